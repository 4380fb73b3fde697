"""Causal attention in tiles that never leave the chip.

    S = scale q kᵀ,  P = softmax(S) over the keys that the query sees,  o = dropout(P) v

A query sees the keys up to its own place, but for those that `key_mask` hides or that belong to another document; one
that sees none gives zeros. This file is the forward (Dao, "FlashAttention-2", 2023, algorithm 1), attention_backward.py
the backward: for each tile of queries, walk over tiles of keys with a running row maximum m and row sum l, and rescale
what is summed so far whenever m grows. Exponentials are base 2, with log2(e) folded into the scale. What the backward
needs is one number a row, lse = m + log2(l).

One loop walks over the tiles up to the diagonal and masks those on it, under an `if` that all threads of a block take
alike: a loop of their own would wait for its first tiles anew, 5% of the time at T = 1024. Where queries are fewer than
keys, the last query sits at the last key. Heads may be grouped: query head h reads key head h // group. q, k and v are
read through strides, so that they may be views of one packed projection.

A key mask or documents make every tile a masked one, and `_spans_kernel` finds which keys a tile can meet at all, so
that foreign documents and padding at either end are never walked over. What a key mask hides is not read. A key of
another document can't be hidden so, being another query's own; there a key that holds NaN or an infinity is read as
zeros, and its scores are made NaN, before those that it may not touch are masked. A window, of the last keys up to the
query's own place, cuts off the tiles before it, and those on its edge are masked as those on the diagonal are. All this
is specialised away, down to the last instruction, where a call has none of it.

Flops, causal: 4 B H T² D / 2. Bytes: reads q, k, v and writes o, 4 B H T D elements, and 4 B H T bytes of lse.

What one turn of the unmasked loop issues on capability 9.0 in bf16, in instructions of one warp, and how many clocks
the units of an H100's multiprocessor are busy with it for the whole block (`python -m bench compile --sass`; the rates
and what they leave out stand in bench/account.py, and a test holds these numbers to the machine code):

    D     tile     warps   all  HGMMA  MUFU  FFMA  FMUL  FADD   tensor core  MUFU  issue    L2
    64    64x64        4   372      8    34    34    34    36           256   272    372   512
    128   64x64        4   438     12    34    34    66    36           512   272    438  1024

At D = 64 exponentials take as long as the products. With all the causal turns at T = 1024, the diagonal's included,
that allows at most 308 TFLOP/s of useful work at an assumed 1.755 GHz if the tensor core waits for the rest and the
rest for it, and 366 if all overlap; at D = 128 385 and 385. Measured on an H200, B = 32, 768 channels: 294 at D = 64
(cuDNN 326, FlashAttention-2 210) and, in the search for tiles alone, 320 at D = 128 (cuDNN 418, FlashAttention-2 235).
Tiles of keys and values then come from the L2 cache at about 5 TB/s, which is what limits it: blocks twice as high read
half as much, and lose as much again by being fewer.

Each loop stands under an `if` that it has a turn at all: where a loop may be skipped, zeros meet products in flight,
and ptxas then lets no two wgmma overlap.
"""

import math

import torch
import triton
import triton.language as tl

from .attention_tiles import (
    ATTENTION_SITE,
    LENGTHS,
    addressable,
    has_extras,
    head_of,
    load_rows,
    open_keys,
    options,
    poison_of,
    sees,
    settings,
    span_of,
    spans,
    store_rows,
    strides,
    window_of,
)
from .launch import cdiv, launch, statistics_dtype
from .philox import keep_mask

MAX_HEAD_DIM = 256


