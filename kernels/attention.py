"""Causal attention in tiles that never leave the chip.

    S = scale q kᵀ,  P = softmax(S) over the keys up to the query's own place,  o = P v

Forward (Dao, "FlashAttention-2", 2023, algorithm 1): for each tile of queries, walk over tiles of keys with a running
row maximum m and row sum l, and rescale what is summed so far whenever m grows. Exponentials are base 2, with
log2(e) folded into the scale. What the backward needs is one number a row, lse = m + log2(l).

Backward (the same, algorithm 2), from P = exp2(S - lse), Δ = rowsum(do ∘ o) and

    dv = Pᵀ do      dP = do vᵀ      dS = P ∘ (dP - Δ)      dq = scale dS k      dk = scale dSᵀ q

in two kernels: dk and dv for a tile of keys, dq for a tile of queries. That is 7 products where one kernel with atomics
has 5, but needs no float32 buffer for dq, and gives the same bits every time. The kernel for dk and dv forms Sᵀ and
dPᵀ at once (k qᵀ, v doᵀ), never by transposing an accumulator, which Hopper gets wrong.

Only the tiles on the diagonal are masked; those below it are walked over first and unmasked, those above never. Where
queries are fewer than keys, the last query sits at the last key. q, k and v are read, and the gradients
written, through strides, so that they may be views of one packed projection.

Flops, causal: 4 B H T² D / 2 forward, 14 B H T² D / 2 backward (one kernel would do with 10). Bytes: the forward reads
q, k, v and writes o, 4 B H T D elements, and 4 B H T bytes of lse.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

MAX_HEAD_DIM = 256
MAX_ROW_STRIDE = 2**23  # times 256 rows of a tile it still fits 32 bits; tensors past it are copied first


class Tiles(NamedTuple):
    block_m: int  # queries
    block_n: int  # keys
    num_warps: int
    num_stages: int


def _tiles(kernel: str, head_dim: int, dtype: torch.dtype, capability: int | None) -> Tiles:
    """Tiles for "fwd", "dkdv" or "dq" on a card of this compute capability (90 is 9.0; None is the interpreter).

    Chosen so that nothing spills and 99 KB of shared memory, the least from 8.0 on, is enough. Not measured on any GPU
    yet. float32 products are no tensor-core work unless TF32 is allowed, and live in registers: small tiles.
    """
    if capability is None:  # small and unequal, so that few tokens make several tiles of each kind
        return Tiles(16, 32, 4, 1) if kernel == "dkdv" else Tiles(32, 16, 4, 1)
    if dtype == torch.float32:
        return Tiles(16, 16, 8, 1) if head_dim > 64 else Tiles(32, 32, 8, 1)
    hopper = 90 <= capability < 120  # and its successor for data centers: accumulators are spread over four warps each
    if kernel == "fwd":
        if head_dim <= 64:
            return Tiles(128, 64, 4 if hopper else 8, 3)
        if head_dim <= 128:
            return Tiles(128, 64 if hopper else 32, 8, 2)
        return Tiles(64, 32, 8, 2)
    if head_dim <= 64:
        return Tiles(64, 128, 8, 2) if kernel == "dkdv" else Tiles(128, 64, 8, 2)
    if head_dim <= 128:
        return Tiles(64, 64, 8, 2) if hopper or kernel == "dq" else Tiles(32, 64, 8, 2)
    return Tiles(32, 32, 8, 1)


@triton.jit
def _head(pointer, head, heads, stride_b, stride_h):
    """Where head b * H + h of a (B, H, T, D) tensor begins."""
    return pointer + (head // heads).to(tl.int64) * stride_b + (head % heads).to(tl.int64) * stride_h


@triton.jit
def _rows(pointer, start, stride_t, stride_d, length, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """BLOCK rows of a (T, D) matrix from `start` on: pointers [BLOCK, BLOCK_D], and whether within T = length and D."""
    rows, cols = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    places = pointer + tl.cast(start, tl.int64) * stride_t + rows[:, None] * stride_t + cols[None, :] * stride_d
    return places, (start + rows[:, None] < length) & (cols[None, :] < D)


@triton.jit
def _load(
    pointer,
    start,
    stride_t,
    stride_d,
    length,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WHOLE: tl.constexpr = False,
):
    """Those rows, zero outside. WHOLE: all of them are known to be there, so that only columns past D need a mask."""
    places, inside = _rows(pointer, start, stride_t, stride_d, length, D, BLOCK, BLOCK_D)
    if WHOLE and BLOCK_D == D:
        return tl.load(places)
    if WHOLE:
        return tl.load(places, tl.arange(0, BLOCK_D)[None, :] < D, 0.0)
    return tl.load(places, inside, 0.0)


@triton.jit
def _seen(first_query, first_key, queries, keys, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Which keys each query sees, [BLOCK_M, BLOCK_N]. The last query sees the last key, so none sees past it."""
    rows = first_query + tl.arange(0, BLOCK_M)
    cols = first_key + tl.arange(0, BLOCK_N)
    return cols[None, :] <= rows[:, None] + (keys - queries)


