"""The backward of the MLP's first matmul and its GELU, for Hopper; linear_gelu.py explains both."""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ..launch import cdiv
from .linear_gelu_tiles import (
    BLOCK_K,
    BLOCK_M,
    PIECE,
    gelu_derivative,
    load_operands,
    operands,
    pieces,
    programs,
    rounded,
    steps,
    tiled,
)
from .pipeline import barriers, launch

COLUMNS = 128  # of a tile: F is a multiple of it


@gluon.jit
def _bwd_load(dy_desc, w_desc, ring, down, across, ksteps, STAGES: gl.constexpr, BLOCK_N: gl.constexpr):
    load_operands(dy_desc, w_desc, ring, down, across, ksteps, STAGES, 1, False, BLOCK_N)


@gluon.jit
def _bwd_load_pre(w: gl.constexpr, given, BLOCK_N: gl.constexpr, PRE_STAGES: gl.constexpr):
    """The warp that loads pre for warpgroup w, in pieces, in the order in which they are used."""
    pre_desc, pre_bufs, pre_full, pre_empty, down, across = given
    col = gl.program_id(0) % across * BLOCK_N
    walk = gl.num_programs(0) // across
    i = gl.to_tensor(0)
    for m in range(gl.program_id(0) // across + w * walk, down, 2 * walk):
        for j in gl.static_range(BLOCK_N // PIECE):
            slot = w * PRE_STAGES + i % PRE_STAGES
            mbarrier.wait(pre_empty.index(slot), (i // PRE_STAGES & 1) ^ 1)
            mbarrier.expect(pre_full.index(slot), pre_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(
                pre_desc, [m * BLOCK_M, col + j * PIECE], pre_full.index(slot), pre_bufs.index(slot)
            )
            i += 1


@gluon.jit
def _bwd_multiply(
    w: gl.constexpr, given, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, PRE_STAGES: gl.constexpr, TANH: gl.constexpr
):
    """The warpgroup of every second tile, from the w-th on. It starts when the other has issued its last product, whose
    slots have all been filled then: the ring's phases are at most one away from here."""
    ring, turn, dpre_desc, bufs, pre_bufs, pre_full, pre_empty, sums_ptr, down, across, ksteps = given
    a_bufs, b_bufs, full, empty = ring
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    piece_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PIECE, 16])
    PIECES: gl.constexpr = BLOCK_N // PIECE
    col = gl.program_id(0) % across * BLOCK_N
    walk = gl.num_programs(0) // across
    it = gl.to_tensor(0) + w * ksteps  # steps of both so far
    pre_i = gl.to_tensor(0)
    turn_phase = gl.to_tensor(1 - w)  # warpgroup 0 need not wait for its first turn
    acc = gl.full([BLOCK_M, BLOCK_N], 0.0, gl.float32, layout)
    for m in range(gl.program_id(0) // across + w * walk, down, 2 * walk):
        mbarrier.wait(turn.index(w), turn_phase)
        turn_phase ^= 1
        stage = it % STAGES
        phase = (it // STAGES) & 1
        mbarrier.wait(full.index(stage), phase)
        a, b = operands(a_bufs, b_bufs, stage, 0, 1, False)
        acc = warpgroup_mma(a, b, acc, use_acc=False, is_async=True)
        acc = warpgroup_mma_wait(1, deps=[acc])  # only turns the token into a tensor
        acc, stage, phase = steps(acc, ring, stage, phase, ksteps, 0, STAGES, 1, False)
        mbarrier.arrive(turn.index(1 - w), count=1)
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(empty.index(stage), count=1)
        it += 2 * ksteps
        row = m * BLOCK_M
        parts = pieces(acc, PIECES)
        for j in gl.static_range(PIECES):
            z = gl.convert_layout(parts[j], piece_layout, assert_trivial=True)
            slot = w * PRE_STAGES + pre_i % PRE_STAGES
            mbarrier.wait(pre_full.index(slot), pre_i // PRE_STAGES & 1)
            pre = pre_bufs.index(slot).load(piece_layout)
            mbarrier.arrive(pre_empty.index(slot), count=1)
            pre_i += 1
            z = z * gelu_derivative(pre.to(gl.float32), TANH)
            cols = gl.arange(0, PIECE, layout=gl.SliceLayout(0, piece_layout))
            gl.store(sums_ptr + m * (across * BLOCK_N) + col + j * PIECE + cols, gl.sum(z, axis=0))
            dpre = rounded(z, dpre_desc.dtype)
            tma.store_wait(pendings=0)
            bufs.index(w).store(dpre)
            fence_async_shared()
            tma.async_copy_shared_to_global(dpre_desc, [row, col + j * PIECE], bufs.index(w))
    tma.store_wait(pendings=0)


@gluon.jit(do_not_specialize=["M"])
def _hopper_linear_gelu_bwd_kernel(
    dy_desc,  # (M, K), tiles [128, 64]
    w_desc,  # (K, N), tiles [64, BLOCK_N]
    pre_desc,  # (M, N), tiles [128, 64]
    dpre_desc,  # (M, N), tiles [128, 64]
    sums_ptr,  # (tiles of rows, N)
    M, N, K,
    TANH: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, PRE_STAGES: gl.constexpr,
    REGISTERS: gl.constexpr, LOADER_REGISTERS: gl.constexpr,
):  # fmt: skip
    down, across, ksteps = gl.cdiv(M, BLOCK_M), N // BLOCK_N, gl.cdiv(K, BLOCK_K)
    a_bufs = gl.allocate_shared_memory(dy_desc.dtype, [STAGES, BLOCK_M, BLOCK_K], dy_desc.layout)
    b_bufs = gl.allocate_shared_memory(w_desc.dtype, [STAGES, BLOCK_K, BLOCK_N], w_desc.layout)
    bufs = gl.allocate_shared_memory(dpre_desc.dtype, [2, BLOCK_M, PIECE], dpre_desc.layout)
    pre_bufs = gl.allocate_shared_memory(pre_desc.dtype, [2 * PRE_STAGES, BLOCK_M, PIECE], pre_desc.layout)
    full = barriers(STAGES, 1)
    empty = barriers(STAGES, 1)
    turn = barriers(2, 1)
    pre_full = barriers(2 * PRE_STAGES, 1)
    pre_empty = barriers(2 * PRE_STAGES, 1)
    fence_async_shared()  # the barriers are seen by the copy engine
    ring = a_bufs, b_bufs, full, empty
    pre = pre_desc, pre_bufs, pre_full, pre_empty, down, across
    given = ring, turn, dpre_desc, bufs, pre_bufs, pre_full, pre_empty, sums_ptr, down, across, ksteps
    gl.warp_specialize([
        (_bwd_multiply, (0, given, BLOCK_N, STAGES, PRE_STAGES, TANH)),
        (_bwd_multiply, (1, given, BLOCK_N, STAGES, PRE_STAGES, TANH)),
        (_bwd_load, (dy_desc, w_desc, ring, down, across, ksteps, STAGES, BLOCK_N)),
        (_bwd_load_pre, (0, pre, BLOCK_N, PRE_STAGES)),
        (_bwd_load_pre, (1, pre, BLOCK_N, PRE_STAGES)),
    ], [4, 1, 1, 1], [REGISTERS, LOADER_REGISTERS, LOADER_REGISTERS, LOADER_REGISTERS])  # fmt: skip


def linear_gelu_bwd(
    dy: torch.Tensor, w_out: torch.Tensor, pre: torch.Tensor, tanh: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """dy (M, C), w_out (C, F), pre (M, F) -> dpre (M, F), and float32 partial sums (tiles of rows, F) of its columns.

    F is a multiple of COLUMNS, rows are contiguous and begin at multiples of 16 bytes.
    """
    rows, hidden = pre.shape
    dpre = torch.empty_like(pre)
    sums = torch.empty((cdiv(rows, BLOCK_M.value), hidden), dtype=torch.float32, device=pre.device)
    channels = dy.shape[1]
    launch(
        _hopper_linear_gelu_bwd_kernel,
        ("linear_gelu_bwd", tanh, hidden, channels, sums.data_ptr() % 16),
        programs(rows, hidden // COLUMNS, dy.device),
        [tiled(dy, 128, 64), tiled(w_out, 64, COLUMNS), tiled(pre, 128, 64), tiled(dpre, 128, 64)],
        (sums, rows, hidden, channels),
        {
            "TANH": tanh,
            "BLOCK_N": COLUMNS,
            "STAGES": 4,
            "PRE_STAGES": 2,
            "REGISTERS": 232,
            "LOADER_REGISTERS": 24,
        },
        num_warps=4,
    )
    return dpre, sums
