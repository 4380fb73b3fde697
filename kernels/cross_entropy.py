"""Cross entropy of rows of logits, and its gradient in their place, in one launch.

    total = Σ exp(z - top),  lse = log total + top             online, in float32, over blocks of the vocabulary
    loss  = log total + (top - z[target]) - ε avg(z - z[target]) + λ lse²      ε label smoothing, λ the z-loss
    dz    = g ((1 + 2 λ lse) exp(z - top) / total - (1 - ε) onehot - ε / V)    g: what reaches the loss from above

where log total + top would round away what is left of a loss near zero, and avg(z) alike.

One program a row reads it twice, the second time from the cache, and writes it once: 3 V e bytes a row, of which 2 V e
reach memory. Rows may be padded, to a width at which loads are of 16 bytes, where those of an odd vocabulary are of 2;
the padding's gradient is zero. An ignored row has loss 0 and gradient 0, a target out of range NaN, and neither reads
outside the row.
(The in-place form is llm.c's fused classifier; the online sum is Milakov, Gimelshein, 2018, algorithm 3.)
"""

import torch
import triton
import triton.language as tl

from .fp8 import eight_bits
from .launch import launch, next_power_of_2


def _tiles(vocab: int) -> tuple[int, int]:
    """BLOCK_V and num_warps: 8 elements a thread, and blocks of 512 threads, of which a multiprocessor holds so few
    that their rows stay in the cache. Measured on an H200 at 50257, 2736 rows: 68% of a copy's rate; the other
    four sizes that were tried take 3 to 23% longer."""
    block_v = min(4096, max(512, next_power_of_2(vocab)))
    return block_v, block_v // 256


