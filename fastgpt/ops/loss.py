"""The chunked linear + cross-entropy head that both backends share; what they differ in is how they go over the logits.

Logits exist for one chunk at a time and are overwritten in place by their own gradient, so that beside dx and dweight
a training step holds a part of what the logits of all rows would take (ops/cpu/logits.py, ops/autograd.py say which),
and on Triton a padded copy of the weight, as large as C rows of logits.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt.ops.transforms import mapped


def linear_cross_entropy(x, weight, targets, *, ignore_index, reduction, label_smoothing, z_loss, chunked_losses):
    """fastgpt.ops.linear_cross_entropy with `chunked_losses`, an op that `chunked_op` made."""
    dtype = compute_dtype(x)
    rows, flat = x.reshape(-1, x.shape[-1]), targets.reshape(-1)
    if not torch.is_grad_enabled():  # a Function can't tell, and would make gradients that nobody asks for
        rows, weight = rows.detach(), weight.detach()
    settings = LossSettings(ignore_index, label_smoothing, z_loss, dtype)
    losses = LinearCrossEntropy.apply(rows, weight, flat, reduction, settings, chunked_losses)
    return losses.view(targets.shape) if reduction == "none" else losses


def compute_dtype(x: Tensor) -> torch.dtype:
    """Of a matmul with x: autocast's where it is on."""
    cast = torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64
    return torch.get_autocast_dtype(x.device.type) if cast else x.dtype


class LossSettings(NamedTuple):
    ignore_index: int
    label_smoothing: float
    z_loss: float
    dtype: torch.dtype  # of the logits and of their gradient: the compute dtype


class LinearCrossEntropy(torch.autograd.Function):
    """x (N, C), weight (V, C), targets (N,) -> the loss in float32 (float64 for float64): a scalar, or (N,) for "none".

    For the mean and the sum the gradients are made in the forward, while a chunk's logits are at hand, and the
    backward scales them by the one number it is given; on a CPU, where that can be asked, not by 1, for dweight is as
    large as the weight. For "none" every row has a number of its own, so the backward
    computes the logits again.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, reduction, settings, chunked_losses):
        ctx.save_for_backward(x, weight, targets)
        ctx.reduction, ctx.settings, ctx.grads = reduction, settings, None
        ctx.chunked_losses = chunked_losses
        if reduction == "none" or not any(ctx.needs_input_grad):
            losses, _, _ = chunked_losses(x, weight, targets, None, *settings, False, False)
        else:
            row_grads = _row_grads(x, targets, reduction, settings)
            losses, *ctx.grads = chunked_losses(x, weight, targets, row_grads, *settings, *ctx.needs_input_grad[:2])
        return losses if reduction == "none" else losses.sum() / _divisor(targets, reduction, settings)

    @staticmethod
    def backward(ctx, dloss):
        x, weight, targets = ctx.saved_tensors
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
            return *_differentiable_backward(ctx, dloss), *[None] * 4

        made, ctx.grads = ctx.grads, None  # scaled in place, so a second backward (retain_graph) makes its own
        if made is None:
            row_grads = dloss if ctx.reduction == "none" else _row_grads(x, targets, ctx.reduction, ctx.settings)
            _, *made = ctx.chunked_losses(x, weight, targets, row_grads, *ctx.settings, *ctx.needs_input_grad[:2])
        if ctx.reduction != "none":
            factor = dloss
            if not _divides_first(x, ctx.settings):
                factor = dloss / _divisor(targets, ctx.reduction, ctx.settings).clamp(min=1)
            if mapped(dloss):
                made = [grad * factor for grad in made]
            elif not _is_one(factor):
                made = [grad.mul_(factor) for grad in made]
        dx, dweight = made
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        return dx if needs_x else None, dweight.to(weight.dtype) if needs_weight else None, *[None] * 4


def _row_grads(x, targets, reduction, settings):
    """What reaches the loss of each row, but for the number that the backward scales by."""
    ones = torch.ones(x.shape[0], dtype=torch.float32, device=x.device)
    return ones / _divisor(targets, reduction, settings).clamp(min=1) if _divides_first(x, settings) else ones


def _divides_first(x, settings) -> bool:
    """Whether a mean's divisor is in the rows' gradients from the start. It would sink float16's small ones; float64's
    rows are float32 here; and elsewhere the backward's pass over them is made all the same."""
    return x.device.type == "cpu" and settings.dtype in (torch.float32, torch.bfloat16)


