"""The matmuls of the GELU MLP with their elementwise work in the epilogue, while the tile is still in registers.

    forward   pre = x w_inᵀ + b_in,  act = gelu(pre)            writes pre and act, 2 M F elements
    backward  dpre = (dy w_out) gelu'(pre)                      reads pre, writes dpre and its column sums

A matmul followed by an elementwise pass moves M F elements more in the forward, 2 M F in the backward. Programs stay
(there are as many as the card holds at once) and walk over output tiles. kernels/mlp.py takes this road only where
`_MEASURED` says that it won.

On capability 9.0 in bf16, a turn over 32 channels of a 128 by 256 tile issues 82 instructions a warp in the forward, 84
in the backward, and keeps an H100's multiprocessor busy for 512 clocks of its tensor core, 320 of shared memory, 168 of
issue, and 768 of the L2 cache, for each program copies both operands for itself (bench/account.py has the rates). That
allows 633 TFLOP/s at an assumed 1.755 GHz; with the epilogue's instructions after 768 channels, which nothing overlaps,
460 forward and 414 backward. Measured on an H200 at GPT-2 124M's sizes, 32 Ki rows: 384 and 547 µs, where cuBLAS's
matmul (690 TFLOP/s) and an elementwise pass take some 330 and 390 together. So `_MEASURED` is empty for that card, and
will stay so until a tile's operands are shared by several programs (TMA multicast, which Triton does not offer there).

Operands are read through their strides, so a transposed Conv1D weight needs no copy.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .gelu import gelu, gelu_derivative
from .launch import accumulator, capability, cdiv, matmul_precision, multiprocessors, statistics_dtype


class Tiles(NamedTuple):
    block_m: int  # rows of the output
    block_n: int  # hidden units
    block_k: int
    num_warps: int
    num_stages: int
    resident: int  # programs to a multiprocessor


# Where the fused matmul beat cuBLAS followed by the elementwise kernel, by (kernel, capability, C, F, dtype): nowhere,
# where it was measured.
_MEASURED: dict[tuple[str, int, int, int, torch.dtype], Tiles] = {}


def measured_tiles(kernel: str, x: torch.Tensor, hidden: int) -> Tiles | None:
    """Tiles for "fwd" or "bwd" of x (M, C) on its card, None where cuBLAS has not been measured to lose."""
    return _MEASURED.get((kernel, capability(x) or 0, x.shape[1], hidden, x.dtype))


def candidate(dtype: torch.dtype, card: int | None) -> Tiles:
    """Tiles to measure first on a card of this capability (90 is 9.0; None is the interpreter), within 99 KB."""
    if card is None:
        return Tiles(16, 32, 16, 4, 1, 1)
    if dtype == torch.float32:
        return Tiles(64, 64, 16, 8, 2, 2)
    return Tiles(128, 256, 32, 8, 4, 1) if card == 90 else Tiles(128, 128, 32, 8, 3, 1)


@triton.jit
def _place(tile, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """First row and first column of an output tile. Tiles come in bands of 8 rows of tiles, column by column, so that
    the operands of those that run at once stay in the L2 cache."""
    down, across = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    band = tile // (8 * across)
    height = tl.minimum(down - 8 * band, 8)
    within = tile % (8 * across)
    return (8 * band + within % height) * BLOCK_M, within // height * BLOCK_N


@triton.jit
def _product(
    a_ptr, b_ptr, first_row, first_col, M, N, K,
    stride_am, stride_ak, stride_bk, stride_bn,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """A tile of a (M, K) times b (K, N): [BLOCK_M, BLOCK_N]."""
    rows, cols, ks = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    a_ptr += tl.cast(first_row, tl.int64) * stride_am
    b_ptr += tl.cast(first_col, tl.int64) * stride_bn
    a_places = rows[:, None] * stride_am + ks[None, :] * stride_ak
    b_places = ks[:, None] * stride_bk + cols[None, :] * stride_bn
    in_rows, in_cols = first_row + rows[:, None] < M, first_col + cols[None, :] < N
    total = tl.zeros([BLOCK_M, BLOCK_N], ACC)
    for k in range(0, K, BLOCK_K):
        if EVEN_K:
            a = tl.load(a_ptr + a_places, in_rows, 0.0)
            b = tl.load(b_ptr + b_places, in_cols, 0.0)
        else:
            a = tl.load(a_ptr + a_places, in_rows & (k + ks[None, :] < K), 0.0)
            b = tl.load(b_ptr + b_places, (k + ks[:, None] < K) & in_cols, 0.0)
        total = tl.dot(a, b, total, input_precision=PRECISION, out_dtype=ACC)
        a_ptr += BLOCK_K * stride_ak
        b_ptr += BLOCK_K * stride_bk
    return total


@triton.jit
def _halves(tile, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Left and right half of a tile: one at a time, the epilogue needs half the registers."""
    return tl.split(tl.permute(tl.reshape(tile, [BLOCK_M, 2, BLOCK_N // 2]), [0, 2, 1]))


@triton.jit
def _store_gelu(
    z, bias_ptr, pre_ptr, act_ptr, first_row, first_col, M, F,
    HAS_BIAS: tl.constexpr, TANH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """z [BLOCK_M, BLOCK_N] and its bias to pre, and gelu of that as it was rounded to act."""
    rows, cols = first_row + tl.arange(0, BLOCK_M), first_col + tl.arange(0, BLOCK_N)
    inside = (rows < M)[:, None] & (cols < F)[None, :]
    places = rows.to(tl.int64)[:, None] * F + cols[None, :]
    if HAS_BIAS:
        z += tl.load(bias_ptr + cols, cols < F, 0.0).to(z.dtype)[None, :]
    rounded = z.to(pre_ptr.dtype.element_ty)
    tl.store(pre_ptr + places, rounded, inside)
    tl.store(act_ptr + places, gelu(rounded.to(z.dtype), TANH).to(act_ptr.dtype.element_ty), inside)


@triton.jit
def _linear_gelu_fwd_kernel(
    x_ptr, w_ptr, bias_ptr,
    pre_ptr, act_ptr,  # (M, F)
    M, F, K,
    stride_xm, stride_xk, stride_wf, stride_wk,
    HAS_BIAS: tl.constexpr, TANH: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    for tile in range(tl.program_id(0), tl.cdiv(M, BLOCK_M) * tl.cdiv(F, BLOCK_N), tl.num_programs(0)):
        first_row, first_col = _place(tile, M, F, BLOCK_M, BLOCK_N)
        z = _product(
            x_ptr, w_ptr, first_row, first_col, M, F, K, stride_xm, stride_xk, stride_wk, stride_wf, ACC, PRECISION,
            BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K
        )  # fmt: skip
        left, right = _halves(z, BLOCK_M, BLOCK_N)
        _store_gelu(left, bias_ptr, pre_ptr, act_ptr, first_row, first_col, M, F, HAS_BIAS, TANH, BLOCK_M, BLOCK_N // 2)
        first_col += BLOCK_N // 2
        _store_gelu(
            right, bias_ptr, pre_ptr, act_ptr, first_row, first_col, M, F, HAS_BIAS, TANH, BLOCK_M, BLOCK_N // 2
        )


@triton.jit
def _store_dgelu(
    dact, pre_ptr, dpre_ptr, act_ptr, partials_ptr, first_row, first_col, M, F,
    RECOMPUTE: tl.constexpr, TANH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dact [BLOCK_M, BLOCK_N] times gelu' to dpre, and its column sums to this row of tiles' partials."""
    rows, cols = first_row + tl.arange(0, BLOCK_M), first_col + tl.arange(0, BLOCK_N)
    inside = (rows < M)[:, None] & (cols < F)[None, :]
    places = rows.to(tl.int64)[:, None] * F + cols[None, :]
    z = tl.load(pre_ptr + places, inside, 0.0).to(dact.dtype)
    dz = dact * gelu_derivative(z, TANH)
    tl.store(dpre_ptr + places, dz.to(dpre_ptr.dtype.element_ty), inside)
    if RECOMPUTE:
        tl.store(act_ptr + places, gelu(z, TANH).to(act_ptr.dtype.element_ty), inside)
    partials = partials_ptr + (first_row // BLOCK_M).to(tl.int64) * F
    tl.store(partials + cols, tl.sum(dz, axis=0), cols < F)  # rows past M are zeros


@triton.jit
def _linear_gelu_bwd_kernel(
    dy_ptr, w_ptr,
    pre_ptr,  # (M, F)
    dpre_ptr,  # (M, F)
    act_ptr,  # (M, F), written if RECOMPUTE
    partials_ptr,  # (rows of tiles, F): column sums of dpre
    M, F, K,
    stride_gm, stride_gk, stride_wk, stride_wf,
    RECOMPUTE: tl.constexpr, TANH: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    for tile in range(tl.program_id(0), tl.cdiv(M, BLOCK_M) * tl.cdiv(F, BLOCK_N), tl.num_programs(0)):
        first_row, first_col = _place(tile, M, F, BLOCK_M, BLOCK_N)
        dact = _product(
            dy_ptr, w_ptr, first_row, first_col, M, F, K, stride_gm, stride_gk, stride_wk, stride_wf, ACC, PRECISION,
            BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K
        )  # fmt: skip
        left, right = _halves(dact, BLOCK_M, BLOCK_N)
        _store_dgelu(
            left, pre_ptr, dpre_ptr, act_ptr, partials_ptr, first_row, first_col, M, F, RECOMPUTE, TANH, BLOCK_M,
            BLOCK_N // 2
        )  # fmt: skip
        _store_dgelu(
            right, pre_ptr, dpre_ptr, act_ptr, partials_ptr, first_row, first_col + BLOCK_N // 2, M, F, RECOMPUTE, TANH,
            BLOCK_M, BLOCK_N // 2
        )  # fmt: skip


def linear_gelu_fwd(x, w_in, b_in, tanh: bool, pre, act, tiles: Tiles) -> None:
    """x (M, C), w_in (F, C), b_in (F,) or None: writes pre and act, (M, F) each. Nothing is empty."""
    rows, hidden = pre.shape
    _linear_gelu_fwd_kernel[_grid(x, rows, hidden, tiles)](
        x,
        w_in,
        pre if b_in is None else b_in.contiguous(),
        pre,
        act,
        rows,
        hidden,
        x.shape[1],
        *x.stride(),
        *w_in.stride(),
        HAS_BIAS=b_in is not None,
        TANH=tanh,
        **_constants(x, tiles),
    )


def linear_gelu_bwd(dy, w_out, pre, tanh: bool, dpre, act, recompute: bool, tiles: Tiles) -> torch.Tensor:
    """dy (M, C), w_out (C, F), pre (M, F): writes dpre (M, F), and act if recompute. Returns float32 partial sums of
    dpre's columns, a row for each row of tiles. Nothing is empty."""
    rows, hidden = pre.shape
    shape = (cdiv(rows, tiles.block_m), hidden)
    partials = torch.empty(shape, dtype=statistics_dtype(dy), device=dy.device)
    _linear_gelu_bwd_kernel[_grid(dy, rows, hidden, tiles)](
        dy,
        w_out,
        pre,
        dpre,
        act,
        partials,
        rows,
        hidden,
        dy.shape[1],
        *dy.stride(),
        *w_out.stride(),
        RECOMPUTE=recompute,
        TANH=tanh,
        **_constants(dy, tiles),
    )
    return partials


def _grid(x, rows, hidden, tiles):
    """As many programs as the card holds at once; 3 in the interpreter, so that walking over tiles is tested."""
    at_once = tiles.resident * (multiprocessors(x) or 3)
    return (min(at_once, cdiv(rows, tiles.block_m) * cdiv(hidden, tiles.block_n)),)


def _constants(x, tiles):
    share = 65536 // (32 * tiles.num_warps * tiles.resident)  # of a multiprocessor's registers, a thread
    return {
        "ACC": accumulator(x),
        "PRECISION": matmul_precision(),
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": tiles.block_n,
        "BLOCK_K": tiles.block_k,
        "EVEN_K": x.shape[1] % tiles.block_k == 0,
        "num_warps": tiles.num_warps,
        "num_stages": tiles.num_stages,
        "maxnreg": share if share < 256 else None,  # told 255, ptxas keeps to fewer and spills
    }
