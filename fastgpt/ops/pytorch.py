"""Every function of fastgpt.ops in plain PyTorch: what runs where Triton can't.

Arguments have been checked by fastgpt.ops. `B` batch, `T` time, `C` channels, `H` heads, `D` head dim, `F` hidden,
`V` vocabulary. Whatever PyTorch has is PyTorch's own; in float64 these functions are what the kernels are judged by.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from fastgpt.ops import loss
from fastgpt.ops.cpu import logits, mlp

# The site of the dropout counter: equal seeds in two functions must not give equal masks. As in kernels/.
ATTENTION_SITE, RESIDUAL_SITE, EMBEDDING_SITE = 0, 1, 2
_SMALLEST_BLOCK = 64  # queries of a windowed attention at once; fewer would be many small products


def layer_norm(x, weight, bias=None, eps=1e-5):
    """(..., C) -> (..., C) in x's dtype."""
    if x.dtype in (torch.float32, torch.float64):  # a half has not so many digits
        # PyTorch's kernels lose |mean| / sigma digits; a constant taken off first changes neither value nor derivative.
        x = x - x.detach().mean(-1, keepdim=True)
    return uncentred_layer_norm(x, weight, bias, eps)


def uncentred_layer_norm(x, weight, bias=None, eps=1e-5):
    """layer_norm by PyTorch's kernel alone: off by |mean| / sigma roundings, which is what x is off by itself where it
    is a rounded sum."""
    dtype = x.dtype
    if weight.dtype != dtype or (bias is not None and bias.dtype != dtype):
        float32 = weight.dtype == torch.float32 == (weight if bias is None else bias).dtype
        if x.device.type != "cpu" or dtype == torch.float64 or not float32:  # a CPU mixes a half with float32
            dtype = torch.promote_types(dtype, weight.dtype)
            weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    return _in(x.dtype, F.layer_norm(_in(dtype, x), x.shape[-1:], weight, bias, eps))


def _in(dtype, x):
    """x.to(dtype), which takes a microsecond even where there is nothing to do."""
    return x if x.dtype == dtype else x.to(dtype)


def add_layer_norm(
    x, residual, weight, bias=None, eps=1e-5, *, x_bias=None, residual_dtype=None, dropout_p=0.0, seed=None
):
    """s = residual + dropout(x + x_bias) -> LayerNorm(s) in x's dtype, s in residual_dtype; both (..., C)."""
    total = residual + _dropout_rows(x if x_bias is None else x + _in(x.dtype, x_bias), dropout_p, seed, RESIDUAL_SITE)
    total = _in(residual.dtype if residual_dtype is None else residual_dtype, total)
    return _in(x.dtype, layer_norm(total, weight, bias, eps)), total


def causal_attention(q, k, v, *, scale=None, dropout_p=0.0, seed=None, key_mask=None, documents=None, window=None):
    """(B, H, T, D) -> (B, H, T, D): softmax(scale q kᵀ) v, each query over the keys up to its own place.

    Without masks and explicit seeds this is scaled_dot_product_attention's own causal form; with them a (Tq, Tk) mask
    is built, and with a seed the probabilities too; of a window both are of blocks of queries and what those see.
    """
    queries, keys = q.shape[-2], k.shape[-2]
    group = int(q.shape[1] // k.shape[1])  # asked here: a trace has a tensor, and a compiler no number of it in blocks
    explicit_dropout = dropout_p > 0 and seed is not None
    if window is not None and q.numel() > 0:
        blocks = Blocks(queries, keys, window)
        rows = blocks.of_queries(q), blocks.of_keys(k), blocks.of_keys(v)
        allowed = blocks.allowed(len(q), q.device)
        ids = None if documents is None else (blocks.of_queries(documents, 1), blocks.of_keys(documents, 1))
        mask = None if key_mask is None else blocks.of_keys(key_mask, 1)
        keep = blocks.keep(seed, dropout_p, q.shape[:2], q.device) if explicit_dropout else None
        return blocks.joined(_hiding(*rows, group, allowed, mask, ids, scale, dropout_p, keep, broken=True), len(q))
    if queries == keys and key_mask is None and documents is None and not explicit_dropout:
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=True, dropout_p=dropout_p, scale=scale, enable_gqa=group > 1
        )

    offset = keys - queries  # causal is aligned at the end: the last query sees every key
    allowed = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(offset)
    ids = None if documents is None else (documents, documents)
    shape = (*q.shape[:3], keys)
    keep = dropout_mask(seed, dropout_p, shape, ATTENTION_SITE, q.device) if explicit_dropout else None
    return _hiding(q, k, v, group, allowed, key_mask, ids, scale, dropout_p, keep, broken=documents is not None)


