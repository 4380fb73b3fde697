"""attn_implementation="fastgpt", for every decoder of transformers that takes an attention function.

Importing this module registers two things with transformers: the attention function, and the mask function without
which no padding mask would reach it. Where a mask is more than causal, a sliding window and padding (packed documents,
the first pass over a static cache), transformers' own sdpa functions run.
"""

import inspect
import types
from typing import Any

import torch
from torch import Tensor, nn

try:
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import (
        AttentionMaskInterface,
        causal_mask_function,
        sdpa_mask,
        sliding_window_causal_mask_function,
        sliding_window_overlay,
    )
except ImportError as error:
    raise ImportError(
        'attn_implementation="fastgpt" needs transformers 4.53 or newer, which takes masks too'
    ) from error

from fastgpt import ops
from fastgpt.families.gpt2 import key_mask, special
from fastgpt.modules import plain

IMPLEMENTATION = "fastgpt"


def attention_function(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """query (B, H, Tq, D), key and value (B, Hkv, Tk, D) -> (B, Tq, H, D), None.

    attention_mask: None, (B, Tk) or (B, window, Tk) from mask_function, or (B, 1, Tq, Tk), True where a query may look.
    """
    if kwargs.get("s_aux") is not None:
        raise ValueError("attn_implementation='fastgpt' has no attention sinks, which this model has: use 'eager'")
    queries, keys = query.shape[2], key.shape[2]
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    window = None
    if attention_mask is not None and attention_mask.dim() == 3:
        window = attention_mask.shape[1]
        attention_mask = attention_mask[:, 0] if attention_mask.shape[2] else None
    covered, seen = key_mask(queries, keys, attention_mask, None)
    if not (covered and causal and not special(kwargs) and key.shape == value.shape and plain(query, key, value)):
        if window is not None or (attention_mask is not None and attention_mask.dim() == 2):
            attention_mask = _spelled_out(attention_mask, queries, keys, window, query.device)
        options: dict = dict(dropout=dropout, scaling=scaling, is_causal=is_causal)
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options, **kwargs)
    if attention_mask is None and window is None and 1 < queries < keys:
        key, value = key[:, :, :queries], value[:, :, :queries]  # the first pass over a static cache, in their words
    seen = None if seen is None else seen.expand(len(query), -1)
    y = ops.causal_attention(query, key, value, scale=scaling, dropout_p=dropout, key_mask=seen, window=window)
    return y.transpose(1, 2), None


def _spelled_out(padding: Tensor | None, queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """(B, 1, Tq, Tk): sdpa's function asks for all four axes."""
    steps = torch.arange(keys, dtype=torch.int64, device=device)
    own = steps[keys - queries :, None]
    allowed = (steps <= own) if window is None else (steps <= own) & (steps > own - window)
    return allowed[None, None] if padding is None else padding[:, None, None] & allowed


def mask_function(*args: Any, **call: Any) -> Tensor | None:
    """None for causal alone, (B, Tk) bool for causal and padding, and what sdpa's own gives for anything else.

    A sliding window is told in a shape: (B, window, Tk) bool for causal, window and padding, the same for all of its
    second axis; (1, window, 0) without padding.
    """
    padding = call.get("attention_mask")
    if padding is not None and padding.dim() == 3:  # one of ours, which generate made ahead of the model
        return padding
    queries, keys, start = call.get("q_length"), call.get("kv_length"), call.get("q_offset", 0)
    first, asked = call.get("kv_offset", 0), call.get("mask_function", causal_mask_function)
    counts = all(isinstance(count, int) for count in (queries, keys, start, first))
    if args or not counts or start + queries != first + keys:  # the last query sits at the last key
        return sdpa_mask(*args, **call)
    window = _window_in(asked)
    if padding is not None and padding.shape[1] != first + keys:
        return sdpa_mask(*args, **call)
    if window is not None:
        if padding is None:
            return torch.ones(1, 1, 0, dtype=torch.bool, device=call.get("device")).expand(1, window, 0)
        return padding[:, None, first:].bool().expand(-1, window, -1)
    if asked is causal_mask_function and first == 0:
        if padding is not None:
            return padding.bool()
        if start == 0 or queries == 1:
            return None
    return sdpa_mask(*args, **call)


def _window_in(function: Any) -> int | None:
    """The window of their mask function for causal attention in a sliding window; None for any other function, which
    may add to it."""
    if torch.compiler.is_compiling() or not isinstance(function, types.FunctionType):
        return None
    parts = _held(function, sliding_window_causal_mask_function(1), "mask_functions")
    if not isinstance(parts, tuple) or len(parts) != 2 or parts[1] is not causal_mask_function:
        return None
    window = _held(parts[0], sliding_window_overlay(1), "sliding_window")
    return window if isinstance(window, int) and window >= 1 else None


def _held(function: Any, like: Any, name: str) -> Any:
    """What a function of the same code as `like` holds by that name, or None."""
    same = getattr(function, "__code__", None) is like.__code__
    return inspect.getclosurevars(function).nonlocals.get(name) if same else None


AttentionInterface.register(IMPLEMENTATION, attention_function)
AttentionMaskInterface.register(IMPLEMENTATION, mask_function)