@triton.jit
def _attend(
    q,  # [BLOCK_M, BLOCK_D]
    acc,  # [BLOCK_M, BLOCK_D]: the sum so far
    m,  # [BLOCK_M]: the largest score so far, in base 2
    l,  # [BLOCK_M]: the sum of exponentials so far
    k_ptr, v_ptr, mask_ptr, ids_ptr, poison_ptr,
    stride_kt, stride_kd, stride_vt, stride_vd,
    first, start, above, below, queries, keys, window, qk_scale, seed, plane, threshold,
    D: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """One tile of keys into the running softmax. WHOLE: all of its keys are there, and from `above` up to `below` every
    query sees all of them; else each key is looked at."""
    rows, cols = first + tl.arange(0, BLOCK_M), start + tl.arange(0, BLOCK_N)
    there = None
    if not WHOLE:
        there, poison = open_keys(cols, keys, mask_ptr, poison_ptr)
    k = load_rows(k_ptr, start, stride_kt, stride_kd, there, D, BLOCK_N, BLOCK_D)
    v = load_rows(v_ptr, start, stride_vt, stride_vd, there, D, BLOCK_N, BLOCK_D)
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=acc.dtype)  # [BLOCK_M, BLOCK_N]
    if ids_ptr is not None:
        s += poison[None, :]
    if not WHOLE or start >= below or (window is not None and start < above):
        seen = sees(first, start, queries, keys, window, mask_ptr, ids_ptr, BLOCK_M, BLOCK_N, False)
        s = tl.where(seen, s, float("-inf"))
    m_new = tl.maximum(m, tl.max(s, axis=1) * qk_scale)  # scaled after the maximum: the scale is positive
    base = m_new
    if mask_ptr is not None or ids_ptr is not None or window is not None:  # a query may have seen nothing yet
        base = tl.where(m_new == float("-inf"), 0.0, m_new)
    p = tl.exp2(s * qk_scale - base[:, None])
    rescale = tl.exp2(m - base)
    l = l * rescale + tl.sum(p, axis=1)
    if seed is not None:
        p = tl.where(keep_mask(seed, rows, start, plane, ATTENTION_SITE, threshold, BLOCK_M, BLOCK_N), p, 0.0)
    acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None], input_precision=PRECISION, out_dtype=acc.dtype)
    return acc, m_new, l


