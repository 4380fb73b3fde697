"""Causal attention, forward, for Hopper: warps of one program that load while others multiply.

    S = scale q kᵀ,  P = softmax(S) over the keys up to the query's own,  o = P v,  lse = m + log2(l)

The mathematics, o's layout and lse are those of kernels/attention.py, from where its backward goes on. B batch, H
heads, T time, D head dim 64 or 128; q, k, v, o in bfloat16 or float16. Every query sees the keys up to its own place:
no dropout, masks, documents or grouped heads.

A program has CONSUMERS warpgroups of 64 queries each, which multiply, and one warp that loads: q into one buffer a
consumer, k and v into rings of STAGES tiles of BLOCK_N keys, in the order in which they are consumed. Keys are walked
from the diagonal down, so a consumer's first tile alone is masked and stands before the loop. A consumer whose diagonal
is not in the block's last tile waits for the tiles that it skips and frees them, which keeps it in step with the ring.

In the loop q kᵀ of the next tile is issued together with p v of this one; once the first is done, the softmax runs
under the second. The wait for the next tile of k stands between the softmax and the wait for p v for a reason: ptxas
moves the latter in front of arithmetic that it does not depend on, but not over a wait for memory, which is a branch.
Without it softmax and product take turns, with no warning.

A work item is the query tiles n-1-i and i of a head, of n: all items cost the same, so a fixed grid of one program a
multiprocessor shares them out evenly.

What one turn (128 keys for 64 queries) issues, in instructions of one warp, and how many clocks it keeps the units of a
multiprocessor busy; L2 is two warpgroups' half each of 32 bytes a clock:

    D     all  HGMMA  MUFU  FFMA  FMUL  FADD   tensor core  MUFU  issue    L2
    64    408     12    66    66    34    68           512   528    408   512
    128   450     16    66    66    66    68          1024   528    450  1024

The kernel's prototype, of which this is a copy without its switches, ran on an H100: docs/kernels.md has the figures,
and says what has not been measured.
"""

import math
from typing import NamedTuple

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
from .pipeline import Map, Part, barrier, barriers, launch, multiprocessors, next_slot, paired_tiles


class Form(NamedTuple):
    """One compiled kernel: its tiles, and how its program's 64K registers are shared out, for each thread."""

    consumers: int  # warpgroups of 64 queries
    block_n: int  # keys
    stages: int
    maxnreg: int  # that a thread starts with
    registers: int  # that a consumer asks for then


FORMS = {  # by head dim and queries of a program
    (64, 128): Form(2, 128, 3, 168, 240),
    (64, 192): Form(3, 128, 3, 128, 160),
    (128, 128): Form(2, 128, 2, 168, 240),
}
_PRODUCER_REGISTERS = 24  # the least there is


@gluon.jit
def _load(desc, batch, row, head, bar, buffer, BYTES: gl.constexpr):
    mbarrier.expect(bar, BYTES)
    tma.async_copy_global_to_shared(desc, [batch, row, head, 0], bar, buffer)


