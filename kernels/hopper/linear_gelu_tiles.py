"""What the two kernels of linear_gelu.py and linear_gelu_backward.py share: GELU on a tile, the steps of a product."""

import torch
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ..launch import cdiv
from .pipeline import Map, multiprocessors, next_slot

BLOCK_M, BLOCK_K = gl.constexpr(128), gl.constexpr(64)  # rows of a tile, and how much of C is multiplied at a step
PIECE = gl.constexpr(64)  # columns of a tile that are ended at once
_NAN = gl.constexpr(tl.PropagateNan.ALL)


@gluon.jit
def _ex2(x):
    return gl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def _rcp(x):
    return gl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def rounded(x, DTYPE: gl.constexpr):
    if gl.bfloat16 == DTYPE:
        halves = gl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [x], dtype=gl.bfloat16, is_pure=False, pack=2
        )
    else:
        halves = gl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [x], dtype=gl.float16, is_pure=False, pack=2
        )
    return halves


@gluon.jit
def _normal(z):
    """Φ(z) = (1 + erf(z / √2)) / 2; below 0 with 6 digits of its own, where erf would cancel. erfc(x) exp(x²) has
    a logarithm that is smooth in 1 / (1 + c x). The coefficients are a Chebyshev fit for 0 ≤ x ≤ 16. Triton's erf takes
    so many registers that the backward spills."""
    t = _rcp(gl.abs(z) * 0.22 + 1.0)
    p = t * (t * (t * (t * 0.588725501 - 2.263805333) + 3.023094416) - 1.984009475) + 1.249552740
    p = t * (t * (t * p + 0.424917182) + 1.473444179) - 3.511919587
    tail = t * _ex2(p - z * z * 0.7213475204444817)  # log2(e) / 2
    return gl.where(z < 0.0, tail, 1.0 - tail)


@gluon.jit
def gelu(z, TANH: gl.constexpr):
    if TANH:
        u = z * (z * z * -0.10294324 + -2.3022082)  # -2 log2(e) √(2/π) (z + 0.044715 z³)
        g = z * _rcp(1.0 + _ex2(u))
    else:
        g = z * _normal(z)
    return g


@gluon.jit
def gelu_derivative(z, TANH: gl.constexpr):
    # 1 and 0 from 10 on, where e could overflow; NaN stays NaN.
    z = gl.maximum(gl.minimum(z, 10.0, propagate_nan=_NAN), -10.0, propagate_nan=_NAN)
    t = z * z
    if TANH:
        e = _ex2(z * (t * -0.10294324 + -2.3022082))
        s = _rcp(1.0 + e)
        d = s + (z * s) * ((e * s) * (t * 0.2140644488178008 + 1.5957691216057308))  # 1 - s, which cancels, is e s
    else:
        d = _normal(z) + z * _ex2(t * -0.7213475204444817) * 0.3989422804014327  # 1 / √(2π)
    return d


@gluon.jit
def pieces(x, COUNT: gl.constexpr):
    """x [R, C] as COUNT pieces of C / COUNT columns, in order; every thread keeps what it has."""
    parts = (x,)
    for _ in gl.static_range(COUNT.bit_length() - 1):
        halves = ()
        for i in gl.static_range(len(parts)):
            part = parts[i]
            halves += gl.split(part.reshape([part.shape[0], 2, part.shape[1] // 2]).permute(0, 2, 1))
        parts = halves
    return parts


@gluon.jit
def operands(a_bufs, b_bufs, stage, part, A_PARTS: gl.constexpr, KMAJOR: gl.constexpr):
    a = a_bufs.index(stage * A_PARTS + part)
    b = b_bufs.index(stage)
    if KMAJOR:
        b = b.permute((1, 0))
    return a, b


@gluon.jit
def steps(acc, ring, stage, phase, count, part, STAGES: gl.constexpr, A_PARTS: gl.constexpr, KMAJOR: gl.constexpr):
    """Steps of a tile from its second on, each of which frees the slot of the one before."""
    a_bufs, b_bufs, full, empty = ring
    for _ in range(1, count):
        before = stage
        stage, phase = next_slot(stage, phase, STAGES)
        mbarrier.wait(full.index(stage), phase)
        a, b = operands(a_bufs, b_bufs, stage, part, A_PARTS, KMAJOR)
        acc = warpgroup_mma(a, b, acc, is_async=True)
        acc = warpgroup_mma_wait(1, deps=[acc])  # the product of `before` is done
        mbarrier.arrive(empty.index(before), count=1)
    return acc, stage, phase


@gluon.jit
def load_operands(
    a_desc, b_desc, ring, down, across, ksteps,
    STAGES: gl.constexpr, A_PARTS: gl.constexpr, KMAJOR: gl.constexpr, BLOCK_N: gl.constexpr,
):  # fmt: skip
    """The warp that loads both operands: a slot at a time, as soon as its readers have left it."""
    a_bufs, b_bufs, full, empty = ring
    A_ROWS: gl.constexpr = a_desc.block_type.shape[0]
    BYTES: gl.constexpr = A_PARTS * a_desc.block_type.nbytes + b_desc.block_type.nbytes
    col = gl.program_id(0) % across * BLOCK_N
    stage = gl.to_tensor(0)
    phase = gl.to_tensor(1)
    for m in range(gl.program_id(0) // across, down, gl.num_programs(0) // across):
        for k in range(ksteps):
            mbarrier.wait(empty.index(stage), phase)
            bar = full.index(stage)
            mbarrier.expect(bar, BYTES)
            for part in gl.static_range(A_PARTS):
                tma.async_copy_global_to_shared(
                    a_desc, [m * BLOCK_M + part * A_ROWS, k * BLOCK_K], bar, a_bufs.index(stage * A_PARTS + part)
                )
            if KMAJOR:
                tma.async_copy_global_to_shared(b_desc, [col, k * BLOCK_K], bar, b_bufs.index(stage))
            else:
                tma.async_copy_global_to_shared(b_desc, [k * BLOCK_K, col], bar, b_bufs.index(stage))
            stage, phase = next_slot(stage, phase, STAGES)


def tiled(t: torch.Tensor, rows: int, columns: int) -> Map:
    """A matrix by tiles [rows, columns]."""
    return Map(t, list(t.shape), [t.stride(0) if t.shape[0] > 1 else t.shape[1], 1], (rows, columns))


def programs(rows: int, across: int, device: torch.device) -> int:
    """As many for each of the `across` blocks of columns: one a multiprocessor, or one a tile where these are fewer."""
    return across * max(1, min(multiprocessors(device) // across, cdiv(rows, BLOCK_M.value)))
