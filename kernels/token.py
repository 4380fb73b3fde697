"""A whole token of a GPT in one launch: from the id of one sequence's newest token and a cache of keys and values to
the logits of the next, all layers and the head by P programs that stay, one a multiprocessor.

    x = wte[id] + wpe[place]
    each layer:  A  q, k, v = norm_1(x) wᵀ + b; k and v into the cache     3C words
                 B  a head over a split of keys -> o_i, and its lse_i      C / 2 and H words a split: pairs of bfloat16
                 C  o = Σ exp2(lse_i - lse) o_i, through w_out             C words
                 D  x += that; gelu(norm_2(x) wᵀ + b)                      F / 2 words: pairs of bfloat16
                 E  that through w_proj; every program adds it to its x    C words
    head:        norm(x) wᵀ

Every matrix's rows are dealt out evenly, so each program has rows of every one, and a row is multiplied by one warp (in
C and E shared by several). Each program keeps all of x, in three registers a thread. What one tells the others is words
(words.py); a phase ends where its words are waited for. Weights do not depend on activations, so each matrix is loaded
to registers two phases before it is needed: two handoffs hide a load.

A tag is a token's number times L, plus the layer, plus 1, of this cache's tokens: it is never used twice, so nothing is
reset. The number is itself in memory. All programs read it, then write words that depend on it; program 0 raises it
after it has had words of all others, and the next launch on the stream finds it raised. Two layers' words alternate. To
write over a layer's words two layers later is safe, for whoever writes has waited for all words of a phase in between,
to which every program came only after it had read the layer's. That every program has rows of every matrix is what
makes it so, and `tiles` refuses shapes where one would have none.

No wait can hang, for the launch is cooperative: CUDA refuses it unless all programs run at once, which needs no more
programs than multiprocessors. Words of another cache are other memory, so two calls may take turns on a stream.

Bytes: each weight once, 248 MB of GPT-2 124M, and 2 L C keys of the cache. Rounded where the kernels that it stands for
round: x, the norms' results, q, k, v, o, the products and the logits to bfloat16; sums are float32.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .launch import cdiv, next_power_of_2
from .token_phases import (
    ROW,
    added,
    address,
    embedded,
    hidden,
    kept,
    merged,
    of_rows,
    phase_a,
    phase_b,
    phase_c_or_e,
    phase_d,
    tiles_of,
    vector,
    write_logits,
)
from .words import counted, put

_INTERPRETED = triton.knobs.runtime.interpret
# Places of a layer's tensors in its row of the table: a weight's, and one further its bias's.
_NORM_1, _QKV, _OUT, _NORM_2, _FC, _PROJ = (tl.constexpr(2 * place) for place in range(6))


@triton.jit(do_not_specialize=["slots"], do_not_specialize_on_alignment=["ids_ptr", "lengths_ptr"])
def _token_kernel(
    ids_ptr,  # (1,), the newest token's
    lengths_ptr,  # (1,), with that token counted in
    table_ptr,  # (L, ROW) int64: addresses
    wte_ptr, wpe_ptr,  # (·, C)
    gain_ptr, shift_ptr,  # (C,), of the last norm; all norms have their dtype
    head_ptr,  # (V, C) bf16 seen as int32
    cache_ptr,  # (2, L, 1, H, slots, D) bf16
    pairs_ptr,  # the same, seen as int32
    words_ptr,  # (2 W + 1,) int64, the last the number of tokens
    logits_ptr,  # (V,) float32
    slots, qk_scale, eps,
    P: tl.constexpr, L: tl.constexpr, C: tl.constexpr, H: tl.constexpr, F: tl.constexpr, V: tl.constexpr,
    BK: tl.constexpr, TR: tl.constexpr, HR: tl.constexpr, KEYS: tl.constexpr, SMAX: tl.constexpr,
    TRC: tl.constexpr, TRE: tl.constexpr, BKE: tl.constexpr, HP: tl.constexpr,
    T_QKV: tl.constexpr, T_OUT: tl.constexpr, T_FC: tl.constexpr, T_PROJ: tl.constexpr,
    TANH: tl.constexpr, ASM: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    D: tl.constexpr = C // H
    CH: tl.constexpr = C // BK
    O: tl.constexpr = 3 * C  # where each phase's words begin
    LSE: tl.constexpr = O + SMAX * C // 2
    OUT: tl.constexpr = LSE + (SMAX * H + 15) // 16 * 16  # a line of memory has 16 words
    HID: tl.constexpr = OUT + C
    PROJ: tl.constexpr = HID + F // 2
    W: tl.constexpr = PROJ + C
    NORM: tl.constexpr = gain_ptr.dtype.element_ty
    HALF: tl.constexpr = tl.bfloat16
    qkv_first, qkv_last = pid * (3 * C) // P, (pid + 1) * (3 * C) // P
    c_first, c_last = pid * C // P, (pid + 1) * C // P
    f_first, f_last = pid * (F // 2) // P * 2, (pid + 1) * (F // 2) // P * 2
    head, split = pid % H, pid // H

    token, length, number = tl.load(ids_ptr), tl.load(lengths_ptr), counted(words_ptr + 2 * W, ASM)
    qkv_ptr, bias_ptr = address(table_ptr, 0, _QKV, tl.int32), address(table_ptr, 0, _QKV + 1, HALF)
    norm_ptr, shift_ptr_0 = address(table_ptr, 0, _NORM_1, NORM), address(table_ptr, 0, _NORM_1 + 1, NORM)
    w_qkv = tiles_of(qkv_ptr, qkv_first, qkv_last, 1, C, T_QKV, TR, BK)
    gain, shift = vector(norm_ptr, CH, BK), vector(shift_ptr_0, CH, BK)
    bias = of_rows(bias_ptr, qkv_first, qkv_last, 1, T_QKV, TR)
    place = length.to(tl.int32) - 1
    x = embedded(wte_ptr, wpe_ptr, token, tl.minimum(place, slots - 1), C, CH, BK)
    splits = tl.minimum(tl.maximum(tl.cdiv(place, KEYS), 1), SMAX)
    mine = split < splits
    k, v = kept(pairs_ptr, 0, head, split, place, slots, mine, L, H, D, KEYS)
    for layer in tl.range(0, L, num_stages=1):
        words = words_ptr + layer % 2 * W
        tag = (number * L + (layer + 1)).to(tl.int32)
        after = (layer + 1) % L
        w_out = tiles_of(address(table_ptr, layer, _OUT, tl.int32), c_first, c_last, 1, C, T_OUT, TRC, HP * D)
        b_out = of_rows(address(table_ptr, layer, _OUT + 1, HALF), c_first, c_last, 1, T_OUT, TRC)
        qkv_ptr = address(table_ptr, after, _QKV, tl.int32)
        phase_a(x, w_qkv, gain, shift, bias, words, tag, cache_ptr, layer, place, slots, pid, eps,
                P, L, C, H, BK, TR, T_QKV, ASM)  # fmt: skip
        fc_ptr, b_fc_ptr = address(table_ptr, layer, _FC, tl.int32), address(table_ptr, layer, _FC + 1, HALF)
        even = tiles_of(fc_ptr, f_first, f_last, 2, C, T_FC, TR, BK)
        odd = tiles_of(fc_ptr, f_first + 1, f_last, 2, C, T_FC, TR, BK)
        gain = vector(address(table_ptr, layer, _NORM_2, NORM), CH, BK)
        shift = vector(address(table_ptr, layer, _NORM_2 + 1, NORM), CH, BK)
        b_even = of_rows(b_fc_ptr, f_first, f_last, 2, T_FC, TR)
        b_odd = of_rows(b_fc_ptr, f_first + 1, f_last, 2, T_FC, TR)
        if mine:
            phase_b(k, v, words, words + O, words + LSE, tag, head, split, place, slots, qk_scale,
                    C, H, KEYS, ASM, WARPS)  # fmt: skip
        w_proj = tiles_of(address(table_ptr, layer, _PROJ, tl.int32), c_first, c_last, 1, F, T_PROJ, TRE, BKE)
        b_proj = of_rows(address(table_ptr, layer, _PROJ + 1, HALF), c_first, c_last, 1, T_PROJ, TRE)
        if splits == 1:
            y = merged(words + O, words + LSE, tag, splits, 1, C, H, HP, ASM, WARPS)
        else:
            y = merged(words + O, words + LSE, tag, splits, SMAX, C, H, HP, ASM, WARPS)
        phase_c_or_e(w_out, (y,), b_out, words + OUT, tag, pid, P, C, TRC, T_OUT, 1, ASM)
        w_qkv = tiles_of(qkv_ptr, qkv_first, qkv_last, 1, C, T_QKV, TR, BK)
        x = added(x, words + OUT, tag, CH, BK, ASM, WARPS)
        phase_d(x, even, odd, gain, shift, b_even, b_odd, words + HID, tag, pid, eps,
                P, C, F, BK, TR, T_FC, TANH, ASM)  # fmt: skip
        k, v = kept(pairs_ptr, after, head, split, place, slots, mine & (after > 0), L, H, D, KEYS)
        gain = vector(address(table_ptr, after, _NORM_1, NORM), CH, BK)
        shift = vector(address(table_ptr, after, _NORM_1 + 1, NORM), CH, BK)
        bias = of_rows(address(table_ptr, after, _QKV + 1, HALF), qkv_first, qkv_last, 1, T_QKV, TR)
        phase_c_or_e(w_proj, hidden(words + HID, tag, F, BKE, ASM, WARPS), b_proj, words + PROJ, tag, pid,
                     P, C, TRE, T_PROJ, F // BKE, ASM)  # fmt: skip
        x = added(x, words + PROJ, tag, CH, BK, ASM, WARPS)
    gain, shift = vector(gain_ptr, CH, BK), vector(shift_ptr, CH, BK)
    write_logits(x, gain, shift, head_ptr, logits_ptr, pid, eps, P, C, V, BK, HR, ASM)
    one = tl.arange(0, 1)
    put(words_ptr + 2 * W + one, number + 1 + one, (one + pid) == 0, ASM)  # all have read it: their words are here


class Tiles(NamedTuple):
    """Constants of the kernel, but for P, L, C, H, F and V."""

    BK: int  # of a piece of x
    TR: int  # rows of a tile of qkv and fc: one a warp
    HR: int  # of the head
    KEYS: int  # of a split
    SMAX: int  # splits
    TRC: int  # rows of a tile of out and proj, which several warps share
    TRE: int
    BKE: int  # of a piece of what proj multiplies
    HP: int  # H up to a power of two
    T_QKV: int  # tiles that a program has of each matrix
    T_OUT: int
    T_FC: int
    T_PROJ: int
    WARPS: int


class Shape(NamedTuple):
    layers: int
    channels: int
    heads: int
    hidden: int
    vocabulary: int  # rows of the head
    context: int  # slots of a cache at most
    programs: int  # multiprocessors


def tiles(shape: Shape, warps: int = 8, head_rows: int = 16, keys: int = 128) -> Tiles | str:
    """Tiles for a shape, or why there are none: every program needs rows of every matrix, and a split of its own.

    With 8 warps, 255 registers and splits of 128 keys a prototype took 169 µs for a token of GPT-2 124M in a CUDA graph
    (H200, Triton 3.6.0); no other tiles were tried there. Tests in the interpreter ask for smaller ones.
    """
    _, channels, heads, hidden, vocabulary, context, programs = shape
    if channels % heads or channels // heads & (channels // heads - 1) or channels // heads < 16:
        return f"{channels} channels in {heads} heads: a head's are no power of two from 16 on"
    if min(channels, hidden // 2, vocabulary) < programs or hidden % 2:
        few = f"{channels} channels, {hidden} hidden units and {vocabulary} outputs"
        return f"{few} do not give each of {programs} programs some"
    block = min(256, channels & -channels)  # the largest power of two that divides it
    if block < channels // heads or hidden % block or programs < heads:
        return f"no pieces fit {channels} channels in {heads} heads, and {hidden} hidden units"
    per_head = min(8, programs // heads)
    keys = max(keys, next_power_of_2(cdiv(context, per_head)))
    splits = next_power_of_2(cdiv(context, keys))
    padded = next_power_of_2(heads)
    rows_of_out = max(1, warps * block // (padded * (channels // heads)))
    block_of_proj = next(size for size in (4 * block, 2 * block, block) if hidden % size == 0 and size <= warps * block)
    rows_of_proj = warps * block // block_of_proj

    shared = (3 * channels, warps), (channels, rows_of_out), (hidden // 2, warps), (channels, rows_of_proj)
    counts = (cdiv(cdiv(rows, programs), of_a_tile) for rows, of_a_tile in shared)
    shares = rows_of_out, rows_of_proj, block_of_proj, padded
    return Tiles(block, warps, head_rows, keys, splits, *shares, *counts, warps)


class Layer(NamedTuple):
    """One block's tensors. Weights (N, K) bfloat16 in rows, biases (N,) bfloat16 or None, norms (C,) of one dtype."""

    norm_1: tuple[torch.Tensor, torch.Tensor | None]
    qkv: tuple[torch.Tensor, torch.Tensor | None]
    out: tuple[torch.Tensor, torch.Tensor | None]
    norm_2: tuple[torch.Tensor, torch.Tensor | None]
    fc: tuple[torch.Tensor, torch.Tensor | None]
    proj: tuple[torch.Tensor, torch.Tensor | None]