def _hiding(q, k, v, group, allowed, key_mask, ids, scale, dropout_p, keep, broken):
    """Attention where `allowed`, of keys that key_mask (B, Tk) leaves and of equal ids, (B, Tq) and (B, Tk).

    group: query heads a key head. broken: whether a key that holds NaN or an infinity may be one that a query must not
    see. It is multiplied by zero, which NaN survives: such keys are read as zeros, and what sees one is NaN.
    """
    if key_mask is not None:
        k = k.masked_fill(~key_mask[:, None, :, None], 0)  # 0 times NaN would be NaN
        v = v.masked_fill(~key_mask[:, None, :, None], 0)
        allowed = allowed & key_mask[:, None, None, :]
    if ids is not None:
        allowed = allowed & (ids[0][:, None, :, None] == ids[1][:, None, None, :])
    if not broken:
        return _masked_attention(q, k, v, group, allowed, scale, dropout_p, keep)
    bad = ~(k.isfinite() & v.isfinite()).all(-1)  # (B, Hkv, Tk)
    k, v = (t.masked_fill(bad[..., None], 0) for t in (k, v))
    poisoned = (allowed[:, 0].float() @ bad.mT.float() > 0).mT[..., None]  # (B, Hkv, Tq, 1)
    poisoned = poisoned.repeat_interleave(group, dim=1)
    return torch.where(poisoned, math.nan, _masked_attention(q, k, v, group, allowed, scale, dropout_p, keep))


