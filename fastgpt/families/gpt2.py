"""Hugging Face's GPT-2: its model, block, attention and loss, and its weights by fastgpt's names.

Their door for attention functions is in huggingface.py.
"""

from typing import Any

import torch
from torch import Tensor

from fastgpt.families.anatomy import Anatomy, transformer_anatomy

# What may come with a call and asks for more than masked attention.
SPECIAL = (
    *("encoder_hidden_states", "head_mask", "position_bias", "cache", "softcap", "output_attentions"),
    *("layer_past", "past_key_value"),  # names of the cache in older versions
)


def special(call: dict) -> bool:
    """Whether a call of attention, by its named arguments, asks for more than causal attention with a mask."""
    asked = any(call.get(name) is not None and call[name] is not False for name in SPECIAL)
    return asked or call.get("is_causal") is False


def key_mask(queries: int, keys: int, mask: Tensor | None, padding: Tensor | None):
    """(whether causal attention and a key mask (B, keys) say all that `mask` says, and that key mask)."""
    if mask is None:
        return True, None
    if mask.dim() == 2:  # from huggingface.py
        return mask.shape[1] == keys, mask
    if mask.dtype != torch.bool or mask.dim() != 4 or mask.shape[1] != 1 or mask.shape[3] != keys:
        return False, None
    if queries == 1:
        return True, mask[:, 0, 0]
    return padding is not None and padding.shape == (mask.shape[0], keys), padding


def anatomy(model: Any) -> Anatomy | None:
    """Of a GPT2LMHeadModel, or of another with its module tree."""
    found = transformer_anatomy(model, "num_heads")
    if found is not None and any(hasattr(layer.block, "crossattention") for layer in found.layers):
        raise ValueError(f"generate: this {type(model).__name__} has cross-attention, and no encoder is given")
    return found


# Weights. Theirs are fastgpt's names behind "transformer.", with the linear layers' weights transposed.

_TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
_GELUS = {"tanh": "gelu_new", "none": "gelu"}
_FIELDS = {"n_positions": "block_size", **{n: n for n in ("n_head", "n_layer", "n_embd", "n_inner", "vocab_size")}}
_ACTIVATIONS = {
    **dict.fromkeys(("gelu_new", "gelu_fast", "gelu_accurate", "gelu_python_tanh", "gelu_pytorch_tanh"), "tanh"),
    **dict.fromkeys(("gelu", "gelu_python"), "none"),
}


def holds(tensors: dict[str, Tensor]) -> bool:
    """Whether these are the weights of Hugging Face's GPT-2, with or without the prefix "transformer."."""
    first = tensors.get("transformer.h.0.attn.c_attn.weight", tensors.get("h.0.attn.c_attn.weight"))
    return first is not None and first.dim() == 2 and first.shape[1] == 3 * first.shape[0]


def read_weights(tensors: dict[str, Tensor], settings: dict) -> tuple[dict[str, Tensor], dict]:
    """Their tensors and config.json -> fastgpt's tensors and fields of GPTConfig. ValueError for what that has not."""
    flags = dict(
        model_type="gpt2", scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False
    )
    for name, needed in flags.items():
        if settings.get(name, needed) != needed:
            raise ValueError(f"{name} is {settings[name]!r}; fastgpt's GPT has {needed!r} alone")
    activation = settings.get("activation_function", "gelu_new")
    if activation not in _ACTIVATIONS:
        raise ValueError(f"activation_function is {activation!r}; fastgpt's GPT has {', '.join(_ACTIVATIONS)}")
    fields: dict = {"gelu": _ACTIVATIONS[activation], "layer_norm_eps": settings.get("layer_norm_epsilon", 1e-5)}
    if settings:  # the three are one in fastgpt
        fields["dropout"] = max(settings.get(name, 0.1) for name in ("embd_pdrop", "attn_pdrop", "resid_pdrop"))
    for theirs, ours in _FIELDS.items():
        if theirs in settings:
            fields[ours] = settings[theirs]
    found = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    found = {name: t.t() if name.endswith(_TRANSPOSED) and t.dim() == 2 else t for name, t in found.items()}
    biases = [t for name, t in found.items() if name.endswith(".bias")]
    if settings.get("bias") is False and not any(bias.any() for bias in biases):  # as write_weights left it
        found = {name: t for name, t in found.items() if not name.endswith(".bias")}
    return found, fields


def write_weights(config: Any, tensors: dict[str, Tensor]) -> tuple[dict, dict[str, Tensor], list[str]]:
    """fastgpt's GPTConfig and tensors -> their config.json, their tensors, and notes. Missing biases become zeros."""
    settings = dict(
        architectures=["GPT2LMHeadModel"],
        model_type="gpt2",
        vocab_size=config.vocab_size,
        n_positions=config.block_size,
        n_embd=config.n_embd,
        n_layer=config.n_layer,
        n_head=config.n_head,
        n_inner=config.n_inner,
        activation_function=_GELUS[config.gelu],
        embd_pdrop=config.dropout,
        attn_pdrop=config.dropout,
        resid_pdrop=config.dropout,
        layer_norm_epsilon=config.layer_norm_eps,
        tie_word_embeddings=config.tie,
    )
    last = config.vocab_size - 1
    settings.update(bos_token_id=min(50256, last), eos_token_id=min(50256, last))
    if not config.bias:
        settings["bias"] = False
    theirs = {}
    for name, tensor in with_biases(tensors).items():
        theirs[name if name == "lm_head.weight" else f"transformer.{name}"] = (
            tensor.t() if name.endswith(_TRANSPOSED) else tensor
        )
    return settings, theirs, []


def with_biases(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """With a bias of zeros for every norm and linear layer that has none."""
    complete = dict(tensors)
    for name, weight in tensors.items():
        if name.startswith(("h.", "ln_f")) and name.endswith("weight"):
            complete.setdefault(name.removesuffix("weight") + "bias", weight.new_zeros(weight.shape[0]))
    return complete
