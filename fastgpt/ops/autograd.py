"""The Triton backend: custom ops around the launchers in kernels/, and the autograd Functions that call them.

The public functions here are the twins of fastgpt.reference: same names, same signatures, arguments already checked.
Launchers are custom ops so that torch.compile sees one opaque call with a known output, and opcheck can check it.
"""

import functools
import math

import torch
import triton
from torch import Tensor
from torch.nn import Parameter

from fastgpt.kernels import attention, attention_backward, cross_entropy, decode, draw, few_rows, greedy, layernorm, mlp
from fastgpt.kernels import embedding as embedding_kernels
from fastgpt.ops import hopper, loss, token
from fastgpt.private import dispatch_modes, is_batch, transformed

INTERPRETED = triton.knobs.runtime.interpret  # what the kernels were decorated with, a line above
_FEWEST_ROWS = 256  # of the logits at once: with fewer the matmuls wait for weight and dweight to be read and written


def layer_norm(x, weight, bias=None, eps=1e-5):
    return LayerNorm.apply(x, weight, bias, eps)


def add_layer_norm(
    x, residual, weight, bias=None, eps=1e-5, *, x_bias=None, residual_dtype=None, dropout_p=0.0, seed=None
):
    seed = _seed_tensor(seed, dropout_p, x.device)
    return AddLayerNorm.apply(x, residual, weight, bias, x_bias, seed, eps, residual_dtype or residual.dtype, dropout_p)


def causal_attention(q, k, v, *, scale=None, dropout_p=0.0, seed=None, key_mask=None, documents=None, window=None):
    q, k, v = cast(q, k, v)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    seed = _seed_tensor(seed, dropout_p, q.device)
    return CausalAttention.apply(q, k, v, seed, key_mask, documents, scale, float(dropout_p), window)


