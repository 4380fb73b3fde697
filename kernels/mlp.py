"""The GELU MLP: matmuls, and everything between them in one pass or in none.

    pre = x w_inᵀ + b_in        act = gelu(pre)        y = act w_outᵀ + b_out

The matmuls are cuBLAS's, which adds b_in as it writes. The forward's pass then reads pre and writes act: 2 M F
elements. The backward's pass turns dact into dpre = dact gelu'(pre) in place and sums its columns for b_in's gradient:
3 M F elements, 4 if act is made again (`recompute`). The derivative is taken at pre as it was rounded. Column sums are
float32 partials, added up by torch: the same bits every time. A copy in 8 bits, where one is asked for, is M F bytes
more in either pass; act itself is then written only if it is kept.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .fp8 import eight_bits, magnitudes, note
from .gelu import gelu, gelu_derivative
from .launch import accumulator, cdiv, launch, multiprocessors, statistics_dtype


class Tiles(NamedTuple):
    block_m: int
    block_f: int
    num_warps: int
    programs: int  # that share the rows of one block of columns


def _tiles(rows: int, hidden: int, multiprocessors: int | None, backward: bool) -> Tiles:
    """Measured on an H200 at 3072 hidden units in bfloat16: 92% and 89% of a copy's rate; wider blocks are no faster in
    the backward, and leave more partial sums."""
    if multiprocessors is None:  # the interpreter: several of each
        return Tiles(8, 128, 4, 2)
    if not backward:
        return Tiles(1, 1024, 4, rows)
    return Tiles(8, 128, 4, min(cdiv(rows, 8), max(1, 16 * multiprocessors // cdiv(hidden, 128))))


@triton.jit(do_not_specialize_on_alignment=["inverse"])  # one of many in a row
def _gelu_fwd_kernel(
    pre_ptr,  # (M, F)
    act_ptr,  # (M, F), or None where only its copy is wanted
    M,
    F,
    TANH: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_F: tl.constexpr,
    act8=None,  # (M, F) in 8 bits, with the two that follow
    inverse=None,
    amax=None,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    mask = (rows[:, None] < M) & (cols[None, :] < F)
    places = rows[:, None] * F + cols[None, :]
    z = tl.load(pre_ptr + places, mask, 0.0).to(ACC)  # [BLOCK_M, BLOCK_F]
    act = gelu(z, TANH).to(pre_ptr.dtype.element_ty)
    if act_ptr is not None:
        tl.store(act_ptr + places, act, mask)
    if act8 is not None:  # of act as it was rounded
        act = act.to(ACC)
        note(amax, magnitudes(act, mask))
        tl.store(act8 + places, eight_bits(act, tl.load(inverse), act8.dtype.element_ty), mask)


@triton.jit(do_not_specialize_on_alignment=["inverse"])  # one of many in a row
def _gelu_bwd_kernel(
    dact_ptr,  # (M, F), overwritten by dpre
    pre_ptr,  # (M, F)
    act_ptr,  # (M, F), written if RECOMPUTE
    partials_ptr,  # (programs, F): column sums of dpre
    M,
    F,
    RECOMPUTE: tl.constexpr,
    TANH: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_F: tl.constexpr,
    dpre8=None,  # (M, F) in 8 bits, with the two that follow
    inverse=None,
    amax=None,
):
    cols = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    sums = tl.zeros([BLOCK_M, BLOCK_F], ACC)
    if dpre8 is not None:
        tops = tl.zeros([BLOCK_M, BLOCK_F], ACC)
        divisor = tl.load(inverse)
    for start in range(tl.program_id(0) * BLOCK_M, M, tl.num_programs(0) * BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        mask = (rows[:, None] < M) & (cols[None, :] < F)
        places = rows.to(tl.int64)[:, None] * F + cols[None, :]
        z = tl.load(pre_ptr + places, mask, 0.0).to(ACC)
        dz = tl.load(dact_ptr + places, mask, 0.0).to(ACC) * gelu_derivative(z, TANH)
        sums += dz
        tl.store(dact_ptr + places, dz.to(dact_ptr.dtype.element_ty), mask)
        if dpre8 is not None:  # of dpre as it was rounded
            dz = dz.to(dact_ptr.dtype.element_ty).to(ACC)
            tops = tl.maximum(tops, magnitudes(dz, mask))
            tl.store(dpre8 + places, eight_bits(dz, divisor, dpre8.dtype.element_ty), mask)
        if RECOMPUTE:
            tl.store(act_ptr + places, gelu(z, TANH).to(act_ptr.dtype.element_ty), mask)
    tl.store(partials_ptr + tl.program_id(0) * F + cols, tl.sum(sums, axis=0), cols < F)
    if dpre8 is not None:
        note(amax, tops)


def gelu_mlp_fwd(
    x: torch.Tensor,
    w_in: torch.Tensor,
    b_in: torch.Tensor | None,
    w_out: torch.Tensor,
    b_out: torch.Tensor | None,
    tanh: bool,
    recompute: bool,
    first: Callable,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x (M, C), w_in (F, C), w_out (C, F) -> y (M, C), pre (M, F) and act (M, F), which is empty with recompute.

    first: linear_gelu, or what does the same.
    """
    y, pre, act = gelu_mlp_fwd_outputs(x, w_in, b_in, w_out, b_out, tanh, recompute)
    full_act = torch.empty_like(pre) if recompute else act
    first(x, w_in, b_in, tanh, pre, full_act)
    if b_out is None:
        torch.mm(full_act, w_out.t(), out=y)
    else:
        torch.addmm(b_out, full_act, w_out.t(), out=y)
    return y, pre, act


