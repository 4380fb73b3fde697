"""The backward of attention.py for Hopper: the mathematics of kernels/attention_backward.py in two Gluon kernels.

    P = exp2(S - lse)   Δ = rowsum(do ∘ o)   dS = P ∘ (do vᵀ - Δ)   dv = Pᵀ do   dq = scale dS k   dk = scale dSᵀ q

attention_dq.py makes dq, for a tile of 128 queries, and leaves lse and Δ where attention_dkdv.py, which makes dk and dv
for a tile of 128 keys, loads them by the copy engine. That is 7 products where one kernel with atomics has 5, but needs
no float32 buffer for dq and no order between programs, and gives the same bits every time. As in the forward, one warp
of a program loads while two warpgroups multiply, and a work item is the tiles n-1-i and i of a head, of n.

How many clocks the units of a multiprocessor are busy with 64 queries by 128 keys, from the machine code of the loops;
L2 is two warpgroups' half each of 32 bytes a clock:

    D    kernel  tensor core  MUFU  issue  shared memory    L2
    64   dq              768   512    356            512   512
    64   dkdv           1024   512    490            512   512
    128  dq             1536   512    488           1280  1024
    128  dkdv           2048   512    580           1536  1024

The kernels' prototype, of which these are copies without its switches, ran on an H200: docs/kernels.md has the figures,
and says what has not been measured.
"""

import math
from typing import NamedTuple

import torch

from ..launch import cdiv
from .attention import nested_strides
from .attention_dkdv import _hopper_attention_dkdv_kernel
from .attention_dq import _hopper_attention_dq_kernel
from .pipeline import Map, Part, launch, multiprocessors


class Form(NamedTuple):
    """The two compiled kernels of a head dim."""

    keys: int  # of a tile of dq's
    dq_stages: int
    dkdv_stages: int
    keys_in_registers: bool  # k and v, in dkdv
    sums: bool  # whether shared memory has room to add up columns over warps


FORMS = {64: Form(128, 3, 4, True, True), 128: Form(64, 3, 3, False, False)}  # by head dim
_ROWS = 128  # of two warpgroups
# How a program's 64K registers are shared out, for each thread: what it starts with, and what it asks for then.
_BEGUN_WITH, _REGISTERS, _PRODUCER_REGISTERS = 168, 240, 24


def attention_bwd(
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    dq: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    scale: float,
) -> None:
    """do, q, k, v, o (B, H, T, D), lse (B, H, T) -> dq, dk, dv (B, H, T, D), which are written.

    D is one of FORMS. All but lse are of one dtype of 16 bits, begin at multiples of 16 bytes, and have
    `nested_strides` that are such multiples too; lse is contiguous, and as the forward leaves it. B H T is below 2**30.
    """
    operands = [(t, nested_strides(t)) for t in (do, q, k, v, o, dq, dk, dv)]
    _backward(operands, q.shape, lse, scale)


def attention_qkv_bwd(
    dout: torch.Tensor,
    qkv: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    dqkv: torch.Tensor,
    heads: int,
    scale: float,
    needs_sums: bool = False,
) -> torch.Tensor | None:
    """dout, out (B, T, C), the packed projection qkv (B, T, 3C), lse (B, H, T) -> dqkv (B, T, 3C), which is written;
    all contiguous. Returns partial sums (B tiles, 3C) of its columns if needs_sums and D has a form for it, else None.
    """
    batch, time, channels = out.shape
    dim = channels // heads
    packed, strides = [3 * time * channels, 3 * channels, dim, 1], [time * channels, channels, dim, 1]
    q, k, v, dq, dk, dv = ((Part(t, i * channels), packed) for t in (qkv, dqkv) for i in range(3))
    sums = None
    if needs_sums and FORMS[dim].sums:
        sums = torch.empty((batch * cdiv(time, 64), packed[1]), dtype=torch.float32, device=qkv.device)
    operands = [(dout, strides), q, k, v, (out, strides), dq, dk, dv]
    _backward(operands, (batch, heads, time, dim), lse, scale, sums)
    return sums


def _backward(operands, shape, lse, scale, sums=None):
    """operands: of do, q, k, v, o, dq, dk, dv a tensor that begins where it does, and its strides as (B, T, H, D)."""
    batch, heads, time, dim = shape
    form = FORMS[dim]
    of_tensor = [batch, time, heads, dim]
    do, q, k, v, o, dq, dk, dv = (Map(t, of_tensor, strides, (1, 64, 1, dim)) for t, strides in operands)
    wide_k, wide_v = k, v
    if form.keys != 64:
        wide_k, wide_v = (Map(t.base, of_tensor, t.strides, (1, form.keys, 1, dim)) for t in (k, v))
    tiles, stat_tiles = cdiv(time, _ROWS), cdiv(time, 64)
    stats = torch.empty(batch * heads * stat_tiles * 128, dtype=torch.float32, device=lse.device)
    items = batch * heads * ((tiles + 1) // 2)
    programs = min(items, multiprocessors(lse.device))
    scales = scale * math.log2(math.e), float(scale)  # of an int Triton would make a constant
    registers = {"REGISTERS": _REGISTERS, "PRODUCER_REGISTERS": _PRODUCER_REGISTERS}
    launch(
        _hopper_attention_dq_kernel,
        ("attention_dq", dim, lse.data_ptr() % 16, sums is None),
        programs,
        [q, do, o, dq, wide_k, wide_v],
        (lse, stats, sums, heads, time, items, tiles, stat_tiles, *scales),
        {"D": dim, "BLOCK_N": form.keys, "STAGES": form.dq_stages, **registers},
        num_warps=4,
        maxnreg=_BEGUN_WITH,
    )
    launch(
        _hopper_attention_dkdv_kernel,
        ("attention_dkdv", dim, sums is None),
        programs,
        [q, do, Map(stats, [stats.numel()], [1], (128,)), k, v, dk, dv],
        (sums, heads, items, tiles, stat_tiles, *scales),
        {"D": dim, "STAGES": form.dkdv_stages, "KEYS_IN_REGISTERS": form.keys_in_registers, **registers},
        num_warps=4,
        maxnreg=_BEGUN_WITH,
    )
