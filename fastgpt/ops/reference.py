"""The naive reference: each function of fastgpt.ops as a textbook prints it, and nothing in it is optimised.

What the kernels and the fallback are compared with, in float64 as a rule. In another dtype it shows what plain PyTorch
loses to rounding there: linear layers and attention in that dtype, statistics and elementwise functions of half
precision in float32. It shares no line with what it judges: only verify, testing, bench and tests import it.

Names, signatures and shapes are those of fastgpt.ops, without `backend`, on any device; autograd differentiates them.
Arguments are taken to be right, and dropout needs a seed.
"""

import math

import numpy
import torch

ATTENTION_SITE, RESIDUAL_SITE, EMBEDDING_SITE = 0, 1, 2  # so that one seed drops other elements in each function


def layer_norm(x, weight, bias=None, eps=1e-5):
    """(x - mean) / sqrt(variance + eps) * weight + bias, over the last axis."""
    centred = wide(x) - wide(x).mean(-1, keepdim=True)
    variance = centred.square().mean(-1, keepdim=True)
    normed = centred / (variance + eps).sqrt() * weight
    return (normed if bias is None else normed + bias).to(x.dtype)


def add_layer_norm(
    x, residual, weight, bias=None, eps=1e-5, *, x_bias=None, residual_dtype=None, dropout_p=0.0, seed=None
):
    """total = residual + dropout(x + x_bias) -> (the layer_norm of total, total)."""
    branch = _dropout_of_rows(x if x_bias is None else x + x_bias, dropout_p, seed, RESIDUAL_SITE)
    total = (residual + branch).to(residual.dtype if residual_dtype is None else residual_dtype)
    return layer_norm(total, weight, bias, eps).to(x.dtype), total


def causal_attention(q, k, v, *, scale=None, dropout_p=0.0, seed=None, key_mask=None, documents=None, window=None):
    """softmax(scale q kᵀ) v over the keys up to the query's own place, or the last `window` of them; the last query
    sits at the last key.

    A key that key_mask hides may be NaN; one of another document makes the result NaN, which ops does not allow.
    """
    return _attention(q, k, v, visible(q, k, key_mask, documents, window), scale, dropout_p, seed)


def visible(q, k, key_mask=None, documents=None, window=None):
    """Whether each query sees each key; broadcasts to (B, H, Tq, Tk)."""
    places = torch.arange(k.shape[2], dtype=torch.int64, device=q.device)
    own = places[k.shape[2] - q.shape[2] :, None]
    allowed = (places <= own)[None, None]
    if window is not None:
        allowed = allowed & (own - places < window)
    if key_mask is not None:
        allowed = allowed & key_mask[:, None, None, :]
    if documents is not None:
        allowed = allowed & (documents[:, None, :, None] == documents[:, None, None, :])
    return allowed


def causal_attention_qkv(
    qkv, heads, *, scale=None, dropout_p=0.0, seed=None, key_mask=None, documents=None, window=None, qkv_bias=None
):
    """causal_attention of queries, keys and values packed side by side, (B, T, 3C) -> (B, T, C). qkv_bias is in qkv
    already, as a constant."""
    if qkv_bias is not None:
        qkv = qkv + (qkv_bias - qkv_bias.detach()).to(qkv.dtype)
    q, k, v = (t.unflatten(2, (heads, -1)).transpose(1, 2) for t in qkv.chunk(3, dim=2))
    options = dict(scale=scale, dropout_p=dropout_p, seed=seed, key_mask=key_mask, documents=documents, window=window)
    return causal_attention(q, k, v, **options).transpose(1, 2).flatten(2)


def decode_attention(q, k_cache, v_cache, lengths, *, scale=None, window=None):
    """Attention over the first lengths[b] slots of the caches; q are the last tokens of them. Of more tokens than slots
    each lies in the slot of its place modulo their number, over an older one."""
    slots, steps = (torch.arange(n, dtype=torch.int64, device=q.device) for n in (k_cache.shape[2], q.shape[2]))
    own = lengths[:, None] - q.shape[2] + steps  # (B, Tq): each query's slot
    newest = lengths[:, None, None] - 1
    places = newest - (newest - slots) % k_cache.shape[2]  # (B, 1, Tmax): of what each slot holds, negative if nothing
    allowed = (places >= 0) & (places <= own[..., None])
    if window is not None:
        allowed = allowed & (own[..., None] - places < window)
    return _attention(q, k_cache, v_cache, allowed[:, None], scale, 0.0, None)


