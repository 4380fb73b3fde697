"""The likeliest token of each row of logits, written down: what a greedy decoding step does last, in two launches.

The first finds the likeliest of each piece of a row, the second that of the row among them: one program alone takes
10 µs for a row of GPT-2 (H100, a profile), a twentieth of a token, and most of them to wait. A logit and its place are
one 64-bit key, so of equal logits the first is taken. A row with a logit that is not finite has -1 for its news, and
its tokens go on. A row's news are a ring, for the host that reads several steps' at once.
"""

import torch
import triton
import triton.language as tl

from .launch import cdiv, launch, next_power_of_2

PIECE, _NUM_WARPS = 2048, 4


@triton.jit
def reversed_if_negative(bits):
    """Between a float32's bits and a whole number of the same order: its own inverse."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def keys_of(z, cols, there):
    """Whole numbers in the order of float32 logits, of equal ones the first above the others; the least of all where
    there is none."""
    z = tl.where(z == 0.0, 0.0, z)  # of either sign
    order = reversed_if_negative(z.to(tl.int32, bitcast=True)).to(tl.int64)
    return tl.where(there, (order << 32) | (~cols & 0x7FFFFFFF).to(tl.int64), -(1 << 63))


@triton.jit
def place_of(keys):
    return ~keys.to(tl.int32) & 0x7FFFFFFF  # of the lower half


@triton.jit
def write_token(token, finite, row, history_ptr, lengths_ptr, news_ptr, last_ptr, stride_h, ring):
    """A row's next token, or 0 where its logits were not finite, and its length, which grows by one."""
    token = tl.where(finite, token, 0).to(tl.int64)
    length = tl.load(lengths_ptr + row)
    tl.store(history_ptr + row * stride_h + length, token)
    tl.store(lengths_ptr + row, length + 1)
    tl.store(news_ptr + row * ring + length % ring, tl.where(finite, token, -1))
    tl.store(last_ptr + row, token)


@triton.jit
def _piece_kernel(
    logits_ptr,  # (B, V)
    keys_ptr,  # (B, pieces)
    spoiled_ptr,  # (B, pieces)
    stride_l, V,
    PIECE: tl.constexpr,
):  # fmt: skip
    piece, pieces, row = tl.program_id(0), tl.num_programs(0), tl.program_id(1).to(tl.int64)
    cols = piece * PIECE + tl.arange(0, PIECE)
    there = cols < V
    z = tl.load(logits_ptr + row * stride_l + cols, there, 0.0).to(tl.float32)
    tl.store(spoiled_ptr + row * pieces + piece, tl.sum(z * 0.0, axis=0))  # NaN from the first that is not finite
    tl.store(keys_ptr + row * pieces + piece, tl.max(keys_of(z, cols, there), axis=0))


@triton.jit
def _greedy_kernel(
    keys_ptr,  # (B, pieces)
    spoiled_ptr,  # (B, pieces)
    history_ptr,  # (B, room)
    lengths_ptr,  # (B,)
    news_ptr,  # (B, ring)
    last_ptr,  # (B,)
    stride_h, ring, pieces,
    PIECES: tl.constexpr,
):  # fmt: skip
    row, piece = tl.program_id(0).to(tl.int64), tl.arange(0, PIECES)
    keys = tl.load(keys_ptr + row * pieces + piece, piece < pieces, -(1 << 63))
    spoiled = tl.load(spoiled_ptr + row * pieces + piece, piece < pieces, 0.0)
    finite = tl.sum(spoiled, axis=0) == 0.0
    token = place_of(tl.max(keys, axis=0))
    write_token(token, finite, row, history_ptr, lengths_ptr, news_ptr, last_ptr, stride_h, ring)


def greedy(
    logits: torch.Tensor, history: torch.Tensor, lengths: torch.Tensor, news: torch.Tensor, last: torch.Tensor
) -> None:
    """logits (B, V), each row in one piece: writes the likeliest tokens to history (B, room) at lengths (B,), to news
    (B, ring) at lengths modulo ring and to last (B, 1), both in one piece, and adds 1 to lengths. There is room for
    them."""
    take_highest(*highest_of_pieces(logits), history, lengths, news, last)


def highest_of_pieces(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """logits (B, V) -> (B, pieces) keys of the likeliest, and (B, pieces) NaN where a logit is not finite, else 0."""
    rows, vocabulary = logits.shape
    pieces = cdiv(vocabulary, PIECE)
    keys = torch.empty((rows, pieces), dtype=torch.int64, device=logits.device)
    spoiled = torch.empty((rows, pieces), dtype=torch.float32, device=logits.device)
    launch(
        _piece_kernel,
        (pieces, rows),
        logits,
        keys,
        spoiled,
        logits.stride(0),
        vocabulary,
        PIECE=PIECE,
        num_warps=_NUM_WARPS,
    )
    return keys, spoiled


def take_highest(
    keys: torch.Tensor,
    spoiled: torch.Tensor,
    history: torch.Tensor,
    lengths: torch.Tensor,
    news: torch.Tensor,
    last: torch.Tensor,
) -> None:
    """The token of each row's highest key (B, pieces), written down."""
    rows, pieces = keys.shape
    launch(
        _greedy_kernel,
        (rows,),
        keys,
        spoiled,
        history,
        lengths,
        news,
        last,
        history.stride(0),
        news.shape[1],
        pieces,
        PIECES=next_power_of_2(pieces),
        num_warps=1,
    )
