"""The chunked linear + cross-entropy head that both roads share; what they differ in is the pass over a chunk's logits.

Logits exist for one chunk of rows at a time and are overwritten in place by their own gradient, so that beside dx and
dweight a training step holds about a twelfth of what the logits of all rows would take.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def linear_cross_entropy(x, weight, targets, *, ignore_index, reduction, label_smoothing, z_loss, chunked_losses):
    """fastgpt.ops.linear_cross_entropy with `chunked_losses`, an op that `chunked_op` made."""
    cast = torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64
    dtype = torch.get_autocast_dtype(x.device.type) if cast else x.dtype
    rows, flat = x.reshape(-1, x.shape[-1]), targets.reshape(-1)
    if not torch.is_grad_enabled():  # a Function can't tell, and would make gradients that nobody asks for
        rows, weight = rows.detach(), weight.detach()
    settings = LossSettings(ignore_index, label_smoothing, z_loss, dtype)
    losses = LinearCrossEntropy.apply(rows, weight, flat, reduction, settings, chunked_losses)
    return losses.view(targets.shape) if reduction == "none" else losses


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
    def forward(ctx, x, weight, targets, reduction, settings, chunked_losses):
        ctx.save_for_backward(x, weight, targets)
        ctx.reduction, ctx.settings, ctx.grads = reduction, settings, None
        ctx.chunked_losses = chunked_losses
        if reduction == "none" or not any(ctx.needs_input_grad):
            losses, _, _ = chunked_losses(x, weight, targets, None, *settings, False, False)
        else:  # gradients of the sum: a mean's divisor would sink float16's small ones, so it comes later
            losses, *ctx.grads = chunked_losses(x, weight, targets, _ones(x), *settings, *ctx.needs_input_grad[:2])
        return losses if reduction == "none" else losses.sum() / _divisor(targets, reduction, settings)

    @staticmethod
    def backward(ctx, dloss):
        x, weight, targets = ctx.saved_tensors
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
            return *_differentiable_backward(ctx, dloss), *[None] * 4

        made, ctx.grads = ctx.grads, None  # scaled in place, so a second backward (retain_graph) makes its own
        if made is None:
            row_grads = dloss if ctx.reduction == "none" else _ones(x)
            _, *made = ctx.chunked_losses(x, weight, targets, row_grads, *ctx.settings, *ctx.needs_input_grad[:2])
        if ctx.reduction != "none":
            factor = dloss / _divisor(targets, ctx.reduction, ctx.settings).clamp(min=1)
            made = [grad.mul_(factor) for grad in made]
        dx, dweight = made
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        return dx if needs_x else None, dweight.to(weight.dtype) if needs_weight else None, *[None] * 4


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


def _statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _outputs(x, weight, dtype, needs_x, needs_weight):
    """What a chunked op allocates; a gradient that is not needed is empty."""
    statistics = _statistics_dtype(dtype)
    losses = torch.empty(x.shape[0], dtype=statistics, device=x.device)
    dx = torch.empty(x.shape if needs_x else (0,), dtype=x.dtype, device=x.device)
    dweight = torch.empty(weight.shape if needs_weight else (0,), dtype=statistics, device=x.device)
    return losses, dx, dweight if len(x) else dweight.zero_()


def _rows_at_once(rows: int, copied: bool) -> int:
    """A twelfth of them, a fortieth where a float32 copy is made too. Where that would be fewer than 64, the matmuls
    would wait for weight and dweight to be read and written: 256 (256 rows take 1.3 times longer by 64 on a CPU)."""
    share = -(-rows // (40 if copied else 12))
    return share if share >= 64 else 64 if copied else 256


def _add_product(total, a, b, first: bool) -> None:
    """total += a b, or = a b to begin with, in total's float32 whatever the dtype of the factors."""
    if a.is_cuda and a.dtype != total.dtype:  # cuBLAS multiplies halves and adds in float32
        if first:
            torch.mm(a, b, out_dtype=total.dtype, out=total)
        else:
            torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    elif first:
        torch.mm(a.to(total.dtype), b.to(total.dtype), out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


def _without_autocast(op):
    """A backward may run under an autocast that its forward did not know."""

    @functools.wraps(op)
    def run(x, *args):
        with torch.autocast(x.device.type, enabled=False):
            return op(x, *args)

    return run


def chunked_op(name: str, pass_over_rows: Callable[..., Tensor], copies_half_precision: bool):
    """The op fastgpt::<name>: one call to a compiler, whatever the chunks.

    pass_over_rows(logits (n, V), targets (n,), row_grads (n,) or None, ignore_index, label_smoothing, z_loss,
    losses (n,)) writes the losses, may overwrite the logits, and returns the gradient that takes their place.
    copies_half_precision: it works in float32 on a copy, three times the memory in all.
    """

    @torch.library.custom_op(f"fastgpt::{name}", mutates_args=())
    @_without_autocast
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
        """x (N, C), weight (V, C), targets (N,) -> losses (N,); and with row_grads (N,), what reaches each loss from
        above, dx (N, C) in x's dtype and dweight (V, C) in float32, each only if needed."""
        vocab, statistics = weight.shape[0], _statistics_dtype(dtype)
        losses, dx, dweight = _outputs(x, weight, dtype, needs_x, needs_weight)
        weight = weight.to(dtype)
        step = _rows_at_once(len(x), copies_half_precision and dtype != statistics)
        stride = -(-vocab // 64) * 64  # 50257 is odd: rows padded to 50304 stay aligned for the matmuls
        buffer = torch.empty(min(step, len(x)), stride, dtype=dtype, device=x.device)
        for start in range(0, len(x), step):
            rows = slice(start, start + step)
            chunk = x[rows].to(dtype)
            logits = torch.mm(chunk, weight.t(), out=buffer[: len(chunk), :vocab])
            grads = None if row_grads is None else row_grads[rows]
            dlogits = pass_over_rows(logits, targets[rows], grads, ignore_index, label_smoothing, z_loss, losses[rows])
            if needs_x:
                dx[rows] = torch.mm(dlogits if dlogits.dtype == dtype else logits.copy_(dlogits), weight)
            if needs_weight:
                _add_product(dweight, dlogits.t(), chunk, first=start == 0)
            del dlogits  # or two of them would live at once
        return losses, dx, dweight

    @chunked_losses.register_fake
    def _(x, weight, targets, row_grads, ignore_index, label_smoothing, z_loss, dtype, needs_x, needs_weight):
        return _outputs(x, weight, dtype, needs_x, needs_weight)

    return chunked_losses


def _pass_over_rows(logits, targets, row_grads, ignore_index, label_smoothing, z_loss, losses):
    """In PyTorch, in place in float32. The gradient comes back in float32."""
    vocab = logits.shape[1]
    target = targets.long()
    ignored = target == ignore_index
    valid = (target >= 0) & (target < vocab)
    index = target.clamp(0, vocab - 1)[:, None]  # never reads out of bounds

    z = logits.to(losses.dtype)
    z_target = z.gather(1, index)[:, 0]
    z_mean = z.mean(1) if label_smoothing else 0.0
    top = z.amax(1)
    total = z.sub_(top[:, None]).exp_().sum(1)
    lse = total.log() + top
    loss = lse - (1 - label_smoothing) * z_target - label_smoothing * z_mean + z_loss * lse**2
    losses.copy_(loss.masked_fill_(~valid, torch.nan).masked_fill_(ignored, 0))
    if row_grads is None:
        return z

    grad = row_grads.to(z.dtype).masked_fill(~valid, torch.nan).masked_fill_(ignored, 0)
    z.mul_((grad * (1 + 2 * z_loss * lse) / total)[:, None])
    if label_smoothing:
        z.sub_((grad * label_smoothing / vocab)[:, None])
    at_target = z.gather(1, index) - ((1 - label_smoothing) * grad)[:, None]
    return z.scatter_(1, index, at_target)  # one place a row: scatter_add_ would be refused as nondeterministic


chunked_losses = chunked_op("chunked_losses", _pass_over_rows, copies_half_precision=True)
