"""The backward of attention.py (Dao, "FlashAttention-2", 2023, algorithm 2).

From P = exp2(S - lse), Δ = rowsum(do ∘ o), the keep mask K of dropout and its scale c = 1 / (1 - p):

    dv = c (K ∘ P)ᵀ do      dP = c K ∘ (do vᵀ)      dS = P ∘ (dP - Δ)      dq = scale dS k      dk = scale dSᵀ q

in two kernels: dk and dv for a tile of keys, dq for a tile of queries. That is 7 products where one kernel with atomics
has 5, but needs no float32 buffer for dq, and gives the same bits every time. The kernel for dq comes first and leaves
Δ for the other. That one forms Sᵀ and dPᵀ at once (k qᵀ, v doᵀ), never by transposing an accumulator, which Hopper gets
wrong, and walks over all query heads of its key head, so grouped heads need no atomics either. Gradients are written
through strides, packed as qkv is. With sums_ptr each tile leaves the sums of its columns too, for the gradient of the
bias in a packed projection: torch adds them up in a fixed order, in place of a pass over 3 C B T elements.

Flops, causal: 14 B H T² D / 2 (one kernel would do with 10). One turn of the unmasked loops, as in attention.py:

    kernel    D     tile   warps   all  HGMMA  MUFU  FFMA  FMUL  FADD   tensor core  MUFU  issue    L2
    dq       64    64x64       4   329     12    32    32    32    32           384   256    329   512
    dkdv     64    32x64       4   196     12    16    16    16    16           256   128    196   288
    dq      128    64x32       4   259     18    16    16    16    16           384   128    259   512
    dkdv    128    32x64       4   255     20    16    16    16    16           512   128    255   544

At T = 1024 both kernels together allow at most 309 TFLOP/s of useful work (the usual 10 B H T² D / 2) at D = 64 if the
tensor core never overlaps the rest, 437 if all does; at D = 128 348 and 471. Measured on an H200, B = 32, 768 channels:
250 at D = 64 (cuDNN 245, FlashAttention-2 183), 247 at D = 128 (cuDNN 309, FlashAttention-2 202).
"""

import math

import torch
import triton
import triton.language as tl

from .attention import attention_fwd_outputs, unpack
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
    store_sums,
    strides,
    window_of,
)
from .launch import cdiv, launch, statistics_dtype
from .philox import keep_mask


@triton.jit
def _dkdv_step(
    k,  # [BLOCK_N, BLOCK_D]
    v,  # [BLOCK_N, BLOCK_D]
    dk,  # [BLOCK_N, BLOCK_D]: the sums so far
    dv,
    poison,  # [BLOCK_N]: of the keys
    q_ptr, do_ptr, lse_ptr, delta_ptr, mask_ptr, ids_ptr,
    stride_qt, stride_qd, stride_gt, stride_gd,
    first, start, queries, keys, window, qk_scale, seed, plane, threshold, keep_scale,
    D: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BELOW: tl.constexpr,
):  # fmt: skip
    """One tile of queries into dk and dv. BELOW: all of them are there and see all of the keys; else those past the end
    add nothing, for their do and Δ are loaded as zero."""
    rows = start + tl.arange(0, BLOCK_M)
    if BELOW:  # tests of every row were a sixth of the loop's instructions
        q = load_rows(q_ptr, start, stride_qt, stride_qd, None, D, BLOCK_M, BLOCK_D)
        do = load_rows(do_ptr, start, stride_gt, stride_gd, None, D, BLOCK_M, BLOCK_D)
        lse, delta = tl.load(lse_ptr + rows), tl.load(delta_ptr + rows)
    else:
        q = load_rows(q_ptr, start, stride_qt, stride_qd, rows < queries, D, BLOCK_M, BLOCK_D)
        do = load_rows(do_ptr, start, stride_gt, stride_gd, rows < queries, D, BLOCK_M, BLOCK_D)
        lse = tl.load(lse_ptr + rows, rows < queries, 0.0)
        delta = tl.load(delta_ptr + rows, rows < queries, 0.0)
    st = tl.dot(k, tl.trans(q), input_precision=PRECISION, out_dtype=dk.dtype)  # [BLOCK_N, BLOCK_M]
    if ids_ptr is not None:
        st += poison[:, None]
    pt = tl.exp2(st * qk_scale - lse[None, :])
    if not BELOW:
        seen = sees(start, first, queries, keys, window, mask_ptr, ids_ptr, BLOCK_M, BLOCK_N, True)
        pt = tl.where(seen, pt, 0.0)
    dpt = tl.dot(v, tl.trans(do), input_precision=PRECISION, out_dtype=dk.dtype)
    kept = pt
    if seed is not None:
        keep = tl.trans(keep_mask(seed, rows, first, plane, ATTENTION_SITE, threshold, BLOCK_M, BLOCK_N))
        kept = tl.where(keep, pt * keep_scale, 0.0)
        dpt = tl.where(keep, dpt * keep_scale, 0.0)
    dv = tl.dot(kept.to(do.dtype), do, dv, input_precision=PRECISION, out_dtype=dv.dtype)
    dst = pt * (dpt - delta[None, :])
    if ids_ptr is not None:  # Δ may be NaN in another document
        dst = tl.where(seen, dst, 0.0)
    dk = tl.dot(dst.to(q.dtype), q, dk, input_precision=PRECISION, out_dtype=dk.dtype)
    return dk, dv


