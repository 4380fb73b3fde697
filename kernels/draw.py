"""A draw among the k likeliest of each row of logits, written down: what a sampling decoding step does last.

Two launches. The first finds the highest of each group of neighbouring logits. The second finds the k likeliest by
them, weighs them by softmax(logits / temperature), leaves out what top_p and min_p leave out, and takes the first of
exponential clocks of these rates to ring (Efraimidis, Spirakis, "Weighted random sampling with a reservoir", 2006,
algorithm A with reciprocal keys). Clocks are drawn by the caller, in the order of likelihood.

Nothing is sorted by exchanging neighbours, whose some fifty turns took 30 µs of a GPT-2's row (H100, a profile). A
key's place is the number of keys above it, all counted at once: of 256 keys 2^16 comparisons, about a microsecond. So
are the highest of 256 lists of groups, and the k-th of them is below k keys at least: no group that is under it as a
whole is read. What remains of the others is a few more than k logits, which are taken a batch at a time, each with the
best so far. Groups of neighbours are of different lists, for neighbours in a vocabulary are likely together.

Keys are as in greedy.py; of logits that 16 bits hold, in a vocabulary of up to 2^16, half as wide and compared in a
third of the instructions. What becomes of a row with a logit that is not finite is as there.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .greedy import PIECE, highest_of_pieces, keys_of, place_of, reversed_if_negative, take_highest, write_token
from .launch import capability, cdiv, launch, next_power_of_2

MOST = 128  # the likeliest that are found, half of a batch
_INTERPRETED = triton.knobs.runtime.interpret
_HALVES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
ONE = 2**40  # a probability of 1, where probabilities are counted


class _Tiles(NamedTuple):
    """Not measured."""

    piece: int  # logits of a program
    group: int
    lists: int
    batch: int  # groups that are read at once
    batch_of_keys: int  # that are compared at once, with those of the best so far among them


_SMALL = _Tiles(16, 4, 8, 2, 2)  # several of each in the interpreter


@triton.jit
def _nothing(HALF: tl.constexpr):
    """Below every logit's key, by 2^15 and more."""
    return tl.full([1], -(1 << 63), tl.int64) if HALF is None else tl.full([1], -(1 << 31), tl.int32)


@triton.jit
def _keys(z, cols, HALF: tl.constexpr):
    """As keys_of's."""
    z += 0.0  # makes -0.0 0.0
    if HALF is None:
        order = reversed_if_negative(z.to(tl.int32, bitcast=True)).to(tl.int64)
        keys = (order << 32) | (~cols & 0x7FFFFFFF).to(tl.int64)
    else:
        bits = z.to(HALF).to(tl.int16, bitcast=True)
        order = (bits ^ ((bits >> 15) & 0x7FFF)).to(tl.int32)
        keys = (order << 16) | (~cols & 0xFFFF)
    return keys


@triton.jit
def _logits(keys, HALF: tl.constexpr):
    """And their places."""
    if HALF is None:
        z = reversed_if_negative((keys >> 32).to(tl.int32)).to(tl.float32, bitcast=True)
        place = place_of(keys)
    else:
        order = (keys >> 16).to(tl.int16)
        z = (order ^ ((order >> 15) & 0x7FFF)).to(HALF, bitcast=True).to(tl.float32)
        place = ~keys & 0xFFFF
    return z, place


@triton.jit
def _above(keys):
    """How many keys are above each one."""
    return tl.sum((keys[:, None] > keys[None, :]).to(tl.int32), axis=0)  # over rows: within a thread


