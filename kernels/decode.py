"""Attention of the newest tokens over a cache: few queries, many keys, and all the time goes to reading them.

A cache (B, Hkv, Tmax, D) is cut into splits of keys, each the work of one program with its own softmax (o_i, lse_i);
a second kernel merges them, o = Σ exp2(lse_i - lse) o_i (Dao and others, "Flash-Decoding", 2023). All query heads of a
key head and all new tokens are rows of one tile, so that the cache is read once. The size of a split depends on Tmax
alone, neither on the batch nor on the lengths, so a row's bits do not depend on its company; nor does the grid, and
lengths are read on the device, so a CUDA graph serves any lengths: programs past a row's length leave at once.

Slots from the length on are never read. A row of no length gives zeros, and a length past Tmax counts as Tmax.

In a window of the last keys, splits begin at the oldest key that the first new token sees, and there are only as many
as the window takes. A cache that holds it, window + Tq - 1 slots or more, may be a ring: the token at place p lies in
slot p % Tmax. Without a window all this is specialised away.

Bytes: 2 B Hkv length D elements of the cache; beside them only the splits' results, 4 B H Tq D bytes a split, which a
split of 128 keys makes Tq H / (32 Hkv) of that at most (bf16).

On capability 9.0 in bf16, a turn over 64 keys of heads of 64 issues 274 instructions a warp, 16 of them HMMA (16 rows
are too few for wgmma), for 16 KiB of cache. Issue, the busiest unit beside the copies, would allow 13.9 TB/s on an H100
(at 128 wide heads 367 for 32 KiB, 20.7 TB/s): only memory limits it.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .attention_tiles import addressable, card_of, head_of, load_rows, strides
from .launch import accumulator, cdiv, launch, matmul_precision, next_power_of_2, statistics_dtype

MAX_STEPS = 16  # new tokens at once


class Tiles(NamedTuple):
    block_m: int  # query heads of a key head, times new tokens
    block_n: int  # keys
    split: int  # keys that one program walks over
    num_warps: int
    num_stages: int


def _tiles(rows: int, head_dim: int, dtype: torch.dtype, slots: int, on_card: bool) -> Tiles:
    """Tiles for `rows` queries a key head and a cache of `slots`, or a window that reaches so many.

    Splits of 128 keys give one sequence of GPT-2 (12 heads, 1024 slots) 96 programs for some 132 multiprocessors; past
    8192 slots they grow, so that there are at most 64. Tiles fit the 99 KB of a consumer card. Measured on an H200 with
    1024 slots: one sequence 10.3 µs (longer splits take more, up to 19), 64 of them 71 (66 with splits of 256).
    """
    block_m = min(64, max(16, next_power_of_2(rows)))
    if not on_card:  # small, so that few slots make several splits of several tiles
        return Tiles(block_m, 16, 32, 4, 1)
    split = (
        256 if slots <= 256 else max(128, next_power_of_2(cdiv(slots, 64)))
    )  # one split needs no merging; its size is not measured
    if dtype == torch.float32:
        return Tiles(min(block_m, 32), 32 if head_dim <= 64 else 16, split, 8, 1)
    return Tiles(block_m, 64 if head_dim <= 128 else 32, split, 4, 3 if head_dim <= 64 else 2)


@triton.jit
def _reach_of(lengths_ptr, batch, steps, slots, window):
    """The first and one past the last place that the new tokens of a row see."""
    length = tl.load(lengths_ptr + batch)
    oldest = 0
    if window is None:
        length = tl.minimum(length, slots).to(tl.int32)
    else:
        ring = slots >= window + steps - 1
        length = tl.where(ring, length, tl.minimum(length, slots)).to(tl.int32)
        oldest = tl.maximum(length - steps + 1 - window, 0)
    return oldest, length


@triton.jit(do_not_specialize=["steps", "slots", "window"])
def _decode_kernel(
    q_ptr, k_ptr, v_ptr,
    lengths_ptr,  # (B,)
    new_ptr,  # (B, 3 H D), queries, keys and values of one new token a row, or None: its key is in the cache
    o_ptr,  # (B, H, Tq, SPLITS, D); of a single split the result, (B, Tq, H, D)
    lse_ptr,  # (B, H, Tq, SPLITS)
    stride_qb, stride_qh, stride_qt, stride_qd,
    stride_kb, stride_kh, stride_kt, stride_kd,
    stride_vb, stride_vh, stride_vt, stride_vd,
    key_heads, group, steps, slots,
    window,  # keys that a query sees at most, or None
    qk_scale,
    D: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, SPLIT: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """One split of one key head, for BLOCK_M of its group * steps rows."""
    row_tiles = tl.cdiv(group * steps, BLOCK_M)
    plane, split = tl.program_id(0) // row_tiles, tl.program_id(1)
    batch, key_head = plane // key_heads, plane % key_heads
    oldest, length = _reach_of(lengths_ptr, batch, steps, slots, window)
    begin = oldest + split * SPLIT
    if SPLITS == 1 or begin < length:
        rows = tl.program_id(0) % row_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
        head, step = key_head * group + rows // steps, rows % steps
        channels = tl.arange(0, BLOCK_D)
        inside = (rows[:, None] < group * steps) & (channels[None, :] < D)
        places = head.to(tl.int64)[:, None] * stride_qh + step[:, None] * stride_qt + channels[None, :] * stride_qd
        q = tl.load(q_ptr + batch.to(tl.int64) * stride_qb + places, inside, 0.0)
        k_ptr = head_of(k_ptr, batch, key_head, stride_kb, stride_kh)
        v_ptr = head_of(v_ptr, batch, key_head, stride_vb, stride_vh)
        last = length - steps + step  # that each row sees
        if new_ptr is not None:
            newest = (tl.load(lengths_ptr + batch) - 1).to(tl.int32)  # its place; one past the slots is dropped
            new_ptr += (batch.to(tl.int64) * 3 * key_heads + key_heads + key_head) * D
            k_new = tl.load(new_ptr + channels, channels < D, 0.0)
            v_new = tl.load(new_ptr + key_heads * D + channels, channels < D, 0.0)
            written = (channels < D) & (newest >= begin) & (newest < tl.minimum(begin + SPLIT, length))
            its_slot = newest.to(tl.int64) if window is None else (newest % slots).to(tl.int64)
            tl.store(k_ptr + its_slot * stride_kt + channels * stride_kd, k_new, written)
            tl.store(v_ptr + its_slot * stride_vt + channels * stride_vd, v_new, written)
            tl.debug_barrier()  # other threads read it

        acc = tl.zeros([BLOCK_M, BLOCK_D], ACC)
        m = tl.full([BLOCK_M], float("-inf"), ACC)
        l = tl.zeros([BLOCK_M], ACC)
        for start in range(begin, tl.minimum(begin + SPLIT, length), BLOCK_N):
            cols = start + tl.arange(0, BLOCK_N)
            if window is None:
                k = load_rows(k_ptr, start, stride_kt, stride_kd, cols < length, D, BLOCK_N, BLOCK_D)
                v = load_rows(v_ptr, start, stride_vt, stride_vd, cols < length, D, BLOCK_N, BLOCK_D)
            else:
                there = (cols < length)[:, None] & (channels[None, :] < D)
                slot = (cols % slots).to(tl.int64)[:, None]
                k = tl.load(k_ptr + slot * stride_kt + channels[None, :] * stride_kd, there, 0.0)
                v = tl.load(v_ptr + slot * stride_vt + channels[None, :] * stride_vd, there, 0.0)
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=ACC) * qk_scale  # [BLOCK_M, BLOCK_N]
            s = tl.where(cols[None, :] <= last[:, None], s, float("-inf"))
            if window is not None:
                s = tl.where(cols[None, :] > last[:, None] - window, s, float("-inf"))
            m_new = tl.maximum(m, tl.max(s, axis=1))
            base = tl.where(m_new == float("-inf"), 0.0, m_new)  # a row may have seen nothing yet
            p = tl.exp2(s - base[:, None])
            rescale = tl.exp2(m - base)
            acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None], input_precision=PRECISION, out_dtype=ACC)
            m, l = m_new, l * rescale + tl.sum(p, axis=1)

        o = tl.where(l[:, None] == 0.0, 0.0, acc / l[:, None])
        if SPLITS == 1:
            slot = (batch.to(tl.int64) * steps + step) * key_heads * group + head
        else:
            slot = ((batch * key_heads * group + head).to(tl.int64) * steps + step) * SPLITS + split
            tl.store(lse_ptr + slot, m + tl.log2(l), rows < group * steps)
        tl.store(o_ptr + slot[:, None] * D + channels[None, :], o.to(o_ptr.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["steps", "slots", "window"])
def _merge_kernel(
    o_ptr,  # (B, H, Tq, SPLITS, D)
    lse_ptr,  # (B, H, Tq, SPLITS)
    lengths_ptr,  # (B,)
    out_ptr,  # (B, Tq, H, D)
    heads, steps, slots, window,
    D: tl.constexpr, ACC: tl.constexpr, BLOCK_D: tl.constexpr,
    SPLIT: tl.constexpr, SPLITS: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """One query: the splits that hold its row's keys into its result."""
    row = tl.program_id(0)
    batch, head, step = row // (heads * steps), row // steps % heads, row % steps
    oldest, length = _reach_of(lengths_ptr, batch, steps, slots, window)
    if window is not None:
        length -= oldest
    channels = tl.arange(0, BLOCK_D)
    o_ptr += row.to(tl.int64) * SPLITS * D
    lse_ptr += row.to(tl.int64) * SPLITS

    acc = tl.zeros([BLOCK_D], ACC)
    m = tl.full([1], float("-inf"), ACC)
    l = tl.zeros([1], ACC)
    for start in range(0, tl.cdiv(length, SPLIT), BLOCK_S):
        splits = start + tl.arange(0, BLOCK_S)
        there = splits * SPLIT < length
        lse = tl.load(lse_ptr + splits, there, float("-inf"))
        o = tl.load(o_ptr + splits[:, None] * D + channels[None, :], there[:, None] & (channels[None, :] < D), 0.0)
        m_new = tl.maximum(m, tl.max(lse, axis=0))
        base = tl.where(m_new == float("-inf"), 0.0, m_new)
        weights, rescale = tl.exp2(lse - base), tl.exp2(m - base)
        acc = acc * rescale + tl.sum(weights[:, None] * o, axis=0)
        m, l = m_new, l * rescale + tl.sum(weights, axis=0)
    out = tl.where(l == 0.0, 0.0, acc / l)
    place = out_ptr + ((batch.to(tl.int64) * steps + step) * heads + head) * D
    tl.store(place + channels, out.to(out_ptr.dtype.element_ty), channels < D)