@gluon.jit
def _producer(load, D: gl.constexpr, BLOCK_N: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr):
    """The warp that loads."""
    q_desc, k_desc, v_desc, tensors, numbers = load
    q_smem, k_smem, v_smem, _, q_full, q_empty, k_full, k_empty, v_full, v_empty = tensors
    heads, time, items, tiles = numbers
    BLOCK_M: gl.constexpr = 64 * CONSUMERS
    KV_BYTES: gl.constexpr = BLOCK_N * D * 2
    Q_BYTES: gl.constexpr = 64 * D * 2
    stage = 0
    phase = 0  # the consumers' parity
    q_phase = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        plane, tile, count = paired_tiles(item, tiles)
        batch = plane // heads
        head = plane - batch * heads
        pair = tiles - 1 - tile
        for half in range(count):
            now = gl.where(half == 0, tile, pair)
            first = now * BLOCK_M
            last = (gl.minimum(first + BLOCK_M, time) - 1) // BLOCK_N
            # In the order of consumption: k(last) and q, then k(j), v(j + 1), and v(0).
            mbarrier.wait(k_empty.index(stage), phase ^ 1)
            _load(k_desc, batch, last * BLOCK_N, head, k_full.index(stage), k_smem.index(stage), KV_BYTES)
            for c in gl.static_range(CONSUMERS):
                mbarrier.wait(q_empty.index(c), q_phase ^ 1)
                _load(q_desc, batch, first + c * 64, head, q_full.index(c), q_smem.index(c), Q_BYTES)
            q_phase ^= 1
            for back in range(last):
                j = last - 1 - back
                k_stage, k_phase = next_slot(stage, phase, STAGES)
                mbarrier.wait(k_empty.index(k_stage), k_phase ^ 1)
                _load(k_desc, batch, j * BLOCK_N, head, k_full.index(k_stage), k_smem.index(k_stage), KV_BYTES)
                mbarrier.wait(v_empty.index(stage), phase ^ 1)
                _load(v_desc, batch, (j + 1) * BLOCK_N, head, v_full.index(stage), v_smem.index(stage), KV_BYTES)
                stage, phase = k_stage, k_phase
            mbarrier.wait(v_empty.index(stage), phase ^ 1)
            _load(v_desc, batch, 0, head, v_full.index(stage), v_smem.index(stage), KV_BYTES)
            stage, phase = next_slot(stage, phase, STAGES)


@gluon.jit
def _consumer(
    attend, C: gl.constexpr, D: gl.constexpr, BLOCK_N: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr
):
    """The warpgroup of queries 64 C to 64 C + 63 of every tile."""
    o_desc, lse_ptr, tensors, numbers, qk_scale = attend
    q_smem, k_smem, v_smem, o_smem, q_full, q_empty, k_full, k_empty, v_full, v_empty = tensors
    heads, time, items, tiles = numbers
    BLOCK_M: gl.constexpr = 64 * CONSUMERS
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    s_rows: gl.constexpr = gl.SliceLayout(1, s_layout)
    o_rows: gl.constexpr = gl.SliceLayout(1, o_layout)
    q = q_smem.index(C).reshape([64, D])
    o_buf = o_smem.index(C)
    rows = gl.arange(0, 64, s_rows)
    cols = gl.arange(0, BLOCK_N, gl.SliceLayout(0, s_layout))
    none = gl.zeros([64, BLOCK_N], gl.float32, s_layout)

    stage = 0
    phase = 0
    q_phase = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        plane, tile, count = paired_tiles(item, tiles)
        batch = plane // heads
        head = plane - batch * heads
        pair = tiles - 1 - tile
        for half in range(count):
            now = gl.where(half == 0, tile, pair)
            first = now * BLOCK_M
            last = (gl.minimum(first + BLOCK_M, time) - 1) // BLOCK_N
            first += C * 64
            mine = gl.minimum(first // BLOCK_N, last)
            for _ in range(last - mine):  # tiles that only later warpgroups see; waiting keeps to the phase
                mbarrier.wait(k_full.index(stage), phase)
                mbarrier.arrive(k_empty.index(stage), count=1)
                mbarrier.wait(v_full.index(stage), phase)
                mbarrier.arrive(v_empty.index(stage), count=1)
                stage, phase = next_slot(stage, phase, STAGES)

            mbarrier.wait(q_full.index(C), q_phase)
            mbarrier.wait(k_full.index(stage), phase)
            k = k_smem.index(stage).reshape([BLOCK_N, D]).permute((1, 0))
            s = warpgroup_mma(q, k, none, use_acc=False, is_async=True)
            s = warpgroup_mma_wait(0, deps=(s,))
            mbarrier.arrive(k_empty.index(stage), count=1)
            seen = gl.expand_dims(cols + mine * BLOCK_N, 0) <= gl.expand_dims(rows + first, 1)
            s = gl.where(seen, s, float("-inf"))
            m = gl.max(s, 1) * qk_scale
            p32 = gl.exp2(s * qk_scale - gl.expand_dims(m, 1))
            l = gl.sum(p32, 1)
            p = gl.convert_layout(p32.to(o_desc.dtype), p_layout)
            acc = gl.zeros([64, D], gl.float32, o_layout)

            k_stage, k_phase = next_slot(stage, phase, STAGES)
            mbarrier.wait(k_full.index(k_stage), k_phase, pred=mine > 0)
            for back in range(mine):
                # k of this turn is there.
                k = k_smem.index(k_stage).reshape([BLOCK_N, D]).permute((1, 0))
                v = v_smem.index(stage).reshape([BLOCK_N, D])
                n_stage, n_phase = next_slot(k_stage, k_phase, STAGES)
                s = warpgroup_mma(q, k, none, use_acc=False, is_async=True)
                mbarrier.wait(v_full.index(stage), phase)
                acc = warpgroup_mma(p, v, acc, is_async=True)
                s = warpgroup_mma_wait(1, deps=(s,))
                mbarrier.arrive(k_empty.index(k_stage), count=1)
                m_new = gl.maximum(m, gl.max(s, 1) * qk_scale)
                p32 = gl.exp2(s * qk_scale - gl.expand_dims(m_new, 1))
                alpha = gl.exp2(m - m_new)
                l = l * alpha + gl.sum(p32, 1)
                m = m_new
                # Here lest ptxas moves the softmax behind the wait for p v: a wait for memory is a branch.
                mbarrier.wait(k_full.index(n_stage), n_phase, pred=back + 1 < mine)
                acc, p = warpgroup_mma_wait(0, deps=(acc, p))
                mbarrier.arrive(v_empty.index(stage), count=1)
                acc = acc * gl.expand_dims(gl.convert_layout(alpha, o_rows), 1)
                p = gl.convert_layout(p32.to(o_desc.dtype), p_layout)
                stage, phase = k_stage, k_phase
                k_stage, k_phase = n_stage, n_phase

            mbarrier.arrive(q_empty.index(C), count=1)  # every product with q is done
            q_phase ^= 1
            mbarrier.wait(v_full.index(stage), phase)
            acc = warpgroup_mma(p, v_smem.index(stage).reshape([BLOCK_N, D]), acc, is_async=True)
            lse = m + gl.log2(l)
            scale = gl.convert_layout(1.0 / l, o_rows)
            gl.store(lse_ptr + plane * time + first + rows, lse, mask=first + rows < time)
            tma.store_wait(0)  # the store of the tile before has read o_buf; the barrier below tells the other warps
            acc, p = warpgroup_mma_wait(0, deps=(acc, p))
            barrier()  # in all four warps
            mbarrier.arrive(v_empty.index(stage), count=1)
            stage, phase = next_slot(stage, phase, STAGES)
            o = (acc * gl.expand_dims(scale, 1)).to(o_desc.dtype)
            o_buf.reshape([64, D]).store(o)
            fence_async_shared()
            barrier()
            tma.async_copy_shared_to_global(o_desc, [batch, first, head, 0], o_buf)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["heads", "time", "items", "tiles"])