@triton.jit(do_not_specialize=LENGTHS)
def _attention_dkdv_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr,
    lse_ptr,  # (B, H, Tq)
    delta_ptr,  # (B, H, Tq)
    dk_ptr, dv_ptr,
    seed_ptr, mask_ptr, ids_ptr,  # as in the forward
    spans_ptr,  # (B, tiles of keys, 2): of queries, where there are documents
    poison_ptr,
    sums_ptr,  # (B tiles, 3, H, D), written here but for dq's, or None
    stride_qb, stride_qh, stride_qt, stride_qd,
    stride_kb, stride_kh, stride_kt, stride_kd,
    stride_vb, stride_vh, stride_vt, stride_vd,
    stride_gb, stride_gh, stride_gt, stride_gd,
    stride_dkb, stride_dkh, stride_dkt, stride_dkd,
    stride_dvb, stride_dvh, stride_dvt, stride_dvd,
    heads, group, queries, keys, window, qk_scale, scale, threshold, keep_scale,
    D: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(keys, BLOCK_N)
    key_heads = heads // group
    key_plane = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles  # most queries see the first keys: they start first
    batch, key_head, first = key_plane // key_heads, key_plane % key_heads, tile * BLOCK_N
    k_ptr = head_of(k_ptr, batch, key_head, stride_kb, stride_kh)
    v_ptr = head_of(v_ptr, batch, key_head, stride_vb, stride_vh)

    begin = tl.maximum(first - (keys - queries), 0) // BLOCK_M * BLOCK_M  # the first tile with a query that sees a key
    below = tl.cdiv(tl.maximum(first + BLOCK_N - 1 - (keys - queries), 0), BLOCK_M) * BLOCK_M  # all see all from here
    below = tl.minimum(below, queries)
    end = queries
    if window is not None:
        in_all = tl.minimum(first + window - (keys - queries), queries)  # the queries from below on, before it, see all
        end = tl.minimum(first + BLOCK_N - 1 + window - (keys - queries), queries)
        below = tl.minimum(below, end)
    if mask_ptr is not None:
        mask_ptr += batch.to(tl.int64) * keys
        below = end
    if ids_ptr is not None:
        ids_ptr += batch.to(tl.int64) * keys
        poison_ptr += key_plane.to(tl.int64) * keys
        _, stop = span_of(spans_ptr, batch, tile, tiles)
        end = stop if window is None else tl.minimum(end, stop)
        below = end
    seed = None
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)

    there, poison = open_keys(first + tl.arange(0, BLOCK_N), keys, mask_ptr, poison_ptr)
    k = load_rows(k_ptr, first, stride_kt, stride_kd, there, D, BLOCK_N, BLOCK_D)
    v = load_rows(v_ptr, first, stride_vt, stride_vd, there, D, BLOCK_N, BLOCK_D)
    dk = tl.zeros([BLOCK_N, BLOCK_D], ACC)
    dv = tl.zeros([BLOCK_N, BLOCK_D], ACC)
    for member in range(group):
        head = key_head * group + member
        plane = batch * heads + head
        q_head = head_of(q_ptr, batch, head, stride_qb, stride_qh)
        do_head = head_of(do_ptr, batch, head, stride_gb, stride_gh)
        lse_head, delta_head = lse_ptr + plane.to(tl.int64) * queries, delta_ptr + plane.to(tl.int64) * queries
        diagonal = tl.cdiv(tl.maximum(below - begin, 0), BLOCK_M)
        sighted = end if window is None else in_all
        whole = below + tl.maximum(sighted - below, 0) // BLOCK_M * BLOCK_M  # past it some do not see all, or are none
        tested = diagonal + (whole < end if window is None else tl.cdiv(tl.maximum(end - whole, 0), BLOCK_M))
        if ids_ptr is None or tested > 0:  # nearly always without documents, and ptxas does worse with the `if`
            for tile_of_queries in range(0, tested):
                start = tl.where(tile_of_queries < diagonal, begin + tile_of_queries * BLOCK_M, whole)
                if window is not None:
                    start += tl.maximum(tile_of_queries - diagonal, 0) * BLOCK_M
                dk, dv = _dkdv_step(
                    k, v, dk, dv, poison, q_head, do_head, lse_head, delta_head, mask_ptr, ids_ptr,
                    stride_qt, stride_qd, stride_gt, stride_gd,
                    first, start, queries, keys, window, qk_scale, seed, plane, threshold, keep_scale,
                    D, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D, False
                )  # fmt: skip
        if mask_ptr is None and ids_ptr is None and below < whole:
            for start in range(below, whole, BLOCK_M):
                dk, dv = _dkdv_step(
                    k, v, dk, dv, poison, q_head, do_head, lse_head, delta_head, None, None,
                    stride_qt, stride_qd, stride_gt, stride_gd,
                    first, start, queries, keys, window, qk_scale, seed, plane, threshold, keep_scale,
                    D, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D, True
                )  # fmt: skip

    dk_ptr = head_of(dk_ptr, batch, key_head, stride_dkb, stride_dkh)
    dv_ptr = head_of(dv_ptr, batch, key_head, stride_dvb, stride_dvh)
    store_rows(dk_ptr, first, stride_dkt, stride_dkd, dk * scale, keys, D, BLOCK_N, BLOCK_D)
    store_rows(dv_ptr, first, stride_dvt, stride_dvd, dv, keys, D, BLOCK_N, BLOCK_D)
    if sums_ptr is not None:
        row = batch * tiles + tile
        store_sums(sums_ptr, row, 1, heads, key_head, dk, scale, D, BLOCK_D)
        store_sums(sums_ptr, row, 2, heads, key_head, dv, 1.0, D, BLOCK_D)


