"""The MLP's first matmul with its GELU, for Hopper: the elementwise work under the products, and no pass of its own.

    forward    pre = x w_inᵀ + b_in, as rounded;  act = gelu(pre)            x (M, C), w_in (F, C)
    backward   dpre = (dy w_out) gelu'(pre);  column sums of dpre            dy (M, C), w_out (C, F)

kernels/gelu.py has both GELUs. Tensors are bfloat16 or float16, sums float32: one row of partial sums a tile of 128
rows, for torch to add up. Any M; F a multiple of 256 forward and of 128 backward; any C that keeps rows at multiples of
16 bytes: what a tile reads past M or C is zeros, and what it would write there is not written.

Every program keeps one block of columns, so that their weights stay in the L2 cache, and walks over tiles of rows. One
warp loads tiles of both operands, 64 of C at a time, into a ring of STAGES. Two warpgroups multiply, with one product
always in flight; a step's slot is freed when the next step's product has been issued and its own is done.

Forward, a tile is 128 x 256: each warpgroup multiplies 64 rows, starting from the bias, leaves them rounded in shared
memory, and goes on; a third warpgroup makes the GELU and writes both results. Warpgroup 1 starts each tile one step
after 0 (`turn`), so that they do not end together. Backward, each warpgroup has every second tile of 128 x 128, and
they take turns: one multiplies while the other ends its tile, for which one more warp each loads pre.

GELU's exponential and reciprocal are the card's own: two instructions an element on the unit that does 16 a clock, some
4100 clocks a tile of 128 x 256 x 768, against 12288 of the tensor core. The rounding takes two elements at once by
hand, for the compiler rounds one by one, on the same unit, where a rounded value is used again.

The kernels' prototypes, of which these are copies without their switches, ran on an H100 with the tanh GELU in
bfloat16: docs/kernels.md has the figures, and says what has not been measured.
"""

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

from .linear_gelu_tiles import (
    BLOCK_K,
    BLOCK_M,
    PIECE,
    gelu,
    load_operands,
    operands,
    pieces,
    programs,
    rounded,
    steps,
    tiled,
)
from .pipeline import barriers, launch

COLUMNS = 256  # of a tile: F is a multiple of it


@gluon.jit
def _fwd_load(x_desc, w_desc, ring, down, across, ksteps, STAGES: gl.constexpr, BLOCK_N: gl.constexpr):
    load_operands(x_desc, w_desc, ring, down, across, ksteps, STAGES, 2, True, BLOCK_N)


