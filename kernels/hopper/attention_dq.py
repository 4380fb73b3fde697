"""The first kernel of attention's backward for Hopper: dq, and what the second needs of each query.

attention_backward.py has the mathematics and the account. A program has two warpgroups of 64 queries each, which
multiply, and one warp that loads: q, do and o into one buffer a warpgroup, k and v into rings of tiles of BLOCK_N
keys, from key 0 up. So a warpgroup's last tile alone is masked, and stands behind the loop.

Δ = rowsum(do ∘ o) is made in shared memory, under the load of the first k. It goes to `stats` together with lse, in
tiles of 64 queries: lse of all, then Δ of all. Behind T lse is infinite there, so that P is 0.

In the loop the exponentials run under do vᵀ. The wait for the next tile of k stands behind them because ptxas moves
the wait for a product in front of arithmetic that it does not depend on, but not over a wait for memory.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .pipeline import barrier, barriers, next_slot, paired_tiles, store_sums

_CONSUMERS = gl.constexpr(2)


@gluon.jit
def _dq_producer(load, D: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr):
    """The warp that loads."""
    q_desc, do_desc, o_desc, k_desc, v_desc, tensors, numbers = load
    q_smem, do_smem, o_smem, k_smem, v_smem, _, q_full, q_empty, k_full, v_full, empty = tensors
    heads, time, items, tiles, _ = numbers
    BLOCK_M: gl.constexpr = 64 * _CONSUMERS
    KV_BYTES: gl.constexpr = BLOCK_N * D * 2
    Q_BYTES: gl.constexpr = 3 * 64 * D * 2
    stage = 0
    phase = 0  # the consumers' parity
    q_phase = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        plane, tile, count = paired_tiles(item, tiles)
        batch = plane // heads
        head = plane - batch * heads
        pair = tiles - 1 - tile
        for half in range(count):
            first = gl.where(half == 0, tile, pair) * BLOCK_M
            last = (gl.minimum(first + BLOCK_M, time) - 1) // BLOCK_N
            for c in gl.static_range(_CONSUMERS):
                mbarrier.wait(q_empty.index(c), q_phase ^ 1)
                mbarrier.expect(q_full.index(c), Q_BYTES)
                where = [batch, first + c * 64, head, 0]
                tma.async_copy_global_to_shared(q_desc, where, q_full.index(c), q_smem.index(c))
                tma.async_copy_global_to_shared(do_desc, where, q_full.index(c), do_smem.index(c))
                tma.async_copy_global_to_shared(o_desc, where, q_full.index(c), o_smem.index(c))
            q_phase ^= 1
            for j in range(last + 1):
                where = [batch, j * BLOCK_N, head, 0]
                mbarrier.wait(empty.index(stage), phase ^ 1)
                mbarrier.expect(k_full.index(stage), KV_BYTES)
                tma.async_copy_global_to_shared(k_desc, where, k_full.index(stage), k_smem.index(stage))
                mbarrier.expect(v_full.index(stage), KV_BYTES)
                tma.async_copy_global_to_shared(v_desc, where, v_full.index(stage), v_smem.index(stage))
                stage, phase = next_slot(stage, phase, STAGES)


@gluon.jit
def _dq_consumer(multiply, C: gl.constexpr, D: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr):
    """The warpgroup of queries 64 C to 64 C + 63 of every tile."""
    dq_desc, lse_ptr, stats_ptr, sums_ptr, tensors, numbers, qk_scale, scale = multiply
    q_smem, do_smem, o_smem, k_smem, v_smem, dq_smem, q_full, q_empty, k_full, v_full, empty = tensors
    heads, time, items, tiles, stat_tiles = numbers
    BLOCK_M: gl.constexpr = 64 * _CONSUMERS
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    dq_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    ds_layout: gl.constexpr = gl.DotOperandLayout(0, dq_layout, 2)
    s_rows: gl.constexpr = gl.SliceLayout(1, s_layout)
    q = q_smem.index(C).reshape([64, D])
    do = do_smem.index(C).reshape([64, D])
    o = o_smem.index(C).reshape([64, D])
    dq_buf = dq_smem.index(C)
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
            first = gl.where(half == 0, tile, pair) * BLOCK_M
            last = (gl.minimum(first + BLOCK_M, time) - 1) // BLOCK_N
            first += C * 64
            mine = gl.minimum(first // BLOCK_N, last)
            there = first + rows
            lse = gl.load(lse_ptr + plane * time + there, mask=there < time, other=float("inf"))

            dq = gl.zeros([64, D], gl.float32, dq_layout)
            mbarrier.wait(q_full.index(C), q_phase)
            delta = gl.sum(o.load(dq_layout).to(gl.float32) * do.load(dq_layout).to(gl.float32), 1)
            delta = gl.convert_layout(delta, s_rows)
            stats = stats_ptr + (plane * stat_tiles + there // 64) * 128 + there % 64
            gl.store(stats, lse, mask=there < stat_tiles * 64)
            gl.store(stats + 64, delta, mask=there < stat_tiles * 64)
            mbarrier.wait(k_full.index(stage), phase)
            for _ in range(mine):
                # k of this turn is there.
                k = k_smem.index(stage).reshape([BLOCK_N, D])
                v = v_smem.index(stage).reshape([BLOCK_N, D])
                n_stage, n_phase = next_slot(stage, phase, STAGES)
                s = warpgroup_mma(q, k.permute((1, 0)), none, use_acc=False, is_async=True)
                mbarrier.wait(v_full.index(stage), phase)
                dp = warpgroup_mma(do, v.permute((1, 0)), none, use_acc=False, is_async=True)
                s = warpgroup_mma_wait(1, deps=(s,))
                p = gl.exp2(s * qk_scale - gl.expand_dims(lse, 1))
                mbarrier.wait(k_full.index(n_stage), n_phase)  # here lest ptxas moves p behind the next wait
                dp = warpgroup_mma_wait(0, deps=(dp,))
                ds = gl.convert_layout((p * (dp - gl.expand_dims(delta, 1))).to(dq_desc.dtype), ds_layout)
                dq = warpgroup_mma(ds, k, dq, is_async=True)
                dq, ds = warpgroup_mma_wait(0, deps=(dq, ds))
                mbarrier.arrive(empty.index(stage), count=1)
                stage, phase = n_stage, n_phase

            # The tile on the diagonal.
            k = k_smem.index(stage).reshape([BLOCK_N, D])
            v = v_smem.index(stage).reshape([BLOCK_N, D])
            s = warpgroup_mma(q, k.permute((1, 0)), none, use_acc=False, is_async=True)
            mbarrier.wait(v_full.index(stage), phase)
            dp = warpgroup_mma(do, v.permute((1, 0)), none, use_acc=False, is_async=True)
            s = warpgroup_mma_wait(1, deps=(s,))
            p = gl.exp2(s * qk_scale - gl.expand_dims(lse, 1))
            p = gl.where(gl.expand_dims(cols + mine * BLOCK_N, 0) <= gl.expand_dims(there, 1), p, 0.0)
            dp = warpgroup_mma_wait(0, deps=(dp,))
            ds = gl.convert_layout((p * (dp - gl.expand_dims(delta, 1))).to(dq_desc.dtype), ds_layout)
            dq = warpgroup_mma(ds, k, dq, is_async=True)
            tma.store_wait(0)  # the store of the tile before has read dq_buf; the barrier below tells the other warps
            barrier()  # all four warps are past their waits for s and dp, and have read o and do
            mbarrier.arrive(q_empty.index(C), count=1)
            q_phase ^= 1
            dq, ds = warpgroup_mma_wait(0, deps=(dq, ds))
            barrier()
            mbarrier.arrive(empty.index(stage), count=1)
            stage, phase = next_slot(stage, phase, STAGES)
            for _ in range(last - mine):  # tiles that only later warpgroups see; waiting keeps to the phase
                mbarrier.wait(k_full.index(stage), phase)
                mbarrier.wait(v_full.index(stage), phase)
                mbarrier.arrive(empty.index(stage), count=1)
                stage, phase = next_slot(stage, phase, STAGES)
            if sums_ptr is not None:
                store_sums(sums_ptr, batch, first // 64, stat_tiles, 0, heads, head, dq, scale, D, dq_layout)
            dq_buf.reshape([64, D]).store((dq * scale).to(dq_desc.dtype))
            fence_async_shared()
            barrier()
            tma.async_copy_shared_to_global(dq_desc, [batch, first, head, 0], dq_buf)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["heads", "time", "items", "tiles", "stat_tiles"])
def _hopper_attention_dq_kernel(
    q_desc,  # (B, T, H, D), tiles [64, D]
    do_desc, o_desc, dq_desc,
    k_desc,  # (B, T, H, D), tiles [BLOCK_N, D]
    v_desc,
    lse_ptr,  # (B, H, T)
    stats_ptr,  # (B, H, stat_tiles, {lse, Δ}, 64), written here
    sums_ptr,  # (B, stat_tiles, 3, H, D): of dq's columns, written here, or None
    heads, time, items, tiles, stat_tiles, qk_scale, scale,
    D: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    q_smem = gl.allocate_shared_memory(q_desc.dtype, [_CONSUMERS, 1, 64, 1, D], q_desc.layout)
    do_smem = gl.allocate_shared_memory(do_desc.dtype, [_CONSUMERS, 1, 64, 1, D], do_desc.layout)
    o_smem = gl.allocate_shared_memory(o_desc.dtype, [_CONSUMERS, 1, 64, 1, D], o_desc.layout)
    dq_smem = gl.allocate_shared_memory(dq_desc.dtype, [_CONSUMERS, 1, 64, 1, D], dq_desc.layout)
    k_smem = gl.allocate_shared_memory(k_desc.dtype, [STAGES, 1, BLOCK_N, 1, D], k_desc.layout)
    v_smem = gl.allocate_shared_memory(v_desc.dtype, [STAGES, 1, BLOCK_N, 1, D], v_desc.layout)
    q_full = barriers(_CONSUMERS, 1)
    q_empty = barriers(_CONSUMERS, 1)
    k_full = barriers(STAGES, 1)
    v_full = barriers(STAGES, 1)
    empty = barriers(STAGES, _CONSUMERS)  # of k and v
    fence_async_shared()  # the barriers are seen by the copy engine
    barrier()

    tensors = q_smem, do_smem, o_smem, k_smem, v_smem, dq_smem, q_full, q_empty, k_full, v_full, empty
    numbers = heads, time, items, tiles, stat_tiles
    load = q_desc, do_desc, o_desc, k_desc, v_desc, tensors, numbers
    multiply = dq_desc, lse_ptr, stats_ptr, sums_ptr, tensors, numbers, qk_scale, scale
    gl.warp_specialize([
        (_dq_consumer, (multiply, 0, D, BLOCK_N, STAGES)),
        (_dq_consumer, (multiply, 1, D, BLOCK_N, STAGES)),
        (_dq_producer, (load, D, BLOCK_N, STAGES)),
    ], [4, 1], [REGISTERS, PRODUCER_REGISTERS])  # fmt: skip
