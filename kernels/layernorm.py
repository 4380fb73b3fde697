"""LayerNorm over the last axis, and the residual add, bias and dropout that come before it, in one pass.

    s    = residual + dropout(x + x_bias)            rounded to the residual's dtype, then normalised as rounded
    y    = (s - mean) * rstd * weight + bias         mean, var over C;  rstd = 1 / sqrt(var + eps)

The mean is compensated: m = sum(s) / C, then c = sum(s - m) / C, and s is centred as (s - m) - c. Without c the
rounding of m alone costs |mean| / sigma digits; with it the error stays at a few units of roundoff at any mean. m and
c are kept apart for the backward, for their sum would round c away again. With n = (s - mean) * rstd, g = dy * weight:

    ds   = rstd * (g - avg(g) - n * avg(g * n)) + dsum          dsum: the gradient that reaches s from elsewhere
    dx   = dropout's mask applied to ds
    dweight, dbias, dx_bias = sums over rows of dy * n, dy, dx

(Ba, Kiros, Hinton, "Layer Normalization", 2016.) Each program of the backward walks over rows and keeps its own sums,
written once as a row of float32 partials that torch adds up in a fixed order: no atomics, the same bits every time.

Bytes a row, e the size of an element, beside 12 of statistics:
    forward   read x, residual; write y, s:     4 C e  (plain LayerNorm: 2 C e)
    backward  read dy, dsum, s; write ds:       4 C e  (plain LayerNorm: 3 C e; dx apart from ds under dropout: 5 C e)
"""

import torch
import triton
import triton.language as tl

from .launch import accumulator, dropout_numbers, multiprocessors, statistics_dtype
from .philox import keep_mask

MAX_COLUMNS = 4096  # a row is held in registers; with dropout the backward of 8192 columns spills on capability 12.0

# Registers a thread: six and five blocks of 128 threads to a multiprocessor. Left alone, ptxas aims at fewer for some
# widths and capabilities and spills 8 bytes for it.
_FORWARD_REGISTERS, _BACKWARD_REGISTERS = 80, 96

_SITE = tl.constexpr(1)  # this file's dropout, in the counter of philox.keep_mask


def _tiles(columns: int, backward: bool) -> tuple[int, int, int]:
    """BLOCK_M, BLOCK_C and num_warps for rows of `columns`: 16 elements a thread, 8 in the backward, which keeps three
    sums beside them. Not measured on any GPU yet."""
    block_c = max(16, triton.next_power_of_2(columns))
    elements = max(block_c, 1024 if backward else 2048)
    return elements // block_c, block_c, elements // 32 // (8 if backward else 16)