def _hopper_attention_fwd_kernel(
    q_desc,  # (B, T, H, D), tiles [64, D]
    k_desc,  # (B, T, H, D), tiles [BLOCK_N, D]
    v_desc,
    o_desc,  # (B, T, H, D), tiles [64, D]
    lse_ptr,  # (B, H, T)
    heads, time, items, tiles, qk_scale,
    D: gl.constexpr, BLOCK_N: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr,
    REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    q_smem = gl.allocate_shared_memory(q_desc.dtype, [CONSUMERS, 1, 64, 1, D], q_desc.layout)
    k_smem = gl.allocate_shared_memory(k_desc.dtype, [STAGES, 1, BLOCK_N, 1, D], k_desc.layout)
    v_smem = gl.allocate_shared_memory(v_desc.dtype, [STAGES, 1, BLOCK_N, 1, D], v_desc.layout)
    o_smem = gl.allocate_shared_memory(o_desc.dtype, [CONSUMERS, 1, 64, 1, D], o_desc.layout)
    q_full = barriers(CONSUMERS, 1)
    q_empty = barriers(CONSUMERS, 1)
    k_full = barriers(STAGES, 1)
    k_empty = barriers(STAGES, CONSUMERS)
    v_full = barriers(STAGES, 1)
    v_empty = barriers(STAGES, CONSUMERS)
    fence_async_shared()  # the barriers are seen by the copy engine
    barrier()

    tensors = q_smem, k_smem, v_smem, o_smem, q_full, q_empty, k_full, k_empty, v_full, v_empty
    numbers = heads, time, items, tiles
    load = q_desc, k_desc, v_desc, tensors, numbers
    attend = o_desc, lse_ptr, tensors, numbers, qk_scale
    if CONSUMERS == 2:
        gl.warp_specialize([
            (_consumer, (attend, 0, D, BLOCK_N, CONSUMERS, STAGES)),
            (_consumer, (attend, 1, D, BLOCK_N, CONSUMERS, STAGES)),
            (_producer, (load, D, BLOCK_N, CONSUMERS, STAGES)),
        ], [4, 1], [REGISTERS, PRODUCER_REGISTERS])  # fmt: skip
    else:
        gl.warp_specialize([
            (_consumer, (attend, 0, D, BLOCK_N, CONSUMERS, STAGES)),
            (_consumer, (attend, 1, D, BLOCK_N, CONSUMERS, STAGES)),
            (_consumer, (attend, 2, D, BLOCK_N, CONSUMERS, STAGES)),
            (_producer, (load, D, BLOCK_N, CONSUMERS, STAGES)),
        ], [4, 4, 1], [REGISTERS, REGISTERS, PRODUCER_REGISTERS])  # fmt: skip


def attention_fwd(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, o: torch.Tensor, lse: torch.Tensor, scale: float, block_m: int
) -> None:
    """q, k, v (B, H, T, D) -> o (B, H, T, D) and lse (B, H, T), which are written.

    block_m: queries of a program; (D, block_m) is one of FORMS. q, k, v and o are of one dtype of 16 bits, begin at
    multiples of 16 bytes, and have `nested_strides` that are such multiples too; B H T is below 2**31.
    """
    _forward([(t, nested_strides(t)) for t in (q, k, v, o)], q.shape, lse, scale, block_m)


def attention_qkv_fwd(
    qkv: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, heads: int, scale: float, block_m: int
) -> None:
    """The packed projection qkv (B, T, 3C) -> out (B, T, C) and lse (B, H, T), which are written; both contiguous."""
    batch, time, channels = out.shape
    dim = channels // heads
    packed, strides = [3 * time * channels, 3 * channels, dim, 1], [time * channels, channels, dim, 1]
    parts = [(Part(qkv, i * channels), packed) for i in range(3)]
    _forward([*parts, (out, strides)], (batch, heads, time, dim), lse, scale, block_m)


def _forward(operands, shape, lse, scale, block_m):
    """operands: of q, k, v, o a tensor that begins where it does, and its strides as (B, T, H, D)."""
    batch, heads, time, dim = shape
    form = FORMS[dim, block_m]
    tiles = cdiv(time, block_m)
    items = batch * heads * ((tiles + 1) // 2)
    rows = (64, form.block_n, form.block_n, 64)
    launch(
        _hopper_attention_fwd_kernel,
        ("attention_fwd", dim, block_m, lse.data_ptr() % 16),
        min(items, multiprocessors(lse.device)),
        [
            Map(t, [batch, time, heads, dim], strides, (1, n, 1, dim))
            for (t, strides), n in zip(operands, rows, strict=True)
        ],
        (lse, heads, time, items, tiles, scale * math.log2(math.e)),
        {
            "D": dim,
            "BLOCK_N": form.block_n,
            "CONSUMERS": form.consumers,
            "STAGES": form.stages,
            "REGISTERS": form.registers,
            "PRODUCER_REGISTERS": _PRODUCER_REGISTERS,
        },
        num_warps=4,
        maxnreg=form.maxnreg,
    )


def nested_strides(t: torch.Tensor) -> list[int]:
    """The strides of (B, H, T, D) as (B, T, H, D). That of an axis of one element, which may be anything, is made the
    axes' below it times their lengths."""
    batch, heads, time, dim = t.shape
    of_head = t.stride(1) if heads > 1 else dim
    of_time = t.stride(2) if time > 1 else heads * of_head
    of_batch = t.stride(0) if batch > 1 else time * of_time
    return [of_batch, of_time, of_head, 1]
