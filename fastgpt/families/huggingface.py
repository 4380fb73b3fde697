"""attn_implementation="fastgpt", for every decoder of transformers that takes an attention function.

Importing this module registers two things with transformers: the attention function, and the mask function without
which no padding mask would reach it. Where a mask is more than causal and padding (packed documents, a sliding window,
the first pass over a static cache), transformers' own sdpa functions run.
"""

from typing import Any

import torch
from torch import Tensor, nn

try:
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import AttentionMaskInterface, causal_mask_function, sdpa_mask
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

    attention_mask: None, (B, Tk) from mask_function, or (B, 1, Tq, Tk), True where a query may look.
    """
    if kwargs.get("s_aux") is not None:
        raise ValueError("attn_implementation='fastgpt' has no attention sinks, which this model has: use 'eager'")
    queries, keys = query.shape[2], key.shape[2]
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    covered, seen = key_mask(queries, keys, attention_mask, None)
    if not (covered and causal and not special(kwargs) and key.shape == value.shape and plain(query, key, value)):
        if attention_mask is not None and attention_mask.dim() == 2:  # sdpa's function asks for all four axes
            steps = torch.arange(keys, dtype=torch.int64, device=query.device)
            attention_mask = attention_mask[:, None, None] & (steps <= steps[keys - queries :, None])
        options: dict = dict(dropout=dropout, scaling=scaling, is_causal=is_causal)
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options, **kwargs)
    if attention_mask is None and 1 < queries < keys:  # transformers' word for the first pass over a static cache
        key, value = key[:, :, :queries], value[:, :, :queries]
    seen = None if seen is None else seen.expand(len(query), -1)
    y = ops.causal_attention(query, key, value, scale=scaling, dropout_p=dropout, key_mask=seen)
    return y.transpose(1, 2), None


def mask_function(*args: Any, **call: Any) -> Tensor | None:
    """None for causal alone, (B, Tk) bool for causal and padding, and what sdpa's own gives for anything else."""
    queries, keys, start = call.get("q_length"), call.get("kv_length"), call.get("q_offset", 0)
    causal = call.get("mask_function", causal_mask_function) is causal_mask_function and not call.get("kv_offset", 0)
    counts = all(isinstance(count, int) for count in (queries, keys, start))
    if causal and not args and counts and start + queries == keys:  # the last query sits at the last key
        padding = call.get("attention_mask")
        if padding is not None and padding.shape[1] == keys:
            return padding.bool()
        if padding is None and (start == 0 or queries == 1):
            return None
    return sdpa_mask(*args, **call)


AttentionInterface.register(IMPLEMENTATION, attention_function)
AttentionMaskInterface.register(IMPLEMENTATION, mask_function)