def linear_gelu(x, w_in, b_in, tanh, pre, act) -> None:
    """Writes pre and act (M, F)."""
    if b_in is None:
        torch.mm(x, w_in.t(), out=pre)
    else:
        torch.addmm(b_in, x, w_in.t(), out=pre)
    gelu_pass(pre, tanh, act)


def gelu_mlp_fwd_outputs(x, w_in, b_in, w_out, b_out, tanh, recompute):
    """What gelu_mlp_fwd returns, so it serves as its fake too."""
    rows, hidden = x.shape[0], w_in.shape[0]
    pre = torch.empty((rows, hidden), dtype=x.dtype, device=x.device)
    act = torch.empty((0,) if recompute else (rows, hidden), dtype=x.dtype, device=x.device)
    return torch.empty((rows, w_out.shape[0]), dtype=x.dtype, device=x.device), pre, act


def gelu_mlp_bwd(
    dy: torch.Tensor,
    x: torch.Tensor,
    w_in: torch.Tensor,
    w_out: torch.Tensor,
    pre: torch.Tensor,
    act: torch.Tensor,
    tanh: bool,
    needs: list[bool],
    first: Callable,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of x, w_in, b_in, w_out and b_out; empty where `needs` has False. act is empty with recompute.

    first: linear_gelu_backward, or where act is not made again what does the same.
    """
    grads = gelu_mlp_bwd_outputs(dy, x, w_in, w_out, pre, act, tanh, needs)
    dx, dw_in, db_in, dw_out, db_out = grads
    needs_x, needs_w_in, needs_b_in, needs_w_out, needs_b_out = needs
    if needs_b_out:
        torch.sum(dy, dim=0, out=db_out)
    recompute = act.numel() == 0 and needs_w_out
    if needs_x or needs_w_in or needs_b_in or recompute:
        if recompute:
            act = torch.empty_like(pre)
            dpre, partials = linear_gelu_backward(dy, w_out, pre, tanh, act)
        else:
            dpre, partials = first(dy, w_out, pre, tanh)
        if needs_b_in:
            db_in.copy_(partials.sum(0))
        if needs_x:
            torch.mm(dpre, w_in, out=dx)
        if needs_w_in:
            torch.mm(dpre.t(), x, out=dw_in)
    if needs_w_out:
        torch.mm(dy.t(), act, out=dw_out)
    return grads


def linear_gelu_backward(dy, w_out, pre, tanh, act=None) -> tuple[torch.Tensor, torch.Tensor]:
    """dpre (M, F) and partial sums of its columns (programs, F). Writes act (M, F) if there is one."""
    dpre = torch.mm(dy, w_out)
    unread = torch.empty((0,), dtype=pre.dtype, device=pre.device)
    return dpre, gelu_backward_pass(dpre, pre, tanh, unread if act is None else act, act is not None)


def gelu_mlp_bwd_outputs(dy, x, w_in, w_out, pre, act, tanh, needs):
    """What gelu_mlp_bwd returns, so it serves as its fake too. A weight's gradient lies in memory as the weight does:
    that of a Conv1D, which is read transposed, would be copied by autograd else."""

    def like(weight, needed):
        return torch.empty_like(weight, dtype=x.dtype) if needed else empty((0,))

    def empty(shape, needed=True):
        return torch.empty(shape if needed else (0,), dtype=x.dtype, device=x.device)

    return (
        empty(x.shape, needs[0]),
        like(w_in, needs[1]),
        empty(w_in.shape[:1], needs[2]),
        like(w_out, needs[3]),
        empty(w_out.shape[:1], needs[4]),
    )


def gelu_pass(pre, tanh, act, **copy) -> None:
    """Writes act (M, F) if there is one. copy: act8 (M, F) in 8 bits, which is written, the inverse of its scale, and
    amax, where act's magnitudes are noted; or nothing."""
    rows, hidden = pre.shape
    if pre.numel() == 0:
        return
    tiles = _tiles(rows, hidden, multiprocessors(pre), backward=False)
    launch(
        _gelu_fwd_kernel,
        (cdiv(rows, tiles.block_m), cdiv(hidden, tiles.block_f)),
        pre,
        act,
        rows,
        hidden,
        TANH=tanh,
        ACC=accumulator(pre),
        BLOCK_M=tiles.block_m,
        BLOCK_F=tiles.block_f,
        **copy,
        num_warps=tiles.num_warps,
    )


def gelu_backward_pass(dact, pre, tanh, act, recompute, **copy) -> torch.Tensor:
    """Turns dact (M, F) into dpre and writes act (M, F) if recompute. Returns partial sums (programs, F) of dpre's
    columns. copy: dpre8 (M, F) in 8 bits, which is written, the inverse of its scale, and amax, where dpre's magnitudes
    are noted; or nothing."""
    rows, hidden = pre.shape
    tiles = _tiles(rows, hidden, multiprocessors(pre), backward=True)
    partials = torch.empty((tiles.programs, hidden), dtype=statistics_dtype(pre), device=pre.device)
    if pre.numel() == 0:
        return partials.zero_()
    launch(
        _gelu_bwd_kernel,
        (tiles.programs, cdiv(hidden, tiles.block_f)),
        dact,
        pre,
        act,
        partials,
        rows,
        hidden,
        RECOMPUTE=recompute,
        TANH=tanh,
        ACC=accumulator(pre),
        BLOCK_M=tiles.block_m,
        BLOCK_F=tiles.block_f,
        **copy,
        num_warps=tiles.num_warps,
    )
    return partials
