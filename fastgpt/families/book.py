"""The models of the book "Build a Large Language Model (From Scratch)" and of its package llms-from-scratch: GPTModel,
GPTModelFast and the variant with a KV cache; their blocks and attention, and their weights by fastgpt's names."""

import re
from typing import Any

import torch
from torch import Tensor

from fastgpt.families.anatomy import Anatomy, Layer, backend_of, hooked
from fastgpt.families.gpt2 import with_biases
from fastgpt.families.nanogpt import expect

SPLIT = ("W_query", "W_key", "W_value")


def residual_dropout(block: Any) -> str:
    """The package's ch04 says drop_resid, the book and the other variants drop_shortcut."""
    return "drop_resid" if hasattr(block, "drop_resid") else "drop_shortcut"


def anatomy(model: Any) -> Anatomy | None:
    parts = ("tok_emb", "pos_emb", "trf_blocks", "final_norm", "out_head")
    layers: Any = getattr(model, "trf_blocks", None)
    if not layers or not all(hasattr(model, name) for name in parts):
        return None
    return Anatomy(
        model.tok_emb,
        model.pos_emb,
        tuple(
            Layer(
                block,
                block.norm1,
                block.att,
                (block.att.qkv,) if hasattr(block.att, "qkv") else tuple(getattr(block.att, name) for name in SPLIT),
                block.att.proj if hasattr(block.att, "proj") else block.att.out_proj,
                block.norm2,
                block.ff,
                (getattr(block, residual_dropout(block)), *hooked(block.att, "dropout")),
                None,
            )
            for block in layers
        ),
        model.final_norm,
        model.out_head,
        layers[0].att.num_heads,
        (model, layers),
        backend_of(layers[0].att),
        hooked(model, "drop_emb"),
    )


# Weights.

VARIANTS = ("GPTModel", "GPTModelFast", "cache")  # split qkv and mask buffers; fused qkv; split qkv alone
_LAYERS = {
    "att.qkv": "attn.c_attn",
    "att.out_proj": "attn.c_proj",
    "att.proj": "attn.c_proj",
    "ff.layers.0": "mlp.c_fc",
    "ff.layers.2": "mlp.c_proj",
    "norm1": "ln_1",
    "norm2": "ln_2",
}
_FIELDS = {
    "vocab_size": "vocab_size",
    "context_length": "block_size",
    "emb_dim": "n_embd",
    "n_heads": "n_head",
    "n_layers": "n_layer",
    "drop_rate": "dropout",
}
_TOP = {"tok_emb": "wte", "pos_emb": "wpe", "final_norm": "ln_f", "out_head": "lm_head"}


def holds(tensors: dict[str, Tensor]) -> bool:
    return "tok_emb.weight" in tensors and "out_head.weight" in tensors


def read_weights(tensors: dict[str, Tensor], settings: dict) -> tuple[dict[str, Tensor], dict]:
    """Its tensors and cfg -> fastgpt's tensors and fields of its GPTConfig."""
    found: dict[str, Tensor] = {}
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        module, _, kind = name.rpartition(".")
        kind = {"scale": "weight", "shift": "bias"}.get(kind, kind)
        inside = re.fullmatch(r"trf_blocks\.(\d+)\.(.+)", module)
        if inside is None:
            found[f"{_TOP.get(module, module)}.{kind}"] = tensor
        elif inside[2].startswith("att.W_"):
            parts.setdefault(f"h.{inside[1]}.attn.c_attn.{kind}", {})[inside[2].removeprefix("att.")] = tensor
        else:
            found[f"h.{inside[1]}.{_LAYERS.get(inside[2], inside[2])}.{kind}"] = tensor
    for name, split in parts.items():
        if missing := [part for part in SPLIT if part not in split]:
            raise ValueError(f"there is no att.{missing[0]} for {name}")
        found[name] = torch.cat([split[part] for part in SPLIT])
    fields: dict = {"gelu": "tanh"}
    for theirs, ours in _FIELDS.items():
        if theirs in settings:
            fields[ours] = settings[theirs]
    return found, fields


def write_weights(
    config: Any, tensors: dict[str, Tensor], variant: str = "GPTModel"
) -> tuple[dict, dict[str, Tensor], list[str]]:
    """fastgpt's GPTConfig and tensors -> cfg, tensors, and notes. A qkv bias that is all zeros is left out.

    ValueError for what the book's code has not.
    """
    if variant not in VARIANTS:
        raise ValueError(f"variant is {variant!r}, not one of {', '.join(VARIANTS)}")
    expect(config, "the book's GPTModel", layer_norm_eps=1e-5, n_inner=4 * config.n_embd)
    notes = []
    if config.gelu != "tanh":
        notes.append("the book computes the tanh GELU, this model was made with the exact one: its logits will differ")
    complete = with_biases(tensors)
    biases = [t for name, t in complete.items() if name.endswith("attn.c_attn.bias")]
    settings = {theirs: getattr(config, ours) for theirs, ours in _FIELDS.items()}
    settings["qkv_bias"] = any(bool(bias.any()) for bias in biases)
    fast = variant == "GPTModelFast"
    layers = {ours: theirs for theirs, ours in _LAYERS.items() if theirs != ("att.out_proj" if fast else "att.proj")}
    tops = {ours: theirs for theirs, ours in _TOP.items()}
    theirs: dict[str, Tensor] = {}
    for name, tensor in complete.items():
        module, _, kind = name.rpartition(".")
        if "ln_" in module and not fast:
            kind = {"weight": "scale", "bias": "shift"}[kind]
        if module in tops:
            theirs[f"{tops[module]}.{kind}"] = tensor
            continue
        _, number, inside = module.split(".", 2)
        block = f"trf_blocks.{number}."
        if inside != "attn.c_attn":
            theirs[f"{block}{layers[inside]}.{kind}"] = tensor
        elif kind == "bias" and not settings["qkv_bias"]:
            continue
        elif fast:
            theirs[f"{block}att.qkv.{kind}"] = tensor
        else:
            theirs.update({f"{block}att.{part}.{kind}": t for part, t in zip(SPLIT, tensor.chunk(3), strict=True)})
    theirs.setdefault("out_head.weight", theirs["tok_emb.weight"])
    if variant == "GPTModel":
        mask = torch.ones(config.block_size, config.block_size, dtype=torch.float32, device="cpu").triu(diagonal=1)
        theirs.update({f"trf_blocks.{i}.att.mask": mask for i in range(config.n_layer)})
    return settings, theirs, notes
