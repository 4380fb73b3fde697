"""What takes the place of nanoGPT's block, attention and loss."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt import ops, private
from fastgpt.modules import (
    Swap,
    class_forward,
    dropout_p,
    free_linear,
    is_linear,
    linear_weight,
    of_one_input,
    packed_projection,
    plain,
    swap_of,
    width_of,
    works,
)
from fastgpt.swap.stream import Stream


def recognise(module: Any) -> Swap | str | None:
    children = private.children(module)
    if {"ln_1", "attn", "ln_2", "mlp"} <= children.keys() and hasattr(children["attn"], "n_head"):
        width = width_of(children["ln_1"])
        if width is None:
            return "its ln_1 has no weight"
        return Swap(block, "layer_norm", "the first residual add inside ln_2", width=width)
    if {"transformer", "lm_head"} <= children.keys() and hasattr(getattr(module, "config", None), "block_size"):
        if not hasattr(children["transformer"], "wte") or not is_linear(children["lm_head"]):
            return None
        return Swap(model, "loss", "linear_cross_entropy in training", width=children["lm_head"].weight.shape[1])
    if {"c_attn", "c_proj"} <= children.keys() and all(
        isinstance(getattr(module, name, None), int) for name in ("n_head", "n_embd")
    ):
        return Swap(attention, "attention", "causal_attention_qkv", width=module.n_embd)
    return None


def _attention_dropout(attn: Any) -> float | None:
    """The probability, or None where a module that must be called sees the attention's weights."""
    if getattr(attn, "flash", False):
        return float(attn.dropout) if attn.training else 0.0
    return dropout_p(getattr(attn, "attn_dropout", None))


def _heads(attn: Any, swap: Swap, x: Tensor) -> Tensor | None:
    """The heads' result, merged, before c_proj: (B, T, C) -> (B, T, C); None where that is not covered."""
    p = _attention_dropout(attn)
    if p is None or x.dim() != 3 or not plain(x):
        return None
    qkv, bias = packed_projection(attn.c_attn, x, swap.backend)
    return ops.causal_attention_qkv(qkv, attn.n_head, dropout_p=p, qkv_bias=bias, backend=swap.backend)


@of_one_input
def attention(attn: Any, swap: Swap, x: Tensor) -> Tensor:
    y = _heads(attn, swap, x)
    return class_forward(attn, x) if y is None else attn.resid_dropout(attn.c_proj(y))


@of_one_input
def block(block: Any, swap: Swap, x: Tensor) -> Tensor:
    stream = Stream(x)
    _through(block, stream, waits=False)
    return stream.total()


def _through(block: Any, stream: Stream, waits: bool) -> None:
    attn = block.attn
    inner, y = swap_of(attn), None
    ours = inner is not None and inner.function is attention
    normed = stream.normed(block.ln_1, casts=ours)
    p = dropout_p(getattr(attn, "resid_dropout", None))
    if inner is not None and ours and p is not None and free_linear(attn.c_proj):
        y = _heads(attn, inner, normed)
    if y is None:
        stream.add(attn(normed))
    else:
        stream.add(F.linear(y, linear_weight(attn.c_proj)), attn.c_proj.bias, p or 0.0)
    stream.add_mlp(block.mlp, block.ln_2, 0.0, waits)


def model(module: Any, swap: Swap, *args, **kwargs) -> Any:
    """GPT's forward, of idx and targets; in training, with both, it returns no logits."""
    call = {**dict(zip(("idx", "targets"), args, strict=False)), **kwargs}
    idx, targets = (call.pop(name, None) for name in ("idx", "targets"))
    if targets is None or not module.training or call or len(args) > 2:
        return class_forward(module, *args, **kwargs)
    parts, head = module.transformer, module.lm_head
    if not (free_linear(head) and head.bias is None and idx.shape[1] <= module.config.block_size):
        return class_forward(module, *args, **kwargs)
    x = parts.drop(parts.wte(idx) + parts.wpe(torch.arange(idx.shape[1], dtype=torch.int64, device=idx.device)))
    stream = Stream(x)
    for layer in parts.h:
        if works(layer, block, x):
            _through(layer, stream, waits=True)
        else:
            stream = Stream(layer(stream.total()))
    x = stream.normed(parts.ln_f, casts=True)  # the loss multiplies it
    return None, ops.linear_cross_entropy(x, head.weight, targets, ignore_index=-1, backend=swap.backend)