@gluon.jit
def _fwd_multiply(w: gl.constexpr, given, STAGES: gl.constexpr, BLOCK_N: gl.constexpr):
    """A warpgroup that only multiplies: rows 64 w on of every tile, rounded, go to shared memory."""
    ring, turn, bufs, hand_full, hand_empty, bias_ptr, down, across, ksteps = given
    a_bufs, b_bufs, full, empty = ring
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    piece_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PIECE, 16])
    PIECES: gl.constexpr = BLOCK_N // PIECE
    col = gl.program_id(0) % across * BLOCK_N
    it = gl.to_tensor(0)  # steps so far
    phase = gl.to_tensor(1)
    turn_phase = gl.to_tensor(0)
    for _ in range(gl.program_id(0) // across, down, gl.num_programs(0) // across):
        bias = gl.load(bias_ptr + (col + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, layout)))).to(gl.float32)
        acc = gl.full([64, BLOCK_N], 0.0, gl.float32, layout) + gl.expand_dims(bias, 0)
        if w == 1:
            mbarrier.wait(turn, turn_phase)
            turn_phase ^= 1
        stage = it % STAGES
        ring_phase = (it // STAGES) & 1
        mbarrier.wait(full.index(stage), ring_phase)
        a, b = operands(a_bufs, b_bufs, stage, w, 2, True)
        acc = warpgroup_mma(a, b, acc, is_async=True)
        acc = warpgroup_mma_wait(1, deps=[acc])  # only turns the token into a tensor
        if w == 0:
            mbarrier.arrive(turn, count=1)
        acc, stage, ring_phase = steps(acc, ring, stage, ring_phase, ksteps, w, STAGES, 2, True)
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(empty.index(stage), count=1)
        it += ksteps
        mbarrier.wait(hand_empty.index(w), phase)
        phase ^= 1
        parts = pieces(acc, PIECES)
        for j in gl.static_range(PIECES):
            z = gl.convert_layout(parts[j], piece_layout, assert_trivial=True)
            bufs.index(w * PIECES + j).store(rounded(z, bufs.dtype))
        fence_async_shared()  # before the copy engine reads what these threads wrote
        mbarrier.arrive(hand_full.index(w), count=1)


@gluon.jit
def _fwd_epilogue(given, BLOCK_N: gl.constexpr, TANH: gl.constexpr):
    """The warpgroup that ends the others' tiles, a piece of [64, 64] at a time."""
    pre_desc, act_desc, bufs, act_bufs, hand_full, hand_empty, down, across = given
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    PIECES: gl.constexpr = BLOCK_N // PIECE
    col = gl.program_id(0) % across * BLOCK_N
    phase = gl.to_tensor(0)
    for m in range(gl.program_id(0) // across, down, gl.num_programs(0) // across):
        for w in gl.static_range(2):
            row = m * BLOCK_M + w * 64
            mbarrier.wait(hand_full.index(w), phase)
            for j in gl.static_range(PIECES):
                tma.async_copy_shared_to_global(pre_desc, [row, col + j * PIECE], bufs.index(w * PIECES + j))
            for j in gl.static_range(PIECES):
                z = bufs.index(w * PIECES + j).load(layout).to(gl.float32)
                act = gelu(z, TANH).to(act_desc.dtype)
                # act's buffer j % 2 was last read by the store two before; younger than that one: the store
                # before, and for j < 2 this part's stores of pre. From j = 2 on, those too are done.
                if j < 2:
                    tma.store_wait(pendings=PIECES + 1)
                else:
                    tma.store_wait(pendings=1)
                act_bufs.index(j % 2).store(act)
                fence_async_shared()
                tma.async_copy_shared_to_global(act_desc, [row, col + j * PIECE], act_bufs.index(j % 2))
            mbarrier.arrive(hand_empty.index(w), count=1)
        phase ^= 1
    tma.store_wait(pendings=0)


@gluon.jit(do_not_specialize=["M"])
def _hopper_linear_gelu_fwd_kernel(
    x_desc,  # (M, K), tiles [64, 64]
    w_desc,  # (N, K), tiles [BLOCK_N, 64]
    pre_desc,  # (M, N), tiles [64, 64]
    act_desc,  # (M, N), tiles [64, 64]
    bias_ptr,  # (N,)
    M, N, K,
    TANH: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    REGISTERS: gl.constexpr, EPILOGUE_REGISTERS: gl.constexpr, LOADER_REGISTERS: gl.constexpr,
):  # fmt: skip
    down, across, ksteps = gl.cdiv(M, BLOCK_M), N // BLOCK_N, gl.cdiv(K, BLOCK_K)
    PIECES: gl.constexpr = BLOCK_N // PIECE
    a_bufs = gl.allocate_shared_memory(x_desc.dtype, [STAGES * 2, 64, BLOCK_K], x_desc.layout)
    b_bufs = gl.allocate_shared_memory(w_desc.dtype, [STAGES, BLOCK_N, BLOCK_K], w_desc.layout)
    bufs = gl.allocate_shared_memory(pre_desc.dtype, [2 * PIECES, 64, PIECE], pre_desc.layout)
    act_bufs = gl.allocate_shared_memory(act_desc.dtype, [2, 64, PIECE], act_desc.layout)
    full = barriers(STAGES, 1)
    empty = barriers(STAGES, 2)
    turn = barriers(1, 1)
    hand_full = barriers(2, 1)
    hand_empty = barriers(2, 1)
    fence_async_shared()  # the barriers are seen by the copy engine
    ring = a_bufs, b_bufs, full, empty
    given = ring, turn.index(0), bufs, hand_full, hand_empty, bias_ptr, down, across, ksteps
    end = pre_desc, act_desc, bufs, act_bufs, hand_full, hand_empty, down, across
    gl.warp_specialize([
        (_fwd_multiply, (0, given, STAGES, BLOCK_N)),
        (_fwd_multiply, (1, given, STAGES, BLOCK_N)),
        (_fwd_epilogue, (end, BLOCK_N, TANH)),
        (_fwd_load, (x_desc, w_desc, ring, down, across, ksteps, STAGES, BLOCK_N)),
    ], [4, 4, 1], [REGISTERS, EPILOGUE_REGISTERS, LOADER_REGISTERS])  # fmt: skip


def linear_gelu_fwd(
    x: torch.Tensor, w_in: torch.Tensor, b_in: torch.Tensor, tanh: bool, pre: torch.Tensor, act: torch.Tensor
) -> None:
    """x (M, C), w_in (F, C), b_in (F,) -> pre and act (M, F), which are written.

    F is a multiple of COLUMNS, rows are contiguous and begin at multiples of 16 bytes.
    """
    (rows, channels), hidden = x.shape, len(w_in)
    launch(
        _hopper_linear_gelu_fwd_kernel,
        ("linear_gelu_fwd", tanh, hidden, channels, b_in.data_ptr() % 16),
        programs(rows, hidden // COLUMNS, x.device),
        [tiled(x, 64, 64), tiled(w_in, COLUMNS, 64), tiled(pre, 64, 64), tiled(act, 64, 64)],
        (b_in, rows, hidden, channels),
        {
            "TANH": tanh,
            "BLOCK_N": COLUMNS,
            "STAGES": 3,
            "REGISTERS": 168,
            "EPILOGUE_REGISTERS": 144,
            "LOADER_REGISTERS": 24,
        },
        num_warps=4,
    )
