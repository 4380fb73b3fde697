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
    forward   read x, residual; write y, s:     4 C e  (plain LayerNorm: 2 C e; y's copy in 8 bits: C more)
    backward  read dy, dsum, s; write ds:       4 C e  (plain LayerNorm: 3 C e; dx apart from ds under dropout: 5 C e;
              past ONE_PASS_COLUMNS, wider than any GPT-2, dx and the sums take another pass over dy, s and ds)
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .fp8 import eight_bits, magnitudes, note
from .launch import accumulator, cdiv, dropout_numbers, launch, multiprocessors, next_power_of_2, statistics_dtype
from .philox import keep_mask

MAX_COLUMNS = 16384  # a row is held in registers
ONE_PASS_COLUMNS = 4096  # of the backward, whose sums are held beside it; with dropout 8192 spill on capability 12.0

_SITE = tl.constexpr(1)  # this file's dropout, in the counter of philox.keep_mask


class Tiles(NamedTuple):
    block_m: int
    block_c: int
    num_warps: int
    stages: int  # rows of the backward that are on their way at once
    registers: int  # a thread; left alone, ptxas aims at fewer for some widths and capabilities, and spills for it


def _tiles(columns: int, dtype: torch.dtype, backward: bool) -> Tiles:
    """A block of rows of `columns`: 16 elements a thread, 8 in the backward of wide rows that keeps three sums beside
    them. Registers for three to six blocks of 128 threads to a multiprocessor; the widest rows take all of one.

    Measured on an H200 at 768 columns in bfloat16: the forward is as fast with six of seven tiles (87% of a copy's
    rate); the backward waits for memory unless rows are loaded two turns ahead (122 µs without, 69 with).
    """
    block_c = max(16, next_power_of_2(columns))
    if block_c > 8192:
        return Tiles(1, block_c, 32, 1, 64) if dtype.itemsize > 2 else Tiles(1, block_c, 16, 1, 128)
    if not backward or block_c > ONE_PASS_COLUMNS:
        elements = max(block_c, 2048)
        return Tiles(elements // block_c, block_c, elements // 512, 1, 96 if backward else 80)
    if block_c <= 1024:
        return Tiles(min(8, 2048 // block_c), block_c, 4, 3, 168)
    return Tiles(1, block_c, block_c // 256, 3 if block_c * dtype.itemsize <= 8192 else 2, 128)


@triton.jit
def _load_rows(
    pointer, rows, stride_m, stride_c, M, C: tl.constexpr, ACC: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """[BLOCK_M, C] of a matrix of any strides, zero outside. A row's offset passes 2**31 long before its number."""
    cols = tl.arange(0, BLOCK_C)
    places = rows.to(tl.int64)[:, None] * stride_m + cols.to(tl.int64)[None, :] * stride_c
    return tl.load(pointer + places, (rows < M)[:, None] & (cols < C)[None, :], 0.0).to(ACC)


@triton.jit
def _store_rows(pointer, values, rows, M, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """[BLOCK_M, C] into a matrix (M, C) in one piece."""
    cols = tl.arange(0, BLOCK_C)
    places = rows.to(tl.int64)[:, None] * C + cols[None, :]
    tl.store(pointer + places, values.to(pointer.dtype.element_ty), (rows < M)[:, None] & (cols < C)[None, :])


@triton.jit
def _load_row(pointer, C: tl.constexpr, ACC: tl.constexpr, BLOCK_C: tl.constexpr):
    """[1, C] of a vector, zero past C."""
    cols = tl.arange(0, BLOCK_C)
    return tl.load(pointer + cols, cols < C, 0.0).to(ACC)[None, :]


@triton.jit
def _normed(s, stats_ptr, rows, M, ACC: tl.constexpr):
    """(s - mean) rstd, and rstd [BLOCK_M]; rows past M give zeros."""
    mean = tl.load(stats_ptr + rows, rows < M, 0.0)
    correction = tl.load(stats_ptr + M + rows, rows < M, 0.0)
    rstd = tl.load(stats_ptr + 2 * M + rows, rows < M, 0.0)
    return ((s - mean[:, None]) - correction[:, None]) * rstd[:, None], rstd


@triton.jit(do_not_specialize_on_alignment=["inverse"])  # one of many in a row
def _layer_norm_fwd_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, x_bias_ptr, seed_ptr,
    y_ptr,  # (M, C)
    sum_ptr,  # (M, C), only with a residual
    stats_ptr,  # (3, M): m, c, rstd
    M,
    stride_xm, stride_xc, stride_rm, stride_rc,
    eps, threshold, keep_scale,
    C: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_X_BIAS: tl.constexpr,
    DROPOUT: tl.constexpr, ACC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
    y8=None,  # (M, C) in 8 bits, with the two that follow
    inverse=None, amax=None,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_rows, in_cols = rows < M, tl.arange(0, BLOCK_C) < C

    s = _load_rows(x_ptr, rows, stride_xm, stride_xc, M, C, ACC, BLOCK_C)  # [BLOCK_M, BLOCK_C]
    if HAS_X_BIAS:
        s += _load_row(x_bias_ptr, C, ACC, BLOCK_C)
    if DROPOUT:
        keep = keep_mask(tl.load(seed_ptr), rows, 0, 0, _SITE, threshold, BLOCK_M, BLOCK_C)
        s = tl.where(keep, s * keep_scale, 0.0)
    if HAS_RESIDUAL:
        s += _load_rows(residual_ptr, rows, stride_rm, stride_rc, M, C, ACC, BLOCK_C)
        rounded = s.to(sum_ptr.dtype.element_ty)
        _store_rows(sum_ptr, rounded, rows, M, C, BLOCK_C)
        s = rounded.to(ACC)

    mean = tl.sum(s, axis=1) / C
    centred = tl.where(in_cols[None, :], s - mean[:, None], 0.0)
    correction = tl.sum(centred, axis=1) / C
    centred = tl.where(in_cols[None, :], centred - correction[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / C + eps)
    tl.store(stats_ptr + rows, mean, in_rows)
    tl.store(stats_ptr + M + rows, correction, in_rows)
    tl.store(stats_ptr + 2 * M + rows, rstd, in_rows)

    y = centred * rstd[:, None] * _load_row(weight_ptr, C, ACC, BLOCK_C)
    if HAS_BIAS:
        y += _load_row(bias_ptr, C, ACC, BLOCK_C)
    _store_rows(y_ptr, y, rows, M, C, BLOCK_C)
    if y8 is not None:  # of y as it was rounded
        y = y.to(y_ptr.dtype.element_ty).to(ACC)
        note(amax, magnitudes(y, in_rows[:, None] & in_cols[None, :]))
        _store_rows(y8, eight_bits(y, tl.load(inverse), y8.dtype.element_ty), rows, M, C, BLOCK_C)


@triton.jit
def _layer_norm_bwd_kernel(
    dy_ptr, dsum_ptr, sum_ptr, weight_ptr,
    stats_ptr,  # (3, M)
    seed_ptr,
    ds_ptr,  # (M, C)
    dx_ptr,  # (M, C), only where it differs from ds
    partials_ptr,  # (2 or 3, programs, C): dweight, dbias, dx_bias
    M,
    stride_gm, stride_gc, stride_dm, stride_dc, stride_sm, stride_sc,
    threshold, keep_scale,
    C: tl.constexpr, HAS_DSUM: tl.constexpr, NEEDS_DX: tl.constexpr, NEEDS_DX_BIAS: tl.constexpr,
    SUMS: tl.constexpr, DROPOUT: tl.constexpr, ACC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """SUMS: the sums over rows too; else _layer_norm_sums_kernel makes them, and dx."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    cols = tl.arange(0, BLOCK_C)
    if SUMS:
        dweight = tl.zeros([BLOCK_M, BLOCK_C], ACC)
        dbias = tl.zeros([BLOCK_M, BLOCK_C], ACC)
        dx_bias = tl.zeros([BLOCK_M, BLOCK_C], ACC)
    if DROPOUT:
        seed = tl.load(seed_ptr)

    for start in tl.range(program * BLOCK_M, M, programs * BLOCK_M, num_stages=STAGES):
        rows = start + tl.arange(0, BLOCK_M)
        mask = (rows < M)[:, None] & (cols < C)[None, :]
        dy = _load_rows(dy_ptr, rows, stride_gm, stride_gc, M, C, ACC, BLOCK_C)
        n, rstd = _normed(
            _load_rows(sum_ptr, rows, stride_sm, stride_sc, M, C, ACC, BLOCK_C), stats_ptr, rows, M, ACC
        )  # fmt: skip
        if SUMS:  # what n holds past C meets dy's zeros
            dweight += dy * n
            dbias += dy
        g = dy * _load_row(weight_ptr, C, ACC, BLOCK_C)
        avg_g = tl.sum(g, axis=1) / C
        avg_gn = tl.sum(g * n, axis=1) / C
        ds = rstd[:, None] * ((g - avg_g[:, None]) - n * avg_gn[:, None])
        if HAS_DSUM:
            ds += _load_rows(dsum_ptr, rows, stride_dm, stride_dc, M, C, ACC, BLOCK_C)
        _store_rows(ds_ptr, ds, rows, M, C, BLOCK_C)

        dx = ds
        if DROPOUT:
            keep = keep_mask(seed, rows, 0, 0, _SITE, threshold, BLOCK_M, BLOCK_C)
            dx = tl.where(keep, ds * keep_scale, 0.0)
        if NEEDS_DX:
            _store_rows(dx_ptr, dx, rows, M, C, BLOCK_C)
        if SUMS and NEEDS_DX_BIAS:
            dx_bias += tl.where(mask, dx, 0.0)

    if SUMS:
        offsets = program * C + cols
        tl.store(partials_ptr + offsets, tl.sum(dweight, axis=0), cols < C)
        tl.store(partials_ptr + programs * C + offsets, tl.sum(dbias, axis=0), cols < C)
        if NEEDS_DX_BIAS:
            tl.store(partials_ptr + 2 * programs * C + offsets, tl.sum(dx_bias, axis=0), cols < C)


@triton.jit
def _layer_norm_sums_kernel(
    dy_ptr, sum_ptr,
    stats_ptr,  # (3, M)
    seed_ptr,
    ds_ptr,  # (M, C)
    dx_ptr,  # (M, C), only where it differs from ds
    partials_ptr,  # (2 or 3, programs, C): dweight, dbias, dx_bias
    M, C,
    stride_gm, stride_gc, stride_sm, stride_sc,
    threshold, keep_scale,
    NEEDS_DX: tl.constexpr, NEEDS_DX_BIAS: tl.constexpr, DROPOUT: tl.constexpr, ACC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dx and the sums over rows of a block of columns, where a whole row and all this do not fit the registers."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    first = tl.program_id(1) * BLOCK_C
    cols = first + tl.arange(0, BLOCK_C)
    dweight = tl.zeros([BLOCK_M, BLOCK_C], ACC)
    dbias = tl.zeros([BLOCK_M, BLOCK_C], ACC)
    dx_bias = tl.zeros([BLOCK_M, BLOCK_C], ACC)
    for start in range(program * BLOCK_M, M, programs * BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        mask = (rows < M)[:, None] & (cols < C)[None, :]
        rows64, cols64 = rows.to(tl.int64)[:, None], cols.to(tl.int64)[None, :]
        dy = tl.load(dy_ptr + rows64 * stride_gm + cols64 * stride_gc, mask, 0.0).to(ACC)
        s = tl.load(sum_ptr + rows64 * stride_sm + cols64 * stride_sc, mask, 0.0).to(ACC)
        n, _ = _normed(s, stats_ptr, rows, M, ACC)
        dweight += dy * n  # dy is zero outside
        dbias += dy
        if NEEDS_DX or NEEDS_DX_BIAS:
            dx = tl.load(ds_ptr + rows64 * C + cols64, mask, 0.0).to(ACC)
            if DROPOUT:
                keep = keep_mask(tl.load(seed_ptr), rows, first, 0, _SITE, threshold, BLOCK_M, BLOCK_C)
                dx = tl.where(keep, dx * keep_scale, 0.0)
            if NEEDS_DX:
                tl.store(dx_ptr + rows64 * C + cols64, dx.to(dx_ptr.dtype.element_ty), mask)
            dx_bias += dx
    offsets = program * C + cols
    tl.store(partials_ptr + offsets, tl.sum(dweight, axis=0), cols < C)
    tl.store(partials_ptr + programs * C + offsets, tl.sum(dbias, axis=0), cols < C)
    if NEEDS_DX_BIAS:
        tl.store(partials_ptr + 2 * programs * C + offsets, tl.sum(dx_bias, axis=0), cols < C)


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
    return copied_layer_norm_fwd(x, residual, weight, bias, x_bias, seed, eps, dropout_p, residual_dtype)


def copied_layer_norm_fwd(
    x, residual, weight, bias, x_bias, seed, eps: float, dropout_p: float, residual_dtype: torch.dtype, **copy
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """layer_norm_fwd. copy: y8 (rows, C) in 8 bits, which is written, the inverse of its scale, and amax, where y's
    magnitudes are noted; or nothing."""
    y, s, stats = layer_norm_fwd_outputs(x, residual, weight, bias, x_bias, seed, eps, dropout_p, residual_dtype)
    columns = x.shape[-1]
    x_rows = x.reshape(-1, columns)
    residual_rows = x_rows if residual is None else residual.reshape(-1, columns)
    tiles = _tiles(columns, x.dtype, backward=False)
    if x_rows.shape[0]:
        launch(
            _layer_norm_fwd_kernel,
            (cdiv(x_rows.shape[0], tiles.block_m),),
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
            BLOCK_M=tiles.block_m,
            BLOCK_C=tiles.block_c,
            **copy,
            num_warps=tiles.num_warps,
            maxnreg=min(tiles.registers + (16 if copy else 0), 2048 // tiles.num_warps),  # of a multiprocessor's
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
    tiles = _tiles(columns, s.dtype, backward=True)
    resident = max(1, 65536 // (32 * tiles.num_warps * tiles.registers))  # blocks, by a multiprocessor's registers
    programs = min(cdiv(rows, tiles.block_m), resident * (multiprocessors(s) or 1))
    one_pass = columns <= ONE_PASS_COLUMNS
    shape = (sums.shape[0], programs, columns)
    partials = torch.empty(shape if one_pass else (0,), dtype=stats.dtype, device=s.device)
    launch(
        _layer_norm_bwd_kernel,
        (programs,),
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
        NEEDS_DX=one_pass and dx.numel() > 0,
        NEEDS_DX_BIAS=one_pass and needs_x_bias,
        SUMS=one_pass,
        DROPOUT=one_pass and dropout_p > 0,
        ACC=accumulator(s),
        BLOCK_M=tiles.block_m,
        BLOCK_C=tiles.block_c,
        STAGES=tiles.stages,
        num_warps=tiles.num_warps,
        maxnreg=tiles.registers,
    )
    if not one_pass:
        partials = _wide_sums(dy_rows, s_rows, stats, seed, ds, dx, dropout_p, needs_x_bias)
    torch.sum(partials, dim=1, out=sums)
    return ds, dx, sums


def layer_norm_bwd_outputs(dy, dsum, s, weight, stats, seed, dropout_p, x_dtype, needs_x_bias):
    """What layer_norm_bwd allocates: shapes, dtypes and strides alone, so it serves as its fake too."""
    ds = torch.empty(s.shape, dtype=s.dtype, device=s.device)
    apart = dropout_p > 0 or x_dtype != s.dtype
    dx = torch.empty(s.shape if apart else (0,), dtype=x_dtype, device=s.device)
    return ds, dx, torch.empty((3 if needs_x_bias else 2, s.shape[-1]), dtype=stats.dtype, device=s.device)


def _wide_sums(dy, s, stats, seed, ds, dx, dropout_p: float, needs_x_bias: bool) -> torch.Tensor:
    """Of rows (M, C) too wide for sums beside them: writes dx if it is not empty, and returns the partial sums
    (2 or 3, programs, C)."""
    rows, columns = dy.shape
    block_m, block_c, num_warps = 4, 512, 4
    across = cdiv(columns, block_c)
    programs = min(cdiv(rows, block_m), max(2, 4 * (multiprocessors(s) or 1) // across))
    partials = torch.empty((3 if needs_x_bias else 2, programs, columns), dtype=stats.dtype, device=s.device)
    launch(
        _layer_norm_sums_kernel,
        (programs, across),
        dy,
        s,
        stats,
        stats if seed is None else seed,
        ds,
        dx,
        partials,
        rows,
        columns,
        *dy.stride(),
        *s.stride(),
        *dropout_numbers(dropout_p),
        NEEDS_DX=dx.numel() > 0,
        NEEDS_DX_BIAS=needs_x_bias,
        DROPOUT=dropout_p > 0,
        ACC=accumulator(s),
        BLOCK_M=block_m,
        BLOCK_C=block_c,
        num_warps=num_warps,
    )
    return partials