def causal_attention_qkv(
    qkv, heads, *, scale=None, dropout_p=0.0, seed=None, key_mask=None, documents=None, window=None, qkv_bias=None
):
    (qkv,) = cast(qkv)
    scale = 1 / math.sqrt(qkv.shape[-1] // 3 // heads) if scale is None else scale
    seed = _seed_tensor(seed, dropout_p, qkv.device)
    numbers = heads, scale, float(dropout_p), window
    return CausalAttentionQKV.apply(qkv, qkv_bias, seed, key_mask, documents, *numbers)


def decode_attention(q, k_cache, v_cache, lengths, *, scale=None, window=None):
    q, k_cache, v_cache = cast(q, k_cache, v_cache)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    return decode_attention_fwd(q, k_cache, v_cache, lengths, scale, window)


def gelu_mlp(x, w_in, b_in, w_out, b_out=None, *, approximate="tanh", recompute=False):
    operands = cast(x.reshape(-1, x.shape[-1]), w_in, b_in, w_out, b_out)
    return GeluMLP.apply(*operands, approximate == "tanh", recompute).view(x.shape)


def linear_cross_entropy(x, weight, targets, *, ignore_index=-100, reduction="mean", label_smoothing=0.0, z_loss=0.0):
    return loss.linear_cross_entropy(
        x,
        weight,
        targets,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        chunked_losses=chunked_losses,
    )


def embedding(ids, token_weight, position_weight, positions=None, *, dropout_p=0.0, seed=None, dtype=None):
    seed = _seed_tensor(seed, dropout_p, token_weight.device)
    dtype = token_weight.dtype if dtype is None else dtype
    return Embedding.apply(token_weight, position_weight, ids, positions, seed, dropout_p, dtype)


def cast(*operands):
    """The operands of a matmul as autocast casts them for PyTorch's own; None and float64 stay."""
    device = operands[0].device.type
    if not torch.is_autocast_enabled(device):
        return operands
    dtype = torch.get_autocast_dtype(device)
    return tuple(t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in operands)


def _on_its_device(launcher):
    """`launcher` on the device and current stream of its first tensor, out of reach of the caller's autocast."""

    def out_of_autocast(kind, first, args):
        if not torch.is_autocast_enabled(kind):
            return launcher(first, *args)
        torch.set_autocast_enabled(kind, False)  # torch.autocast itself takes ten times as long
        try:
            return launcher(first, *args)
        finally:
            torch.set_autocast_enabled(kind, True)

    @functools.wraps(launcher)
    def launch(first, *args):
        if not first.is_cuda:
            return out_of_autocast("cpu", first, args)
        if first.device.index == torch.cuda.current_device():  # no need of a context
            return out_of_autocast("cuda", first, args)
        with torch.cuda.device(first.device):
            return out_of_autocast("cuda", first, args)

    return launch


def _go_over_logits(x, *arguments):
    """By a twelfth of the rows, but 256 at least: fewer would wait for the weights; a multiple of 8, for a product over
    other numbers of rows is a slow one. A row's pass is one launch."""
    pass_over_rows = _on_its_device(cross_entropy.cross_entropy_rows)
    loss.by_rows(pass_over_rows, max(_FEWEST_ROWS, 8 * -(-len(x) // 96)), True, x, *arguments)


_ORDINARY = (Tensor, Parameter)


def _custom_op(launcher, fake):
    """`launcher` as the op fastgpt::<its name>; called by Python it is launched at once, for PyTorch's way through an
    op took 12 of layer_norm's 18 µs on a CPU. A compiler, a mode that looks at every op and another kind of tensor get
    the op."""
    launch = _on_its_device(launcher)
    op = torch.library.custom_op(f"fastgpt::{launcher.__name__}", launch, mutates_args=())
    op.register_fake(fake)
    op.register_vmap(functools.partial(loss.one_by_one, op))

    @functools.wraps(launcher)
    def call(first, *args):
        if torch.compiler.is_compiling() or dispatch_modes() or transformed():
            return op(first, *args)
        for arg in (first, *args):
            if isinstance(arg, Tensor) and (type(arg) not in _ORDINARY or is_batch(arg)):
                return op(first, *args)
        return launch(first, *args)

    call.op = op  # type: ignore[attr-defined]
    return call


layer_norm_fwd = _custom_op(layernorm.layer_norm_fwd, layernorm.layer_norm_fwd_outputs)
layer_norm_bwd = _custom_op(layernorm.layer_norm_bwd, layernorm.layer_norm_bwd_outputs)
attention_fwd = _custom_op(hopper.attention_fwd, attention.attention_fwd_outputs)
attention_bwd = _custom_op(hopper.attention_bwd, attention_backward.attention_bwd_outputs)
attention_qkv_fwd = _custom_op(hopper.attention_qkv_fwd, attention.attention_qkv_fwd_outputs)
attention_qkv_bwd = _custom_op(hopper.attention_qkv_bwd, attention_backward.attention_qkv_bwd_outputs)
decode_attention_fwd = _custom_op(decode.decode_attention_fwd, decode.decode_attention_fwd_outputs)
gelu_mlp_fwd = _custom_op(hopper.gelu_mlp_fwd, mlp.gelu_mlp_fwd_outputs)
gelu_mlp_bwd = _custom_op(hopper.gelu_mlp_bwd, mlp.gelu_mlp_bwd_outputs)
embedding_fwd = _custom_op(embedding_kernels.embedding_fwd, embedding_kernels.embedding_fwd_outputs)
embedding_bwd = _custom_op(embedding_kernels.embedding_bwd, embedding_kernels.embedding_bwd_outputs)
few_linear, few_norm_linear = _on_its_device(few_rows.linear), _on_its_device(few_rows.norm_linear)
append_to_cache, fits_few = _on_its_device(decode.append), few_rows.fits
take_likeliest, take_drawn = _on_its_device(greedy.greedy), _on_its_device(draw.draw)
whole_token, measured_token = token.whole_token, token.measured
chunked_losses = loss.chunked_op("chunked_losses_triton", _go_over_logits, pads=True)


class LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        y, _, stats = layer_norm_fwd(x, None, weight, bias, None, None, eps, 0.0, x.dtype)
        ctx.save_for_backward(x, weight, bias, stats)
        return y

    @staticmethod
    def backward(ctx, dy):
        _refuse_second_derivative("layer_norm")
        x, weight, bias, stats = ctx.saved_tensors
        dx, _, sums = layer_norm_bwd(dy, None, x, weight, stats, None, 0.0, x.dtype, False)
        return dx, sums[0].to(weight.dtype), None if bias is None else sums[1].to(bias.dtype), None


class AddLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, weight, bias, x_bias, seed, eps, residual_dtype, dropout_p):
        y, s, stats = layer_norm_fwd(x, residual, weight, bias, x_bias, seed, eps, dropout_p, residual_dtype)
        ctx.save_for_backward(s, weight, bias, x_bias, stats, seed)
        ctx.set_materialize_grads(False)  # either output may go unused
        ctx.dropout_p, ctx.x_dtype, ctx.residual_dtype = dropout_p, x.dtype, residual.dtype
        return y, s

    @staticmethod
    def backward(ctx, dy, dsum):
        _refuse_second_derivative("add_layer_norm")
        s, weight, bias, x_bias, stats, seed = ctx.saved_tensors
        if dy is None:
            dy = torch.zeros((), dtype=ctx.x_dtype, device=s.device).expand(s.shape)
        needs_x_bias = x_bias is not None and ctx.needs_input_grad[4]
        ds, dx, sums = layer_norm_bwd(dy, dsum, s, weight, stats, seed, ctx.dropout_p, ctx.x_dtype, needs_x_bias)
        if all(t is None or t.dtype == weight.dtype for t in (bias, x_bias)):
            sums = sums.to(weight.dtype)  # one launch instead of three
        return (
            dx if dx.numel() else ds,
            ds.to(ctx.residual_dtype),
            sums[0].to(weight.dtype),
            None if bias is None else sums[1].to(bias.dtype),
            sums[2].to(x_bias.dtype) if needs_x_bias else None,
            *[None] * 4,
        )


class CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, seed, key_mask, documents, *numbers):
        """numbers: scale, dropout_p, window."""
        o, lse = attention_fwd(q, k, v, seed, key_mask, documents, *numbers)
        ctx.save_for_backward(q, k, v, o, lse, seed, key_mask, documents)
        ctx.numbers = numbers
        return o

    @staticmethod
    def backward(ctx, do):
        _refuse_second_derivative("causal_attention")
        return *attention_bwd(do, *ctx.saved_tensors, *ctx.numbers), *[None] * 6


class CausalAttentionQKV(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, bias, seed, key_mask, documents, *numbers):
        """numbers: heads, scale, dropout_p, window."""
        out, lse = attention_qkv_fwd(qkv, seed, key_mask, documents, *numbers)
        ctx.save_for_backward(qkv, out, lse, seed, key_mask, documents)
        ctx.numbers = numbers
        ctx.bias_dtype = None if bias is None else bias.dtype
        return out

    @staticmethod
    def backward(ctx, dout):
        _refuse_second_derivative("causal_attention_qkv")
        needs_bias = ctx.needs_input_grad[1]
        dqkv, sums = attention_qkv_bwd(dout, *ctx.saved_tensors, *ctx.numbers, needs_bias)
        return dqkv, sums.to(ctx.bias_dtype) if needs_bias else None, *[None] * 7


class GeluMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w_in, b_in, w_out, b_out, tanh, recompute):
        y, pre, act = gelu_mlp_fwd(x, w_in, b_in, w_out, b_out, tanh, recompute)
        ctx.save_for_backward(x, w_in, w_out, pre, act)
        ctx.tanh = tanh
        return y

    @staticmethod
    def backward(ctx, dy):
        _refuse_second_derivative("gelu_mlp")
        needs = list(ctx.needs_input_grad[:5])
        grads = gelu_mlp_bwd(dy, *ctx.saved_tensors, ctx.tanh, needs)
        return *(grad if needed else None for grad, needed in zip(grads, needs, strict=True)), None, None


class Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, token_weight, position_weight, ids, positions, seed, dropout_p, dtype):
        ctx.save_for_backward(ids, positions, seed)
        ctx.sizes = (token_weight.shape[0], position_weight.shape[0])
        ctx.dropout_p, ctx.weight_dtype = dropout_p, token_weight.dtype
        return embedding_fwd(token_weight, position_weight, ids, positions, seed, dropout_p, dtype)

    @staticmethod
    def backward(ctx, dout):
        _refuse_second_derivative("embedding")
        ids, positions, seed = ctx.saved_tensors
        grads = [
            embedding_bwd(dout, keys, seed, size, ctx.dropout_p, ctx.weight_dtype) if needed else None
            for keys, size, needed in zip((ids, positions), ctx.sizes, ctx.needs_input_grad[:2], strict=True)
        ]
        return *grads, *[None] * 5


def _seed_tensor(seed, dropout_p, device):
    """The seed as the kernels read it, (1,) int64 on the device; drawn from torch's generator if None. No host sync."""
    if dropout_p == 0:
        return None
    if seed is None:
        return torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=device)
    if isinstance(seed, torch.Tensor):
        return seed.reshape(1)
    return torch.full((1,), seed, dtype=torch.int64, device=device)


def _refuse_second_derivative(name):
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # backward(create_graph=True)
        raise RuntimeError(f"{name}: the Triton kernels have no second derivative; pass backend='torch' to get one")