@triton.jit(do_not_specialize=LENGTHS)
def _attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr,
    lse_ptr,  # (B, H, Tq)
    seed_ptr,  # (1,), or None: no dropout
    mask_ptr,  # (B, Tk), or None
    ids_ptr,  # (B, Tk): documents, or None
    spans_ptr,  # (B, tiles of queries, 2), where there is either
    poison_ptr,  # (B, Hkv, Tk), where there are documents
    stride_qb, stride_qh, stride_qt, stride_qd,
    stride_kb, stride_kh, stride_kt, stride_kd,
    stride_vb, stride_vh, stride_vt, stride_vd,
    stride_ob, stride_oh, stride_ot, stride_od,
    heads, group, queries, keys,
    window,  # keys that a query sees at most, or None
    qk_scale, threshold, keep_scale,
    D: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(queries, BLOCK_M)
    plane = tl.program_id(0) // tiles
    tile = tiles - 1 - tl.program_id(0) % tiles  # the last queries have the most keys: they start first
    batch, head, first = plane // heads, plane % heads, tile * BLOCK_M
    q_ptr = head_of(q_ptr, batch, head, stride_qb, stride_qh)
    k_ptr = head_of(k_ptr, batch, head // group, stride_kb, stride_kh)
    v_ptr = head_of(v_ptr, batch, head // group, stride_vb, stride_vh)

    begin, above = 0, 0
    below = (first + (keys - queries) + 1) // BLOCK_N * BLOCK_N  # keys in whole tiles that the first query sees
    end = tl.minimum(first + BLOCK_M + (keys - queries), keys)
    if window is not None:
        begin, above = window_of(first, queries, keys, window, BLOCK_M, BLOCK_N)
    if spans_ptr is not None:
        opens, stop = span_of(spans_ptr, batch, tile, tiles)
        opens, end = opens // BLOCK_N * BLOCK_N, tl.minimum(end, stop)
        begin = opens if window is None else tl.maximum(begin, opens)
    if mask_ptr is not None:
        mask_ptr += batch.to(tl.int64) * keys
    if ids_ptr is not None:
        ids_ptr += batch.to(tl.int64) * keys
        poison_ptr += (batch * (heads // group) + head // group).to(tl.int64) * keys
    seed = None
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)

    rows = first + tl.arange(0, BLOCK_M)
    q = load_rows(q_ptr, first, stride_qt, stride_qd, rows < queries, D, BLOCK_M, BLOCK_D)
    acc = tl.zeros([BLOCK_M, BLOCK_D], ACC)
    m = tl.full([BLOCK_M], float("-inf"), ACC)
    l = tl.zeros([BLOCK_M], ACC)
    if spans_ptr is None:
        whole = end // BLOCK_N * BLOCK_N
        if whole > begin:
            for start in range(begin, whole, BLOCK_N):
                acc, m, l = _attend(
                    q, acc, m, l, k_ptr, v_ptr, None, None, None, stride_kt, stride_kd, stride_vt, stride_vd,
                    first, start, above, below, queries, keys, window, qk_scale, seed, plane, threshold,
                    D, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D, True
                )  # fmt: skip
        begin = whole
    if begin < end:
        for start in range(begin, end, BLOCK_N):
            acc, m, l = _attend(
                q, acc, m, l, k_ptr, v_ptr, mask_ptr, ids_ptr, poison_ptr, stride_kt, stride_kd, stride_vt, stride_vd,
                first, start, above, start, queries, keys, window, qk_scale, seed, plane, threshold,
                D, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D, False
            )  # fmt: skip

    o = acc / l[:, None]
    if spans_ptr is not None:
        o = tl.where(l[:, None] == 0.0, 0.0, o)
    if seed_ptr is not None:
        o *= keep_scale
    o_ptr = head_of(o_ptr, batch, head, stride_ob, stride_oh)
    store_rows(o_ptr, first, stride_ot, stride_od, o, queries, D, BLOCK_M, BLOCK_D)
    tl.store(lse_ptr + plane.to(tl.int64) * queries + rows, m + tl.log2(l), rows < queries)


def attention_fwd(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seed: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    documents: torch.Tensor | None,
    scale: float,
    dropout_p: float,
    window: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """q (B, H, Tq, D), k, v (B, Hkv, Tk, D) -> o (B, H, Tq, D), in memory (B, Tq, H, D), and lse (B, H, Tq).

    seed: (1,) int64, needed where dropout_p > 0. key_mask: (B, Tk) bool. documents: (B, Tk) integers. window: the last
    keys that a query sees, itself included, fewer than Tk.
    """
    o, lse = attention_fwd_outputs(q, k, v)
    _forward(q, k, v, o, lse, seed, key_mask, documents, scale, dropout_p, window)
    return o, lse


def attention_fwd_outputs(q, k, v, *_):
    """What attention_fwd allocates, so it serves as its fake too."""
    batch, heads, queries, dim = q.shape
    o = torch.empty((batch, queries, heads, dim), dtype=q.dtype, device=q.device).transpose(1, 2)
    return o, torch.empty((batch, heads, queries), dtype=statistics_dtype(q), device=q.device)


def attention_qkv_fwd(
    qkv: torch.Tensor,
    seed: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    documents: torch.Tensor | None,
    heads: int,
    scale: float,
    dropout_p: float,
    window: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The packed projection qkv (B, T, 3C) -> out (B, T, C) and lse (B, H, T)."""
    out, lse = attention_qkv_fwd_outputs(qkv, seed, key_mask, documents, heads)
    options = seed, key_mask, documents, scale, dropout_p, window
    _forward(*unpack(qkv, 3, heads), *unpack(out, 1, heads), lse, *options)
    return out, lse


def attention_qkv_fwd_outputs(qkv, seed, key_mask, documents, heads, *_):
    """What attention_qkv_fwd allocates, so it serves as its fake too."""
    batch, time, packed = qkv.shape
    out = torch.empty((batch, time, packed // 3), dtype=qkv.dtype, device=qkv.device)
    return out, torch.empty((batch, heads, time), dtype=statistics_dtype(qkv), device=qkv.device)


def unpack(packed: torch.Tensor, parts: int, heads: int) -> tuple[torch.Tensor, ...]:
    """(B, T, parts · C) of any strides -> `parts` views (B, H, T, D)."""
    dim = packed.shape[-1] // parts // heads
    return packed.unflatten(-1, (parts, heads, dim)).permute(2, 0, 3, 1, 4).unbind(0)


def _forward(q, k, v, o, lse, seed, key_mask, documents, scale, dropout_p, window):
    batch, heads, queries, _ = q.shape
    if q.numel() == 0:
        return
    q, k, v = (addressable(t) for t in (q, k, v))
    beyond = options(seed, key_mask, documents, dropout_p)
    constants = settings("fwd", q, has_extras(beyond))
    tiles = cdiv(queries, constants["BLOCK_M"])
    launch(
        _attention_fwd_kernel,
        (tiles * batch * heads,),
        q,
        k,
        v,
        o,
        lse,
        **beyond,
        spans_ptr=spans(key_mask, documents, constants["BLOCK_M"], tiles),
        poison_ptr=None if documents is None else poison_of(k, v),
        **strides(q=q, k=k, v=v, o=o),
        heads=heads,
        group=heads // k.shape[1],
        queries=queries,
        keys=k.shape[2],
        window=window,
        qk_scale=scale * math.log2(math.e),
        **constants,
    )