@triton.jit(do_not_specialize=["steps", "slots"])
def _append_kernel(
    qkv_ptr,  # (B, Tq, 3 H D)
    k_ptr, v_ptr,  # (B, H, Tmax, D)
    lengths_ptr,  # (B,), with the new tokens counted in
    stride_kb, stride_kh, stride_kt,
    stride_vb, stride_vh, stride_vt,
    steps, slots,
    H: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, RING: tl.constexpr,
):  # fmt: skip
    """The keys and values of one token, 2 H D numbers, to their slots."""
    token = tl.program_id(0)
    batch, step = (token // steps).to(tl.int64), token % steps
    place = (tl.load(lengths_ptr + batch) - steps + step).to(tl.int64)
    channels = tl.arange(0, BLOCK)
    there = (channels < H * D) & (place >= 0)
    if RING:
        place = place % slots
    else:
        there = there & (place < slots)
    head, channel = (channels // D).to(tl.int64), channels % D
    qkv_ptr += token.to(tl.int64) * 3 * H * D + channels
    k = tl.load(qkv_ptr + H * D, there, 0.0)
    v = tl.load(qkv_ptr + 2 * H * D, there, 0.0)
    tl.store(k_ptr + batch * stride_kb + place * stride_kt + head * stride_kh + channel, k, there)
    tl.store(v_ptr + batch * stride_vb + place * stride_vt + head * stride_vh + channel, v, there)


def append(
    qkv: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, lengths: torch.Tensor, ring: bool = False
) -> None:
    """Writes the newest tokens' keys and values, of qkv (B, Tq, 3C), into caches (B, H, Tmax, D) whose rows are in one
    piece. lengths: (B,), with the new tokens counted in; what would fall outside of a cache is dropped, or in a ring
    takes the place of what is Tmax tokens older."""
    batch, steps, _ = qkv.shape
    heads, slots, dim = k_cache.shape[1:]
    launch(
        _append_kernel,
        (batch * steps,),
        qkv.contiguous(),
        k_cache,
        v_cache,
        lengths,
        *k_cache.stride()[:3],
        *v_cache.stride()[:3],
        steps,
        slots,
        H=heads,
        D=dim,
        BLOCK=next_power_of_2(heads * dim),
        RING=ring,
        num_warps=4,
    )


def decode_attention_fwd(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    lengths: torch.Tensor,
    scale: float,
    window: int | None = None,
) -> torch.Tensor:
    """q (B, H, Tq, D), caches (B, Hkv, Tmax, D), lengths (B,) -> o (B, H, Tq, D), in memory (B, Tq, H, D)."""
    return _attend(q, k_cache, v_cache, lengths, None, scale, window)


def append_and_attend(
    qkv: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    lengths: torch.Tensor,
    scale: float,
    window: int | None = None,
) -> torch.Tensor:
    """`append` of one new token a row, qkv (B, 1, 3C), and the attention of its queries, in one launch or, with splits,
    two -> o (B, H, 1, D). With a window the caches (B, H, Tmax, D) are rings, of window slots or more."""
    qkv = qkv.contiguous()
    q = qkv.view(len(qkv), 1, 3, k_cache.shape[1], -1)[:, :, 0].transpose(1, 2)
    return _attend(q, k_cache, v_cache, lengths, qkv, scale, window)


def _attend(q, k_cache, v_cache, lengths, new, scale, window):
    out = decode_attention_fwd_outputs(q)
    batch, heads, steps, dim = q.shape
    key_heads, slots = k_cache.shape[1:3]
    if out.numel() == 0 or slots == 0:
        return out.zero_()
    q = addressable(q)
    if new is None:  # or what is written there would be written to a copy
        k_cache, v_cache = addressable(k_cache), addressable(v_cache)
    group = heads // key_heads
    reach = slots if window is None else min(slots, window + steps - 1)
    tiles = _tiles(group * steps, dim, q.dtype, reach, card_of(q) is not None)
    splits = cdiv(reach, tiles.split)
    partial, lse = out, out  # of a single split
    if splits > 1:
        partial = torch.empty((batch, heads, steps, splits, dim), dtype=statistics_dtype(q), device=q.device)
        lse = torch.empty(partial.shape[:-1], dtype=partial.dtype, device=q.device)
    constants = {
        "D": dim,
        "ACC": accumulator(q),
        "BLOCK_D": max(16, next_power_of_2(dim)),
        "SPLIT": tiles.split,
        "SPLITS": splits,
    }
    lengths = lengths.contiguous()
    launch(
        _decode_kernel,
        (cdiv(group * steps, tiles.block_m) * batch * key_heads, splits),
        q,
        k_cache,
        v_cache,
        lengths,
        new,
        partial,
        lse,
        **strides(q=q, k=k_cache, v=v_cache),
        key_heads=key_heads,
        group=group,
        steps=steps,
        slots=slots,
        window=window,
        qk_scale=scale * math.log2(math.e),
        **constants,
        PRECISION=matmul_precision(),
        BLOCK_M=tiles.block_m,
        BLOCK_N=tiles.block_n,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        maxnreg=255,  # left alone, ptxas aims at 96 on capability 12.0 and spills
    )
    if splits == 1:
        return out
    launch(
        _merge_kernel,
        (batch * heads * steps,),
        partial,
        lse,
        lengths,
        out,
        heads,
        steps,
        slots,
        window,
        **constants,
        BLOCK_S=min(16, next_power_of_2(splits)),
        num_warps=4,
    )
    return out


def decode_attention_fwd_outputs(q, *_):
    """What decode_attention_fwd allocates, so it serves as its fake too."""
    batch, heads, steps, dim = q.shape
    return torch.empty((batch, steps, heads, dim), dtype=q.dtype, device=q.device).transpose(1, 2)
