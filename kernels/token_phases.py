"""The phases of token.py's kernel, and the tiles that they multiply: what is in memory, and what in which registers.

words_ptr is a layer's own words. Matrices (N, K) of bfloat16 are seen as int32, two at a time, for bfloat16 that lives
across a loop is kept in a register each. A vector of C comes as a tuple of CH pieces [BK].
"""

import triton
import triton.language as tl

from .gelu import gelu
from .words import await_splits, await_words, put, put_numbers, word

ROW = tl.constexpr(16)  # places in the table of addresses that a layer has: a line of 128 bytes


@triton.jit
def _low(pairs):
    return (pairs << 16).to(tl.float32, bitcast=True)


@triton.jit
def _high(pairs):
    return (pairs & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _rounded(x):
    return x.to(tl.bfloat16).to(tl.float32)


@triton.jit
def _pair(low, high):
    """float32 -> two bfloat16 in an int32."""
    low, high = low.to(tl.bfloat16).to(tl.int16, bitcast=True), high.to(tl.bfloat16).to(tl.int16, bitcast=True)
    return (low.to(tl.int32) & 0xFFFF) | (high.to(tl.int32) << 16)


@triton.jit
def _unpacked(pairs):
    """int32 (…, n) -> float32 (…, 2n)."""
    return tl.interleave(_low(pairs), _high(pairs))


@triton.jit
def _floats(got, N: tl.constexpr):
    out = (got[0].to(tl.float32, bitcast=True),)
    for n in tl.static_range(1, N):
        out = out + (got[n].to(tl.float32, bitcast=True),)
    return out


@triton.jit
def address(table_ptr, layer, PLACE: tl.constexpr, dtype: tl.constexpr):
    """Of a layer's tensor, which begins at a multiple of 16 bytes."""
    return tl.multiple_of(tl.load(table_ptr + layer * ROW + PLACE).to(tl.pointer_type(dtype)), [16])


@triton.jit
def tiles_of(w_ptr, first, last, STEP: tl.constexpr, K: tl.constexpr, TILES: tl.constexpr, TR: tl.constexpr,
              BK: tl.constexpr):  # fmt: skip
    """Rows first, first + STEP, … below last of (N, K): TILES of TR rows, each in pieces [TR, BK / 2] of int32, for
    bfloat16 that lives across a loop is kept in a register each."""
    for t in tl.static_range(TILES):
        rows = first + (t * TR + tl.arange(0, TR)) * STEP
        for c in tl.static_range((K + BK - 1) // BK):
            cols = c * (BK // 2) + tl.arange(0, BK // 2)
            there = (rows < last)[:, None]
            if K % BK != 0:
                there = there & (cols < K // 2)[None, :]
            places = rows[:, None] * (K // 2) + cols[None, :]
            w = tl.load(w_ptr + places, there, 0, eviction_policy="evict_first")
            ws = (w,) if t == 0 and c == 0 else ws + (w,)  # noqa: F821
    return ws


@triton.jit
def of_rows(ptr, first, last, STEP: tl.constexpr, TILES: tl.constexpr, TR: tl.constexpr):
    """A bias's numbers for the rows of each tile, (N,) -> [TR] each."""
    for t in tl.static_range(TILES):
        rows = first + (t * TR + tl.arange(0, TR)) * STEP
        b = tl.load(ptr + rows, rows < last, 0.0)
        got = (b,) if t == 0 else got + (b,)  # noqa: F821
    return got


@triton.jit
def vector(ptr, CH: tl.constexpr, BK: tl.constexpr):
    got = (tl.load(ptr + tl.arange(0, BK)),)
    for c in tl.static_range(1, CH):
        got = got + (tl.load(ptr + c * BK + tl.arange(0, BK)),)
    return got


# Products and norms


@triton.jit
def _products(ws, tile: tl.constexpr, x, CH: tl.constexpr):
    """[TR, BK]: the rows of one tile times x, which comes in CH pieces, not yet summed up."""
    acc = _unpacked(ws[tile * CH]) * x[0][None, :]
    for c in tl.static_range(1, CH):
        acc += _unpacked(ws[tile * CH + c]) * x[c][None, :]
    return acc


@triton.jit
def _dot(ws, tile: tl.constexpr, x, CH: tl.constexpr):
    return tl.sum(_products(ws, tile, x, CH), axis=1)


@triton.jit
def _add_three(a, b, c, d, e, f):
    return a + d, b + e, c + f


@triton.jit
def _add_two(a, b, c, d):
    return a + c, b + d


@triton.jit
def _dots(ws, x, TILES: tl.constexpr, CH: tl.constexpr):
    """[TR] of each tile. Where several warps share a row, three tiles take one exchange between them."""
    if TILES == 3:
        return tl.reduce((_products(ws, 0, x, CH), _products(ws, 1, x, CH), _products(ws, 2, x, CH)), 1, _add_three)
    else:
        got = (_dot(ws, 0, x, CH),)
        for t in tl.static_range(1, TILES):
            got = got + (_dot(ws, t, x, CH),)
        return got


@triton.jit
def normed(x, gain, shift, eps, C: tl.constexpr, CH: tl.constexpr):
    """x was rounded to 8 bits when it was summed up: to centre it before it is squared would not make it exact."""
    total, squares = x[0], x[0] * x[0]
    for c in tl.static_range(1, CH):
        total += x[c]
        squares += x[c] * x[c]
    total, squares = tl.reduce((total, squares), 0, _add_two)
    mean = total / C
    scale = 1.0 / tl.sqrt(tl.maximum(squares / C - mean * mean, 0.0) + eps)
    y = (_rounded((x[0] - mean) * scale * gain[0].to(tl.float32) + shift[0].to(tl.float32)),)
    for c in tl.static_range(1, CH):
        y = y + (_rounded((x[c] - mean) * scale * gain[c].to(tl.float32) + shift[c].to(tl.float32)),)
    return y


@triton.jit
def added(x, words_ptr, tag, CH: tl.constexpr, BK: tl.constexpr, ASM: tl.constexpr, WARPS: tl.constexpr):
    """x and the C numbers that all programs wrote together."""
    branch = _floats(await_words(words_ptr + tl.arange(0, BK), tag, CH, BK, BK, ASM, WARPS), CH)
    y = (_rounded(x[0] + branch[0]),)
    for c in tl.static_range(1, CH):
        y = y + (_rounded(x[c] + branch[c]),)
    return y


# The phases. words_ptr: this layer's.


@triton.jit
def embedded(wte_ptr, wpe_ptr, token, place, C: tl.constexpr, CH: tl.constexpr, BK: tl.constexpr):
    for c in tl.static_range(CH):
        cols = c * BK + tl.arange(0, BK)
        x = tl.load(wte_ptr + token * C + cols).to(tl.float32) + tl.load(wpe_ptr + place * C + cols).to(tl.float32)
        got = (_rounded(x),) if c == 0 else got + (_rounded(x),)  # noqa: F821
    return got


@triton.jit
def phase_a(x, ws, gain, shift, bias, words_ptr, tag, cache_ptr, layer, place, slots, pid, eps,
             P: tl.constexpr, L: tl.constexpr, C: tl.constexpr, H: tl.constexpr, BK: tl.constexpr, TR: tl.constexpr,
             TILES: tl.constexpr, ASM: tl.constexpr):  # fmt: skip
    CH: tl.constexpr = C // BK
    D: tl.constexpr = C // H
    first, last = pid * (3 * C) // P, (pid + 1) * (3 * C) // P
    x = normed(x, gain, shift, eps, C, CH)
    for t in tl.static_range(TILES):
        rows = first + t * TR + tl.arange(0, TR)
        y = _rounded(_dot(ws, t, x, CH) + bias[t].to(tl.float32))
        put(words_ptr + rows, word(tag, y.to(tl.int32, bitcast=True)), rows < last, ASM)
        part, head, channel = rows // C, rows % C // D, rows % D
        there = (rows < last) & (part > 0) & (place < slots)
        slot = (((part - 1) * L + layer) * H + head) * slots + place
        put_numbers(cache_ptr + slot * D + channel, y, there, ASM)


@triton.jit
def kept(cache_ptr, layer, head, split, place, slots, there,
          L: tl.constexpr, H: tl.constexpr, D: tl.constexpr, KEYS: tl.constexpr):  # fmt: skip
    """The split's keys and values before `place`, [KEYS, D / 2] of int32 each."""
    keys = split * KEYS + tl.arange(0, KEYS)
    seen = (keys < place) & (keys < slots) & there
    at = ((layer * H + head) * slots + keys)[:, None] * (D // 2) + tl.arange(0, D // 2)[None, :]
    k = tl.load(cache_ptr + at, seen[:, None], 0, cache_modifier=".cg")
    v = tl.load(cache_ptr + L * H * slots * (D // 2) + at, seen[:, None], 0, cache_modifier=".cg")
    return k, v


@triton.jit
def phase_b(k, v, words_ptr, o_ptr, lse_ptr, tag, head, split, place, slots, qk_scale,
             C: tl.constexpr, H: tl.constexpr, KEYS: tl.constexpr, ASM: tl.constexpr, WARPS: tl.constexpr):  # fmt: skip
    """One head over one split of the keys before `place`; the first split's over the newest key too, from its words."""
    D: tl.constexpr = C // H
    q, k_new, v_new = _floats(await_words(words_ptr + head * D + tl.arange(0, D), tag, 3, C, D, ASM, WARPS), 3)
    q *= qk_scale
    keys = split * KEYS + tl.arange(0, KEYS)
    s = tl.where((keys < place) & (keys < slots), tl.sum(_unpacked(k) * q[None, :], axis=1), float("-inf"))
    s_new = tl.where(split == 0, tl.sum(q * k_new, axis=0), float("-inf"))
    m = tl.maximum(tl.max(s, axis=0), s_new)
    p, p_new = tl.exp2(s - m), tl.exp2(s_new - m)
    l = tl.sum(p, axis=0) + p_new
    o = (tl.sum(p[:, None] * _unpacked(v), axis=0) + p_new * v_new) / l
    low, high = tl.split(tl.permute(tl.reshape(o, [2, D // 2]), (1, 0)))  # a pair: half a head apart
    at = (split * H + head) * (D // 2) + tl.arange(0, D // 2)
    put(o_ptr + at, word(tag, _pair(low, high)), at >= 0, ASM)
    one = tl.arange(0, 1)
    lse = tl.zeros([1], tl.float32) + (m + tl.log2(l))
    put(lse_ptr + split * H + head + one, word(tag, lse.to(tl.int32, bitcast=True)), one == 0, ASM)


@triton.jit
def merged(o_ptr, lse_ptr, tag, splits, S: tl.constexpr, C: tl.constexpr, H: tl.constexpr, HP: tl.constexpr,
            ASM: tl.constexpr, WARPS: tl.constexpr):  # fmt: skip
    """The heads' results, [HP D]; HP - H heads at the end, of weights that are 0, are copies of the last."""
    D: tl.constexpr = C // H
    heads = tl.minimum(tl.arange(0, HP), H - 1)[:, None]
    pairs = tl.arange(0, D // 2)[None, :]
    o_ptrs = o_ptr + heads * (D // 2) + pairs
    if S == 1:
        got = await_words(o_ptrs, tag, 1, 1, HP * D // 2, ASM, WARPS)
        low, high = _low(got[0]), _high(got[0])
    else:
        # Every split's words in registers of the same thread: nothing to sum up across threads. A split that is not
        # there looks at the words of split 0 of the same head, and counts for nothing.
        lse_ptrs = lse_ptr + heads + tl.zeros_like(pairs)
        got = await_splits(o_ptrs, lse_ptrs, tag, splits, S, H * (D // 2), H, HP * D // 2, ASM, WARPS)
        most = got[S].to(tl.float32, bitcast=True)
        for n in tl.static_range(1, S):
            most = tl.maximum(most, got[S + n].to(tl.float32, bitcast=True))
        total = tl.zeros_like(most)
        low, high = total, total
        for n in tl.static_range(S):
            weight = tl.where(n < splits, tl.exp2(got[S + n].to(tl.float32, bitcast=True) - most), 0.0)
            total += weight
            low += weight * _low(got[n])
            high += weight * _high(got[n])
        low, high = low / total, high / total
    return _rounded(tl.reshape(tl.permute(tl.join(low, high), (0, 2, 1)), [HP * D]))


@triton.jit
def phase_c_or_e(ws, x, bias, words_ptr, tag, pid, P: tl.constexpr, N: tl.constexpr, TR: tl.constexpr,
                 TILES: tl.constexpr, CH: tl.constexpr, ASM: tl.constexpr):  # fmt: skip
    first, last = pid * N // P, (pid + 1) * N // P
    sums = _dots(ws, x, TILES, CH)
    for t in tl.static_range(TILES):
        rows = first + t * TR + tl.arange(0, TR)
        y = _rounded(sums[t] + bias[t].to(tl.float32))
        put(words_ptr + rows, word(tag, y.to(tl.int32, bitcast=True)), rows < last, ASM)


@triton.jit
def phase_d(x, even, odd, gain, shift, bias_even, bias_odd, words_ptr, tag, pid, eps,
             P: tl.constexpr, C: tl.constexpr, F: tl.constexpr, BK: tl.constexpr, TR: tl.constexpr,
             TILES: tl.constexpr, TANH: tl.constexpr, ASM: tl.constexpr):  # fmt: skip
    """Two neighbouring units make a word."""
    CH: tl.constexpr = C // BK
    first, last = pid * (F // 2) // P, (pid + 1) * (F // 2) // P
    x = normed(x, gain, shift, eps, C, CH)
    for t in tl.static_range(TILES):
        pairs = first + t * TR + tl.arange(0, TR)
        low = gelu(_rounded(_dot(even, t, x, CH) + bias_even[t].to(tl.float32)), TANH)
        high = gelu(_rounded(_dot(odd, t, x, CH) + bias_odd[t].to(tl.float32)), TANH)
        put(words_ptr + pairs, word(tag, _pair(low, high)), pairs < last, ASM)


@triton.jit
def hidden(words_ptr, tag, F: tl.constexpr, BK: tl.constexpr, ASM: tl.constexpr, WARPS: tl.constexpr):
    """The GELU's results, (F,) in pieces of BK."""
    N: tl.constexpr = F // BK
    HALF: tl.constexpr = BK // 2
    got = await_words(words_ptr + tl.arange(0, HALF), tag, N, HALF, HALF, ASM, WARPS)
    x = (_unpacked(got[0]),)
    for n in tl.static_range(1, N):
        x = x + (_unpacked(got[n]),)
    return x


@triton.jit
def write_logits(x, gain, shift, head_ptr, logits_ptr, pid, eps, P: tl.constexpr, C: tl.constexpr, V: tl.constexpr,
          BK: tl.constexpr, HR: tl.constexpr, ASM: tl.constexpr):  # fmt: skip
    """The last norm and the head."""
    CH: tl.constexpr = C // BK
    first, last = (pid.to(tl.int64) * V // P).to(tl.int32), ((pid + 1).to(tl.int64) * V // P).to(tl.int32)
    ws = tiles_of(head_ptr, first, last, 1, C, 1, HR, BK)
    x = normed(x, gain, shift, eps, C, CH)
    for tile in tl.range(0, (V // P + HR) // HR, num_stages=1):
        rows = first + tile * HR + tl.arange(0, HR)
        following = tiles_of(head_ptr, first + (tile + 1) * HR, last, 1, C, 1, HR, BK)
        put_numbers(logits_ptr + rows, _rounded(_dot(ws, 0, x, CH)), rows < last, ASM)
        ws = following
