"""The page that Hugging Face's hub shows of a model, README.md: what the files say of it, and nothing else."""

import json
from typing import Any

from fastgpt.data.characters import PREFIX
from fastgpt.model import GPTConfig

_HEAD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags:
- gpt2
- fastgpt
---
"""


def card(name: str, config: GPTConfig, parameters: int, encoding: str, told: dict[str, Any]) -> str:
    """name: of the folder. told: what a training run left beside its weights, in its config.json; {} where there is
    none."""
    kind = "one token a character" if encoding.startswith(PREFIX) else f"encoding `{encoding}`"
    lines = [
        f"# {name}",
        "",
        f"A GPT-2 of {config.n_layer} layers, {config.n_head} heads and {config.n_embd} channels: {parameters:,} "
        f"parameters, a context of {config.block_size:,} tokens, a vocabulary of {config.vocab_size:,} ({kind}).",
        "",
        "## Training",
        "",
        *(_training(config, told) or ["Its files do not say how it was trained."]),
        "",
        "## Use",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'model = AutoModelForCausalLM.from_pretrained("PATH")',
        'tokenizer = AutoTokenizer.from_pretrained("PATH")',
        "```",
        "",
        "`PATH` is this folder, or its name on the hub.",
        "",
        "## Not known",
        "",
        "Its licence, what it is meant for, and what it says wrongly: whoever publishes it fills these in.",
    ]
    return _HEAD + "\n".join(lines) + "\n"


def _training(config: GPTConfig, told: dict[str, Any]) -> list[str]:
    """Sentences; [] where nothing is told."""
    train, step, data = (told.get(key) for key in ("train", "step", "data"))
    if not isinstance(train, dict) or not isinstance(step, int):
        return []
    said = [f"Trained with fastgpt for {step:,} of {train['max_iters']:,} steps."]
    if isinstance(data, dict):
        said.append(
            f"Data: {data['train_tokens']:,} tokens to train on and {data['val_tokens']:,} to validate, of SHA-256 "
            f"`{data['sha256']}`."
        )
    if isinstance(told.get("val_loss"), float):
        said.append(f"Validation loss: {told['val_loss']:.4f} nats a token.")
    if train.get("init_from") not in (None, "scratch"):
        said.append(f"It began from `{train['init_from']}`.")
    shown = {**{name: getattr(config, name) for name in ("dropout", "gelu", "residual")}, **train}
    settings = [
        f"{name} = {json.dumps(value)}" for name, value in shown.items() if value is not None and name != "init_from"
    ]
    return ["\n\n".join(said), "", "```", *settings, "```"]