@triton.jit
def _dq_step(
    q,  # [BLOCK_M, BLOCK_D]
    do,  # [BLOCK_M, BLOCK_D]
    lse,  # [BLOCK_M]
    delta,  # [BLOCK_M]
    dq,  # [BLOCK_M, BLOCK_D]: the sum so far
    k_ptr, v_ptr, mask_ptr, ids_ptr, poison_ptr,
    stride_kt, stride_kd, stride_vt, stride_vd,
    first, start, above, below, queries, keys, window, qk_scale, seed, plane, threshold, keep_scale,
    D: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """One tile of keys into dq. WHOLE, above, below: as in the forward."""
    rows, cols = first + tl.arange(0, BLOCK_M), start + tl.arange(0, BLOCK_N)
    there = None
    if not WHOLE:
        there, poison = open_keys(cols, keys, mask_ptr, poison_ptr)
    k = load_rows(k_ptr, start, stride_kt, stride_kd, there, D, BLOCK_N, BLOCK_D)
    v = load_rows(v_ptr, start, stride_vt, stride_vd, there, D, BLOCK_N, BLOCK_D)
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=dq.dtype)  # [BLOCK_M, BLOCK_N]
    if ids_ptr is not None:
        s += poison[None, :]
    p = tl.exp2(s * qk_scale - lse[:, None])
    if not WHOLE or start >= below or (window is not None and start < above):
        p = tl.where(sees(first, start, queries, keys, window, mask_ptr, ids_ptr, BLOCK_M, BLOCK_N, False), p, 0.0)
    dp = tl.dot(do, tl.trans(v), input_precision=PRECISION, out_dtype=dq.dtype)
    if seed is not None:
        keep = keep_mask(seed, rows, start, plane, ATTENTION_SITE, threshold, BLOCK_M, BLOCK_N)
        dp = tl.where(keep, dp * keep_scale, 0.0)
    ds = p * (dp - delta[:, None])
    return tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION, out_dtype=dq.dtype)