def _is_one(factor) -> bool:
    """Where it can be asked without waiting for a device, and without a compiler's having to know."""
    return type(factor) is Tensor and factor.is_cpu and not torch.compiler.is_compiling() and factor.item() == 1


def _divisor(targets, reduction, settings):
    counted = (targets != settings.ignore_index).sum()
    return counted if reduction == "mean" else torch.ones_like(counted)


def _differentiable_backward(ctx, dloss):
    """The gradients through all of the logits, which PyTorch can differentiate again."""
    x, weight, targets = ctx.saved_tensors
    loss = of_all_logits(x, weight, targets, ctx.reduction, ctx.settings)
    needs = ctx.needs_input_grad[:2]
    wanted = [tensor for tensor, needed in zip((x, weight), needs, strict=True) if needed]
    grads = iter(torch.autograd.grad(loss, wanted, dloss, create_graph=True))
    return [next(grads) if needed else None for needed in needs]


def of_all_logits(x: Tensor, weight: Tensor, targets: Tensor, reduction: str, settings: LossSettings) -> Tensor:
    """The loss in PyTorch's own operations, from all logits at once: x (…, C), weight (V, C), targets (…)."""
    dtype, targets = settings.dtype, targets.long()
    logits = F.linear(x.to(dtype), weight.to(dtype)).to(_statistics_dtype(dtype))
    logprobs, vocab = logits.log_softmax(-1), weight.shape[0]
    at_target = logprobs.gather(-1, targets.clamp(0, vocab - 1)[..., None])[..., 0]
    losses = -(1 - settings.label_smoothing) * at_target
    if settings.label_smoothing:
        losses = losses - settings.label_smoothing * logprobs.mean(-1)
    if settings.z_loss:
        losses = losses + settings.z_loss * logits.logsumexp(-1) ** 2
    losses = losses.masked_fill((targets < 0) | (targets >= vocab), torch.nan)
    losses = losses.masked_fill(targets == settings.ignore_index, 0)
    return losses if reduction == "none" else losses.sum() / _divisor(targets, reduction, settings)


