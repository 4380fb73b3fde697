"""Matmuls of 8-bit floats: e4m3 for activations and weights, e5m2 for gradients, one scale a tensor.

A copy of a tensor x is values = x / scale, rounded, and the product of two copies is multiplied by both scales. Scales
are powers of two: dividing by one loses no digit, so the same scale gives the same copy on every backend. What is too
large is cut off at the format's largest number; what is not finite becomes NaN, so it reaches the loss.

The copies come from whatever makes the tensor (`OnPyTorch`, or kernels in fp8_kernels.py), which notes the largest
magnitude beside. The gradients of weights are products in the compute dtype.
"""

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt.ops import loss, pytorch
from fastgpt.ops.cpu import logits as cpu_logits
from fastgpt.ops.loss import compute_dtype as compute_dtype
from fastgpt.private import scaled_mm

PLACES = 64  # at which programs note their maxima, so that few wait for the same one
MULTIPLE = 16  # of both axes of a weight: no library multiplies other sizes


class Format(NamedTuple):
    dtype: torch.dtype
    largest: float


PLAIN = -100, 0.0, 0.0  # of a loss: what is ignored, label smoothing, z-loss
E4M3 = Format(torch.float8_e4m3fn, 448.0)
E5M2 = Format(torch.float8_e5m2, 57344.0)


class Copy(NamedTuple):
    """Of a tensor (M, K): values * scale is that tensor, rounded."""

    values: Tensor
    scale: Tensor  # ()


class Weight(NamedTuple):
    """Of a weight (N, K): its copy, N rounded up with zeros, and the copy's transpose where a gradient asks for it."""

    values: Tensor  # (N, K)
    transposed: Tensor | None  # (K, N)
    scale: Tensor  # ()

    @property
    def forward(self) -> Copy:
        return Copy(self.values, self.scale)

    @property
    def backward(self) -> Copy:
        assert self.transposed is not None
        return Copy(self.transposed, self.scale)


class Slot(NamedTuple):
    """Of a tensor that is made once a step: the scale of its next copy, and where its largest magnitude is noted."""

    format: Format
    amax: Tensor  # (PLACES,) float32, the largest of them counts
    scale: Tensor | None = None  # (); None: by the tensor's own largest magnitude
    inverse: Tensor | None = None


class Mlp(NamedTuple):
    """What gelu_mlp is told beside its operands."""

    w_in: Weight
    w_out: Weight
    act: Slot
    gradients: tuple[Slot, Slot] | None  # of y and pre, where those of x and act are made of their copies
    tanh: bool
    recompute: bool


def scales(amax: Tensor, largest: float | Tensor) -> tuple[Tensor, Tensor]:
    """The scale of copies of tensors of such magnitudes, and its inverse: float32 powers of two.

    The magnitude ends up at a quarter to a half of the format's largest number, so that it may double by the next step.
    Of zeros it is 2.
    """
    exponent = (torch.frexp(amax.float() / largest).exponent + 1).clamp(-100, 100)
    return _power_of_two(exponent), _power_of_two(-exponent)


def _power_of_two(exponent: Tensor) -> Tensor:
    """float32, put together from its bits: pow need not be exact."""
    return ((exponent + 127).int() << 23).view(torch.float32)