class Blocks:
    """Queries in `count` blocks of S, each with the L keys that the windows of its queries reach: a batch of small
    attentions, whose time and memory grow with Tq and not with its square."""

    def __init__(self, queries: int, keys: int, window: int):
        self._queries, self._keys, self._window = queries, keys, window
        self._offset = keys - queries
        # Both are such that a block begins and its keys begin at a multiple of 4, as Philox's columns do.
        self._size = -(-min(max(window, _SMALLEST_BLOCK), queries) // 4) * 4
        self._before = window - 1 + (self._offset - window + 1) % 4  # keys before a block's first query
        self._count = -(-queries // self._size)
        self._spare = self._count * self._size - queries  # queries that are not there

    def of_queries(self, x, axis=2):
        """(B, H, Tq, D) -> (B · count, H, S, D), or with axis 1 (B, Tq) -> (B · count, S)."""
        x = F.pad(x, (0, 0) * (x.dim() - axis - 1) + (0, self._spare)).unflatten(axis, (self._count, self._size))
        return x.transpose(1, axis).flatten(0, 1)

    def of_keys(self, x, axis=2):
        """(B, H, Tk, D) -> (B · count, H, L, D), or with axis 1 (B, Tk) -> (B · count, L)."""
        x = F.pad(x, (0, 0) * (x.dim() - axis - 1) + (self._before - self._offset, self._spare))
        x = x.unfold(axis, self._before + self._size, self._size)
        return x.movedim(axis, 1).flatten(0, 1).movedim(-1, axis)

    def allowed(self, batch, device):
        """(B · count, 1, S, L)."""
        whole: Any = dict(dtype=torch.int64, device=device)
        own, places = torch.arange(self._size, **whole)[:, None], torch.arange(-self._before, self._size, **whole)
        band = (places <= own) & (places > own - self._window)
        there = places >= -self._offset - self._size * torch.arange(self._count, **whole)[:, None]
        return (band & there[:, None]).repeat(batch, 1, 1)[:, None]

    def keep(self, seed, p, planes, device):
        """What dropout keeps, (B · count, H, S, L)."""
        whole: Any = dict(dtype=torch.int64, device=device)
        starts = torch.arange(self._count, **whole) * self._size
        first = torch.div(starts + self._offset - self._before, 4, rounding_mode="floor")
        seen = self._before + self._size
        groups = first[:, None, None, None] + torch.arange(-(-seen // 4), **whole)
        rows = starts[:, None, None, None] + torch.arange(self._size, **whole)[:, None]
        plane = torch.arange(planes[0] * planes[1], **whole).view(planes[0], 1, planes[1], 1, 1)
        return _kept(seed, p, groups, rows, plane, ATTENTION_SITE)[..., :seen].flatten(0, 1)

    def joined(self, x, batch):
        """(B · count, H, S, D) -> (B, H, Tq, D)."""
        return x.unflatten(0, (batch, self._count)).transpose(1, 2).flatten(2, 3)[:, :, : self._queries]


def causal_attention_qkv(
    qkv, heads, *, scale=None, dropout_p=0.0, seed=None, key_mask=None, documents=None, window=None, qkv_bias=None
):
    """The packed projection (B, T, 3C), queries then keys then values, -> heads merged again, (B, T, C)."""
    if qkv_bias is not None:  # zeros with a derivative
        qkv = qkv + _in(qkv.dtype, qkv_bias - qkv_bias.detach())
    batch, time, packed = qkv.shape
    # Split first, so that one cat makes qkv's gradient.
    q, k, v = (t.unflatten(2, (heads, -1)).transpose(1, 2) for t in qkv.split(packed // 3, dim=2))  # (B, H, T, D)
    options = dict(scale=scale, dropout_p=dropout_p, seed=seed, key_mask=key_mask, documents=documents, window=window)
    return causal_attention(q, k, v, **options).transpose(1, 2).reshape(batch, time, packed // 3)


def decode_attention(q, k_cache, v_cache, lengths, *, scale=None, window=None):
    """q (B, H, Tq, D) over the first lengths[b] slots of the caches (B, Hkv, Tmax, D), q's own the last Tq of them."""
    if window is None and _full(q, k_cache, lengths):
        grouped = bool(q.shape[1] != k_cache.shape[1])
        return F.scaled_dot_product_attention(q, k_cache, v_cache, scale=scale, enable_gqa=grouped)
    return decode_masked(q, k_cache, v_cache, lengths, scale=scale, window=window)


def decode_masked(q, k_cache, v_cache, lengths, *, scale=None, window=None):
    """decode_attention, whatever the caches hold."""
    slots = torch.arange(k_cache.shape[-2], dtype=torch.int64, device=q.device)
    steps = torch.arange(q.shape[-2], dtype=torch.int64, device=q.device)
    filled = slots < lengths[:, None]  # (B, Tmax)
    visible_to = lengths[:, None] - q.shape[-2] + steps  # (B, Tq): the last slot that each query sees
    allowed = (slots <= visible_to[..., None])[:, None]  # (B, 1, Tq, Tmax)
    if window is not None:  # the cache may be a ring
        newest = lengths[:, None, None] - 1
        places = newest - (newest - slots) % k_cache.shape[-2]  # (B, 1, Tmax): of what each slot holds
        allowed = (places >= 0) & (places <= visible_to[..., None]) & (places > visible_to[..., None] - window)
        filled, allowed = allowed.any(1), allowed[:, None]
    k = k_cache.masked_fill(~filled[:, None, :, None], 0)
    v = v_cache.masked_fill(~filled[:, None, :, None], 0)
    return _masked_attention(q, k, v, int(q.shape[1] // k.shape[1]), allowed, scale, 0.0, None)


def _full(q, k_cache, lengths) -> bool:
    """Whether one query a row sees every slot, where asking does not wait for a device."""
    if q.device.type != "cpu" or q.shape[-2] != 1 or torch.compiler.is_compiling():
        return False
    return bool((lengths == k_cache.shape[-2]).all())


def _masked_attention(q, k, v, group, allowed, scale, dropout_p, keep):
    """allowed broadcasts to (B, H, Tq, Tk). keep: what dropout with a seed keeps, or None. A query that may see nothing
    gives zeros, and zero gradients."""
    sees_something = allowed.any(-1, keepdim=True)
    allowed = allowed | ~sees_something  # softmax needs a key; the row is zeroed below
    if keep is None:
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=allowed, dropout_p=dropout_p, scale=scale, enable_gqa=group > 1
        )
    else:
        if group > 1:
            k, v = (t.repeat_interleave(group, dim=1) for t in (k, v))
        scores = (q @ k.transpose(-1, -2)) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
        probabilities = scores.masked_fill(~allowed, -math.inf).softmax(-1)
        out = _apply_mask(probabilities, keep, dropout_p) @ v
    return torch.where(sees_something, out, 0)


def gelu_mlp(x, w_in, b_in, w_out, b_out=None, *, approximate="tanh", recompute=False):
    """(..., C) -> (..., C) through the hidden (..., F). recompute keeps only the pre-activation for the backward."""
    operands = [x, w_in, b_in, w_out, b_out]
    form = mlp_form(operands, recompute)
    if form == "differentiated in place":
        if torch.is_autocast_enabled("cpu") and x.dtype != torch.float64:  # whose casts inside would have no derivative
            dtype = torch.get_autocast_dtype("cpu")
            operands = [None if t is None else _in(dtype, t) for t in operands]
        return mlp.GeluMlp.apply(*operands, approximate)
    gelu = mlp.gelu if form == "without a derivative" else F.gelu

    def second_half(hidden):
        return linear(gelu(hidden, approximate=approximate), w_out, b_out)

    hidden = linear(x, w_in, b_in)
    return (
        checkpoint(second_half, hidden, use_reentrant=False, preserve_rng_state=False)
        if form == "recomputed"
        else second_half(hidden)
    )


def mlp_form(operands, recompute) -> str:
    """The form that gelu_mlp takes: on a CPU "differentiated in place" or "without a derivative", elsewhere "plain";
    "recomputed" on either."""
    eager_cpu = operands[0].device.type == "cpu" and not torch.compiler.is_compiling()
    differentiable = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in operands)
    if eager_cpu and not differentiable:
        return "without a derivative"
    if recompute:
        return "recomputed"
    return "differentiated in place" if eager_cpu else "plain"


def linear(x, weight, bias=None):
    """x weightᵀ + bias: (..., K), (N, K), (N,) -> (..., N).

    One row of bfloat16 on a CPU with AVX-512 is multiplied as a vector: that reads the weights at 25 GB/s, PyTorch's
    product of matrices at 17 (Xeon with AMX, 2 cores, PyTorch 2.13; without AVX-512 it would be 2 to 12).
    """
    one_row = x.numel() == x.shape[-1] and x.dtype == torch.bfloat16
    if one_row and AVX512 and x.is_cpu and weight.dtype == x.dtype and weight.stride(0) == x.shape[-1]:
        y = torch.mv(weight, x.reshape(-1)).view(*x.shape[:-1], -1)
        return y if bias is None else y + bias
    return F.linear(x, weight, bias)


AVX512 = torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def embedding(ids, token_weight, position_weight, positions=None, *, dropout_p=0.0, seed=None, dtype=None):
    """ids (B, T) -> token_weight[ids] + position_weight[positions], (B, T, C); positions count from 0 if not given."""
    places = position_weight[: ids.shape[-1]] if positions is None else F.embedding(positions, position_weight)
    total = F.embedding(ids, token_weight) + places
    return _dropout_rows(total if dtype is None else total.to(dtype), dropout_p, seed, EMBEDDING_SITE)


def linear_cross_entropy(x, weight, targets, *, ignore_index=-100, reduction="mean", label_smoothing=0.0, z_loss=0.0):
    """Cross entropy of x @ weightᵀ against targets without ever holding all of the logits.

    x (..., C), weight (V, C), targets (...) -> a scalar, or (...) for reduction "none". A target out of range makes
    its loss NaN and reads nothing. The mean over no target at all is NaN, as PyTorch's, with zero gradients.
    """
    return loss.linear_cross_entropy(
        x,
        weight,
        targets,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        chunked_losses=logits.chunked_losses,
    )


def _dropout_rows(x, p, seed, site):
    """Dropout of x (..., C), whose rows are numbered in order: torch's own without a seed."""
    if p == 0:
        return x
    if seed is None:
        return F.dropout(x, p)
    return _apply_mask(
        x, dropout_mask(seed, p, (1, 1, x.numel() // x.shape[-1], x.shape[-1]), site, x.device).view(x.shape), p
    )


def _apply_mask(x, keep, p):
    return torch.where(keep, x * (0.0 if p == 1 else 1 / (1 - p)), 0.0)


def dropout_mask(seed, p, shape, site, device):
    """True where dropout with this seed keeps an element of (B, H, rows, cols); the twin of kernels/philox.py.

    seed: an int, or an int64 tensor of one element (never read by the host). Element (b, h, row, col) takes word
    col % 4 of the counter (col // 4, row, b * H + h, site) and is kept where that word reaches floor(p * 2**32).
    """
    batch, heads, rows, cols = shape
    whole: Any = dict(dtype=torch.int64, device=device)
    planes = torch.arange(batch * heads, **whole)[:, None, None]
    kept = _kept(seed, p, torch.arange((cols + 3) // 4, **whole), torch.arange(rows, **whole)[:, None], planes, site)
    return kept[..., :cols].view(shape)


def _kept(seed, p, groups, rows, planes, site):
    """dropout_mask of the four columns of each group, by planes b * H + h: they broadcast to (…, G) -> (…, 4 G)."""
    whole: Any = dict(dtype=torch.int64, device=groups.device)
    words = _philox(
        groups,
        rows,
        planes,
        torch.full((), site, **whole),  # filled on the device: a copy from the host would wait for it
        seed.reshape(()) if isinstance(seed, torch.Tensor) else torch.full((), seed, **whole),
    )
    return torch.stack(words, dim=-1).flatten(-2) >= int(p * 2**32)


def _philox(c0, c1, c2, c3, seed):
    """Four tensors of 32-bit words, held in int64: products wrap at 2**64, whose upper word a masked shift recovers."""
    low = 0xFFFFFFFF
    c0, c1, c2, c3 = torch.broadcast_tensors(c0, c1, c2, c3)
    k0, k1 = seed & low, (seed >> 32) & low
    for _ in range(10):
        p0, p2 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = ((p2 >> 32) & low) ^ c1 ^ k0, p2 & low, ((p0 >> 32) & low) ^ c3 ^ k1, p0 & low
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return c0, c1, c2, c3
