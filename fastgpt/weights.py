"""A GPT as a folder: model.safetensors with its weights, config.json with its shape and its encoding."""

import dataclasses
import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from fastgpt.checkpoint import replacing
from fastgpt.model import GPT, GPTConfig

WEIGHTS, CONFIG = "model.safetensors", "config.json"


def save_model(model: GPT, folder: Path, encoding: str, **facts) -> None:
    """Write the model's two files into `folder`; `facts` (JSON values) go into config.json beside the shape."""
    config = {"model": dataclasses.asdict(model.config), "encoding": encoding, **facts}
    with replacing(folder / WEIGHTS) as new:
        save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, new)
    with replacing(folder / CONFIG) as new:
        new.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def load_model(folder: str | Path, **changes) -> tuple[GPT, dict]:
    """The model saved in `folder`, in eval mode on the CPU, and the whole of its config.json.

    `changes` replace fields of its GPTConfig (backend, dropout). FileNotFoundError or ValueError says what is wrong.
    """
    folder = Path(folder)
    for file in (WEIGHTS, CONFIG):
        if not (folder / file).is_file():
            raise FileNotFoundError(f"no {file} in {folder}: train a model first, or name the folder that holds one")
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        if not isinstance(config["encoding"], str):
            raise TypeError(f"encoding is {config['encoding']!r}")
        with torch.device("meta"):  # no memory before the shapes are known to agree
            model = GPT(GPTConfig.from_dict({**config["model"], **changes}))
    except (ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{folder / CONFIG} is not a fastgpt configuration: {reason}") from error
    try:
        tensors = load_file(folder / WEIGHTS)
    except SafetensorError as error:
        raise ValueError(f"{folder / WEIGHTS} is not a whole safetensors file: {error}") from error
    expected = model.state_dict()
    if wrong := sorted(expected.keys() ^ tensors.keys()):
        raise ValueError(f"{folder / WEIGHTS} and {CONFIG} disagree about {len(wrong)} tensors, {wrong[0]} first")
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            shapes = f"{tuple(tensor.shape)}, {CONFIG} says {tuple(expected[name].shape)}"
            raise ValueError(f"{folder / WEIGHTS}: {name} has shape {shapes}")
    model.load_state_dict(tensors, assign=True)
    return model.eval(), config