@triton.jit
def _layer_norm_fwd_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    x_bias_ptr,
    seed_ptr,
    y_ptr,  # (M, C)
    sum_ptr,  # (M, C), only with a residual
    stats_ptr,  # (3, M): m, c, rstd
    M,
    stride_xm,
    stride_xc,
    stride_rm,
    stride_rc,
    eps,
    threshold,
    keep_scale,
    C: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_X_BIAS: tl.constexpr,
    DROPOUT: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_C)
    in_rows = rows < M
    in_cols = cols < C
    mask = in_rows[:, None] & in_cols[None, :]
    rows64 = rows.to(tl.int64)  # a row's offset passes 2**31 long before its number does

    s = tl.load(x_ptr + rows64[:, None] * stride_xm + cols[None, :] * stride_xc, mask, 0.0).to(
        ACC
    )  # [BLOCK_M, BLOCK_C]
    if HAS_X_BIAS:
        s += tl.load(x_bias_ptr + cols, in_cols, 0.0).to(ACC)[None, :]
    if DROPOUT:
        keep = keep_mask(tl.load(seed_ptr), rows, 0, 0, _SITE, threshold, BLOCK_M, BLOCK_C)
        s = tl.where(keep, s * keep_scale, 0.0)
    if HAS_RESIDUAL:
        s += tl.load(residual_ptr + rows64[:, None] * stride_rm + cols[None, :] * stride_rc, mask, 0.0).to(ACC)
        rounded = s.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + rows64[:, None] * C + cols[None, :], rounded, mask)
        s = rounded.to(ACC)

    mean = tl.sum(s, axis=1) / C
    centred = tl.where(in_cols[None, :], s - mean[:, None], 0.0)
    correction = tl.sum(centred, axis=1) / C
    centred = tl.where(in_cols[None, :], centred - correction[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / C + eps)
    tl.store(stats_ptr + rows, mean, in_rows)
    tl.store(stats_ptr + M + rows, correction, in_rows)
    tl.store(stats_ptr + 2 * M + rows, rstd, in_rows)

    y = centred * rstd[:, None] * tl.load(weight_ptr + cols, in_cols, 0.0).to(ACC)[None, :]
    if HAS_BIAS:
        y += tl.load(bias_ptr + cols, in_cols, 0.0).to(ACC)[None, :]
    tl.store(y_ptr + rows64[:, None] * C + cols[None, :], y.to(y_ptr.dtype.element_ty), mask)


@triton.jit
def _layer_norm_bwd_kernel(
    dy_ptr,
    dsum_ptr,
    sum_ptr,
    weight_ptr,
    stats_ptr,  # (3, M)
    seed_ptr,
    ds_ptr,  # (M, C)
    dx_ptr,  # (M, C), only where it differs from ds
    partials_ptr,  # (2 or 3, programs, C): dweight, dbias, dx_bias
    M,
    stride_gm,
    stride_gc,
    stride_dm,
    stride_dc,
    stride_sm,
    stride_sc,
    threshold,
    keep_scale,
    C: tl.constexpr,
    HAS_DSUM: tl.constexpr,
    NEEDS_DX: tl.constexpr,
    NEEDS_DX_BIAS: tl.constexpr,
    DROPOUT: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    program, programs = tl.program_id(0), tl.num_programs(0)
    cols = tl.arange(0, BLOCK_C)
    in_cols = cols < C
    dweight = tl.zeros([BLOCK_M, BLOCK_C], ACC)
    dbias = tl.zeros([BLOCK_M, BLOCK_C], ACC)
    dx_bias = tl.zeros([BLOCK_M, BLOCK_C], ACC)
    if DROPOUT:
        seed = tl.load(seed_ptr)

    for start in range(program * BLOCK_M, M, programs * BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        in_rows = rows < M
        mask = in_rows[:, None] & in_cols[None, :]
        rows64 = rows.to(tl.int64)
        dy = tl.load(dy_ptr + rows64[:, None] * stride_gm + cols[None, :] * stride_gc, mask, 0.0).to(ACC)
        s = tl.load(sum_ptr + rows64[:, None] * stride_sm + cols[None, :] * stride_sc, mask, 0.0).to(ACC)
        mean = tl.load(stats_ptr + rows, in_rows, 0.0)
        correction = tl.load(stats_ptr + M + rows, in_rows, 0.0)
        rstd = tl.load(stats_ptr + 2 * M + rows, in_rows, 0.0)

        n = tl.where(mask, ((s - mean[:, None]) - correction[:, None]) * rstd[:, None], 0.0)
        dweight += dy * n
        dbias += dy
        g = dy * tl.load(weight_ptr + cols, in_cols, 0.0).to(ACC)[None, :]
        avg_g = tl.sum(g, axis=1) / C
        avg_gn = tl.sum(g * n, axis=1) / C
        ds = rstd[:, None] * ((g - avg_g[:, None]) - n * avg_gn[:, None])
        if HAS_DSUM:
            ds += tl.load(dsum_ptr + rows64[:, None] * stride_dm + cols[None, :] * stride_dc, mask, 0.0).to(ACC)
        tl.store(ds_ptr + rows64[:, None] * C + cols[None, :], ds.to(ds_ptr.dtype.element_ty), mask)

        dx = ds
        if DROPOUT:
            keep = keep_mask(seed, rows, 0, 0, _SITE, threshold, BLOCK_M, BLOCK_C)
            dx = tl.where(keep, ds * keep_scale, 0.0)
        if NEEDS_DX:
            tl.store(dx_ptr + rows64[:, None] * C + cols[None, :], dx.to(dx_ptr.dtype.element_ty), mask)
        if NEEDS_DX_BIAS:
            dx_bias += tl.where(mask, dx, 0.0)

    offsets = program * C + cols
    tl.store(partials_ptr + offsets, tl.sum(dweight, axis=0), in_cols)
    tl.store(partials_ptr + programs * C + offsets, tl.sum(dbias, axis=0), in_cols)
    if NEEDS_DX_BIAS:
        tl.store(partials_ptr + 2 * programs * C + offsets, tl.sum(dx_bias, axis=0), in_cols)


def layer_norm_fwd(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    x_bias: torch.Tensor | None,
    seed: torch.Tensor | None,
    eps: float,
    dropout_p: float,
    residual_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, residual (..., C) -> y (..., C) in x's dtype, s (..., C) in residual_dtype (empty with no residual) and
    stats (3, rows). seed: (1,) int64, needed where dropout_p > 0."""
    y, s, stats = layer_norm_fwd_outputs(x, residual, weight, bias, x_bias, seed, eps, dropout_p, residual_dtype)
    columns = x.shape[-1]
    x_rows = x.reshape(-1, columns)
    residual_rows = x_rows if residual is None else residual.reshape(-1, columns)
    block_m, block_c, num_warps = _tiles(columns, backward=False)
    if x_rows.shape[0]:
        _layer_norm_fwd_kernel[(triton.cdiv(x_rows.shape[0], block_m),)](
            x_rows,
            residual_rows,
            weight.contiguous(),
            weight if bias is None else bias.contiguous(),
            weight if x_bias is None else x_bias.contiguous(),
            stats if seed is None else seed,
            y,
            y if residual is None else s,
            stats,
            x_rows.shape[0],
            *x_rows.stride(),
            *residual_rows.stride(),
            eps,
            *dropout_numbers(dropout_p),
            C=columns,
            HAS_RESIDUAL=residual is not None,
            HAS_BIAS=bias is not None,
            HAS_X_BIAS=x_bias is not None,
            DROPOUT=dropout_p > 0,
            ACC=accumulator(x),
            BLOCK_M=block_m,
            BLOCK_C=block_c,
            num_warps=num_warps,
            maxnreg=_FORWARD_REGISTERS,
        )
    return y, s, stats


def layer_norm_fwd_outputs(x, residual, weight, bias, x_bias, seed, eps, dropout_p, residual_dtype):
    """What layer_norm_fwd allocates: shapes, dtypes and strides alone, so it serves as its fake too."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    s = torch.empty((0,) if residual is None else x.shape, dtype=residual_dtype, device=x.device)
    rows = x.numel() // x.shape[-1]
    return y, s, torch.empty((3, rows), dtype=statistics_dtype(x), device=x.device)


def layer_norm_bwd(
    dy: torch.Tensor,
    dsum: torch.Tensor | None,
    s: torch.Tensor,
    weight: torch.Tensor,
    stats: torch.Tensor,
    seed: torch.Tensor | None,
    dropout_p: float,
    x_dtype: torch.dtype,
    needs_x_bias: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dy, dsum, s (..., C) -> ds (..., C) in s's dtype, dx (..., C) in x_dtype (empty where it equals ds) and
    (2 or 3, C) float32: the gradients of weight, bias and, if needs_x_bias, x_bias."""
    ds, dx, sums = layer_norm_bwd_outputs(dy, dsum, s, weight, stats, seed, dropout_p, x_dtype, needs_x_bias)
    columns = s.shape[-1]
    rows = s.numel() // columns
    if rows == 0:
        return ds, dx, sums.zero_()
    dy_rows, s_rows = dy.reshape(-1, columns), s.reshape(-1, columns)
    dsum_rows = dy_rows if dsum is None else dsum.reshape(-1, columns)
    block_m, block_c, num_warps = _tiles(columns, backward=True)
    programs = min(triton.cdiv(rows, block_m), _programs(s))
    partials = torch.empty((sums.shape[0], programs, columns), dtype=stats.dtype, device=s.device)
    _layer_norm_bwd_kernel[(programs,)](
        dy_rows,
        dsum_rows,
        s_rows,
        weight.contiguous(),
        stats,
        stats if seed is None else seed,
        ds,
        dx,
        partials,
        rows,
        *dy_rows.stride(),
        *dsum_rows.stride(),
        *s_rows.stride(),
        *dropout_numbers(dropout_p),
        C=columns,
        HAS_DSUM=dsum is not None,
        NEEDS_DX=dx.numel() > 0,
        NEEDS_DX_BIAS=needs_x_bias,
        DROPOUT=dropout_p > 0,
        ACC=accumulator(s),
        BLOCK_M=block_m,
        BLOCK_C=block_c,
        num_warps=num_warps,
        maxnreg=_BACKWARD_REGISTERS,
    )
    torch.sum(partials, dim=1, out=sums)
    return ds, dx, sums


def layer_norm_bwd_outputs(dy, dsum, s, weight, stats, seed, dropout_p, x_dtype, needs_x_bias):
    """What layer_norm_bwd allocates: shapes, dtypes and strides alone, so it serves as its fake too."""
    ds = torch.empty(s.shape, dtype=s.dtype, device=s.device)
    apart = dropout_p > 0 or x_dtype != s.dtype
    dx = torch.empty(s.shape if apart else (0,), dtype=x_dtype, device=s.device)
    return ds, dx, torch.empty((3 if needs_x_bias else 2, s.shape[-1]), dtype=stats.dtype, device=s.device)


def _programs(x: torch.Tensor) -> int:
    """How many programs of the backward share the rows: enough to fill the card, with partials that stay small."""
    return 4 * (multiprocessors(x) or 1)  # in the interpreter 4, so that walking over rows is tested