@triton.jit(do_not_specialize=LENGTHS)
def _attention_dq_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, o_ptr,
    lse_ptr,  # (B, H, Tq)
    delta_ptr,  # (B, H, Tq), written here
    dq_ptr,
    seed_ptr, mask_ptr, ids_ptr, spans_ptr, poison_ptr,  # as in the forward
    sums_ptr,  # as above
    stride_qb, stride_qh, stride_qt, stride_qd,
    stride_kb, stride_kh, stride_kt, stride_kd,
    stride_vb, stride_vh, stride_vt, stride_vd,
    stride_gb, stride_gh, stride_gt, stride_gd,
    stride_ob, stride_oh, stride_ot, stride_od,
    stride_dqb, stride_dqh, stride_dqt, stride_dqd,
    heads, group, queries, keys, window, qk_scale, scale, threshold, keep_scale,
    D: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(queries, BLOCK_M)
    plane = tl.program_id(0) // tiles
    tile = tiles - 1 - tl.program_id(0) % tiles  # as in the forward
    batch, head, first = plane // heads, plane % heads, tile * BLOCK_M
    k_ptr = head_of(k_ptr, batch, head // group, stride_kb, stride_kh)
    v_ptr = head_of(v_ptr, batch, head // group, stride_vb, stride_vh)
    q_ptr = head_of(q_ptr, batch, head, stride_qb, stride_qh)
    do_ptr = head_of(do_ptr, batch, head, stride_gb, stride_gh)

    begin, above = 0, 0
    below = (first + (keys - queries) + 1) // BLOCK_N * BLOCK_N
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
    do = load_rows(do_ptr, first, stride_gt, stride_gd, rows < queries, D, BLOCK_M, BLOCK_D)
    lse = tl.load(lse_ptr + plane.to(tl.int64) * queries + rows, rows < queries, 0.0)
    o_ptr = head_of(o_ptr, batch, head, stride_ob, stride_oh)
    o = load_rows(o_ptr, first, stride_ot, stride_od, rows < queries, D, BLOCK_M, BLOCK_D)
    delta = tl.sum(o.to(ACC) * do.to(ACC), axis=1)
    tl.store(delta_ptr + plane.to(tl.int64) * queries + rows, delta, rows < queries)
    dq = tl.zeros([BLOCK_M, BLOCK_D], ACC)
    if spans_ptr is None:
        whole = end // BLOCK_N * BLOCK_N
        if whole > begin:
            for start in range(begin, whole, BLOCK_N):
                dq = _dq_step(
                    q, do, lse, delta, dq, k_ptr, v_ptr, None, None, None, stride_kt, stride_kd, stride_vt, stride_vd,
                    first, start, above, below, queries, keys, window, qk_scale, seed, plane, threshold, keep_scale,
                    D, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D, True
                )  # fmt: skip
        begin = whole
    if begin < end:
        for start in range(begin, end, BLOCK_N):
            dq = _dq_step(
                q, do, lse, delta, dq, k_ptr, v_ptr, mask_ptr, ids_ptr, poison_ptr,
                stride_kt, stride_kd, stride_vt, stride_vd,
                first, start, above, start, queries, keys, window, qk_scale, seed, plane, threshold, keep_scale,
                D, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D, False
            )  # fmt: skip
    dq_ptr = head_of(dq_ptr, batch, head, stride_dqb, stride_dqh)
    store_rows(dq_ptr, first, stride_dqt, stride_dqd, dq * scale, queries, D, BLOCK_M, BLOCK_D)
    if sums_ptr is not None:
        store_sums(sums_ptr, batch * tiles + tile, 0, heads, head, dq, scale, D, BLOCK_D)


def attention_bwd(
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    seed: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    documents: torch.Tensor | None,
    scale: float,
    dropout_p: float,
    window: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of q, k and v, each of its shape and laid out as attention_fwd lays out o."""
    dq, dk, dv = attention_bwd_outputs(do, q, k, v, o, lse, seed, key_mask, documents, scale, dropout_p)
    _backward(do, q, k, v, o, lse, dq, dk, dv, seed, key_mask, documents, scale, dropout_p, window)
    return dq, dk, dv


def attention_bwd_outputs(do, q, k, v, o, lse, *options):
    """What attention_bwd allocates, so it serves as its fake too."""
    return tuple(attention_fwd_outputs(t, k, v, *options)[0] for t in (q, k, v))


def attention_qkv_bwd(
    dout: torch.Tensor,
    qkv: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    seed: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    documents: torch.Tensor | None,
    heads: int,
    scale: float,
    dropout_p: float,
    window: int | None = None,
    needs_bias: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient of qkv, packed as it is, (B, T, 3C), and if needs_bias that of a bias in it, its sums over tokens:
    (3C,) float32."""
    dqkv, sums = attention_qkv_bwd_outputs(
        dout, qkv, out, lse, seed, key_mask, documents, heads, scale, dropout_p, window, needs_bias
    )
    (do,), (o,) = unpack(dout, 1, heads), unpack(out, 1, heads)
    operands = do, *unpack(qkv, 3, heads), o, lse, *unpack(dqkv, 3, heads)
    partials = _backward(*operands, seed, key_mask, documents, scale, dropout_p, window, needs_bias)
    if partials is not None:
        torch.sum(partials, dim=0, out=sums)
    return dqkv, sums


def attention_qkv_bwd_outputs(
    dout, qkv, out, lse, seed, key_mask, documents, heads, scale, dropout_p, window=None, needs_bias=False
):  # fmt: skip
    """What attention_qkv_bwd allocates, so it serves as its fake too."""
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    shape = qkv.shape[2:] if needs_bias else (0,)
    return dqkv, torch.empty(shape, dtype=statistics_dtype(qkv), device=qkv.device)


def _backward(do, q, k, v, o, lse, dq, dk, dv, seed, key_mask, documents, scale, dropout_p, window, needs_sums=False):
    """Writes dq, dk and dv. Returns partial sums (rows, 3 H D) of their columns if needs_sums, else None."""
    batch, heads, queries, dim = q.shape
    key_heads, keys = k.shape[1:3]
    if q.numel() == 0:
        dk.zero_()
        dv.zero_()
        return q.new_zeros((1, 3 * heads * dim), dtype=statistics_dtype(q)) if needs_sums else None
    do, q, k, v, o = (addressable(t) for t in (do, q, k, v, o))
    beyond = options(seed, key_mask, documents, dropout_p)
    windowed = window is not None
    of_dq, of_dkdv = (settings(kernel, q, has_extras(beyond), windowed) for kernel in ("dq", "dkdv"))
    tiles, key_tiles = cdiv(queries, of_dq["BLOCK_M"]), cdiv(keys, of_dkdv["BLOCK_N"])
    partials = None
    if needs_sums:  # where one of the kernels has fewer rows than the other, its last ones stay zero
        make = torch.empty if tiles == key_tiles else torch.zeros
        shape = (batch * max(tiles, key_tiles), 3 * heads * dim)
        partials = make(shape, dtype=statistics_dtype(q), device=q.device)
    shared = {
        "q_ptr": q,
        "k_ptr": k,
        "v_ptr": v,
        "do_ptr": do,
        "lse_ptr": lse,
        "delta_ptr": torch.empty((batch, heads, queries), dtype=statistics_dtype(q), device=q.device),
        **beyond,
        "poison_ptr": None if documents is None else poison_of(k, v),
        "sums_ptr": partials,
        **strides(q=q, k=k, v=v, g=do),
        "heads": heads,
        "group": heads // key_heads,
        "queries": queries,
        "keys": keys,
        "window": window,
        "qk_scale": scale * math.log2(math.e),
        "scale": scale,
    }
    launch(
        _attention_dq_kernel,
        (tiles * batch * heads,),
        o_ptr=o,
        dq_ptr=dq,
        spans_ptr=spans(key_mask, documents, of_dq["BLOCK_M"], tiles),
        **shared,
        **strides(o=o, dq=dq),
        **of_dq,
    )
    launch(
        _attention_dkdv_kernel,
        (key_tiles * batch * key_heads,),
        dk_ptr=dk,
        dv_ptr=dv,
        spans_ptr=spans(None, documents, of_dkdv["BLOCK_N"], key_tiles),  # a hidden token is a query all the same
        **shared,
        **strides(dk=dk, dv=dv),
        **of_dkdv,
    )
    return partials
