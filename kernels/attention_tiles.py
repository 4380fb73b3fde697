"""What attention's kernels share: the tiles they are given, rows in and out of a tile, who sees whom.

B batch, H query heads, Hkv key heads, T time, D head dim. A tile is BLOCK_M queries by BLOCK_N keys.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .launch import accumulator, cdiv, dropout_numbers, launch, matmul_precision, next_power_of_2, statistics_dtype

MAX_ROW_STRIDE = 2**23  # times 256 rows of a tile it still fits 32 bits; tensors past it are copied first
ATTENTION_SITE = tl.constexpr(0)  # attention's dropout, in the counter of philox.keep_mask
# Lengths are not specialised: one compiled kernel serves every T, and every window.
LENGTHS = ["queries", "keys", "length", "window"]


class Tiles(NamedTuple):
    block_m: int  # queries
    block_n: int  # keys
    num_warps: int
    num_stages: int


class Card(NamedTuple):
    capability: int  # 90 is 9.0
    shared: int  # bytes of shared memory that one block may have

    @property
    def is_large(self) -> bool:
        """Hopper and its successor in data centers."""
        return 90 <= self.capability < 120 and self.shared >= 160 * 1024


def settings(kernel: str, q: torch.Tensor, extras: bool = False, windowed: bool = False) -> dict[str, Any]:
    """The constexprs and compiler's options of "fwd", "dkdv" or "dq" for these queries; extras: dropout or masks."""
    card = card_of(q)
    tiles = _tiles(kernel, q.shape[-1], q.dtype, card, extras, windowed)
    registers = None
    if q.dtype == torch.float32:  # left alone, ptxas aims at 64 for float32 on capability 8.0, and spills
        registers = 255 if q.shape[-1] > 128 else 192
    elif card is not None and card.capability != 90 and (kernel == "dq" or (kernel == "dkdv" and card.is_large)):
        registers = 255  # and at 128 or 96 for these
    return {
        "D": q.shape[-1],
        "ACC": accumulator(q),
        "PRECISION": matmul_precision(),
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": tiles.block_n,
        "BLOCK_D": max(16, next_power_of_2(q.shape[-1])),
        "num_warps": tiles.num_warps,
        "num_stages": tiles.num_stages,
        "maxnreg": registers,
    }


def _tiles(
    kernel: str, head_dim: int, dtype: torch.dtype, card: Card | None, extras: bool, windowed: bool = False
) -> Tiles:
    """Tiles for "fwd", "dkdv" or "dq" on a card (None is the interpreter); extras: with dropout or masks.

    Those of Hopper were measured on an H200 at B = 32, T = 1024, 768 channels, bfloat16, against some fifteen others of
    each kind (bench/results/nvidia-h200/tiles-2026-11-26.txt), which take up to twice as long: three small blocks of
    four warps to a multiprocessor hide what starts and ends each of them. Those of other cards are not measured: chosen
    by the instruction account (`python -m bench compile --sass`), so that nothing spills and the card can hold them.
    float32 products are no tensor-core work unless TF32 is allowed, and live in registers: small tiles.
    """
    if card is None:  # small and unequal, so that few tokens make several tiles of each kind
        return Tiles(16, 32, 4, 1) if kernel == "dkdv" else Tiles(32, 16, 4, 1)
    if dtype == torch.float32:
        return Tiles(16, 16, 8, 1) if head_dim > 64 else Tiles(32, 32, 8, 1)
    if head_dim > 128:
        return Tiles(64, 32, 8, 2) if kernel == "fwd" else Tiles(32, 16 if extras and kernel == "dkdv" else 32, 8, 1)
    if card.is_large:
        if kernel == "dkdv":
            return Tiles(16 if windowed and head_dim > 64 else 32, 64, 4, 3)  # 32 spill, or no two wgmma overlap
        return Tiles(64, 32 if extras or (kernel == "dq" and head_dim > 64) else 64, 4, 3)
    if kernel == "fwd" and head_dim <= 64:
        return Tiles(64, 64, 8, 2) if extras else Tiles(128, 64, 8, 3)
    if kernel == "fwd":
        return Tiles(128, 32, 8, 2)
    if head_dim <= 64 and not extras:
        if kernel == "dkdv":
            return Tiles(32, 64, 8, 2)
        return Tiles(128, 32 if card.capability >= 120 else 64, 8, 2)
    if kernel == "dq":
        return Tiles(64, 32, 8, 2)
    return Tiles(32, 32 if extras else 64, 8, 2)


def card_of(tensor) -> Card | None:
    if not tensor.is_cuda:
        return None
    card = torch.cuda.get_device_properties(tensor.device)
    return Card(10 * card.major + card.minor, getattr(card, "shared_memory_per_block_optin", 99 * 1024))


@triton.jit
def head_of(pointer, batch, head, stride_b, stride_h):
    """Where a head of a (B, H, T, D) tensor begins."""
    return pointer + batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h