@triton.jit
def _add_up(z, tops, totals, BLOCK_V: tl.constexpr):
    """z [BLOCK_V] into the maxima and the sums of exp(z - top) of each eight neighbours, [BLOCK_V // 8]: one thread
    holds all eight, so that the loop waits for no other."""
    eights = tl.reshape(z, [BLOCK_V // 8, 8])
    new_tops = tl.maximum(tops, tl.max(eights, axis=1))
    totals = totals * tl.exp(tops - new_tops) + tl.sum(tl.exp(eights - new_tops[:, None]), axis=1)
    return new_tops, totals


@triton.jit
def _gradient(z, cols, place, top, scale, grad, smoothing, V, SMOOTHS: tl.constexpr):
    dz = scale * tl.exp(z - top)
    if SMOOTHS:
        dz -= grad * smoothing / V
    return tl.where(cols == place, dz - (1 - smoothing) * grad, dz)


@triton.jit(do_not_specialize_on_alignment=["inverse"])  # one of many in a row
def _cross_entropy_kernel(
    logits_ptr,  # (N, WIDTH), overwritten by the gradient
    targets_ptr,  # (N,)
    row_grads_ptr,  # (N,)
    losses_ptr,  # (N,)
    stride_ln,
    stride_tn,
    stride_gn,
    width,
    V,
    ignore_index,
    smoothing,
    z_loss,
    HAS_GRAD: tl.constexpr,
    SMOOTHS: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_V: tl.constexpr,
    gradient8=None,  # (N, WIDTH) in 8 bits, with the one that follows
    inverse=None,
):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride_ln
    target = tl.load(targets_ptr + row * stride_tn).to(tl.int64)
    valid = (target >= 0) & (target < V)
    z_target = tl.load(logits_ptr + target, valid, 0.0).to(ACC)
    whole = V // BLOCK_V * BLOCK_V  # blocks whose places need no test

    tops = tl.full([BLOCK_V // 8], -3.0e38, ACC)  # finite, for eight of nothing but -inf
    totals = tl.zeros([BLOCK_V // 8], ACC)
    plain = tl.zeros([BLOCK_V], ACC)
    for start in range(0, whole, BLOCK_V):
        z = tl.load(logits_ptr + start + tl.arange(0, BLOCK_V)).to(ACC)
        tops, totals = _add_up(z, tops, totals, BLOCK_V)
        if SMOOTHS:
            plain += z - z_target
    last = whole + tl.arange(0, BLOCK_V)
    z = tl.load(logits_ptr + last, last < width, 0.0).to(ACC)
    tops, totals = _add_up(tl.where(last < V, z, float("-inf")), tops, totals, BLOCK_V)
    top = tl.max(tops, axis=0)
    total = tl.sum(totals * tl.exp(tops - top), axis=0)
    log_total = tl.log(total)
    lse = log_total + top

    loss = log_total + (top - z_target) + z_loss * lse * lse
    if SMOOTHS:
        loss -= smoothing * (tl.sum(plain + tl.where(last < V, z - z_target, 0.0), axis=0) / V)
    loss = tl.where(valid, loss, float("nan"))
    tl.store(losses_ptr + row, tl.where(target == ignore_index, 0.0, loss))
    if HAS_GRAD:
        grad = tl.where(valid, tl.load(row_grads_ptr + row * stride_gn).to(ACC), float("nan"))
        grad = tl.where(target == ignore_index, 0.0, grad)
        scale = grad * (1 + 2 * z_loss * lse) / total
        if gradient8 is not None:
            divisor = tl.load(inverse)
        place = target.to(tl.int32)  # one out of range has NaN for its gradient, wherever it falls
        for start in range(0, whole, BLOCK_V):
            cols = start + tl.arange(0, BLOCK_V)
            z = tl.load(logits_ptr + cols).to(ACC)
            dz = _gradient(z, cols, place, top, scale, grad, smoothing, V, SMOOTHS)
            dz = dz.to(logits_ptr.dtype.element_ty)
            tl.store(logits_ptr + cols, dz, eviction_policy="evict_first")
            if gradient8 is not None:  # of the gradient as it was rounded
                copy = eight_bits(dz.to(ACC), divisor, gradient8.dtype.element_ty)
                tl.store(gradient8 + row * width + cols, copy)
        z = tl.load(logits_ptr + last, last < width, 0.0).to(ACC)
        dz = _gradient(z, last, place, top, scale, grad, smoothing, V, SMOOTHS)
        dz = tl.where(last < V, dz, 0.0)
        dz = dz.to(logits_ptr.dtype.element_ty)
        tl.store(logits_ptr + last, dz, last < width)
        if gradient8 is not None:
            copy = eight_bits(dz.to(ACC), divisor, gradient8.dtype.element_ty)
            tl.store(gradient8 + row * width + last, copy, last < width)


def cross_entropy_rows(
    logits: torch.Tensor,
    vocab: int,
    targets: torch.Tensor,
    row_grads: torch.Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    losses: torch.Tensor,
    **copy,
) -> torch.Tensor:
    """logits (N, vocab or more), N at least 1, each row in one piece, and targets (N,): writes losses (N,), and with
    row_grads (N,) the gradient over the logits, zeros over the padding, which is less than 64. Returns the logits.
    copy: gradient8, as the logits in 8 bits and in one piece, which is written, and the inverse of its scale; or
    nothing."""
    block_v, num_warps = _tiles(vocab)
    launch(
        _cross_entropy_kernel,
        (logits.shape[0],),
        logits,
        targets,
        losses if row_grads is None else row_grads,
        losses,
        logits.stride(0),
        targets.stride(0),
        0 if row_grads is None else row_grads.stride(0),
        logits.shape[1],
        vocab,
        ignore_index,
        label_smoothing,
        z_loss,
        HAS_GRAD=row_grads is not None,
        SMOOTHS=label_smoothing != 0,
        ACC=tl.float64 if logits.dtype == torch.float64 else tl.float32,
        BLOCK_V=block_v,
        **copy,
        num_warps=num_warps,
        maxnreg=64 if logits.element_size() > 2 else None,  # left alone, ptxas spills float32 on capability 12.0
    )
    return logits
