"""The chunked linear + cross-entropy head in PyTorch, under reference.linear_cross_entropy.

Logits exist for one chunk of rows at a time and are overwritten in place by their own gradient, so that beside dx and
dweight a training step holds about a twelfth of what the logits of all rows would take.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class LossSettings(NamedTuple):
    ignore_index: int
    label_smoothing: float
    z_loss: float
    dtype: torch.dtype  # of the logits and of their gradient: the compute dtype


class LinearCrossEntropy(torch.autograd.Function):
    """x (N, C), weight (V, C), targets (N,) -> the loss in float32 (float64 for float64): a scalar, or (N,) for "none".

    For the mean and the sum the gradients are made in the forward, while a chunk's logits are at hand, and the
    backward scales them by the one number it is given. For "none" every row has a number of its own, so the backward
    computes the logits again.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, reduction, settings):
        ctx.save_for_backward(x, weight, targets)
        ctx.reduction, ctx.settings, ctx.grads = reduction, settings, None
        if reduction == "none" or not any(ctx.needs_input_grad):
            losses, _, _ = chunked_losses(x, weight, targets, None, *settings, False, False)
        else:  # gradients of the sum: a mean's divisor would sink float16's small ones, so it comes later
            losses, *ctx.grads = chunked_losses(x, weight, targets, _ones(x), *settings, *ctx.needs_input_grad[:2])
        return losses if reduction == "none" else losses.sum() / _divisor(targets, reduction, settings)

    @staticmethod
    def backward(ctx, dloss):
        x, weight, targets = ctx.saved_tensors
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
            return *_differentiable_backward(ctx, dloss), None, None, None

        made, ctx.grads = ctx.grads, None  # scaled in place, so a second backward (retain_graph) makes its own
        if made is None:
            row_grads = dloss if ctx.reduction == "none" else _ones(x)
            _, *made = chunked_losses(x, weight, targets, row_grads, *ctx.settings, *ctx.needs_input_grad[:2])
        if ctx.reduction != "none":
            factor = dloss / _divisor(targets, ctx.reduction, ctx.settings).clamp(min=1)
            made = [grad.mul_(factor) for grad in made]
        dx, dweight = made
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        return dx if needs_x else None, dweight.to(weight.dtype) if needs_weight else None, None, None, None


def _ones(x):
    return torch.ones(x.shape[0], device=x.device)


def _divisor(targets, reduction, settings):
    counted = (targets != settings.ignore_index).sum()
    return counted if reduction == "mean" else torch.ones_like(counted)


def _differentiable_backward(ctx, dloss):
    """The gradients through all of the logits, which PyTorch can differentiate again."""
    x, weight, targets = ctx.saved_tensors
    settings, ignored = ctx.settings, targets == ctx.settings.ignore_index
    logits = F.linear(x, weight).to(_statistics_dtype(settings.dtype))
    loss = F.cross_entropy(
        logits,
        targets.long(),
        ignore_index=settings.ignore_index,
        label_smoothing=settings.label_smoothing,
        reduction="none",
    )
    loss = loss + (settings.z_loss * logits.logsumexp(-1) ** 2).masked_fill(ignored, 0)
    if ctx.reduction != "none":
        loss = loss.sum() / _divisor(targets, ctx.reduction, settings)
    needs = ctx.needs_input_grad[:2]
    wanted = [tensor for tensor, needed in zip((x, weight), needs, strict=True) if needed]
    grads = iter(torch.autograd.grad(loss, wanted, dloss, create_graph=True))
    return [next(grads) if needed else None for needed in needs]


def _chunk_rows(rows: int, logits_dtype: torch.dtype) -> int:
    """A twelfth of the rows, or a fortieth in half precision, whose chunk has a float32 copy beside it. Below 64 rows
    the matmuls would wait for weight to be read more than they compute (1.3 times slower at 25 of 256 on a CPU)."""
    share = 12 if _statistics_dtype(logits_dtype) == logits_dtype else 40
    return max(64, -(-rows // share))


def _statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _outputs(x, weight, dtype, needs_x, needs_weight):
    """What chunked_losses allocates; a gradient that is not needed is empty."""
    statistics = _statistics_dtype(dtype)
    losses = torch.empty(x.shape[0], dtype=statistics, device=x.device)
    dx = torch.empty(x.shape if needs_x else (0,), dtype=x.dtype, device=x.device)
    dweight = torch.zeros(weight.shape if needs_weight else (0,), dtype=statistics, device=x.device)
    return losses, dx, dweight


@torch.library.custom_op("fastgpt::chunked_losses", mutates_args=())  # one call to a compiler, whatever the chunks
def chunked_losses(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    row_grads: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    dtype: torch.dtype,
    needs_x: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """x (N, C), weight (V, C), targets (N,) -> losses (N,); and with row_grads (N,), what reaches each loss from above,
    dx (N, C) in x's dtype and dweight (V, C) in float32, each only if needed."""
    vocab, statistics = weight.shape[0], _statistics_dtype(dtype)
    losses, dx, dweight = _outputs(x, weight, dtype, needs_x, needs_weight)
    weight = weight.to(dtype)
    step = _chunk_rows(len(x), dtype)
    stride = -(-vocab // 64) * 64  # 50257 is odd: rows padded to 50304 stay aligned for the matmuls
    buffer = torch.empty(min(step, len(x)), stride, dtype=dtype, device=x.device)
    wide = buffer if dtype == statistics else torch.empty_like(buffer, dtype=statistics)
    for start in range(0, len(x), step):
        rows = slice(start, start + step)
        chunk, target = x[rows].to(dtype), targets[rows].long()
        logits = torch.mm(chunk, weight.t(), out=buffer[: len(chunk), :vocab])
        ignored = target == ignore_index
        valid = (target >= 0) & (target < vocab)
        index = target.clamp(0, vocab - 1)[:, None]  # never reads out of bounds

        z = wide[: len(chunk), :vocab].copy_(logits)  # no copy where they are one; from here on in place
        z_target = z.gather(1, index)[:, 0]
        z_mean = z.mean(1) if label_smoothing else 0.0
        top = z.amax(1)
        total = z.sub_(top[:, None]).exp_().sum(1)
        lse = total.log() + top
        loss = lse - (1 - label_smoothing) * z_target - label_smoothing * z_mean
        loss += z_loss * lse**2
        losses[rows] = loss.masked_fill_(~valid, torch.nan).masked_fill_(ignored, 0)
        if row_grads is None:
            continue

        grad = row_grads[rows].to(statistics).masked_fill(~valid, torch.nan).masked_fill_(ignored, 0)
        z.mul_((grad * (1 + 2 * z_loss * lse) / total)[:, None])
        if label_smoothing:
            z.sub_((grad * label_smoothing / vocab)[:, None])
        z.scatter_add_(1, index, (-(1 - label_smoothing) * grad)[:, None])
        dlogits = z if z.dtype == dtype else logits.copy_(z)
        if needs_x:
            dx[rows] = torch.mm(dlogits, weight)
        if not needs_weight:
            continue
        if dlogits.is_cuda and dlogits.dtype != statistics:  # factors in half precision, sums in float32
            torch.addmm(dweight, dlogits.t(), chunk, out_dtype=statistics, out=dweight)
        else:
            dweight.addmm_(z.t(), chunk.to(statistics))
    return losses, dx, dweight


@chunked_losses.register_fake
def _(x, weight, targets, row_grads, ignore_index, label_smoothing, z_loss, dtype, needs_x, needs_weight):
    return _outputs(x, weight, dtype, needs_x, needs_weight)