def _statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def padded(vocab: int) -> int:
    """A width of logits that keeps rows and matmuls aligned: 50257 is odd, 50304 is not."""
    return -(-vocab // 64) * 64


def outputs(x, weight, dtype, needs_x, needs_weight, pads):
    """What a chunked op gives; a gradient that is not needed is empty. With `pads` dweight's memory goes on to the
    padded vocabulary."""
    statistics = _statistics_dtype(dtype)
    losses = torch.empty(x.shape[0], dtype=statistics, device=x.device)
    dx = torch.empty(x.shape if needs_x else (0,), dtype=x.dtype, device=x.device)
    rows, channels = weight.shape if needs_weight else (0, weight.shape[1])
    dweight = torch.empty(padded(rows) if pads else rows, channels, dtype=statistics, device=x.device)
    dweight.resize_(rows, channels)  # and no view, which would be held beside its sum with another gradient
    return losses, dx, dweight if len(x) else dweight.zero_()


def add_product(total, a, b, first: bool) -> None:
    """total += a b, or = a b to begin with, in total's float32 whatever the dtype of the factors."""
    if a.is_cuda and a.dtype != total.dtype:  # cuBLAS multiplies halves and adds in float32
        if first:
            torch.mm(a, b, out_dtype=total.dtype, out=total)
        else:
            torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    elif a.dtype != total.dtype and not a.is_cuda and multiplies(a.dtype):
        for part, rows in zip(total.split(_ROWS_OF_A_PRODUCT), a.split(_ROWS_OF_A_PRODUCT), strict=True):
            part.copy_(rows @ b) if first else part.add_(rows @ b)
    elif first:
        torch.mm(a.to(total.dtype), b.to(total.dtype), out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


_ROWS_OF_A_PRODUCT = 4096  # in half precision, on its way to float32


def multiplies(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies halves faster than float32; their sums are float32 in it, and rounded once."""
    if dtype not in (torch.bfloat16, torch.float16) or not torch.backends.mkldnn.is_available():
        return False
    ops = torch.ops.mkldnn
    return ops._is_mkldnn_bf16_supported() if dtype == torch.bfloat16 else ops._is_mkldnn_fp16_supported()


def _without_autocast(op):
    """A backward may run under an autocast that its forward did not know."""

    @functools.wraps(op)
    def run(x, *args):
        with torch.autocast(x.device.type, enabled=False):
            return op(x, *args)

    return run


def chunked_op(name: str, go_over: Callable[..., None], pads: bool = False):
    """The op fastgpt::<name>: one call to a compiler, whatever the chunks.

    go_over(x, weight, targets, row_grads or None, settings, losses, dx or None, dweight or None) writes the last three.
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
        losses, dx, dweight = outputs(x, weight, dtype, needs_x, needs_weight, pads)
        settings = LossSettings(ignore_index, label_smoothing, z_loss, dtype)
        wanted = (dx if needs_x else None, dweight if needs_weight else None)
        go_over(x, weight, targets, row_grads, settings, losses, *wanted)
        return losses, dx, dweight

    @chunked_losses.register_fake
    def _(x, weight, targets, row_grads, ignore_index, label_smoothing, z_loss, dtype, needs_x, needs_weight):
        return outputs(x, weight, dtype, needs_x, needs_weight, pads)

    chunked_losses.register_vmap(functools.partial(one_by_one, chunked_losses))
    return chunked_losses


def one_by_one(op, info, in_dims, *args):
    """The rule by which torch.func.vmap maps a custom op, as a backward under is_grads_batched asks: a call for each.

    Every argument's place in `in_dims` is the axis over which it is mapped, or None; each output is stacked along its
    first axis.
    """
    calls = [
        op(*(arg.select(dim, i) if isinstance(dim, int) else arg for arg, dim in zip(args, in_dims, strict=True)))
        for i in range(info.batch_size)
    ]
    if isinstance(calls[0], Tensor):
        return torch.stack(calls), 0
    outputs = tuple(torch.stack(each) for each in zip(*calls, strict=True))
    return outputs, (0,) * len(outputs)


def by_rows(
    pass_over_rows: Callable[..., Tensor],
    rows_at_once: int,
    pads: bool,
    x,
    weight,
    targets,
    grads,
    settings,
    losses,
    dx,
    dweight,
) -> None:
    """A chunk of rows at a time, against the whole vocabulary; with `pads` the matmuls take its padding along, for
    cuBLAS has its fast kernels for aligned sizes alone.

    pass_over_rows(logits (n, V or more), V, targets (n,), row_grads (n,) or None, ignore_index, label_smoothing,
    z_loss, losses (n,)) writes the losses, may overwrite the logits, and returns the gradient that takes their place,
    zero in the padding.
    """
    vocab, dtype = weight.shape[0], settings.dtype
    weight = weight.to(dtype)
    width = padded(vocab)
    buffer = torch.empty(min(rows_at_once, len(x)), width, dtype=dtype, device=x.device)
    if pads:
        weight = F.pad(weight, (0, 0, 0, width - vocab)) if width > vocab else weight
        dweight = None if dweight is None else dweight.as_strided(weight.shape, dweight.stride())  # as outputs made it
    elif not x.is_cuda:  # oneDNN's bfloat16 product on AMX multiplies one number past an odd row by zero: may be NaN
        buffer[:, vocab:].zero_()
    for start in range(0, len(x), rows_at_once):
        rows = slice(start, start + rows_at_once)
        chunk = x[rows].to(dtype)
        logits = torch.mm(chunk, weight.t(), out=buffer[: len(chunk), : len(weight)])
        row_grads = None if grads is None else grads[rows]
        dlogits = pass_over_rows(logits, vocab, targets[rows], row_grads, *settings[:3], losses[rows])
        if dx is not None:
            dx[rows] = torch.mm(dlogits if dlogits.dtype == dtype else logits.copy_(dlogits), weight)
        if dweight is not None:
            add_product(dweight, dlogits.t(), chunk, first=start == 0)
        del dlogits  # or two of them would live at once
