"""The fallback's GELU MLP on a CPU: no more memory at its peak than the forward left behind.

Autograd's own backward would take two more tensors as large as the hidden units. Here the gradient of the activations
is written over the activations, when nothing needs these any more, and multiplied by the GELU's slope in there.

    gelu(x) = x (1 + tanh u) / 2 = x s,    s = sigmoid(z),    z = 2u = 2 √(2/π) (x + 0.044715 x³)
    gelu'(x) = s + x z' s (1 - s),    x z' = 3 z - 4 √(2/π) x

in passes of PyTorch's over what a cache holds. At 3.1 million float32 numbers its own tanh GELU takes 2.6 ms and that
one's derivative 3.1; the passes take 1.4, or 2.4 with the slope, and to multiply by it 0.7 (Xeon, 2 cores, PyTorch
2.13; with AVX2 alone 3.7 and 4.2 against 1.7).

`C` channels, `F` hidden units.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt.ops.transforms import mapped

_AT_ONCE = 2**18  # hidden units that stay in a core's cache between the passes over them
_SCALE = 2 * math.sqrt(2 / math.pi)


def gelu(x: Tensor, approximate: str) -> Tensor:
    """F.gelu, without a derivative."""
    if not by_passes(x.numel(), x.dtype, approximate):
        return F.gelu(x, approximate=approximate)
    out, scale = torch.empty_like(x, memory_format=torch.contiguous_format), _scale(x)
    for part, y in zip(*(t.reshape(-1).split(_AT_ONCE) for t in (x, out)), strict=True):
        torch.addcmul(scale, part, part, value=0.044715 * _SCALE, out=y).mul_(part).sigmoid_().mul_(part)
    return out


def gelu_leaving_slope_(x: Tensor) -> Tensor:
    """gelu(x); x, which is contiguous, is overwritten by gelu'(x)."""
    out, scale = torch.empty_like(x), _scale(x)
    first, second = torch.empty(2, min(_AT_ONCE, x.numel()), dtype=x.dtype, device=x.device)
    for part, y in zip(*(t.view(-1).split(_AT_ONCE) for t in (x, out)), strict=True):
        z, s = first[: len(part)], second[: len(part)]
        torch.addcmul(scale, part, part, value=0.044715 * _SCALE, out=z).mul_(part).clamp_(-100, 100)  # inf · 0 is NaN
        torch.sigmoid(z, out=s)
        z.sub_(part, alpha=2 / 3 * _SCALE)  # x z' / 3
        torch.ops.aten.sigmoid_backward.grad_input(z, s, grad_input=z)
        torch.mul(part, s, out=y)
        torch.add(s, z, alpha=3, out=part)
    return out


def _scale(x: Tensor) -> Tensor:
    return torch.full((), _SCALE, dtype=x.dtype, device=x.device)


def by_passes(units: int, dtype: torch.dtype, approximate: str) -> bool:
    """Whether a GELU of so many numbers is faster in passes than PyTorch's own."""
    return approximate == "tanh" and dtype == torch.float32 and units >= _AT_ONCE // 4


class GeluMlp(torch.autograd.Function):
    """gelu(x w_inᵀ + b_in) w_outᵀ + b_out: x (..., C), w_in (F, C), b_in (F,), w_out (C', F), b_out (C',)."""

    @staticmethod
    def forward(ctx, x, w_in, b_in, w_out, b_out, approximate):
        hidden = F.linear(x, w_in, b_in)
        ctx.has_slope = by_passes(hidden.numel(), hidden.dtype, approximate)
        act = gelu_leaving_slope_(hidden) if ctx.has_slope else F.gelu(hidden, approximate=approximate)
        ctx.save_for_backward(x, w_in, b_in, w_out, b_out, hidden, act)  # or the slope, which is where hidden was
        ctx.approximate, ctx.overwritten = approximate, False
        return F.linear(act, w_out, b_out)

    @staticmethod
    def backward(ctx, dy):
        *operands, hidden, act = ctx.saved_tensors
        if torch.is_grad_enabled() or mapped(dy):  # create_graph=True, or is_grads_batched
            return *_differentiable_backward(operands, ctx.approximate, ctx.needs_input_grad, dy), None
        with torch.autocast("cpu", enabled=False):  # which the forward did not know
            if ctx.overwritten:  # by an earlier backward through a graph that was kept
                act = gelu(F.linear(*operands[:3]), ctx.approximate)
            ctx.overwritten = True
            unwatched = act.data  # autograd would refuse a second look at a saved tensor that was written over
            return *_backward(ctx, operands, hidden, unwatched, dy), None


def _backward(ctx, operands, hidden, act, dy):
    """act is overwritten."""
    x, w_in, _, w_out, _ = operands
    needs_x, needs_w_in, needs_b_in, needs_w_out, needs_b_out, _ = ctx.needs_input_grad
    rows, hidden, act, dy = (t.reshape(-1, t.shape[-1]) for t in (x, hidden, act, dy))
    dw_out = _weight_gradient(dy, act, w_out) if needs_w_out else None
    db_out = dy.sum(0) if needs_b_out else None
    if not (needs_x or needs_w_in or needs_b_in):
        return None, None, None, dw_out, db_out
    dhidden = torch.mm(dy, w_out, out=act)
    if ctx.has_slope:
        dhidden.mul_(hidden)
    else:
        gelu_backward = torch.ops.aten.gelu_backward.grad_input
        gelu_backward(dhidden, hidden, approximate=ctx.approximate, grad_input=dhidden)
    dx = (dhidden @ w_in).view(x.shape) if needs_x else None
    dw_in = _weight_gradient(dhidden, rows, w_in) if needs_w_in else None
    return dx, dw_in, dhidden.sum(0) if needs_b_in else None, dw_out, db_out


def _weight_gradient(dy, x, weight):
    """dyᵀ x in weight's own order in memory: in another, whoever adds gradients up would copy it first."""
    return (x.t() @ dy).t() if weight.stride(0) == 1 else dy.t() @ x


def _differentiable_backward(operands, approximate, needs, dy):
    """The gradients through plain functions, which PyTorch can differentiate again."""
    x, w_in, b_in, w_out, b_out = operands
    with torch.enable_grad():
        y = F.linear(F.gelu(F.linear(x, w_in, b_in), approximate=approximate), w_out, b_out)
    wanted = [operand for operand, needed in zip(operands, needs, strict=False) if needed]
    grads = iter(torch.autograd.grad(y, wanted, dy, create_graph=torch.is_grad_enabled()))
    return [next(grads) if needed else None for needed in needs[:5]]
