"""Token + position embedding with dropout in one pass, and a backward that gives the same bits every time.

    out[r] = dropout(token_weight[ids[r]] + position_weight[positions[r]])        r = b T + t, the row of (B, T)

The gradient of a weight's row is the sum of the rows of dout that read it. A few tokens are read by a twentieth of all
rows and most by none, so neither a program a token nor atomics will do. The rows are sorted by what they read; then
runs of equal keys are adjacent, and a program sums a chunk of sorted rows one after another. A run within a chunk is
written at once. One that crosses chunks leaves a sum in each of them, which a second, small launch adds up in order.

Bytes, e the size of an element: the forward reads and writes 2 M C e (positions come from the cache); the backward
reads M C e for each of the two weights and writes all of its gradient, V C e for the tokens' with the zeros that most
of it is. Sorting M ids is PyTorch's.
"""

import torch
import triton
import triton.language as tl

from .launch import accumulator, cdiv, dropout_numbers, launch, next_power_of_2, statistics_dtype
from .philox import keep_mask

_SITE = tl.constexpr(2)  # this file's dropout, in the counter of philox.keep_mask


def _tiles(columns: int) -> tuple[int, int, int]:
    """BLOCK_M, BLOCK_C and num_warps: 16 bytes of half precision a thread. Measured on an H200 at 768:
    78% of a copy's rate."""
    block_c = min(1024, max(16, next_power_of_2(columns)))
    return max(1, 1024 // block_c), block_c, 4


def _chunk(tensor: torch.Tensor) -> int:
    """Sorted rows that one program of the backward sums: long enough that few runs cross, short enough that 32 Ki rows
    fill a card. Other lengths have not been measured."""
    return 32 if tensor.is_cuda else 4  # the interpreter sees few rows, and runs should cross there too


@triton.jit
def _embedding_fwd_kernel(
    token_ptr, position_ptr,
    ids_ptr, positions_ptr,  # (B, T)
    seed_ptr,
    out_ptr,  # (B, T, C)
    M, T, C, vocab, context,
    stride_tv, stride_tc, stride_pv, stride_pc,
    stride_ib, stride_it, stride_sb, stride_st,
    threshold, keep_scale,
    HAS_POSITIONS: tl.constexpr, DROPOUT: tl.constexpr, ACC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    batch, time = (rows // T).to(tl.int64), (rows % T).to(tl.int64)
    ids = tl.load(ids_ptr + batch * stride_ib + time * stride_it, rows < M, 0).to(tl.int64)
    places = time
    if HAS_POSITIONS:
        places = tl.load(positions_ptr + batch * stride_sb + time * stride_st, rows < M, 0).to(tl.int64)
    known = (ids >= 0) & (ids < vocab) & (places >= 0) & (places < context)  # the others read nothing and give NaN
    inside = (rows < M)[:, None] & (cols < C)[None, :]
    mask = inside & known[:, None]
    cols64 = cols.to(tl.int64)
    x = tl.load(token_ptr + ids[:, None] * stride_tv + cols64[None, :] * stride_tc, mask, 0.0).to(ACC)
    x += tl.load(position_ptr + places[:, None] * stride_pv + cols64[None, :] * stride_pc, mask, 0.0).to(ACC)
    if DROPOUT:
        keep = keep_mask(tl.load(seed_ptr), rows, tl.program_id(1) * BLOCK_C, 0, _SITE, threshold, BLOCK_M, BLOCK_C)
        x = tl.where(keep, x * keep_scale, 0.0)
    x = tl.where(known[:, None], x, float("nan"))
    tl.store(out_ptr + rows.to(tl.int64)[:, None] * C + cols64[None, :], x.to(out_ptr.dtype.element_ty), inside)


@triton.jit
def _run_sums_kernel(
    dout_ptr,  # (B, T, C)
    keys_ptr,  # (M,): what each row reads, in order
    order_ptr,  # (M,): which row that is
    seed_ptr,
    dweight_ptr,  # (size, C)
    heads_ptr,  # (chunks, C): the sum of a chunk's first run, where it began in an earlier chunk
    tails_ptr,  # (chunks, C): the sum of a chunk's last run, where it begins here and goes on in the next one
    M, T, C, size,
    stride_gb, stride_gt, stride_gc,
    threshold, keep_scale,
    DROPOUT: tl.constexpr, ACC: tl.constexpr, CHUNK: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0)
    first_col = tl.program_id(1) * BLOCK_C
    cols = first_col + tl.arange(0, BLOCK_C)
    in_cols = cols < C
    cols64 = cols.to(tl.int64)
    start = chunk * CHUNK
    end = tl.minimum(start + CHUNK, M)
    if DROPOUT:
        seed = tl.load(seed_ptr)

    key = tl.load(keys_ptr + start).to(tl.int64)
    begins_here = (start == 0) | (tl.load(keys_ptr + start - 1, start > 0, 0).to(tl.int64) != key)
    total = tl.zeros([BLOCK_C], ACC)
    for i in range(start, end):
        row = tl.load(order_ptr + i)
        batch, time = (row // T).to(tl.int64), (row % T).to(tl.int64)
        d = tl.load(dout_ptr + batch * stride_gb + time * stride_gt + cols64 * stride_gc, in_cols, 0.0).to(ACC)
        if DROPOUT:
            rows = tl.zeros([1], tl.int32) + row.to(tl.int32)
            keep = keep_mask(seed, rows, first_col, 0, _SITE, threshold, 1, BLOCK_C)
            d = tl.where(tl.reshape(keep, [BLOCK_C]), d * keep_scale, 0.0)
        total += d
        next_key = tl.load(keys_ptr + i + 1, i + 1 < M, 0).to(tl.int64)
        ends = (i + 1 == M) | (next_key != key)
        if ends | (i + 1 == end):
            # Two stores: Triton 3.6.0 does not compile a tensor that a loop carries and three branches store.
            if begins_here & ends:
                if (key >= 0) & (key < size):
                    tl.store(dweight_ptr + key * C + cols, total.to(dweight_ptr.dtype.element_ty), in_cols)
            else:
                part_ptr = tl.where(begins_here, tails_ptr, heads_ptr)
                tl.store(part_ptr + chunk.to(tl.int64) * C + cols, total, in_cols)
            total = tl.zeros([BLOCK_C], ACC)
            begins_here = ends
        key = next_key


@triton.jit
def _join_runs_kernel(
    keys_ptr,  # (M,)
    heads_ptr, tails_ptr,  # (chunks, C)
    dweight_ptr,  # (size, C)
    M, C, size,
    ACC: tl.constexpr, CHUNK: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The run that begins in this program's chunk and goes on in the next ones, if there is one."""
    chunk = tl.program_id(0)
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_cols = cols < C
    start = chunk * CHUNK
    end = start + CHUNK
    key = tl.load(keys_ptr + tl.minimum(end, M) - 1).to(tl.int64)
    before = tl.load(keys_ptr + start - 1, start > 0, 0).to(tl.int64)
    begins_here = (start == 0) | (before != key)
    goes_on = (end < M) & (tl.load(keys_ptr + end, end < M, 0).to(tl.int64) == key)
    if begins_here & goes_on & (key >= 0) & (key < size):
        last = chunk  # that has a part of the run
        while goes_on:  # counted first: a tensor carried through a `while` breaks Triton's layout pass
            last += 1
            end += CHUNK
            goes_on = (end < M) & (tl.load(keys_ptr + end, end < M, 0).to(tl.int64) == key)
        total = tl.load(tails_ptr + chunk.to(tl.int64) * C + cols, in_cols, 0.0)
        for part in range(chunk + 1, last + 1):
            total += tl.load(heads_ptr + tl.cast(part, tl.int64) * C + cols, in_cols, 0.0)
        tl.store(dweight_ptr + key * C + cols, total.to(dweight_ptr.dtype.element_ty), in_cols)


def embedding_fwd(
    token_weight: torch.Tensor,
    position_weight: torch.Tensor,
    ids: torch.Tensor,
    positions: torch.Tensor | None,
    seed: torch.Tensor | None,
    dropout_p: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    """token_weight (V, C), position_weight (Tmax, C), ids (B, T), positions (B, T), (T,) or None for 0, 1, …, T - 1
    -> (B, T, C) in dtype. seed: (1,) int64, needed where dropout_p > 0. A row with an id out of range is NaN."""
    out = embedding_fwd_outputs(token_weight, position_weight, ids, positions, seed, dropout_p, dtype)
    rows, columns = ids.numel(), token_weight.shape[1]
    if out.numel() == 0:
        return out
    places = ids if positions is None else positions.expand(ids.shape)
    block_m, block_c, num_warps = _tiles(columns)
    launch(
        _embedding_fwd_kernel,
        (cdiv(rows, block_m), cdiv(columns, block_c)),
        token_weight,
        position_weight,
        ids,
        places,
        ids if seed is None else seed,
        out,
        rows,
        ids.shape[1],
        columns,
        token_weight.shape[0],
        position_weight.shape[0],
        *token_weight.stride(),
        *position_weight.stride(),
        *ids.stride(),
        *places.stride(),
        *dropout_numbers(dropout_p),
        HAS_POSITIONS=positions is not None,
        DROPOUT=dropout_p > 0,
        ACC=accumulator(token_weight),
        BLOCK_M=block_m,
        BLOCK_C=block_c,
        num_warps=num_warps,
    )
    return out


def embedding_fwd_outputs(token_weight, position_weight, ids, positions, seed, dropout_p, dtype):
    """What embedding_fwd allocates, so it serves as its fake too."""
    return torch.empty((*ids.shape, token_weight.shape[1]), dtype=dtype, device=token_weight.device)


def embedding_bwd(
    dout: torch.Tensor,
    keys: torch.Tensor | None,
    seed: torch.Tensor | None,
    size: int,
    dropout_p: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    """dout (B, T, C) and what each of its rows read, keys (B, T), (T,) or None for 0, 1, …, T - 1 -> the gradient of
    the weight (size, C) they were read from, in dtype."""
    dweight = embedding_bwd_outputs(dout, keys, seed, size, dropout_p, dtype).zero_()
    batch, time, columns = dout.shape
    rows = batch * time
    if dout.numel() == 0:
        return dweight
    sorted_keys, order = _in_order(keys, batch, time, dout.device)
    chunk = _chunk(dout)
    chunks = cdiv(rows, chunk)
    heads, tails = torch.empty((2, chunks, columns), dtype=statistics_dtype(dout), device=dout.device)
    _, block_c, num_warps = _tiles(columns)
    grid = (chunks, cdiv(columns, block_c))
    constants = dict(ACC=accumulator(dout), CHUNK=chunk, BLOCK_C=block_c, num_warps=num_warps)
    launch(
        _run_sums_kernel,
        grid,
        dout,
        sorted_keys,
        order,
        order if seed is None else seed,
        dweight,
        heads,
        tails,
        rows,
        time,
        columns,
        size,
        *dout.stride(),
        *dropout_numbers(dropout_p),
        DROPOUT=dropout_p > 0,
        **constants,
    )
    launch(_join_runs_kernel, grid, sorted_keys, heads, tails, dweight, rows, columns, size, **constants)
    return dweight


def embedding_bwd_outputs(dout, keys, seed, size, dropout_p, dtype):
    """What embedding_bwd allocates, so it serves as its fake too."""
    return torch.empty((size, dout.shape[2]), dtype=dtype, device=dout.device)


def _in_order(keys, batch, time, device):
    """The keys of all rows in order, and the rows that have them; rows of one key stay in their order."""
    if keys is None:  # every sequence counts from 0: the order is known
        order = torch.arange(batch * time, dtype=torch.int64, device=device).view(batch, time).t().flatten()
        return order % time, order
    return keys.expand(batch, time).flatten().sort(stable=True)
