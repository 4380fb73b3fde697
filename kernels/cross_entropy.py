"""Cross entropy of rows of logits, and its gradient in their place, in one launch.

    lse  = log Σ exp(z)                                        online, in float32, over blocks of the vocabulary
    loss = lse - (1 - ε) z[target] - ε avg(z) + λ lse²         ε label smoothing, λ the z-loss
    dz   = g ((1 + 2 λ lse) exp(z - lse) - (1 - ε) onehot - ε / V)        g: what reaches the loss from above

One program a row reads it twice, the second time from the cache, and writes it once: 3 V e bytes a row, of which 2 V e
reach memory. An ignored row has loss 0 and gradient 0, a target out of range NaN, and neither reads outside the row.
(The in-place form is llm.c's fused classifier; the online sum is Milakov, Gimelshein, 2018, algorithm 3.)
"""

import torch
import triton
import triton.language as tl


def _tiles(vocab: int) -> tuple[int, int]:
    """BLOCK_V and num_warps: 16 elements a thread. Not measured on any GPU yet."""
    block_v = min(4096, max(512, triton.next_power_of_2(vocab)))
    return block_v, block_v // 512


@triton.jit
def _cross_entropy_kernel(
    logits_ptr,  # (N, V), overwritten by the gradient
    targets_ptr,  # (N,)
    row_grads_ptr,  # (N,)
    losses_ptr,  # (N,)
    stride_ln,
    stride_tn,
    stride_gn,
    V,
    ignore_index,
    smoothing,
    z_loss,
    HAS_GRAD: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride_ln
    target = tl.load(targets_ptr + row * stride_tn).to(tl.int64)
    valid = (target >= 0) & (target < V)
    z_target = tl.load(logits_ptr + target, valid, 0.0).to(ACC)

    top = tl.full([], -3.0e38, ACC)  # finite, for a block of nothing but -inf
    total = tl.zeros([], ACC)  # of exp(z - top)
    plain = tl.zeros([], ACC)  # of z
    for start in range(0, V, BLOCK_V):
        cols = start + tl.arange(0, BLOCK_V)
        z = tl.load(logits_ptr + cols, cols < V, float("-inf")).to(ACC)  # [BLOCK_V]
        new_top = tl.maximum(top, tl.max(z, axis=0))
        total = total * tl.exp(top - new_top) + tl.sum(tl.exp(z - new_top), axis=0)
        plain += tl.sum(tl.where(cols < V, z, 0.0), axis=0)
        top = new_top
    lse = top + tl.log(total)

    loss = lse - (1 - smoothing) * z_target - smoothing * (plain / V) + z_loss * lse * lse
    loss = tl.where(valid, loss, float("nan"))
    tl.store(losses_ptr + row, tl.where(target == ignore_index, 0.0, loss))
    if HAS_GRAD:
        grad = tl.where(valid, tl.load(row_grads_ptr + row * stride_gn).to(ACC), float("nan"))
        grad = tl.where(target == ignore_index, 0.0, grad)
        scale = grad * (1 + 2 * z_loss * lse)
        for start in range(0, V, BLOCK_V):
            cols = start + tl.arange(0, BLOCK_V)
            z = tl.load(logits_ptr + cols, cols < V, 0.0).to(ACC)
            dz = scale * tl.exp(z - lse) - grad * smoothing / V
            dz = tl.where(cols == target, dz - (1 - smoothing) * grad, dz)
            tl.store(logits_ptr + cols, dz.to(logits_ptr.dtype.element_ty), cols < V)


def cross_entropy_rows(
    logits: torch.Tensor,
    targets: torch.Tensor,
    row_grads: torch.Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    losses: torch.Tensor,
) -> torch.Tensor:
    """logits (N, V), N at least 1, each row in one piece, and targets (N,): writes losses (N,), and with row_grads (N,)
    the gradient over the logits. Returns the logits."""
    block_v, num_warps = _tiles(logits.shape[1])
    _cross_entropy_kernel[(logits.shape[0],)](
        logits,
        targets,
        losses if row_grads is None else row_grads,
        losses,
        logits.stride(0),
        targets.stride(0),
        0 if row_grads is None else row_grads.stride(0),
        logits.shape[1],
        ignore_index,
        label_smoothing,
        z_loss,
        HAS_GRAD=row_grads is not None,
        ACC=tl.float64 if logits.dtype == torch.float64 else tl.float32,
        BLOCK_V=block_v,
        num_warps=num_warps,
    )
    return logits