def rounded(x: Tensor, inverse: Tensor, format: Format) -> Tensor:
    """The values of x's copy."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    cut = (wide * inverse).clamp_(-format.largest, format.largest)
    return cut.sub_(wide - wide).to(format.dtype)  # 0, or NaN of what is not finite


def magnitude(x: Tensor) -> Tensor:
    """The largest of what is finite, () float32."""
    if x.numel() == 0:
        return torch.zeros((), dtype=torch.float32, device=x.device)
    return x.abs().nan_to_num_(0.0, 0.0).amax().float()


def padded(rows: int) -> int:
    """Of a weight's copy. A head's 50257 are not even; 64 is what logits of halves are padded to as well."""
    return rows if rows % MULTIPLE == 0 else loss.padded(rows)


def _no_autocast(x: Tensor) -> torch.autocast:
    """Products here are in the dtype that is asked for, whatever autocast would make of them."""
    return torch.autocast(x.device.type, enabled=False)


def _refuse_second_derivative() -> None:
    if torch.is_grad_enabled():  # backward(create_graph=True)
        raise RuntimeError("matmuls of 8-bit floats have no second derivative; fp8='none' has one")


def product(
    a: Copy, b: Copy, dtype: torch.dtype, bias: Tensor | None = None, *, simulate: bool, fast: bool = False
) -> Tensor:
    """a bᵀ + bias in dtype: a (M, K), b (N, K). simulate: in float32, of the same values. fast: sums may be rounded to
    fewer bits on the way, as a card of capability 9.0 does it."""
    bias = None if bias is None else bias.to(dtype)
    if simulate:
        wide = torch.promote_types(dtype, torch.float32)
        y = (a.values.to(wide) @ b.values.to(wide).t()) * (a.scale * b.scale)
        return (y if bias is None else y + bias).to(dtype)
    if dtype == torch.float32:  # for which the library adds no bias
        y = scaled_mm(a.values, b.values.t(), a.scale, b.scale, None, dtype, fast)
        return y if bias is None else y + bias
    return scaled_mm(a.values, b.values.t(), a.scale, b.scale, bias, dtype, fast)


class OnPyTorch:
    """What makes copies, in PyTorch's own operations; OnKernels does the same in passes that are made anyway."""

    def copy(self, x: Tensor, slot: Slot) -> Copy:
        scale, inverse, amax = slot.scale, slot.inverse, magnitude(x)
        slot.amax[:1].clamp_(min=amax)
        if inverse is None or scale is None:
            scale, inverse = scales(amax, slot.format.largest)
        return Copy(rounded(x, inverse, slot.format), scale)

    def weight(self, w: Tensor, inverse: Tensor, format: Format, values: Tensor, transposed: Tensor | None) -> None:
        """Write w's values (N, K), and their transpose."""
        made = rounded(w, inverse, format)
        values[: len(made)] = made
        if transposed is not None:
            transposed[:, : len(made)] = made.t()

    def norm(self, x, residual, weight, bias, eps, slot: Slot, **options) -> tuple[Tensor, Tensor, Copy]:
        """As layer_norm without a residual, or add_layer_norm; and the copy of what it normed."""
        if residual is None:
            normed, total = pytorch.layer_norm(x, weight, bias, eps), x
        else:
            normed, total = pytorch.add_layer_norm(x, residual, weight, bias, eps, **options)
        return normed, total, self.copy(_rows(normed.detach()), slot)

    def gelu(self, pre: Tensor, tanh: bool, slot: Slot, keeps: bool) -> tuple[Tensor | None, Copy]:
        """gelu(pre), if it is to be kept, and its copy."""
        act = F.gelu(pre, approximate=_name(tanh))
        return act if keeps else None, self.copy(act, slot)

    def gelu_backward(
        self, dact: Tensor, pre: Tensor, tanh: bool, slot: Slot, again: bool
    ) -> tuple[Tensor, Tensor, Copy, Tensor | None]:
        """dpre, which may take dact's place, the sums of its columns, its copy, and gelu(pre) if it is wanted again."""
        dpre = torch.ops.aten.gelu_backward(dact, pre, approximate=_name(tanh))
        act = F.gelu(pre, approximate=_name(tanh)) if again else None
        return dpre, dpre.sum(0), self.copy(dpre, slot), act

    def mlp_backward(self, dy, x, w_in, w_out, pre, act, tanh: bool, needs: list[bool]):
        """As _mlp_backward, of nothing but halves."""
        dpre = torch.ops.aten.gelu_backward(dy @ w_out, pre, approximate=_name(tanh))
        act = F.gelu(pre, approximate=_name(tanh)) if act is None else act
        return dpre @ w_in, dpre.t() @ x, dpre.sum(0), dy.t() @ act, dy.sum(0)

    def over_logits(
        self, logits: Tensor, vocab: int, targets: Tensor, row_grads: Tensor | None, losses: Tensor, format: Format,
        inverse: Tensor | None,
    ) -> Tensor | None:  # fmt: skip
        """Write the losses, and with row_grads the gradient over the logits; with an inverse, the values of its
        copy."""
        cpu_logits.pass_over_rows(logits[:, :vocab], vocab, targets, row_grads, *PLAIN, losses)
        logits[:, vocab:] = 0
        return None if inverse is None else rounded(logits, inverse, format)


def _name(tanh: bool) -> str:
    return "tanh" if tanh else "none"


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, copy: Copy, w: Weight, simulate: bool) -> Tensor:
    """x weightᵀ + bias of copies: (…, K), (N, K), (N,) -> (…, N) in x's dtype; its derivatives of x and weight."""
    return Linear.apply(_rows(x), weight, bias, copy, w, simulate).view(*x.shape[:-1], -1)


class Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, copy, w, simulate):
        ctx.save_for_backward(x, weight, bias)
        with _no_autocast(x):
            return product(copy, w.forward, x.dtype, bias, simulate=simulate, fast=True)

    @staticmethod
    def backward(ctx, dy):
        x, weight, bias = ctx.saved_tensors
        _refuse_second_derivative()
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        with _no_autocast(x):
            return (
                dy @ weight.to(dy.dtype) if needs_x else None,
                (dy.t() @ x).to(weight.dtype) if needs_weight else None,
                dy.sum(0).to(bias.dtype) if needs_bias else None,
                *[None] * 3,
            )