def gelu_mlp(x, w_in, b_in, w_out, b_out=None, *, approximate="tanh", recompute=False):
    """gelu(x w_inᵀ + b_in) w_outᵀ + b_out; recompute changes nothing here."""
    return linear(gelu(linear(x, w_in, b_in), approximate), w_out, b_out)


def linear_cross_entropy(x, weight, targets, *, ignore_index=-100, reduction="mean", label_smoothing=0.0, z_loss=0.0):
    """-Σ p log softmax(x weightᵀ) + z_loss · logsumexp², where p is 1 - label_smoothing at the target, and
    label_smoothing shared out evenly over the vocabulary."""
    logits = wide(linear(x, weight))
    at_target = (targets[..., None] == torch.arange(len(weight), dtype=torch.int64, device=x.device)).to(logits.dtype)
    p = (1 - label_smoothing) * at_target + label_smoothing / len(weight)
    losses = -(p * logits.log_softmax(-1)).sum(-1) + z_loss * logits.logsumexp(-1) ** 2
    counted = targets != ignore_index
    losses = losses.masked_fill(~counted, 0)
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / counted.sum()


def embedding(ids, token_weight, position_weight, positions=None, *, dropout_p=0.0, seed=None, dtype=None):
    """dropout(token_weight[ids] + position_weight[positions]); positions are 0, 1, … if None."""
    if positions is None:
        positions = torch.arange(ids.shape[1], dtype=torch.int64, device=ids.device)
    total = token_weight[ids] + position_weight[positions]
    return _dropout_of_rows(total if dtype is None else total.to(dtype), dropout_p, seed, EMBEDDING_SITE)


def linear(x, weight, bias=None):
    """x weightᵀ + bias."""
    return x @ weight.mT if bias is None else x @ weight.mT + bias


def gelu(x, approximate):
    """x Φ(x), Φ being the normal distribution's; or "tanh", GPT-2's formula for about the same."""
    y = wide(x)
    inside = math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)
    share = torch.tanh(inside) if approximate == "tanh" else torch.erf(y / math.sqrt(2))
    return (0.5 * y * (1 + share)).to(x.dtype)


def wide(x):
    """In float32 if it is in half precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _attention(q, k, v, allowed, scale, dropout_p, seed):
    """allowed broadcasts to (B, H, Tq, Tk). A query that sees no key gives zeros."""
    unseen = ~allowed.any(2)[..., None]  # such keys may be NaN, and 0 · NaN is NaN
    k, v = (t.masked_fill(unseen, 0).repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
    scores = q @ k.mT * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    weights = scores.masked_fill(~allowed, -math.inf).softmax(-1).masked_fill(~allowed, 0)
    return _dropout(weights, dropout_p, seed, ATTENTION_SITE) @ v


def _dropout_of_rows(x, p, seed, site):
    return _dropout(x.reshape(1, 1, -1, x.shape[-1]), p, seed, site).view(x.shape)


def _dropout(x, p, seed, site):
    """x (B, H, rows, cols) / (1 - p) where it is kept, else 0."""
    return x if p == 0 else torch.where(keep_mask(seed, p, x.shape, site).to(x.device), x / (1 - p if p < 1 else 1), 0)


def keep_mask(seed, p, shape, site):
    """What dropout keeps of (B, H, rows, cols): element (b, h, row, col) where word col % 4 of Philox, of the counter
    (col // 4, row, b · H + h, site) and the key `seed`, reaches floor(p · 2**32)."""
    plane, row, col = numpy.indices((shape[0] * shape[1], *shape[2:]), dtype=numpy.uint64)
    words = philox((col // 4, row, plane, numpy.full_like(col, site)), int(seed))
    chosen = numpy.choose((col % 4).astype(int), words)
    return torch.from_numpy(chosen >= int(p * 2**32)).view(shape)


def philox(counter, seed):
    """Philox 4x32-10, the random words of a counter (four arrays of uint64) and a 64-bit key, each below 2**32. Source:
    Salmon, Moraes, Dror, Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3", 2011, section 3.3."""
    a, b, c, d = counter
    low, high = seed % 2**32, seed // 2**32 % 2**32
    for _ in range(10):
        first, second = a * numpy.uint64(0xD2511F53), c * numpy.uint64(0xCD9E8D57)
        a, b = second // 2**32 ^ b ^ numpy.uint64(low), second % 2**32
        c, d = first // 2**32 ^ d ^ numpy.uint64(high), first % 2**32
        low, high = (low + 0x9E3779B9) % 2**32, (high + 0xBB67AE85) % 2**32
    return a, b, c, d
