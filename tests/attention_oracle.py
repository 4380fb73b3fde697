"""What attention's tests share: operands, and the judgement of the kernels' four results against float64."""

import math

import torch

from fastgpt import ops
from fastgpt.ops import pytorch
from fastgpt.testing import assert_accurate

NAMES = ("o", "dq", "dk", "dv")


def operands(batch, heads, queries, keys, dim, dtype, device, scale=1.0, key_heads=None):
    """q, k, v and the gradient of o."""
    shapes = ((heads, queries), (key_heads or heads, keys), (key_heads or heads, keys), (heads, queries))
    tensors = [torch.randn(batch, h, length, dim, dtype=torch.float64) for h, length in shapes]
    return [(t * s).to(device, dtype) for t, s in zip(tensors, (scale, scale, 1.0, 1.0), strict=True)]


def run(q, k, v, do, **options):
    """o and the gradients of q, k, v, for leaves of these values and strides."""
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    o = ops.causal_attention(*leaves, **options)
    o.backward(do)
    return [o, *(leaf.grad for leaf in leaves)]


def check(tensors, scale=None, backend="triton", **options):
    """A road's four results for these operands, each within assert_accurate's limits. Returns them."""
    real_scale = tensors[0].shape[-1] ** -0.5 if scale is None else scale
    results = run(*tensors, scale=scale, backend=backend, **options)
    wide = [t.double() for t in tensors]
    oracle = run(*wide, scale=scale, backend="torch", **options)
    allowed, weight = _masks(*tensors[:2], **options)
    sizes, largest = _magnitudes(*wide, real_scale, tensors[0].dtype, allowed, weight)
    theirs = _composed(*tensors, real_scale, allowed, weight)
    for name, got, expected, their, size in zip(NAMES, results, oracle, theirs, sizes, strict=True):
        assert_accurate(got, expected, their, size, logit_max=largest, name=name)
    return results


def _masks(q, k, key_mask=None, documents=None, dropout_p=0.0, seed=None):
    """Which keys each query sees, and what dropout multiplies the probabilities by; as (B, H, Tq, Tk)."""
    queries, keys = q.shape[2], k.shape[2]
    allowed = torch.ones(1, 1, queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)
    if key_mask is not None:
        allowed = allowed & key_mask[:, None, None]
    if documents is not None:
        allowed = allowed & (documents[:, None, :, None] == documents[:, None, None])
    if dropout_p == 0:
        return allowed, torch.ones((), device=q.device)
    keep = pytorch.dropout_mask(seed, dropout_p, (*q.shape[:3], keys), pytorch.ATTENTION_SITE, q.device)
    return allowed, keep * (0.0 if dropout_p == 1 else 1 / (1 - dropout_p))


def _magnitudes(q, k, v, do, scale, dtype, allowed, weight):
    """The formulas on absolute values, and the largest score. Probabilities too small for float32 are lost whole, those
    too small for float16 in part."""
    group, key_heads = q.shape[1] // k.shape[1], k.shape[1]
    k, v = (t.repeat_interleave(group, dim=1) for t in (k, v))
    scores = q @ k.mT * scale
    p = scores.masked_fill(~allowed, -math.inf).softmax(-1).nan_to_num(0.0)
    p = p + torch.finfo(torch.float32).tiny / torch.finfo(torch.float32).eps + torch.finfo(dtype).tiny
    o = (p * weight) @ v.abs()
    ds = p * (weight * (do.abs() @ v.abs().mT) + (do.abs() * o).sum(-1, keepdim=True))
    over_group = [
        t.unflatten(1, (key_heads, group)).sum(2) for t in (scale * ds.mT @ q.abs(), (p * weight).mT @ do.abs())
    ]
    return [o, scale * ds @ k.abs(), *over_group], scores.abs().max().item()


def _composed(q, k, v, do, scale, allowed, weight):
    """PyTorch's own error: the plain composition in the operands' dtype."""
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in leaves[1:])
    some = allowed.any(-1, keepdim=True)
    p = (leaves[0] @ k.mT * scale).masked_fill(~(allowed | ~some), -math.inf).softmax(-1)
    o = torch.where(some, (p * weight.to(q.dtype)) @ v, 0.0)
    o.backward(do)
    return [o, *(leaf.grad for leaf in leaves)]
