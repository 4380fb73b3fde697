"""The second kernel of attention's backward for Hopper: dk and dv.

attention_backward.py has the mathematics and the account. A program has two warpgroups of 64 keys each, which multiply,
and one warp that loads: k and v into one buffer a warpgroup, q with its `stats` (attention_dq.py) and do into rings of
tiles of 64 queries, from the last down to the diagonal. So a warpgroup's last tile alone is masked, and stands behind
the loop; queries past T have P = 0 by their stats.

Sᵀ = k qᵀ and dPᵀ = v doᵀ are formed as such, and Pᵀ and dSᵀ are operands in registers of the products for dv and dk.
dv's runs under the arithmetic of dS. Where KEYS_IN_REGISTERS says so, k and v are operands in registers too, which
leaves more of shared memory's bandwidth to q and do.

Three orders are for ptxas's sake. Every turn ends with a wait for all of its products: with one in flight over the
loop's end it lets no two overlap. Δ is loaded behind dv's product, and dv and dk are stored behind a wait for theirs:
with loads or stores of shared memory elsewhere, ptxas 12.8 crashed on some of these forms.
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
def _dkdv_producer(load, D: gl.constexpr, STAGES: gl.constexpr):
    """The warp that loads."""
    q_desc, do_desc, stats_desc, k_desc, v_desc, of_queries, of_keys, rings, numbers = load
    q_smem, do_smem, stats_smem = of_queries
    q_full, do_full, empty = rings
    k_smem, v_smem, k_full, k_empty = of_keys
    heads, items, tiles, stat_tiles = numbers
    BLOCK_N: gl.constexpr = 64 * _CONSUMERS
    Q_BYTES: gl.constexpr = 64 * D * 2
    STATS_BYTES: gl.constexpr = 2 * 64 * 4
    KV_BYTES: gl.constexpr = 2 * 64 * D * 2
    stage = 0
    phase = 0  # the consumers' parity
    k_phase = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        plane, tile, count = paired_tiles(item, tiles)
        batch = plane // heads
        head = plane - batch * heads
        pair = tiles - 1 - tile
        for half in range(count):
            first = gl.where(half == 0, tile, pair) * BLOCK_N
            for c in gl.static_range(_CONSUMERS):
                mbarrier.wait(k_empty.index(c), k_phase ^ 1)
                mbarrier.expect(k_full.index(c), KV_BYTES)
                where = [batch, first + c * 64, head, 0]
                tma.async_copy_global_to_shared(k_desc, where, k_full.index(c), k_smem.index(c))
                tma.async_copy_global_to_shared(v_desc, where, k_full.index(c), v_smem.index(c))
            k_phase ^= 1
            for back in range(stat_tiles - first // 64):
                i = stat_tiles - 1 - back
                where = [batch, i * 64, head, 0]
                stats_where = [(plane * stat_tiles + i) * 128]
                mbarrier.wait(empty.index(stage), phase ^ 1)
                mbarrier.expect(q_full.index(stage), Q_BYTES + STATS_BYTES)
                tma.async_copy_global_to_shared(q_desc, where, q_full.index(stage), q_smem.index(stage))
                tma.async_copy_global_to_shared(stats_desc, stats_where, q_full.index(stage), stats_smem.index(stage))
                mbarrier.expect(do_full.index(stage), Q_BYTES)
                tma.async_copy_global_to_shared(do_desc, where, do_full.index(stage), do_smem.index(stage))
                stage, phase = next_slot(stage, phase, STAGES)


@gluon.jit
def _dkdv_step(
    k, v, dk, dv, of_queries, q_full, do_full, stage, phase, qk_scale, keys, queries, first, tile,
    DTYPE: gl.constexpr, D: gl.constexpr, DIAGONAL: gl.constexpr,
):  # fmt: skip
    """A tile of queries into dk and dv, whose last products are still under way; p and ds are their operands."""
    q_smem, do_smem, stats_smem = of_queries
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])  # of Sᵀ: keys by queries
    g_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, g_layout, 2)
    s_cols: gl.constexpr = gl.SliceLayout(0, s_layout)
    none = gl.zeros([64, 64], gl.float32, s_layout)
    mbarrier.wait(q_full.index(stage), phase)
    q = q_smem.index(stage).reshape([64, D])
    do = do_smem.index(stage).reshape([64, D])
    stats = stats_smem.index(stage)
    s = warpgroup_mma(k, q.permute((1, 0)), none, use_acc=False, is_async=True)
    lse = stats.slice(0, 64).load(s_cols)
    mbarrier.wait(do_full.index(stage), phase)
    dp = warpgroup_mma(v, do.permute((1, 0)), none, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(1, deps=(s,))
    p32 = gl.exp2(s * qk_scale - gl.expand_dims(lse, 0))
    if DIAGONAL:
        seen = gl.expand_dims(keys + first, 1) <= gl.expand_dims(queries + tile * 64, 0)
        p32 = gl.where(seen, p32, 0.0)
    p = gl.convert_layout(p32.to(DTYPE), p_layout)
    dv = warpgroup_mma(p, do, dv, is_async=True)
    delta = stats.slice(64, 64).load(s_cols)
    dp = warpgroup_mma_wait(1, deps=(dp,))
    ds = gl.convert_layout((p32 * (dp - gl.expand_dims(delta, 0))).to(DTYPE), p_layout)
    dk = warpgroup_mma(ds, q, dk, is_async=True)
    return dv, dk, p, ds


@gluon.jit
def _dkdv_consumer(multiply, C: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, KEYS_IN_REGISTERS: gl.constexpr):
    """The warpgroup of keys 64 C to 64 C + 63 of every tile."""
    dk_desc, dv_desc, sums_ptr, of_queries, of_keys, rings, dk_smem, dv_smem, numbers, qk_scale, scale = multiply
    q_full, do_full, empty = rings
    k_smem, v_smem, k_full, k_empty = of_keys
    heads, items, tiles, stat_tiles = numbers
    BLOCK_N: gl.constexpr = 64 * _CONSUMERS
    DTYPE: gl.constexpr = dk_desc.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    g_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    k_layout: gl.constexpr = gl.DotOperandLayout(0, s_layout, 2)
    k_mem = k_smem.index(C).reshape([64, D])
    v_mem = v_smem.index(C).reshape([64, D])
    dk_buf = dk_smem.index(C)
    dv_buf = dv_smem.index(C)
    keys = gl.arange(0, 64, gl.SliceLayout(1, s_layout))
    queries = gl.arange(0, 64, gl.SliceLayout(0, s_layout))

    stage = 0
    phase = 0
    k_phase = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        plane, tile, count = paired_tiles(item, tiles)
        batch = plane // heads
        head = plane - batch * heads
        pair = tiles - 1 - tile
        for half in range(count):
            first = gl.where(half == 0, tile, pair) * BLOCK_N
            start = first // 64  # the last tile of queries to be walked over
            first += C * 64
            mine = gl.minimum(first // 64, stat_tiles - 1)  # the one on this warpgroup's diagonal

            mbarrier.wait(k_full.index(C), k_phase)
            if KEYS_IN_REGISTERS:
                k = k_mem.load(k_layout)
                v = v_mem.load(k_layout)
                barrier()
                mbarrier.arrive(k_empty.index(C), count=1)
                k_phase ^= 1
            else:
                k = k_mem
                v = v_mem
            dk = gl.zeros([64, D], gl.float32, g_layout)
            dv = gl.zeros([64, D], gl.float32, g_layout)
            for back in range(stat_tiles - 1 - mine):
                dv, dk, p, ds = _dkdv_step(
                    k, v, dk, dv, of_queries, q_full, do_full, stage, phase, qk_scale,
                    keys, queries, first, stat_tiles - 1 - back, DTYPE, D, False
                )  # fmt: skip
                dv, dk, p, ds = warpgroup_mma_wait(0, deps=(dv, dk, p, ds))
                mbarrier.arrive(empty.index(stage), count=1)
                stage, phase = next_slot(stage, phase, STAGES)

            dv, dk, p, ds = _dkdv_step(
                k, v, dk, dv, of_queries, q_full, do_full, stage, phase, qk_scale,
                keys, queries, first, mine, DTYPE, D, True
            )  # fmt: skip
            if not KEYS_IN_REGISTERS:
                barrier()  # all four warps are past their waits for s and dp
                mbarrier.arrive(k_empty.index(C), count=1)
                k_phase ^= 1
            tma.store_wait(0)  # the stores of the tile before have read the buffers; the barrier tells the other warps
            dv, dk, p, ds = warpgroup_mma_wait(0, deps=(dv, dk, p, ds))
            barrier()
            mbarrier.arrive(empty.index(stage), count=1)
            stage, phase = next_slot(stage, phase, STAGES)
            for _ in range(mine - start):  # a tile that only the warpgroup before sees; waiting keeps to the phase
                mbarrier.wait(q_full.index(stage), phase)
                mbarrier.wait(do_full.index(stage), phase)
                mbarrier.arrive(empty.index(stage), count=1)
                stage, phase = next_slot(stage, phase, STAGES)
            if sums_ptr is not None:
                store_sums(sums_ptr, batch, first // 64, stat_tiles, 1, heads, head, dk, scale, D, g_layout)
                store_sums(sums_ptr, batch, first // 64, stat_tiles, 2, heads, head, dv, 1.0, D, g_layout)
            dv_buf.reshape([64, D]).store(dv.to(DTYPE))
            dk_buf.reshape([64, D]).store((dk * scale).to(DTYPE))
            fence_async_shared()
            barrier()
            tma.async_copy_shared_to_global(dv_desc, [batch, first, head, 0], dv_buf)
            tma.async_copy_shared_to_global(dk_desc, [batch, first, head, 0], dk_buf)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["heads", "items", "tiles", "stat_tiles"])
def _hopper_attention_dkdv_kernel(
    q_desc,  # (B, T, H, D), tiles [64, D]
    do_desc,
    stats_desc,  # as attention_dq.py leaves them, tiles [128]
    k_desc,  # (B, T, H, D), tiles [64, D]
    v_desc, dk_desc, dv_desc,
    sums_ptr,  # (B, stat_tiles, 3, H, D): of dk's and dv's columns, written here, or None
    heads, items, tiles, stat_tiles, qk_scale, scale,
    D: gl.constexpr, STAGES: gl.constexpr, KEYS_IN_REGISTERS: gl.constexpr,
    REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    k_smem = gl.allocate_shared_memory(k_desc.dtype, [_CONSUMERS, 1, 64, 1, D], k_desc.layout)
    v_smem = gl.allocate_shared_memory(v_desc.dtype, [_CONSUMERS, 1, 64, 1, D], v_desc.layout)
    dk_smem = gl.allocate_shared_memory(dk_desc.dtype, [_CONSUMERS, 1, 64, 1, D], dk_desc.layout)
    dv_smem = gl.allocate_shared_memory(dv_desc.dtype, [_CONSUMERS, 1, 64, 1, D], dv_desc.layout)
    q_smem = gl.allocate_shared_memory(q_desc.dtype, [STAGES, 1, 64, 1, D], q_desc.layout)
    do_smem = gl.allocate_shared_memory(do_desc.dtype, [STAGES, 1, 64, 1, D], do_desc.layout)
    stats_smem = gl.allocate_shared_memory(gl.float32, [STAGES, 128], stats_desc.layout)
    k_full = barriers(_CONSUMERS, 1)  # of k and v
    k_empty = barriers(_CONSUMERS, 1)
    q_full = barriers(STAGES, 1)  # of q and its stats
    do_full = barriers(STAGES, 1)
    empty = barriers(STAGES, _CONSUMERS)  # of all three
    fence_async_shared()  # the barriers are seen by the copy engine
    barrier()

    of_queries = q_smem, do_smem, stats_smem
    of_keys = k_smem, v_smem, k_full, k_empty
    rings = q_full, do_full, empty
    numbers = heads, items, tiles, stat_tiles
    load = q_desc, do_desc, stats_desc, k_desc, v_desc, of_queries, of_keys, rings, numbers
    multiply = dk_desc, dv_desc, sums_ptr, of_queries, of_keys, rings, dk_smem, dv_smem, numbers, qk_scale, scale
    gl.warp_specialize([
        (_dkdv_consumer, (multiply, 0, D, STAGES, KEYS_IN_REGISTERS)),
        (_dkdv_consumer, (multiply, 1, D, STAGES, KEYS_IN_REGISTERS)),
        (_dkdv_producer, (load, D, STAGES)),
    ], [4, 1], [REGISTERS, PRODUCER_REGISTERS])  # fmt: skip