@triton.jit
def _attend(
    q,  # [BLOCK_M, BLOCK_D]
    acc,  # [BLOCK_M, BLOCK_D]: the sum so far
    m,  # [BLOCK_M]: the largest score so far, in base 2
    l,  # [BLOCK_M]: the sum of exponentials so far
    k_ptr, v_ptr,
    stride_kt, stride_kd, stride_vt, stride_vd,
    first, start, queries, keys, qk_scale,
    D: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BELOW: tl.constexpr,
):  # fmt: skip
    """One tile of keys into the running softmax. BELOW: it lies below the diagonal, every query sees all of it."""
    k = _load(k_ptr, start, stride_kt, stride_kd, keys, D, BLOCK_N, BLOCK_D, BELOW)
    v = _load(v_ptr, start, stride_vt, stride_vd, keys, D, BLOCK_N, BLOCK_D, BELOW)
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=acc.dtype)  # [BLOCK_M, BLOCK_N]
    if not BELOW:
        s = tl.where(_seen(first, start, queries, keys, BLOCK_M, BLOCK_N), s, float("-inf"))
    m_new = tl.maximum(m, tl.max(s, axis=1) * qk_scale)  # scaled after the maximum: the scale is positive
    p = tl.exp2(s * qk_scale - m_new[:, None])
    rescale = tl.exp2(m - m_new)
    acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None], input_precision=PRECISION, out_dtype=acc.dtype)
    return acc, m_new, l * rescale + tl.sum(p, axis=1)


@triton.jit
def _attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr,
    lse_ptr,  # (B, H, Tq)
    stride_qb, stride_qh, stride_qt, stride_qd,
    stride_kb, stride_kh, stride_kt, stride_kd,
    stride_vb, stride_vh, stride_vt, stride_vd,
    stride_ob, stride_oh, stride_ot, stride_od,
    heads, queries, keys, qk_scale,
    D: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(queries, BLOCK_M)
    head = tl.program_id(0) // tiles
    first = (tiles - 1 - tl.program_id(0) % tiles) * BLOCK_M  # the last queries have the most keys: they start first
    q_ptr = _head(q_ptr, head, heads, stride_qb, stride_qh)
    k_ptr = _head(k_ptr, head, heads, stride_kb, stride_kh)
    v_ptr = _head(v_ptr, head, heads, stride_vb, stride_vh)
    o_ptr = _head(o_ptr, head, heads, stride_ob, stride_oh)

    q = _load(q_ptr, first, stride_qt, stride_qd, queries, D, BLOCK_M, BLOCK_D)
    acc = tl.zeros([BLOCK_M, BLOCK_D], ACC)
    m = tl.full([BLOCK_M], float("-inf"), ACC)
    l = tl.zeros([BLOCK_M], ACC)
    below = (first + (keys - queries) + 1) // BLOCK_N * BLOCK_N  # keys in whole tiles that the first query sees
    end = tl.minimum(first + BLOCK_M + (keys - queries), keys)
    for start in range(0, below, BLOCK_N):
        acc, m, l = _attend(
            q, acc, m, l, k_ptr, v_ptr, stride_kt, stride_kd, stride_vt, stride_vd, first, start, queries, keys,
            qk_scale, D, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D, True
        )  # fmt: skip
    for start in range(below, end, BLOCK_N):
        acc, m, l = _attend(
            q, acc, m, l, k_ptr, v_ptr, stride_kt, stride_kd, stride_vt, stride_vd, first, start, queries, keys,
            qk_scale, D, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D, False
        )  # fmt: skip

    places, inside = _rows(o_ptr, first, stride_ot, stride_od, queries, D, BLOCK_M, BLOCK_D)
    tl.store(places, (acc / l[:, None]).to(o_ptr.dtype.element_ty), inside)
    rows = first + tl.arange(0, BLOCK_M)
    tl.store(lse_ptr + head.to(tl.int64) * queries + rows, m + tl.log2(l), rows < queries)


