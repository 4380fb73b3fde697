"""What takes the place of the book's blocks and attention."""

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgpt import ops, private
from fastgpt.families.book import SPLIT, residual_dropout
from fastgpt.modules import (
    Swap,
    class_forward,
    dropout_p,
    free_linear,
    linear_weight,
    own_type,
    packed_projection,
    plain,
    swap_of,
    width_of,
    works,
)
from fastgpt.swap.stream import Stream


def recognise(module: Any) -> Swap | str | None:
    children = private.children(module)
    if _is_block(module):
        width = width_of(children["norm1"])
        if width is None:
            return "its norm1 has no weight"
        return Swap(block, "layer_norm", "the first residual add inside norm2", (residual_dropout(module),), width)
    if own_type(module) is nn.Sequential and children and all(map(_hands_on_x_alone, children.values())):
        return Swap(blocks, "layer_norm", "the last residual add of each inside the next one's norm1")
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


def _is_block(module: Any) -> bool:
    return isinstance(module, nn.Module) and {"att", "ff", "norm1", "norm2"} <= private.children(module).keys()


def _hands_on_x_alone(module: Any) -> bool:
    """Whether it is a block that knows no cache: a model with one calls each block by itself."""
    return _is_block(module) and len(inspect.signature(own_type(module).forward).parameters) == 2


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
    if "qkv" in private.children(attn):
        qkv, bias = packed_projection(attn.qkv, x, swap.backend)
        return ops.causal_attention_qkv(qkv, attn.num_heads, qkv_bias=bias, **options), None
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
    names = ("use_cache", "start_pos", "cache")
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    if not given.keys() <= {*names} or len(given) < len(args) + len(kwargs):  # one too many, or one given twice
        return None
    return dict(use_cache=given.get("use_cache", False), cache=given.get("cache"))


def block(block: Any, swap: Swap, x: Tensor, *args, **kwargs) -> Any:
    p = dropout_p(getattr(block, swap.names[0]))
    if p is None:  # it must see each branch
        return class_forward(block, x, *args, **kwargs)
    stream = Stream(x)
    caches, new_cache = _through(block, stream, p, False, args, kwargs)
    return (stream.total(), new_cache) if caches else stream.total()


def _through(
    block: Any, stream: Stream, p: float, waits: bool, args: tuple = (), kwargs: dict | None = None
) -> tuple[bool, Any]:
    """The stream through a block whose dropout is p; whether the block hands on a cache, and that."""
    attn, kwargs = block.att, kwargs or {}
    inner, found, caches = swap_of(attn), None, False
    ours = inner is not None and inner.function is attention
    normed = stream.normed(block.norm1, casts=ours)
    if inner is not None and ours:
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
    stream.add(branch, bias, p)
    stream.add_mlp(block.ff, block.norm2, p, waits)
    return caches, new_cache


def blocks(module: Any, swap: Swap, x: Tensor) -> Tensor:
    """An nn.Sequential of blocks."""
    stream = Stream(x)
    for each in module:
        p = _chained(each, x)
        if p is None:
            stream = Stream(each(stream.total()))
        else:
            _through(each, stream, p, waits=each is not module[-1])
    return stream.total()


def _chained(each: Any, x: Tensor) -> float | None:
    """The block's dropout if a call of it is `block`, with attention of ours that keeps no cache; else None."""
    inner = swap_of(getattr(each, "att", None))
    if not works(each, block, x) or inner is None or inner.function is not attention or inner.names[1]:
        return None
    return dropout_p(getattr(each, residual_dropout(each)))
