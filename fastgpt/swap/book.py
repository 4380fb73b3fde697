"""What takes the place of the book's blocks and attention."""

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt import ops
from fastgpt.families.book import SPLIT, residual_dropout
from fastgpt.modules import (
    Swap,
    class_forward,
    dropout_p,
    free_linear,
    linear_weight,
    own_type,
    plain,
    swap_of,
    width_of,
)
from fastgpt.swap.layers import add_then_norm


def recognise(module: Any) -> Swap | str | None:
    children = module._modules
    if {"att", "ff", "norm1", "norm2"} <= children.keys():
        width = width_of(children["norm1"])
        if width is None:
            return "its norm1 has no weight"
        return Swap(block, "layer_norm", "the first residual add inside norm2", (residual_dropout(module),), width)
    if not all(isinstance(getattr(module, name, None), int) for name in ("num_heads", "d_out")):
        return None
    out = (
        "out_proj" if {*SPLIT, "out_proj"} <= children.keys() else "proj" if {"qkv", "proj"} <= children.keys() else ""
    )
    if not out or not hasattr(module, "dropout"):
        return None
    parameters = inspect.signature(own_type(module).forward).parameters
    caches = "cache" in parameters
    if "use_cache" in parameters and not caches:  # and only its forward knows how far that cache, or a window, reaches
        return "it keeps a cache of its own, and every call names it (use_cache)"
    what = "causal_attention" if out == "out_proj" else "causal_attention_qkv"
    return Swap(attention, "attention", what, (out, caches), width=module.d_out)


def _attention_dropout(attn: Any) -> float | None:
    if isinstance(attn.dropout, float | int):
        return float(attn.dropout) if attn.training else 0.0
    return dropout_p(attn.dropout)


def _heads(attn: Any, swap: Swap, x: Tensor, use_cache=False, cache=None) -> tuple[Tensor, Any] | None:
    """The heads' result, merged, before the output layer, (B, T, C), and the new cache; None if that is not covered."""
    p = _attention_dropout(attn)
    if p is None or x.dim() != 3 or not plain(x):
        return None
    batch, time, _ = x.shape
    options: dict = dict(dropout_p=p, backend=swap.backend)
    if "qkv" in attn._modules:
        return ops.causal_attention_qkv(attn.qkv(x), attn.num_heads, **options), None
    k, v, q = (  # in the order of the book's forward, for the sake of hooks
        linear(x).view(batch, time, attn.num_heads, -1).transpose(1, 2)
        for linear in (attn.W_key, attn.W_value, attn.W_query)
    )
    if use_cache and cache is not None:
        k, v = torch.cat((cache[0], k), dim=2), torch.cat((cache[1], v), dim=2)
    y = ops.causal_attention(q, k, v, **options)
    return y.transpose(1, 2).reshape(batch, time, -1), (k, v) if use_cache else None


def attention(attn: Any, swap: Swap, x: Tensor, *args, **kwargs) -> Any:
    out, caches = swap.names
    options = _cache_options(args, kwargs) if caches else None if args or kwargs else {}
    found = None if options is None else _heads(attn, swap, x, **options)
    if found is None:
        return class_forward(attn, x, *args, **kwargs)
    y = getattr(attn, out)(found[0])
    return (y, found[1]) if caches else y


def _cache_options(args: tuple, kwargs: dict) -> dict | None:
    """use_cache and cache of a call (x, use_cache, start_pos, cache), None for any other."""
    given = {**dict(zip(("use_cache", "start_pos", "cache"), args, strict=False)), **kwargs}
    if not given.keys() <= {"use_cache", "start_pos", "cache"}:
        return None
    return dict(use_cache=given.get("use_cache", False), cache=given.get("cache"))


def block(block: Any, swap: Swap, x: Tensor, *args, **kwargs) -> Any:
    attn, dropout = block.att, getattr(block, swap.names[0])
    inner = swap_of(attn)
    p = dropout_p(dropout)
    if p is None:  # it must see each branch
        return class_forward(block, x, *args, **kwargs)
    normed, found, caches = block.norm1(x), None, False
    if inner is not None and inner.function is attention:
        out, caches = inner.names
        options = _cache_options(args, kwargs) if caches else None if args or kwargs else {}
        if options is not None and free_linear(getattr(attn, out)):
            found = _heads(attn, inner, normed, **options)
    if found is not None:
        last = getattr(attn, out)
        branch, bias, new_cache = F.linear(found[0], linear_weight(last)), last.bias, found[1]
    else:
        result = attn(normed, *args, **kwargs)
        caches = isinstance(result, tuple)
        (branch, new_cache), bias = result if caches else (result, None), None
    normed, x = add_then_norm(branch, x, block.norm2, bias, p, block.ff)
    x = dropout(block.ff(normed)) + x
    return (x, new_cache) if caches else x
