"""A draw among the k likeliest of each row of logits, written down: what a sampling decoding step does last.

Two launches. The first finds the k likeliest of each of a row's lists, in order; the second those of the row among
them, weighs them by softmax(logits / temperature), leaves out what top_p and min_p leave out, and takes the first of
exponential clocks of these rates to ring (Efraimidis, Spirakis, "Weighted random sampling with a reservoir", 2006,
algorithm A with reciprocal keys). Clocks are drawn by the caller, in the order of likelihood.

Neither sorts by exchanging neighbours, whose some fifty turns took 30 µs of a GPT-2's row (H100, a profile). A key's
place is the number of keys above it, all counted at once: of 256 keys 2^16 comparisons, about a microsecond. A list
is every so many logits, not a piece of the row, for neighbours in a vocabulary are likely together. The k-th of the
lists' first keys is below k keys at least, so nothing under it is looked at, and what remains is a few more than k:
the second launch takes them a batch at a time, each with the best so far.

Keys are as in greedy.py; of logits that 16 bits hold, in a vocabulary of up to 2^16, half as wide and compared in a
third of the instructions. What becomes of a row with a logit that is not finite is as there.
"""

import math

import torch
import triton
import triton.language as tl

from .greedy import PIECE, highest_of_pieces, keys_of, place_of, reversed_if_negative, take_highest, write_token
from .launch import cdiv, next_power_of_2

MOST = 128  # the likeliest that are found, half of a batch
_INTERPRETED = triton.knobs.runtime.interpret
_HALVES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
ONE = 2**40  # a probability of 1, where probabilities are counted
_EACH = tl.constexpr(8)  # keys of a list that are read at once


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
def _likeliest_kernel(
    logits_ptr,  # (B, V)
    keys_ptr,  # (B, K, lists)
    spoiled_ptr,  # (B, lists)
    stride_l, V,
    LIST: tl.constexpr, K: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    one, lists, row = tl.program_id(0), tl.num_programs(0), tl.program_id(1).to(tl.int64)
    cols = one + tl.arange(0, LIST) * lists
    there = cols < V
    z = tl.load(logits_ptr + row * stride_l + cols, there, float("-inf")).to(tl.float32)  # below all that are finite
    spoiled = tl.where(there, z * 0.0, 0.0)  # NaN from the first that is not finite
    tl.store(spoiled_ptr + row * lists + one, tl.sum(spoiled, axis=0))
    keys = _keys(z, cols, HALF)
    above = _above(keys)
    tl.store(keys_ptr + (row * K + above) * lists + one, keys, above < K)


@triton.jit
def _survivors(keys_ptr, found_ptr, least, nothing, first, alive, total, lists, K: tl.constexpr, LISTS: tl.constexpr):
    """The next keys of the lists that are alive, those from `least` on to found_ptr at total: the lists that go on,
    and the new total."""
    list, each = tl.arange(0, LISTS), first + tl.arange(0, _EACH)
    keys = tl.load(keys_ptr + each[None, :] * lists + list[:, None], alive[:, None] & (each < K)[None, :], -1)
    good = (keys >= least) & (keys > nothing[:, None]) & alive[:, None] & (each < K)[None, :]
    count = tl.sum(good.to(tl.int32), axis=1)
    at = total + tl.cumsum(count, axis=0) - count
    tl.store(found_ptr + at[:, None] + (each - first)[None, :], keys, good)  # a list is in order: the first ones are
    return count == _EACH, total + tl.sum(count, axis=0)


@triton.jit
def _draw_kernel(
    keys_ptr,  # (B, K, lists)
    spoiled_ptr,  # (B, lists)
    clocks_ptr,  # (B, k)
    found_ptr,  # (B, K + K * lists), what the program writes to read it in another order
    history_ptr,  # (B, room)
    lengths_ptr,  # (B,)
    news_ptr,  # (B, ring)
    last_ptr,  # (B,)
    stride_h, lists, k, ring, temperature, most, min_p,
    K: tl.constexpr, N: tl.constexpr, LISTS: tl.constexpr, ONE: tl.constexpr, TOP_P: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """most: what likelier tokens may reach together, counted in parts of ONE, for one to be left by TOP_P."""
    row = tl.program_id(0).to(tl.int64)
    list, each, places = tl.arange(0, LISTS), tl.arange(0, K), tl.arange(0, N)
    keys_ptr += row * K * lists
    found_ptr += row * (K + K * lists)
    clocks = tl.load(clocks_ptr + row * k + each, each < k, 1.0)
    spoiled = tl.load(spoiled_ptr + row * lists + list, list < lists, 0.0)
    nothing = _nothing(HALF)
    heads = tl.where(list < lists, tl.load(keys_ptr + list, list < lists, 0), nothing)
    least = tl.max(tl.where(_above(heads) == k - 1, heads, nothing), axis=0)
    alive, total = _survivors(keys_ptr, found_ptr + K, least, nothing, 0, list < lists, 0, lists, K, LISTS)
    for first in range(_EACH, tl.where(tl.max(alive.to(tl.int32), axis=0) > 0, K, 0), _EACH):
        alive, total = _survivors(keys_ptr, found_ptr + K, least, nothing, first, alive, total, lists, K, LISTS)
    tl.debug_barrier()  # written by other threads
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
    chosen = tl.argmax(weights / clocks, axis=0)
    finite = tl.sum(spoiled, axis=0) == 0.0
    token = tl.sum(tl.where(each == chosen, place, 0), axis=0)
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
    length = _length(vocabulary, most)
    lists = cdiv(vocabulary, length)
    half = _HALVES.get(rounded or logits.dtype) if vocabulary <= 2**16 else None
    width = torch.int64 if half is None else torch.int32
    keys = torch.empty((rows, most, lists), dtype=width, device=logits.device)
    found = torch.empty((rows, most + most * lists), dtype=width, device=logits.device)
    spoiled = torch.empty((rows, lists), dtype=torch.float32, device=logits.device)
    _likeliest_kernel[(lists, rows)](
        logits, keys, spoiled, logits.stride(0), vocabulary, LIST=length, K=most, HALF=half, num_warps=8
    )
    _draw_kernel[(rows,)](
        keys,
        spoiled,
        clocks,
        found,
        history,
        lengths,
        news,
        last,
        history.stride(0),
        lists,
        k,
        news.shape[1],
        temperature,
        max(1, int(top_p * ONE)),
        min_p,
        K=most,
        N=2 * most if _INTERPRETED else 2 * MOST,
        LISTS=next_power_of_2(lists),
        ONE=ONE,
        TOP_P=top_p < 1,
        HALF=half,
        num_warps=8,
        maxnreg=255,  # left alone, ptxas of Triton 3.6 aims at 80 and spills
    )


def _length(vocabulary: int, most: int) -> int:
    """Logits of a list: about as many as there are lists, since either are compared with each other."""
    if _INTERPRETED:  # several lists
        return max(16, most)
    return max(256, next_power_of_2(math.isqrt(vocabulary)))


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
    _race_kernel[(pieces, rows)](
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
