"""A draw among the k likeliest of each row of logits, written down: what a sampling decoding step does last.

Two launches. The first finds the k likeliest of each piece of a row, in order; the second those of the row among them,
weighs them by softmax(logits / temperature), leaves out what top_p and min_p leave out, and takes the first of
exponential clocks of these rates to ring (Efraimidis, Spirakis, "Weighted random sampling with a reservoir", 2006,
algorithm A with reciprocal keys). Clocks are drawn by the caller, in the order of likelihood.

Keys, and what becomes of a row with a logit that is not finite, are as in greedy.py. Launches are bound by latency, for
a row of GPT-2 has 0.2 MB.
"""

import torch
import triton
import triton.language as tl

from .greedy import keys_of, place_of, reversed_if_negative, write_token
from .launch import cdiv, next_power_of_2

MOST = 128  # the likeliest that are found: the second launch sorts as many of each piece at once
_PIECE = 16 if triton.knobs.runtime.interpret else 2048  # Triton's interpreter takes minutes to sort as many
ONE = 2**40  # a probability of 1, where probabilities are counted


@triton.jit
def _likeliest_kernel(
    logits_ptr,  # (B, V)
    keys_ptr,  # (B, pieces * K)
    spoiled_ptr,  # (B, pieces)
    stride_l, V,
    PIECE: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    piece, pieces, row = tl.program_id(0), tl.num_programs(0), tl.program_id(1).to(tl.int64)
    cols = piece * PIECE + tl.arange(0, PIECE)
    there = cols < V
    z = tl.load(logits_ptr + row * stride_l + cols, there, 0.0).to(tl.float32)
    tl.store(spoiled_ptr + row * pieces + piece, tl.sum(z * 0.0, axis=0))  # NaN from the first that is not finite
    best = tl.topk(keys_of(z, cols, there), K)
    tl.store(keys_ptr + (row * pieces + piece) * K + tl.arange(0, K), best)


@triton.jit
def _draw_kernel(
    keys_ptr,  # (B, pieces * K)
    spoiled_ptr,  # (B, pieces)
    clocks_ptr,  # (B, k)
    history_ptr,  # (B, room)
    lengths_ptr,  # (B,)
    news_ptr,  # (B, ring)
    last_ptr,  # (B,)
    stride_h, pieces, k, ring, temperature, most, min_p,
    K: tl.constexpr, N: tl.constexpr, PIECES: tl.constexpr, ONE: tl.constexpr, TOP_P: tl.constexpr,
):  # fmt: skip
    """most: what likelier tokens may reach together, counted in parts of ONE, for one to be left by TOP_P."""
    row = tl.program_id(0).to(tl.int64)
    places, each, piece = tl.arange(0, N), tl.arange(0, K), tl.arange(0, PIECES)
    found = tl.load(keys_ptr + row * pieces * K + places, places < pieces * K, -(1 << 63))
    best = tl.topk(found, K)
    z = reversed_if_negative((best >> 32).to(tl.int32)).to(tl.float32, bitcast=True)
    z = tl.where(each < k, z, float("-inf"))
    weights = tl.exp((z - tl.max(z, axis=0)) / temperature)
    weights = weights / tl.sum(weights, axis=0)
    if TOP_P:
        counts = (weights * ONE).to(tl.int64)
        weights = tl.where(tl.cumsum(counts, axis=0) - counts < most, weights, 0.0)
    weights = tl.where(weights >= min_p * tl.max(weights, axis=0), weights, 0.0)
    clocks = tl.load(clocks_ptr + row * k + each, each < k, 1.0)
    chosen = tl.argmax(weights / clocks, axis=0)
    spoiled = tl.load(spoiled_ptr + row * pieces + piece, piece < pieces, 0.0)
    finite = tl.sum(spoiled, axis=0) == 0.0
    token = tl.sum(tl.where(each == chosen, place_of(best), 0), axis=0)
    write_token(token, finite, row, history_ptr, lengths_ptr, news_ptr, last_ptr, stride_h, ring)


def draw(
    logits: torch.Tensor,
    clocks: torch.Tensor,
    temperature: float,
    top_p: float,
    min_p: float,
    history: torch.Tensor,
    lengths: torch.Tensor,
    news: torch.Tensor,
    last: torch.Tensor,
) -> None:
    """logits (B, V), each row in one piece, and clocks (B, k) float32, exponentially distributed, k at most MOST and V:
    writes the drawn tokens to history (B, room) at lengths (B,), to news (B, ring) at lengths modulo ring and to last
    (B, 1), and adds 1 to lengths. There is room for them."""
    (rows, vocabulary), k = logits.shape, clocks.shape[1]
    most, pieces = max(2, next_power_of_2(k)), cdiv(vocabulary, _PIECE)
    keys = torch.empty((rows, pieces * most), dtype=torch.int64, device=logits.device)
    spoiled = torch.empty((rows, pieces), dtype=torch.float32, device=logits.device)
    _likeliest_kernel[(pieces, rows)](
        logits, keys, spoiled, logits.stride(0), vocabulary, PIECE=_PIECE, K=most, num_warps=4
    )
    _draw_kernel[(rows,)](
        keys,
        spoiled,
        clocks,
        history,
        lengths,
        news,
        last,
        history.stride(0),
        pieces,
        k,
        news.shape[1],
        temperature,
        max(1, int(top_p * ONE)),
        min_p,
        K=most,
        N=next_power_of_2(pieces * most),
        PIECES=next_power_of_2(pieces),
        ONE=ONE,
        TOP_P=top_p < 1,
        num_warps=4,
    )
