"""Every function of fastgpt.ops in PyTorch's own differentiable operations alone: what runs under torch.func's
transforms, in forward-mode differentiation and while torch.jit.trace records.

The fallback without its special forms: nothing is written in place, given up and computed again, or decided by what a
tensor holds. It takes the memory of all hidden units, logits and attention weights.
"""

import contextlib

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastgpt.ops import loss, pytorch
from fastgpt.ops.pytorch import add_layer_norm, embedding, layer_norm

__all__ = [
    "add_layer_norm",
    "causal_attention",
    "causal_attention_qkv",
    "decode_attention",
    "embedding",
    "gelu_mlp",
    "layer_norm",
    "linear_cross_entropy",
]


def causal_attention(q, k, v, **options):
    with _differentiable():
        return pytorch.causal_attention(q, k, v, **options)


def causal_attention_qkv(qkv, heads, **options):
    with _differentiable():
        return pytorch.causal_attention_qkv(qkv, heads, **options)


def decode_attention(q, k_cache, v_cache, lengths, **options):
    with _differentiable():
        return pytorch.decode_masked(q, k_cache, v_cache, lengths, **options)


def _differentiable():
    """PyTorch's fused attention has no forward-mode derivative, and no second one."""
    return contextlib.nullcontext() if torch.jit.is_tracing() else sdpa_kernel(SDPBackend.MATH)


def gelu_mlp(x, w_in, b_in, w_out, b_out=None, *, approximate="tanh", recompute=False):
    """recompute changes nothing here: torch.func knows no checkpoints."""
    return F.linear(F.gelu(F.linear(x, w_in, b_in), approximate=approximate), w_out, b_out)


def linear_cross_entropy(x, weight, targets, *, ignore_index=-100, reduction="mean", label_smoothing=0.0, z_loss=0.0):
    settings = loss.LossSettings(ignore_index, label_smoothing, z_loss, loss.compute_dtype(x))
    return loss.of_all_logits(x, weight, targets, reduction, settings)