@triton.jit
def places_of(pointer, start, stride_t, stride_d, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """Pointers [BLOCK, BLOCK_D] to rows of a (T, D) matrix from `start` on."""
    rows, cols = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    return pointer + tl.cast(start, tl.int64) * stride_t + rows[:, None] * stride_t + cols[None, :] * stride_d


@triton.jit
def load_rows(
    pointer, start, stride_t, stride_d,
    there,  # [BLOCK]: which rows to read, the others are zeros; None is all
    D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Rows [BLOCK, BLOCK_D] of a (T, D) matrix from `start` on, zero past D."""
    places = places_of(pointer, start, stride_t, stride_d, BLOCK, BLOCK_D)
    in_cols = tl.arange(0, BLOCK_D)[None, :] < D
    if there is not None:
        values = tl.load(places, there[:, None] & in_cols, 0.0)
    elif BLOCK_D != D:
        values = tl.load(places, in_cols, 0.0)
    else:
        values = tl.load(places)
    return values


@triton.jit
def store_rows(
    pointer, start, stride_t, stride_d, values, length,
    D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """Write values [BLOCK, BLOCK_D] to rows of a (length, D) matrix from `start` on, in its dtype."""
    inside = (start + tl.arange(0, BLOCK)[:, None] < length) & (tl.arange(0, BLOCK_D)[None, :] < D)
    places = places_of(pointer, start, stride_t, stride_d, BLOCK, BLOCK_D)
    tl.store(places, values.to(pointer.dtype.element_ty), inside)


@triton.jit
def store_sums(
    sums_ptr,  # (rows, 3, H, D): of a tile's queries, keys, values
    row, part, heads, head, values, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write scale times the sums of the columns of values [BLOCK, BLOCK_D]; what lies past the last token is zero."""
    cols = tl.arange(0, BLOCK_D)
    place = ((row.to(tl.int64) * 3 + part) * heads + head) * D
    tl.store(sums_ptr + place + cols, tl.sum(values, axis=0) * scale, cols < D)


def addressable(tensor):
    """A copy where rows or channels lie so far apart that offsets within a tile would not fit 32 bits."""
    return tensor if max(tensor.stride()[2:]) < MAX_ROW_STRIDE else tensor.contiguous()


def strides(**tensors: torch.Tensor) -> dict[str, int]:
    """The kernels' arguments stride_qb, stride_qh, stride_qt, stride_qd for q=…, and so on."""
    return {f"stride_{n}{axis}": s for n, t in tensors.items() for axis, s in zip("bhtd", t.stride(), strict=True)}


@triton.jit
def open_keys(cols, keys, mask_ptr, poison_ptr):
    """Which of the keys `cols` may be read, [BLOCK_N], and what to add to their scores.

    mask_ptr, poison_ptr: the batch row's key mask and the key head's poison, or None.
    """
    there = cols < keys
    poison = tl.zeros(cols.shape, tl.float32)
    if mask_ptr is not None:
        there = there & tl.load(mask_ptr + cols, there, False).to(tl.int1)
    if poison_ptr is not None:
        poison = tl.load(poison_ptr + cols, there, 0.0)
        there = there & (poison == 0.0)
    return there, poison


@triton.jit
def sees(
    first_query, first_key, queries, keys, window, mask_ptr, ids_ptr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, KEYS_FIRST: tl.constexpr,
):  # fmt: skip
    """Whether each query of a tile sees each key of another, [BLOCK_M, BLOCK_N], or with KEYS_FIRST its transpose.

    window: the keys that a query sees at most, itself included, or None. mask_ptr, ids_ptr: the batch row's key mask
    and documents, or None.
    """
    q = tl.expand_dims(tl.arange(0, BLOCK_M), 0 if KEYS_FIRST else 1)
    k = tl.expand_dims(tl.arange(0, BLOCK_N), 1 if KEYS_FIRST else 0)
    seen = k <= q + (first_query + (keys - queries) - first_key)  # the last query sees the last key, none sees past it
    if window is not None:
        seen = seen & (k > q + (first_query + (keys - queries) - first_key) - window)
    q, k = first_query + q, first_key + k
    if mask_ptr is not None:
        seen = seen & tl.load(mask_ptr + k, k < keys, False).to(tl.int1)
    if ids_ptr is not None:
        seen = seen & (tl.load(ids_ptr + q, q < queries, 0) == tl.load(ids_ptr + k, k < keys, 0))
    return seen


def options(seed, key_mask, documents, dropout_p) -> dict[str, Any]:
    """What the forward and backward kernels take beyond plain attention."""
    threshold, keep_scale = dropout_numbers(dropout_p)
    return {
        "seed_ptr": seed if dropout_p > 0 else None,
        "mask_ptr": None if key_mask is None else key_mask.contiguous(),
        "ids_ptr": None if documents is None else documents.contiguous(),
        "threshold": threshold,
        "keep_scale": keep_scale,
    }


def has_extras(beyond: dict[str, Any]) -> bool:
    return any(beyond[name] is not None for name in ("seed_ptr", "mask_ptr", "ids_ptr"))


@triton.jit
def window_of(first_query, queries, keys, window, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Of a tile of queries: where the tiles of keys begin that a window reaches, and the key from which on it reaches
    all, for every query."""
    oldest = first_query + (keys - queries) - window + 1  # that the first query sees
    return tl.maximum(oldest, 0) // BLOCK_N * BLOCK_N, oldest + BLOCK_M - 1


@triton.jit
def span_of(spans_ptr, batch, tile, tiles):
    """What _spans_kernel found for a tile."""
    place = spans_ptr + (batch.to(tl.int64) * tiles + tile) * 2
    return tl.load(place), tl.load(place + 1)


@triton.jit(do_not_specialize=LENGTHS)
def _spans_kernel(
    mask_ptr,  # (B, length), or None
    ids_ptr,  # (B, length), or None
    spans_ptr,  # (B, tiles, 2)
    length, tiles,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """For each tile of BLOCK tokens the first and one past the last token that is open and whose document lies between
    the tile's lowest and highest: exact where documents are numbered in order, and never too narrow."""
    batch, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    if mask_ptr is not None:
        mask_ptr += batch.to(tl.int64) * length
    if ids_ptr is not None:
        ids_ptr += batch.to(tl.int64) * length
        own = tl.minimum(tile * BLOCK + tl.arange(0, BLOCK), length - 1)
        own_ids = tl.load(ids_ptr + own)
        lowest, highest = tl.min(own_ids, axis=0), tl.max(own_ids, axis=0)
    firsts = tl.full([CHUNK], 0, tl.int32) + length
    stops = tl.zeros([CHUNK], tl.int32)
    for start in range(0, length, CHUNK):
        cols = start + tl.arange(0, CHUNK)
        meets = cols < length
        if mask_ptr is not None:
            meets = meets & tl.load(mask_ptr + cols, cols < length, False).to(tl.int1)
        if ids_ptr is not None:
            ids = tl.load(ids_ptr + cols, cols < length, 0)
            meets = meets & (lowest <= ids) & (ids <= highest)
        firsts = tl.minimum(firsts, tl.where(meets, cols, length))
        stops = tl.maximum(stops, tl.where(meets, cols + 1, 0))
    place = spans_ptr + (batch.to(tl.int64) * tiles + tile) * 2
    tl.store(place, tl.min(firsts, axis=0))
    tl.store(place + 1, tl.max(stops, axis=0))


def spans(key_mask, documents, block, tiles):
    """(B, tiles, 2) int32: for each tile of `block` tokens what _spans_kernel finds; None without masks."""
    if key_mask is None and documents is None:
        return None
    tokens = key_mask if documents is None else documents
    batch, length = tokens.shape
    found = torch.empty((batch, tiles, 2), dtype=torch.int32, device=tokens.device)
    masks = options(None, key_mask, documents, 0.0)
    launch(
        _spans_kernel,
        (batch * tiles,),
        masks["mask_ptr"],
        masks["ids_ptr"],
        found,
        length,
        tiles,
        BLOCK=block,
        CHUNK=1024,
        num_warps=4,
    )
    return found


@triton.jit(do_not_specialize=LENGTHS)
def _poison_kernel(
    k_ptr, v_ptr,  # (B, H, T, D)
    poison_ptr,  # (B, H, T)
    stride_kb, stride_kh, stride_kt, stride_kd,
    stride_vb, stride_vh, stride_vt, stride_vd,
    heads, length,
    D: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(length, BLOCK)
    plane = tl.program_id(0) // tiles
    batch, head, first = plane // heads, plane % heads, tl.program_id(0) % tiles * BLOCK
    rows = first + tl.arange(0, BLOCK)
    k_ptr, v_ptr = head_of(k_ptr, batch, head, stride_kb, stride_kh), head_of(v_ptr, batch, head, stride_vb, stride_vh)
    k = load_rows(k_ptr, first, stride_kt, stride_kd, rows < length, D, BLOCK, BLOCK_D).to(ACC)
    v = load_rows(v_ptr, first, stride_vt, stride_vd, rows < length, D, BLOCK, BLOCK_D).to(ACC)
    poison = tl.sum(k * 0.0 + v * 0.0, axis=1)
    tl.store(poison_ptr + plane.to(tl.int64) * length + rows, poison, rows < length)


def poison_of(k, v):
    """(B, H, T) for keys and values (B, H, T, D): 0 where all of both is finite, else NaN."""
    batch, heads, length, dim = k.shape
    poison = torch.empty((batch, heads, length), dtype=statistics_dtype(k), device=k.device)
    block_d = max(16, next_power_of_2(dim))
    block = max(16, 8192 // block_d)  # 32 elements a thread
    launch(
        _poison_kernel,
        (cdiv(length, block) * batch * heads,),
        k,
        v,
        poison,
        **strides(k=k, v=v),
        heads=heads,
        length=length,
        D=dim,
        ACC=accumulator(k),
        BLOCK=block,
        BLOCK_D=block_d,
        num_warps=8,
    )
    return poison