@triton.jit
def _groups_kernel(
    logits_ptr,  # (B, V)
    highest_ptr,  # (B, groups)
    spoiled_ptr,  # (B, pieces)
    stride_l, V,
    PIECE: tl.constexpr, GROUP: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    piece, pieces, row = tl.program_id(0), tl.num_programs(0), tl.program_id(1).to(tl.int64)
    groups = piece * (PIECE // GROUP) + tl.arange(0, PIECE // GROUP)
    cols = groups[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    there = cols < V
    z = tl.load(logits_ptr + row * stride_l + cols, there, float("-inf")).to(tl.float32)  # below all that are finite
    spoiled = tl.where(there, z * 0.0, 0.0)  # NaN from the first that is not finite
    tl.store(spoiled_ptr + row * pieces + piece, tl.sum(tl.sum(spoiled, axis=1), axis=0))
    highest = tl.max(_keys(z, cols, HALF), axis=1)
    tl.store(highest_ptr + row * pieces * (PIECE // GROUP) + groups, highest)


@triton.jit
def _draw_kernel(
    logits_ptr,  # (B, V)
    highest_ptr,  # (B, groups)
    spoiled_ptr,  # (B, pieces)
    clocks_ptr,  # (B, k)
    ids_ptr,  # (B, groups), and found_ptr, (B, K + V): what the program writes to read it in another order
    found_ptr,
    history_ptr,  # (B, room)
    lengths_ptr,  # (B,)
    news_ptr,  # (B, ring)
    last_ptr,  # (B,)
    stride_l, V, stride_h, groups, pieces, k, ring, temperature, most, min_p,
    K: tl.constexpr, N: tl.constexpr, LISTS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
    BATCH: tl.constexpr, PIECES: tl.constexpr, ONE: tl.constexpr, TOP_P: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """most: what likelier tokens may reach together, counted in parts of ONE, for one to be left by TOP_P."""
    row = tl.program_id(0).to(tl.int64)
    every, each, places = tl.arange(0, DEPTH * LISTS), tl.arange(0, K), tl.arange(0, N)
    by_list = tl.arange(0, DEPTH)[:, None] * LISTS + tl.arange(0, LISTS)[None, :]
    logits_ptr += row * stride_l
    highest_ptr += row * groups
    ids_ptr += row * groups
    found_ptr += row * (K + V)
    nothing = _nothing(HALF)
    clocks = tl.load(clocks_ptr + row * k + each, each < k, 1.0)
    spoiled = tl.load(spoiled_ptr + row * pieces + tl.arange(0, PIECES), tl.arange(0, PIECES) < pieces, 0.0)
    highest = tl.where(every < groups, tl.load(highest_ptr + every, every < groups, 0), nothing)
    heads = tl.load(highest_ptr + by_list, by_list < groups, 0)
    heads = tl.max(tl.where(by_list < groups, heads, nothing[None, :]), axis=0)
    least = tl.max(tl.where(_above(heads) == k - 1, heads, nothing), axis=0)

    good = ((highest >= least) & (every < groups)).to(tl.int32)
    tl.store(ids_ptr + tl.cumsum(good, axis=0) - good, every, good > 0)
    read, total = tl.sum(good, axis=0), 0
    tl.debug_barrier()  # written by other threads
    for first in range(0, read, BATCH):
        at = first + tl.arange(0, BATCH)
        ids = tl.load(ids_ptr + at, at < read, 0)
        cols = ids[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        there = (at < read)[:, None] & (cols < V)
        keys = _keys(tl.load(logits_ptr + cols, there, 0.0).to(tl.float32), cols, HALF)
        chosen = (there & (keys >= least)).to(tl.int32)
        count = tl.sum(chosen, axis=1)
        before = total + tl.cumsum(count, axis=0) - count
        tl.store(found_ptr + K + before[:, None] + tl.cumsum(chosen, axis=1) - chosen, keys, chosen > 0)
        total += tl.sum(count, axis=0)
    tl.debug_barrier()
    for start in range(0, total, N - K):
        coming = start + places - K
        keys = tl.load(found_ptr + K + coming, (places >= K) & (coming < total), 0)
        keys = tl.where((places >= K) & (coming < total), keys, nothing + places)
        keys = tl.where((places < K) & (start > 0), tl.load(found_ptr + places, (places < K) & (start > 0), 0), keys)
        above = _above(keys)
        tl.debug_barrier()  # all have read the best so far
        tl.store(found_ptr + above, keys, above < K)
        tl.debug_barrier()
    z, place = _logits(tl.load(found_ptr + each, each < k, 0), HALF)
    z = tl.where(each < k, z, float("-inf"))
    weights = tl.exp((z - tl.max(z, axis=0)) / temperature)
    weights = weights / tl.sum(weights, axis=0)
    if TOP_P:
        counts = (weights * ONE).to(tl.int64)
        weights = tl.where(tl.cumsum(counts, axis=0) - counts < most, weights, 0.0)
    weights = tl.where(weights >= min_p * tl.max(weights, axis=0), weights, 0.0)
    winner = tl.argmax(weights / clocks, axis=0)
    finite = tl.sum(spoiled, axis=0) == 0.0
    token = tl.sum(tl.where(each == winner, place, 0), axis=0)
    write_token(token, finite, row, history_ptr, lengths_ptr, news_ptr, last_ptr, stride_h, ring)


@triton.jit
def _race_kernel(
    logits_ptr,  # (B, V)
    clocks_ptr,  # (B, V)
    highest_ptr,  # (B, pieces), of each piece of logits the highest's key
    keys_ptr,  # (B, pieces)
    stride_l, V, temperature, min_p,
    PIECE: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """A piece's token whose clock rings first: of its rate over its clock a key, as greedy.py's of a logit."""
    piece, pieces, row = tl.program_id(0), tl.num_programs(0), tl.program_id(1).to(tl.int64)
    every = tl.arange(0, PIECES)
    cols = piece * PIECE + tl.arange(0, PIECE)
    there = cols < V
    z = tl.load(logits_ptr + row * stride_l + cols, there, 0.0).to(tl.float32)
    clocks = tl.load(clocks_ptr + row * V + cols, there, 1.0)
    highest = tl.max(tl.load(highest_ptr + row * pieces + every, every < pieces, -(1 << 63)), axis=0)
    highest = reversed_if_negative((highest >> 32).to(tl.int32)).to(tl.float32, bitcast=True)
    weights = tl.exp((z - highest) / temperature)
    weights = tl.where(weights >= min_p, weights, 0.0)
    tl.store(keys_ptr + row * pieces + piece, tl.max(keys_of(weights / clocks, cols, there), axis=0))


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
    rounded: torch.dtype | None = None,
) -> None:
    """logits (B, V), each row in one piece, all of which `rounded` holds unless None, and clocks (B, k) float32,
    exponentially distributed, k at most MOST and V: writes the drawn tokens to history (B, room) at lengths (B,), to
    news (B, ring) at lengths modulo ring and to last (B, 1), and adds 1 to lengths. There is room for them."""
    (rows, vocabulary), k = logits.shape, clocks.shape[1]
    most = max(2, next_power_of_2(k))
    tiles = _SMALL if _INTERPRETED else _Tiles(1024, 32 if vocabulary > 2**14 else 4, 256, 64, 2 * MOST)
    half = _HALVES.get(rounded or logits.dtype) if vocabulary <= 2**16 else None
    pieces = cdiv(vocabulary, tiles.piece)
    groups = pieces * (tiles.piece // tiles.group)
    device, width = logits.device, torch.int64 if half is None else torch.int32
    highest = torch.empty((rows, groups), dtype=width, device=device)
    spoiled = torch.empty((rows, pieces), dtype=torch.float32, device=device)
    ids = torch.empty((rows, groups), dtype=torch.int32, device=device)
    found = torch.empty((rows, most + vocabulary), dtype=width, device=device)
    launch(
        _groups_kernel,
        (pieces, rows),
        logits,
        highest,
        spoiled,
        logits.stride(0),
        vocabulary,
        PIECE=tiles.piece,
        GROUP=tiles.group,
        HALF=half,
        num_warps=4,
    )
    launch(
        _draw_kernel,
        (rows,),
        logits,
        highest,
        spoiled,
        clocks,
        ids,
        found,
        history,
        lengths,
        news,
        last,
        logits.stride(0),
        vocabulary,
        history.stride(0),
        groups,
        pieces,
        k,
        news.shape[1],
        temperature,
        max(1, int(top_p * ONE)),
        min_p,
        K=most,
        N=max(tiles.batch_of_keys, 2 * most),
        LISTS=tiles.lists,
        DEPTH=next_power_of_2(cdiv(groups, tiles.lists)),
        GROUP=tiles.group,
        BATCH=tiles.batch,
        PIECES=next_power_of_2(pieces),
        ONE=ONE,
        TOP_P=top_p < 1,
        HALF=half,
        num_warps=8,
        maxnreg=None if capability(logits) == 120 else 255,  # without, or with it on 12.0, ptxas spills a few bytes
    )


def race(
    logits: torch.Tensor,
    clocks: torch.Tensor,
    temperature: float,
    min_p: float,
    history: torch.Tensor,
    lengths: torch.Tensor,
    news: torch.Tensor,
    last: torch.Tensor,
) -> None:
    """As `draw`, among all tokens, by a clock (B, V) for each. Three launches: the row's highest logit comes first."""
    rows, vocabulary = logits.shape
    highest, spoiled = highest_of_pieces(logits)
    pieces, keys = highest.shape[1], torch.empty_like(highest)
    launch(
        _race_kernel,
        (pieces, rows),
        logits,
        clocks,
        highest,
        keys,
        logits.stride(0),
        vocabulary,
        temperature,
        min_p,
        PIECE=PIECE,
        PIECES=next_power_of_2(pieces),
        num_warps=4,
    )
    take_highest(keys, spoiled, history, lengths, news, last)
