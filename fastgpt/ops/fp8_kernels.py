"""Copies in 8 bits by the Triton kernels, in the passes that make their tensors anyway."""

import functools

import torch
from torch import Tensor

from fastgpt.kernels import cross_entropy, layernorm, mlp
from fastgpt.kernels import fp8 as kernels
from fastgpt.ops import autograd
from fastgpt.ops.fp8 import PLAIN, Copy, Format, OnPyTorch, Slot, scales


def _there(method):
    """On the device and the current stream of its first tensor."""

    @functools.wraps(method)
    def run(self, first, *args, **kwargs):
        if not first.is_cuda or first.device.index == torch.cuda.current_device():
            return method(self, first, *args, **kwargs)
        with torch.cuda.device(first.device):
            return method(self, first, *args, **kwargs)

    return run


class OnKernels(OnPyTorch):
    """Where a slot has no scale yet, the tensor is made as ever, and its copy in two passes over it."""

    @_there
    def copy(self, x: Tensor, slot: Slot) -> Copy:
        x, scale, inverse = x.contiguous(), slot.scale, slot.inverse
        if scale is None:
            own = torch.zeros_like(slot.amax)
            kernels.cast(x, None, None, own)
            scale, inverse = scales(own.amax(), slot.format.largest)
        values = torch.empty_like(x, dtype=slot.format.dtype)
        kernels.cast(x, values, inverse, slot.amax)
        return Copy(values, scale)

    @_there
    def weight(self, w: Tensor, inverse: Tensor, format: Format, values: Tensor, transposed: Tensor | None) -> None:
        kernels.cast_weight(w, values, transposed, inverse)

    @_there
    def norm(self, x, residual, weight, bias, eps, slot: Slot, *, x_bias=None, dropout_p=0.0):
        if slot.scale is None:
            if residual is None:
                normed, total = autograd.layer_norm(x, weight, bias, eps), x
            else:
                options = dict(x_bias=x_bias, dropout_p=dropout_p)
                normed, total = autograd.add_layer_norm(x, residual, weight, bias, eps, **options)
            return normed, total, self.copy(normed.detach().flatten(0, -2), slot)
        if residual is None:
            normed, values = LayerNorm.apply(x, weight, bias, eps, slot)
            return normed, x, Copy(values, slot.scale)
        seed = torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=x.device) if dropout_p else None
        numbers = eps, residual.dtype, dropout_p
        normed, total, values = AddLayerNorm.apply(x, residual, weight, bias, x_bias, seed, *numbers, slot)
        return normed, total, Copy(values, slot.scale)

    @_there
    def gelu(self, pre: Tensor, tanh: bool, slot: Slot, keeps: bool) -> tuple[Tensor | None, Copy]:
        if slot.scale is None:
            act = torch.empty_like(pre)
            mlp.gelu_pass(pre, tanh, act)
            return act if keeps else None, self.copy(act, slot)
        kept = torch.empty_like(pre) if keeps else None
        values, copy = _beside(pre, slot, "act8")
        mlp.gelu_pass(pre, tanh, kept, **copy)
        return kept, Copy(values, slot.scale)

    @_there
    def gelu_backward(
        self, dact: Tensor, pre: Tensor, tanh: bool, slot: Slot, again: bool
    ) -> tuple[Tensor, Tensor, Copy, Tensor | None]:
        act = torch.empty_like(pre) if again else torch.empty((0,), dtype=pre.dtype, device=pre.device)
        if slot.scale is None:
            partials = mlp.gelu_backward_pass(dact, pre, tanh, act, again)
            made = self.copy(dact, slot)
        else:
            values, copy = _beside(pre, slot, "dpre8")
            partials = mlp.gelu_backward_pass(dact, pre, tanh, act, again, **copy)
            made = Copy(values, slot.scale)
        return dact, partials.sum(0), made, act if again else None

    def mlp_backward(self, dy, x, w_in, w_out, pre, act, tanh: bool, needs: list[bool]):
        """By whatever serves the same call without copies."""
        act = torch.empty((0,), dtype=pre.dtype, device=pre.device) if act is None else act
        return autograd.gelu_mlp_bwd(dy, x, w_in, w_out, pre, act, tanh, needs)

    @_there
    def over_logits(self, logits, vocab, targets, row_grads, losses, format: Format, inverse):
        copy = {}
        if inverse is not None:
            copy = dict(gradient8=torch.empty_like(logits, dtype=format.dtype), inverse=inverse)
        cross_entropy.cross_entropy_rows(logits, vocab, targets, row_grads, *PLAIN, losses, **copy)
        return copy.get("gradient8")


def _beside(x: Tensor, slot: Slot, name: str) -> tuple[Tensor, dict]:
    """A copy as large as x, and what a launcher is told of it."""
    values = torch.empty_like(x, dtype=slot.format.dtype)
    return values, {name: values, "inverse": slot.inverse, "amax": slot.amax}


class LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, eps, slot):
        values, copy = _beside(x.flatten(0, -2), slot, "y8")
        given = x, None, weight, bias, None, None, eps, 0.0, x.dtype
        y, _, stats = layernorm.copied_layer_norm_fwd(*given, **copy)
        ctx.save_for_backward(x, weight, bias, stats)
        ctx.set_materialize_grads(False)  # of the copy, which has none
        ctx.mark_non_differentiable(values)
        return y, values

    @staticmethod
    def backward(ctx, dy, _):
        return *autograd.LayerNorm.backward(ctx, dy), None


class AddLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, weight, bias, x_bias, seed, eps, residual_dtype, dropout_p, slot):
        values, copy = _beside(x.flatten(0, -2), slot, "y8")
        given = x, residual, weight, bias, x_bias, seed, eps, dropout_p, residual_dtype
        y, s, stats = layernorm.copied_layer_norm_fwd(*given, **copy)
        ctx.save_for_backward(s, weight, bias, x_bias, stats, seed)
        ctx.set_materialize_grads(False)  # of the copy, and either output may go unused
        ctx.dropout_p, ctx.x_dtype, ctx.residual_dtype = dropout_p, x.dtype, residual.dtype
        ctx.mark_non_differentiable(values)
        return y, s, values

    @staticmethod
    def backward(ctx, dy, dsum, _):
        return *autograd.AddLayerNorm.backward(ctx, dy, dsum), None
