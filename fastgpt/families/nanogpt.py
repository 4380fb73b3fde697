"""nanoGPT's GPT: its block, attention and loss, and its weights by fastgpt's names."""

from typing import Any

from torch import Tensor

from fastgpt.families.anatomy import Anatomy, transformer_anatomy


def anatomy(model: Any) -> Anatomy | None:
    return transformer_anatomy(model, "n_head")


# Weights: fastgpt's names behind "transformer.", and the tied head a second time.

_FIELDS = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout")


def holds(tensors: dict[str, Tensor]) -> bool:
    first = tensors.get("transformer.h.0.attn.c_attn.weight")
    return first is not None and first.dim() == 2 and first.shape[0] == 3 * first.shape[1]


def read_weights(tensors: dict[str, Tensor], settings: dict) -> tuple[dict[str, Tensor], dict]:
    """Its tensors and model_args -> fastgpt's tensors and fields of its GPTConfig."""
    fields = {name: settings[name] for name in _FIELDS if name in settings and name != "bias"}
    return {name.removeprefix("transformer."): t for name, t in tensors.items()}, {"gelu": "none", **fields}


def write_weights(config: Any, tensors: dict[str, Tensor]) -> tuple[dict, dict[str, Tensor], list[str]]:
    """fastgpt's GPTConfig and tensors -> model_args, tensors, and notes. ValueError for what nanoGPT has not."""
    expect(config, "nanoGPT", tie=True, layer_norm_eps=1e-5, n_inner=4 * config.n_embd)
    notes = []
    if config.gelu != "none":
        notes.append("nanoGPT computes the exact GELU, this model was made with the tanh one: its logits will differ")
    theirs = {f"transformer.{name}": tensor for name, tensor in tensors.items()}
    theirs["lm_head.weight"] = theirs["transformer.wte.weight"]
    return {name: getattr(config, name) for name in _FIELDS}, theirs, notes


def expect(config: Any, family: str, **needed) -> None:
    """ValueError for a field that the family's code fixes to another value."""
    for name, value in needed.items():
        given = getattr(config, name)
        if name == "n_inner" and given is None:
            continue
        if given != value:
            raise ValueError(f"{family} has {name} = {value!r} alone, this model has {given!r}")