def gelu_mlp(
    x: Tensor, w_in: Tensor, b_in: Tensor | None, w_out: Tensor, b_out: Tensor | None, copy: Copy, how: Mlp,
    makes: OnPyTorch, simulate: bool,
) -> Tensor:  # fmt: skip
    """As ops.gelu_mlp, of copies."""
    return GeluMlp.apply(_rows(x), w_in, b_in, w_out, b_out, copy, how, makes, simulate).view(x.shape)


class GeluMlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w_in, b_in, w_out, b_out, copy, how, makes, simulate):
        with _no_autocast(x):
            pre = product(copy, how.w_in.forward, x.dtype, b_in, simulate=simulate, fast=True)
            act, act_copy = makes.gelu(pre, how.tanh, how.act, keeps=not how.recompute)
            ctx.save_for_backward(x, w_in, b_in, w_out, b_out, pre, act)
            ctx.given = how, makes, simulate
            return product(act_copy, how.w_out.forward, x.dtype, b_out, simulate=simulate, fast=True)

    @staticmethod
    def backward(ctx, dy):
        _refuse_second_derivative()
        x, w_in, _, w_out, _, pre, act = saved = ctx.saved_tensors  # a checkpoint gives them once
        how, makes, simulate = ctx.given
        needs = list(ctx.needs_input_grad[:5])
        with _no_autocast(x):
            if how.gradients is None:
                weights = w_in.to(dy.dtype), w_out.to(dy.dtype)
                grads = makes.mlp_backward(dy, x, *weights, pre, act, how.tanh, needs)
            else:
                grads = _mlp_backward(dy, x, w_in, w_out, pre, act, how, makes, simulate, needs)
        found = zip(grads, saved[:5], needs, strict=True)
        return *(grad.to(like.dtype) if needed else None for grad, like, needed in found), *[None] * 4


def _mlp_backward(dy, x, w_in, w_out, pre, act, how: Mlp, makes: OnPyTorch, simulate: bool, needs: list[bool]):
    """The gradients of x, w_in, b_in, w_out and b_out, those of inputs of copies; None where `needs` has False."""
    assert how.gradients is not None
    of_dy, of_dpre = how.gradients
    dact = product(makes.copy(dy, of_dy), how.w_out.backward, dy.dtype, simulate=simulate)
    again = act is None and needs[3]
    dpre, sums, copy, made = makes.gelu_backward(dact, pre, how.tanh, of_dpre, again)
    return (
        product(copy, how.w_in.backward, dy.dtype, simulate=simulate) if needs[0] else None,
        dpre.t() @ x if needs[1] else None,
        sums,
        dy.t() @ (made if again else act) if needs[3] else None,
        dy.sum(0) if needs[4] else None,
    )


def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, copy: Copy, w: Weight, gradient: Format, makes: OnPyTorch,
    simulate: bool,
) -> Tensor:  # fmt: skip
    """The mean loss, as ops.linear_cross_entropy has it, of copies; gradient: the format of the logits' one."""
    settings = loss.LossSettings(*PLAIN, x.dtype)
    if not torch.is_grad_enabled():  # a Function can't tell
        x, weight = x.detach(), weight.detach()
    chunked = functools.partial(_chunked_losses, copy=copy, w=w, gradient=gradient, makes=makes, simulate=simulate)
    return loss.LinearCrossEntropy.apply(_rows(x), weight, targets.reshape(-1), "mean", settings, chunked)


def _chunked_losses(x, weight, targets, row_grads, *more, copy, w, gradient, makes, simulate):
    """As what loss.chunked_op makes. A gradient of logits is at most what reaches its row's loss, which is the scale's
    magnitude; more: LossSettings, needs_x and needs_weight."""
    *_, dtype, needs_x, needs_weight = more
    losses, dx, dweight = loss.outputs(x, weight, dtype, needs_x, needs_weight, True)
    padded = dweight.as_strided((len(w.values), x.shape[1]), dweight.stride()) if needs_weight else None
    scale, inverse = copy.scale, None
    if row_grads is not None and needs_x:
        scale, inverse = scales(magnitude(row_grads), gradient.largest)
    at_once = max(256, MULTIPLE * -(-len(x) // (12 * MULTIPLE)))  # a twelfth
    for start in range(0, len(x), at_once):
        rows = slice(start, start + at_once)
        with _no_autocast(x):
            logits = product(Copy(copy.values[rows], copy.scale), w.forward, dtype, simulate=simulate, fast=True)
            grads = None if row_grads is None else row_grads[rows]
            values = makes.over_logits(logits, len(weight), targets[rows], grads, losses[rows], gradient, inverse)
            if values is not None:
                dx[rows] = product(Copy(values, scale), w.backward, dtype, simulate=simulate)
            if padded is not None:
                loss.add_product(padded, logits.t(), x[rows], first=start == 0)
        del logits, values  # or the next chunk's would live beside them
    return losses, dx, dweight
