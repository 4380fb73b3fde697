"""A linear layer over the few rows of a decoding step, and the LayerNorm before it or the GELU after it in one launch.

    y = act(n wᵀ + b)        n = x, or LayerNorm(s) of the stream s = x + branch + branch_bias, which is written too

All the time goes to reading w, N K e bytes, so there is little for tensor cores to do: a program reads a few of w's
rows in long pieces, while it makes n for itself, which costs less than a launch of its own would. A library's matmul of
one row takes longer for GPT-2's layers on an H200, and four launches a layer instead of seven leave fewer gaps.

Rounded where the kernels that it stands for round: s in the stream's dtype, n and the pre-activation in w's.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .gelu import gelu
from .launch import accumulator, cdiv, launch, next_power_of_2

MAX_ROWS = 4  # every row costs as many multiplications again; only one row has been measured
MAX_NORMED = 4096  # channels under a LayerNorm: a row is held in registers


class Tiles(NamedTuple):
    block_n: int  # rows of w
    block_k: int
    num_warps: int


def _tiles(channels: int, normed: bool) -> Tiles:
    """Measured on an H200 for the layers of GPT-2 124M, one row: 2.3 to 4.2 µs, where cuBLAS takes 4.3 to 7.6 without
    the norm and the GELU; the head 25 µs, cuBLAS 34."""
    block_k = max(16, next_power_of_2(channels))
    if normed:
        return Tiles(max(1, min(4, 4096 // block_k)), block_k, 4)
    return Tiles(2, min(2048, block_k), 4)


@triton.jit
def _row(pointer, cols, there, ACC: tl.constexpr):
    return tl.load(pointer + cols, there, 0.0).to(ACC)


@triton.jit
def _linear_kernel(
    x_ptr,  # (M, K)
    branch_ptr,  # (M, K), or None
    branch_bias_ptr,  # (K,), or None
    norm_weight_ptr,  # (K,), or None: no norm
    norm_bias_ptr,  # (K,), or None
    w_ptr,  # (N, K)
    b_ptr,  # (N,), or None
    stream_ptr,  # (M, K), written where there is a branch
    y_ptr,  # (M, N)
    N,
    stride_wn,
    eps,
    M: tl.constexpr, K: tl.constexpr, GELU: tl.constexpr, ACC: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    units = program * BLOCK_N + tl.arange(0, BLOCK_N)
    dtype: tl.constexpr = w_ptr.dtype.element_ty
    w_rows = w_ptr + units.to(tl.int64)[:, None] * stride_wn
    for m in tl.static_range(M):
        products = tl.zeros([BLOCK_N, BLOCK_K], ACC)
        for start in tl.static_range(0, K, BLOCK_K):
            cols = start + tl.arange(0, BLOCK_K)
            there = cols < K
            w = tl.load(w_rows + cols[None, :], (units < N)[:, None] & there[None, :], 0.0).to(ACC)
            x = _row(x_ptr + m * K, cols, there, ACC)
            if branch_ptr is not None:
                if branch_bias_ptr is not None:
                    x += _row(branch_ptr + m * K, cols, there, ACC) + _row(branch_bias_ptr, cols, there, ACC)
                else:
                    x += _row(branch_ptr + m * K, cols, there, ACC)
                rounded = x.to(stream_ptr.dtype.element_ty)
                tl.store(stream_ptr + m * K + cols, rounded, there & (program == 0))
                x = rounded.to(ACC)
            if norm_weight_ptr is not None:
                mean = tl.sum(x, axis=0) / K
                centred = tl.where(there, x - mean, 0.0)
                centred = tl.where(there, centred - tl.sum(centred, axis=0) / K, 0.0)
                x = centred * (1.0 / tl.sqrt(tl.sum(centred * centred, axis=0) / K + eps))
                x *= _row(norm_weight_ptr, cols, there, ACC)
                if norm_bias_ptr is not None:
                    x += _row(norm_bias_ptr, cols, there, ACC)
                x = x.to(dtype).to(ACC)
            products += w * x[None, :]
        total = tl.sum(products, axis=1)
        if b_ptr is not None:
            total += tl.load(b_ptr + units, units < N, 0.0).to(ACC)
        if GELU != "":
            total = gelu(total.to(dtype).to(ACC), GELU == "tanh")
        tl.store(y_ptr + m * N + units, total.to(dtype).to(y_ptr.dtype.element_ty), units < N)


def fits(rows: int, w: torch.Tensor) -> bool:
    """Whether so many rows and this weight (N, K) are for these kernels."""
    return 0 < rows <= MAX_ROWS and w.stride(1) == 1 and 0 < w.shape[1] <= MAX_NORMED * 4


def linear(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None, dtype: torch.dtype | None = None) -> torch.Tensor:
    """x (M, K), w (N, K), b (N,) -> (M, N), rounded to w's dtype and given in it or in `dtype`."""
    return _launch(x, None, None, None, None, 0.0, w, b, "", dtype)[0]


def norm_linear(
    x: torch.Tensor,
    branch: torch.Tensor | None,
    branch_bias: torch.Tensor | None,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor | None,
    eps: float,
    w: torch.Tensor,
    b: torch.Tensor | None,
    gelu: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x, branch (M, K), w (N, K) -> y (M, N) in w's dtype, and the stream (M, K) in x's. gelu: "tanh", "none" for the
    exact one, or "" for no GELU."""
    return _launch(x, branch, branch_bias, norm_weight, norm_bias, eps, w, b, gelu)


def _dense(vector: torch.Tensor | None) -> torch.Tensor | None:
    return None if vector is None else vector.contiguous()


def _launch(x, branch, branch_bias, norm_weight, norm_bias, eps, w, b, gelu, dtype=None):
    (rows, channels), units = x.shape, w.shape[0]
    x = x.contiguous()
    y = torch.empty((rows, units), dtype=dtype or w.dtype, device=x.device)
    stream = x if branch is None else torch.empty_like(x)
    tiles = _tiles(channels, norm_weight is not None)
    launch(
        _linear_kernel,
        (cdiv(units, tiles.block_n),),
        x,
        None if branch is None else branch.contiguous(),
        None if branch is None else _dense(branch_bias),
        _dense(norm_weight),
        _dense(norm_bias),
        w,
        _dense(b),
        stream,
        y,
        units,
        w.stride(0),
        eps,
        M=rows,
        K=channels,
        GELU=gelu,
        ACC=accumulator(x),
        BLOCK_N=tiles.block_n,
        BLOCK_K=tiles.block_k,
        num_warps=tiles.num_warps,
    )
    return y, stream
