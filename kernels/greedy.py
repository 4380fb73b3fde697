"""The likeliest token of each row of logits, written down: what a greedy decoding step does last, in one launch.

Of equal logits the first is taken. A row with a logit that is not finite has -1 for its news, and its tokens go on. A
row's news are a ring, for the host that reads several steps' at once.
"""

import torch
import triton
import triton.language as tl

from .launch import next_power_of_2

_BLOCK_V, _NUM_WARPS = 8192, 16


@triton.jit
def _greedy_kernel(
    logits_ptr,  # (B, V)
    history_ptr,  # (B, room)
    lengths_ptr,  # (B,)
    news_ptr,  # (B, ring)
    last_ptr,  # (B,)
    stride_l,
    stride_h,
    ring,
    V,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride_l
    best = tl.full([BLOCK_V], float("-inf"), tl.float32)
    place = tl.zeros([BLOCK_V], tl.int32)
    spoiled = tl.zeros([BLOCK_V], tl.float32)
    for start in range(0, V, BLOCK_V):
        cols = start + tl.arange(0, BLOCK_V)
        z = tl.load(logits_ptr + cols, cols < V, float("-inf")).to(tl.float32)
        spoiled += tl.where(cols < V, z * 0.0, 0.0)  # NaN from the first that is not finite
        better = z > best
        best, place = tl.where(better, z, best), tl.where(better, cols, place)
    most = tl.max(best, axis=0)
    first = tl.min(tl.where(best == most, place, V), axis=0)
    finite = tl.sum(spoiled, axis=0) == 0.0
    token = tl.where(finite, first, 0).to(tl.int64)
    length = tl.load(lengths_ptr + row)
    tl.store(history_ptr + row * stride_h + length, token)
    tl.store(lengths_ptr + row, length + 1)
    tl.store(news_ptr + row * ring + length % ring, tl.where(finite, token, -1))
    tl.store(last_ptr + row, token)


def greedy(
    logits: torch.Tensor, history: torch.Tensor, lengths: torch.Tensor, news: torch.Tensor, last: torch.Tensor
) -> None:
    """logits (B, V), each row in one piece: writes the likeliest tokens to history (B, room) at lengths (B,), to news
    (B, ring) at lengths modulo ring and to last (B, 1), both in one piece, and adds 1 to lengths. There is room for
    them."""
    _greedy_kernel[(len(logits),)](
        logits,
        history,
        lengths,
        news,
        last,
        logits.stride(0),
        history.stride(0),
        news.shape[1],
        logits.shape[1],
        BLOCK_V=min(_BLOCK_V, max(16, next_power_of_2(logits.shape[1]))),
        num_warps=_NUM_WARPS,
    )
