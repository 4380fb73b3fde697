"""What attention's tests share: operands, and how their four results are held to the naive reference."""

import math

import torch

from fastgpt import ops
from fastgpt.ops import reference
from fastgpt.testing import assert_accurate

NAMES = ("o", "dq", "dk", "dv")


def operands(batch, heads, queries, keys, dim, dtype, device, scale=1.0, key_heads=None):
    """q, k, v and the gradient of o."""
    shapes = ((heads, queries), (key_heads or heads, keys), (key_heads or heads, keys), (heads, queries))
    tensors = [torch.randn(batch, h, length, dim, dtype=torch.float64) for h, length in shapes]
    return [(t * s).to(device, dtype) for t, s in zip(tensors, (scale, scale, 1.0, 1.0), strict=True)]


def run(q, k, v, do, function=ops.causal_attention, **options):
    """o and the gradients of q, k, v, for leaves of these values and strides."""
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    o = function(*leaves, **options)
    o.backward(do)
    return [o, *(leaf.grad for leaf in leaves)]


def check(tensors, backend="triton", **options):
    """A backend's four results for these operands, each within assert_accurate's limits. Returns them."""
    results = run(*tensors, backend=backend, **options)
    wide = [t.double() for t in tensors]
    expected = run(*wide, reference.causal_attention, **options)
    theirs = run(*tensors, reference.causal_attention, **options)
    sizes, largest = magnitudes(*wide, tensors[0].dtype, **options)
    for name, got, exact, their, size in zip(NAMES, results, expected, theirs, sizes, strict=True):
        assert_accurate(got, exact, their, size, logit_max=largest, name=name)
    return results


def magnitudes(q, k, v, do, dtype, scale=None, dropout_p=0.0, seed=None, **masks):
    """The formulas on absolute values, and the largest score. Probabilities too small for float32 are lost whole, those
    too small for float16 in part."""
    group, key_heads = q.shape[1] // k.shape[1], k.shape[1]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    k, v = (t.repeat_interleave(group, dim=1) for t in (k, v))
    scores, allowed = q @ k.mT * scale, reference.visible(q, k, **masks)
    p = scores.masked_fill(~allowed, -math.inf).softmax(-1).nan_to_num(0.0)
    p = p + torch.finfo(torch.float32).tiny / torch.finfo(torch.float32).eps + torch.finfo(dtype).tiny
    weight = torch.ones((), device=q.device)
    if dropout_p:
        keep = reference.keep_mask(seed, dropout_p, p.shape, reference.ATTENTION_SITE).to(q.device)
        weight = keep * (0.0 if dropout_p == 1 else 1 / (1 - dropout_p))
    o = (p * weight) @ v.abs()
    ds = p * (weight * (do.abs() @ v.abs().mT) + (do.abs() * o).sum(-1, keepdim=True))
    over_group = [
        t.unflatten(1, (key_heads, group)).sum(2) for t in (scale * ds.mT @ q.abs(), (p * weight).mT @ do.abs())
    ]
    return [o, scale * ds @ k.abs(), *over_group], scores.abs().max().item()