@triton.jit
def _attention_delta_kernel(
    o_ptr, do_ptr,
    delta_ptr,  # (B, H, Tq)
    stride_ob, stride_oh, stride_ot, stride_od,
    stride_gb, stride_gh, stride_gt, stride_gd,
    heads, queries,
    D: tl.constexpr, ACC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Δ = rowsum(do ∘ o)."""
    tiles = tl.cdiv(queries, BLOCK_M)
    head = tl.program_id(0) // tiles
    first = tl.program_id(0) % tiles * BLOCK_M
    o = _load(
        _head(o_ptr, head, heads, stride_ob, stride_oh), first, stride_ot, stride_od, queries, D, BLOCK_M, BLOCK_D
    )
    do = _load(
        _head(do_ptr, head, heads, stride_gb, stride_gh), first, stride_gt, stride_gd, queries, D, BLOCK_M, BLOCK_D
    )
    rows = first + tl.arange(0, BLOCK_M)
    delta = tl.sum(o.to(ACC) * do.to(ACC), axis=1)
    tl.store(delta_ptr + head.to(tl.int64) * queries + rows, delta, rows < queries)


@triton.jit
def _dkdv_step(
    k,  # [BLOCK_N, BLOCK_D]
    v,  # [BLOCK_N, BLOCK_D]
    dk,  # [BLOCK_N, BLOCK_D]: the sums so far
    dv,
    q_ptr, do_ptr, lse_ptr, delta_ptr,
    stride_qt, stride_qd, stride_gt, stride_gd,
    first, start, queries, keys, qk_scale,
    D: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BELOW: tl.constexpr,
):  # fmt: skip
    """One tile of queries into dk and dv. Queries past the end add nothing: their do and Δ are loaded as zero."""
    rows = start + tl.arange(0, BLOCK_M)
    q = _load(q_ptr, start, stride_qt, stride_qd, queries, D, BLOCK_M, BLOCK_D)
    do = _load(do_ptr, start, stride_gt, stride_gd, queries, D, BLOCK_M, BLOCK_D)
    lse = tl.load(lse_ptr + rows, rows < queries, 0.0)
    delta = tl.load(delta_ptr + rows, rows < queries, 0.0)
    st = tl.dot(k, tl.trans(q), input_precision=PRECISION, out_dtype=dk.dtype)  # [BLOCK_N, BLOCK_M]
    pt = tl.exp2(st * qk_scale - lse[None, :])
    if not BELOW:
        pt = tl.where(tl.trans(_seen(start, first, queries, keys, BLOCK_M, BLOCK_N)), pt, 0.0)
    dv = tl.dot(pt.to(do.dtype), do, dv, input_precision=PRECISION, out_dtype=dv.dtype)
    dpt = tl.dot(v, tl.trans(do), input_precision=PRECISION, out_dtype=dk.dtype)
    dst = pt * (dpt - delta[None, :])
    dk = tl.dot(dst.to(q.dtype), q, dk, input_precision=PRECISION, out_dtype=dk.dtype)
    return dk, dv


@triton.jit
def _attention_dkdv_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr,
    lse_ptr,  # (B, H, Tq)
    delta_ptr,  # (B, H, Tq)
    dk_ptr, dv_ptr,
    stride_qb, stride_qh, stride_qt, stride_qd,
    stride_kb, stride_kh, stride_kt, stride_kd,
    stride_vb, stride_vh, stride_vt, stride_vd,
    stride_gb, stride_gh, stride_gt, stride_gd,
    stride_dkb, stride_dkh, stride_dkt, stride_dkd,
    stride_dvb, stride_dvh, stride_dvt, stride_dvd,
    heads, queries, keys, qk_scale, scale,
    D: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(keys, BLOCK_N)
    head = tl.program_id(0) // tiles
    first = tl.program_id(0) % tiles * BLOCK_N  # the first keys are seen by most queries: they start first
    q_ptr = _head(q_ptr, head, heads, stride_qb, stride_qh)
    do_ptr = _head(do_ptr, head, heads, stride_gb, stride_gh)
    lse_ptr += head.to(tl.int64) * queries
    delta_ptr += head.to(tl.int64) * queries
    k_ptr = _head(k_ptr, head, heads, stride_kb, stride_kh)
    v_ptr = _head(v_ptr, head, heads, stride_vb, stride_vh)
    k = _load(k_ptr, first, stride_kt, stride_kd, keys, D, BLOCK_N, BLOCK_D)
    v = _load(v_ptr, first, stride_vt, stride_vd, keys, D, BLOCK_N, BLOCK_D)

    dk = tl.zeros([BLOCK_N, BLOCK_D], ACC)
    dv = tl.zeros([BLOCK_N, BLOCK_D], ACC)
    begin = tl.maximum(first - (keys - queries), 0) // BLOCK_M * BLOCK_M  # the first tile with a query that sees a key
    below = tl.cdiv(tl.maximum(first + BLOCK_N - 1 - (keys - queries), 0), BLOCK_M) * BLOCK_M  # all see all from here
    below = tl.minimum(below, queries)
    for start in range(begin, below, BLOCK_M):
        dk, dv = _dkdv_step(
            k, v, dk, dv, q_ptr, do_ptr, lse_ptr, delta_ptr, stride_qt, stride_qd, stride_gt, stride_gd, first, start,
            queries, keys, qk_scale, D, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D, False
        )  # fmt: skip
    for start in range(below, queries, BLOCK_M):
        dk, dv = _dkdv_step(
            k, v, dk, dv, q_ptr, do_ptr, lse_ptr, delta_ptr, stride_qt, stride_qd, stride_gt, stride_gd, first, start,
            queries, keys, qk_scale, D, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D, True
        )  # fmt: skip

    dk_ptr = _head(dk_ptr, head, heads, stride_dkb, stride_dkh)
    dv_ptr = _head(dv_ptr, head, heads, stride_dvb, stride_dvh)
    places, inside = _rows(dk_ptr, first, stride_dkt, stride_dkd, keys, D, BLOCK_N, BLOCK_D)
    tl.store(places, (dk * scale).to(dk_ptr.dtype.element_ty), inside)
    places, inside = _rows(dv_ptr, first, stride_dvt, stride_dvd, keys, D, BLOCK_N, BLOCK_D)
    tl.store(places, dv.to(dv_ptr.dtype.element_ty), inside)


@triton.jit
def _dq_step(
    q,  # [BLOCK_M, BLOCK_D]
    do,  # [BLOCK_M, BLOCK_D]
    lse,  # [BLOCK_M]
    delta,  # [BLOCK_M]
    dq,  # [BLOCK_M, BLOCK_D]: the sum so far
    k_ptr, v_ptr,
    stride_kt, stride_kd, stride_vt, stride_vd,
    first, start, queries, keys, qk_scale,
    D: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BELOW: tl.constexpr,
):  # fmt: skip
    """One tile of keys into dq."""
    k = _load(k_ptr, start, stride_kt, stride_kd, keys, D, BLOCK_N, BLOCK_D, BELOW)
    v = _load(v_ptr, start, stride_vt, stride_vd, keys, D, BLOCK_N, BLOCK_D, BELOW)
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=dq.dtype)  # [BLOCK_M, BLOCK_N]
    p = tl.exp2(s * qk_scale - lse[:, None])
    if not BELOW:
        p = tl.where(_seen(first, start, queries, keys, BLOCK_M, BLOCK_N), p, 0.0)
    dp = tl.dot(do, tl.trans(v), input_precision=PRECISION, out_dtype=dq.dtype)
    ds = p * (dp - delta[:, None])
    return tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION, out_dtype=dq.dtype)


@triton.jit
def _attention_dq_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr,
    lse_ptr,  # (B, H, Tq)
    delta_ptr,  # (B, H, Tq)
    dq_ptr,
    stride_qb, stride_qh, stride_qt, stride_qd,
    stride_kb, stride_kh, stride_kt, stride_kd,
    stride_vb, stride_vh, stride_vt, stride_vd,
    stride_gb, stride_gh, stride_gt, stride_gd,
    stride_dqb, stride_dqh, stride_dqt, stride_dqd,
    heads, queries, keys, qk_scale, scale,
    D: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(queries, BLOCK_M)
    head = tl.program_id(0) // tiles
    first = (tiles - 1 - tl.program_id(0) % tiles) * BLOCK_M  # as in the forward
    k_ptr = _head(k_ptr, head, heads, stride_kb, stride_kh)
    v_ptr = _head(v_ptr, head, heads, stride_vb, stride_vh)
    q_ptr = _head(q_ptr, head, heads, stride_qb, stride_qh)
    do_ptr = _head(do_ptr, head, heads, stride_gb, stride_gh)
    q = _load(q_ptr, first, stride_qt, stride_qd, queries, D, BLOCK_M, BLOCK_D)
    do = _load(do_ptr, first, stride_gt, stride_gd, queries, D, BLOCK_M, BLOCK_D)
    rows = first + tl.arange(0, BLOCK_M)
    lse = tl.load(lse_ptr + head.to(tl.int64) * queries + rows, rows < queries, 0.0)
    delta = tl.load(delta_ptr + head.to(tl.int64) * queries + rows, rows < queries, 0.0)

    dq = tl.zeros([BLOCK_M, BLOCK_D], ACC)
    below = (first + (keys - queries) + 1) // BLOCK_N * BLOCK_N
    end = tl.minimum(first + BLOCK_M + (keys - queries), keys)
    for start in range(0, below, BLOCK_N):
        dq = _dq_step(
            q, do, lse, delta, dq, k_ptr, v_ptr, stride_kt, stride_kd, stride_vt, stride_vd, first, start, queries,
            keys, qk_scale, D, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D, True
        )  # fmt: skip
    for start in range(below, end, BLOCK_N):
        dq = _dq_step(
            q, do, lse, delta, dq, k_ptr, v_ptr, stride_kt, stride_kd, stride_vt, stride_vd, first, start, queries,
            keys, qk_scale, D, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D, False
        )  # fmt: skip
    dq_ptr = _head(dq_ptr, head, heads, stride_dqb, stride_dqh)
    places, inside = _rows(dq_ptr, first, stride_dqt, stride_dqd, queries, D, BLOCK_M, BLOCK_D)
    tl.store(places, (dq * scale).to(dq_ptr.dtype.element_ty), inside)


def attention_fwd(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """q (B, H, Tq, D), k, v (B, H, Tk, D) -> o (B, H, Tq, D), in memory (B, Tq, H, D), and lse (B, H, Tq)."""
    o, lse = attention_fwd_outputs(q, k, v, scale)
    _forward(q, k, v, o, lse, scale)
    return o, lse


def attention_fwd_outputs(q, k, v, scale):
    """What attention_fwd allocates, so it serves as its fake too."""
    batch, heads, queries, dim = q.shape
    o = torch.empty((batch, queries, heads, dim), dtype=q.dtype, device=q.device).transpose(1, 2)
    return o, torch.empty((batch, heads, queries), dtype=_statistics_dtype(q), device=q.device)


def attention_bwd(
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of q, k and v, each (B, H, T, D) and laid out as attention_fwd lays out o."""
    dq, dk, dv = attention_bwd_outputs(do, q, k, v, o, lse, scale)
    _backward(do, q, k, v, o, lse, dq, dk, dv, scale)
    return dq, dk, dv


def attention_bwd_outputs(do, q, k, v, o, lse, scale):
    """What attention_bwd allocates, so it serves as its fake too."""
    return tuple(attention_fwd_outputs(t, k, v, scale)[0] for t in (q, k, v))


def attention_qkv_fwd(qkv: torch.Tensor, heads: int, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The packed projection qkv (B, T, 3C) -> out (B, T, C) and lse (B, H, T)."""
    out, lse = attention_qkv_fwd_outputs(qkv, heads, scale)
    _forward(*_unpack(qkv, 3, heads), *_unpack(out, 1, heads), lse, scale)
    return out, lse


def attention_qkv_fwd_outputs(qkv, heads, scale):
    """What attention_qkv_fwd allocates, so it serves as its fake too."""
    batch, time, packed = qkv.shape
    out = torch.empty((batch, time, packed // 3), dtype=qkv.dtype, device=qkv.device)
    return out, torch.empty((batch, heads, time), dtype=_statistics_dtype(qkv), device=qkv.device)


def attention_qkv_bwd(
    dout: torch.Tensor, qkv: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, heads: int, scale: float
) -> torch.Tensor:
    """The gradient of qkv, packed as it is: (B, T, 3C)."""
    dqkv = attention_qkv_bwd_outputs(dout, qkv, out, lse, heads, scale)
    (do,), (o,) = _unpack(dout, 1, heads), _unpack(out, 1, heads)
    _backward(do, *_unpack(qkv, 3, heads), o, lse, *_unpack(dqkv, 3, heads), scale)
    return dqkv


def attention_qkv_bwd_outputs(dout, qkv, out, lse, heads, scale):
    """What attention_qkv_bwd allocates, so it serves as its fake too."""
    return torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)


def _unpack(packed: torch.Tensor, parts: int, heads: int) -> tuple[torch.Tensor, ...]:
    """(B, T, parts · C) of any strides -> `parts` views (B, H, T, D)."""
    dim = packed.shape[-1] // parts // heads
    return packed.unflatten(-1, (parts, heads, dim)).permute(2, 0, 3, 1, 4).unbind(0)


def _forward(q, k, v, o, lse, scale):
    batch, heads, queries, dim = q.shape
    if q.numel() == 0:
        return
    q, k, v = (_addressable(t) for t in (q, k, v))
    tiles = _tiles("fwd", dim, q.dtype, _capability(q))
    _attention_fwd_kernel[(triton.cdiv(queries, tiles.block_m) * batch * heads,)](
        q,
        k,
        v,
        o,
        lse,
        *q.stride(),
        *k.stride(),
        *v.stride(),
        *o.stride(),
        heads,
        queries,
        k.shape[2],
        scale * math.log2(math.e),
        **_constants(q, tiles),
    )


def _backward(do, q, k, v, o, lse, dq, dk, dv, scale):
    batch, heads, queries, dim = q.shape
    keys = k.shape[2]
    if q.numel() == 0:
        dk.zero_()
        dv.zero_()
        return
    do, q, k, v, o = (_addressable(t) for t in (do, q, k, v, o))
    delta = torch.empty_like(lse)
    constants = _constants(q, tiles := _tiles("dq", dim, q.dtype, _capability(q)))
    grid = (triton.cdiv(queries, tiles.block_m) * batch * heads,)
    _attention_delta_kernel[grid](
        o,
        do,
        delta,
        *o.stride(),
        *do.stride(),
        heads,
        queries,
        **{name: constants[name] for name in ("D", "ACC", "BLOCK_M", "BLOCK_D")},
        num_warps=8,
    )
    operands = (q, k, v, do, lse, delta)
    strides = (*q.stride(), *k.stride(), *v.stride(), *do.stride())
    numbers = (heads, queries, keys, scale * math.log2(math.e), scale)
    _attention_dq_kernel[grid](*operands, dq, *strides, *dq.stride(), *numbers, **constants)
    tiles = _tiles("dkdv", dim, q.dtype, _capability(q))
    _attention_dkdv_kernel[(triton.cdiv(keys, tiles.block_n) * batch * heads,)](
        *operands, dk, dv, *strides, *dk.stride(), *dv.stride(), *numbers, **_constants(q, tiles)
    )


def _constants(q, tiles):
    """The constexprs and options that all three kernels take."""
    # float32 follows torch's own setting for matmuls: IEEE unless the user allowed TF32
    tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return {
        "D": q.shape[-1],
        "ACC": tl.float64 if q.dtype == torch.float64 else tl.float32,
        "PRECISION": "tf32" if tf32 else "ieee",
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": tiles.block_n,
        "BLOCK_D": max(16, triton.next_power_of_2(q.shape[-1])),
        "num_warps": tiles.num_warps,
        "num_stages": tiles.num_stages,
        # left alone, ptxas aims at 64 registers for float32 on capability 8.0 and spills 16 bytes for it
        "maxnreg": 192 if q.dtype == torch.float32 else None,
    }


def _capability(tensor):
    if not tensor.is_cuda:
        return None
    major, minor = torch.cuda.get_device_capability(tensor.device)
    return 10 * major + minor


def _addressable(tensor):
    """A copy where rows or channels lie so far apart that offsets within a tile would not fit 32 bits."""
    return tensor if max(tensor.stride()[2:]) < MAX_ROW_STRIDE else tensor.contiguous()


def _statistics_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
