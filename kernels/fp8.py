"""Copies in 8 bits: what a kernel that makes a tensor calls to write one beside it, and passes that only cast.

    copy = round(cut(x / scale))     cut to the format's largest; NaN of what is not finite

The scale is a power of two and its inverse is given, so x / scale is exact. Each program also notes the largest finite
magnitude that it saw, at one of PLACES places. A maximum is the same in whatever order it is taken, so the atomic one
keeps a run's bits.

Bytes an element: 1 written where the tensor is made, 3 in a pass of its own over halves.
"""

import torch
import triton
import triton.language as tl

from .launch import cdiv, launch

PLACES = 64

_PLACES = tl.constexpr(PLACES)
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def eight_bits(x, inverse, dtype: tl.constexpr):
    """The copy of x, in float8e4nv or float8e5."""
    LARGEST: tl.constexpr = 448.0 if dtype == tl.float8e4nv else 57344.0
    cut = tl.minimum(tl.maximum(x * inverse, -LARGEST), LARGEST)
    finite = tl.abs(x) < float("inf")
    if _INTERPRETED:
        return _interpreted(cut, finite, dtype)
    return tl.where(finite, cut, float("nan")).to(dtype)


@triton.jit
def _interpreted(x, finite, dtype: tl.constexpr):
    """The same in Triton's interpreter, whose cast drops digits below the least exponent, a carry into the next one,
    and NaN. Here x is rounded before, half to even, by adding a number whose last digit is x's last one in the dtype.
    """
    LEAST: tl.constexpr = 0.015625 if dtype == tl.float8e4nv else 6.103515625e-05  # 2**-6, 2**-14
    DIGITS: tl.constexpr = 1572864.0 if dtype == tl.float8e4nv else 3145728.0  # 1.5 2**20, 1.5 2**21
    bits = x.to(tl.int32, bitcast=True)
    power = (bits & 0x7F800000).to(tl.float32, bitcast=True)
    large = tl.maximum(power, LEAST) * DIGITS
    positive = (tl.abs(x) + large) - large
    x = (positive.to(tl.int32, bitcast=True) | (bits & -0x80000000)).to(tl.float32, bitcast=True)
    byte = tl.where(finite, x.to(dtype).to(tl.uint8, bitcast=True), 0x7F).to(tl.uint8)
    return byte.to(dtype, bitcast=True)


@triton.jit
def magnitudes(x, mask):
    return tl.where(mask & (tl.abs(x) < float("inf")), tl.abs(x), 0.0)


@triton.jit
def note(amax, x):
    """The largest of x, all of it at least 0."""
    tl.atomic_max(amax + tl.program_id(0) % _PLACES, tl.max(tl.ravel(x), axis=0), sem="relaxed")


@triton.jit(do_not_specialize_on_alignment=["inverse_ptr"])  # one of many in a row
def _cast_kernel(
    x_ptr,  # (N,)
    y8_ptr,  # (N,), or None where only amax is asked for
    inverse_ptr,  # (), or None
    amax_ptr,  # (PLACES,)
    N,
    BLOCK: tl.constexpr,
):
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + places, places < N, 0.0).to(tl.float32)
    note(amax_ptr, magnitudes(x, places < N))
    if y8_ptr is not None:
        tl.store(y8_ptr + places, eight_bits(x, tl.load(inverse_ptr), y8_ptr.dtype.element_ty), places < N)


@triton.jit(do_not_specialize_on_alignment=["inverse_ptr"])  # one of many in a row
def _cast_weight_kernel(
    w_ptr,  # (N, K)
    w8_ptr,  # (N or more, K)
    turned_ptr,  # (K, N or more), or None
    inverse_ptr,  # ()
    N,
    K,
    stride_wn,
    stride_wk,
    stride_tk,
    BLOCK: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = (rows < N)[:, None] & (cols < K)[None, :]
    rows64, cols64 = rows.to(tl.int64)[:, None], cols.to(tl.int64)[None, :]
    w = tl.load(w_ptr + rows64 * stride_wn + cols64 * stride_wk, there, 0.0).to(tl.float32)
    inverse = tl.load(inverse_ptr)
    tl.store(w8_ptr + rows64 * K + cols64, eight_bits(w, inverse, w8_ptr.dtype.element_ty), there)
    if turned_ptr is not None:  # turned before it is cut: of 8 bits a quarter came out as zeros (H100, Triton 3.6.0)
        turned = eight_bits(tl.trans(w), inverse, w8_ptr.dtype.element_ty)
        places = cols.to(tl.int64)[:, None] * stride_tk + rows[None, :]
        tl.store(turned_ptr + places, turned, (cols < K)[:, None] & (rows < N)[None, :])


def cast(x: torch.Tensor, y8: torch.Tensor | None, inverse: torch.Tensor | None, amax: torch.Tensor) -> None:
    """Write the copy y8 of x, both in one piece and of one shape, and note x's magnitudes in amax (PLACES,); without a
    y8 note them alone."""
    if x.numel():
        launch(_cast_kernel, (cdiv(x.numel(), 2048),), x, y8, inverse, amax, x.numel(), BLOCK=2048, num_warps=4)


def cast_weight(w: torch.Tensor, w8: torch.Tensor, turned: torch.Tensor | None, inverse: torch.Tensor) -> None:
    """Write the copy w8 (N or more, K) of w (N, K), any strides, and its transpose (K, N or more)."""
    rows, columns = w.shape
    stride = 0 if turned is None else turned.stride(0)
    grid = (cdiv(rows, 64), cdiv(columns, 64))
    launch(_cast_weight_kernel, grid, w, w8, turned, inverse, rows, columns, *w.stride(), stride, BLOCK=64, num_warps=4)