class Model:
    """A GPT's tensors as the kernel finds them: where they are, not copies, so it reads them as they are then."""

    def __init__(
        self,
        layers: list[Layer],
        norm: tuple[torch.Tensor, torch.Tensor | None],
        token_weight: torch.Tensor,
        position_weight: torch.Tensor,
        head: torch.Tensor,
        shape: Shape,
        tiles: Tiles,
        scale: float,
        eps: float,
        tanh: bool,
    ):
        """token_weight (·, C), position_weight (context, C), in any dtype; head (V, C) bfloat16."""
        self.shape, self.tiles = shape, tiles
        zeros = torch.zeros(max(3 * shape.channels, shape.hidden), dtype=torch.float32, device=head.device)
        rows = []
        self.tensors = [zeros]  # that the table leads to; they must outlive it
        for layer in layers:
            pairs = [part for pair in layer for part in pair]
            self.tensors += [part for part in pairs if part is not None]
            addresses = [(zeros if part is None else part).data_ptr() for part in pairs]
            rows.append(addresses + [0] * (ROW.value - len(addresses)))
        self._table = torch.tensor(rows, dtype=torch.int64, device=head.device)
        gain, shift = norm
        self._last = gain, zeros.to(gain.dtype) if shift is None else shift
        self._token_weight, self._position_weight, self._head = token_weight, position_weight, head
        self.own_tensors = zeros, self._table, self._last[1]  # which a captured launch needs as long as it is replayed
        self._numbers = scale * math.log2(math.e), eps
        self._constants = dict(
            zip("PLCHFV", (shape.programs, *shape[:5]), strict=True), **tiles._asdict(), TANH=tanh, ASM=not _INTERPRETED
        )

    def words(self) -> torch.Tensor:
        """For one cache: what its tokens' programs tell each other. Zeros, and nothing for others to write to."""
        _, channels, heads, hidden, *_ = self.shape
        splits = self.tiles.SMAX * channels // 2 + cdiv(self.tiles.SMAX * heads, 16) * 16
        count = 3 * channels + splits + channels + hidden // 2 + channels
        return torch.zeros(2 * count + 1, dtype=torch.int64, device=self._head.device)

    def logits(
        self, ids: torch.Tensor, lengths: torch.Tensor, cache: torch.Tensor, words: torch.Tensor
    ) -> torch.Tensor:
        """The token ids (1, 1), whose key and value go into the cache (2, L, 1, H, slots, D) at lengths (1,) - 1, with
        this token counted in -> float32 (1, 1, V). words: as made for this cache."""
        logits = torch.empty(1, 1, self.shape.vocabulary, dtype=torch.float32, device=cache.device)
        _token_kernel[(self.shape.programs,)](
            ids,
            lengths,
            self._table,
            self._token_weight,
            self._position_weight,
            *self._last,
            self._head.view(torch.int32),
            cache,
            cache.view(torch.int32),
            words,
            logits,
            cache.shape[-2],
            *self._numbers,
            **self._constants,
            num_warps=self.tiles.WARPS,
            num_stages=1,
            launch_cooperative_grid=True,
        )
        return logits
