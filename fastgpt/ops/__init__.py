"""The public functions: each checks its arguments once, chooses Triton or PyTorch, and calls its twin there.

`B` batch, `T` time, `C` channels, `H` heads, `D` head dim, `F` MLP hidden, `V` vocabulary; (…) is any leading shape.
Wrong dtypes raise TypeError, wrong shapes and values ValueError, the same on both backends and before any work is done.

Every function takes `backend`: "auto" runs the Triton kernels where they can serve and PyTorch elsewhere, "torch" is
always PyTorch, "triton" raises a ValueError that names what the kernels can't do. `explain` tells which and why.

Dropout takes p in [0, 1]. With an explicit `seed` (an int, or an int64 tensor of one element on the same device, so
that a CUDA graph can advance it) both backends drop the same elements; with None, torch.manual_seed repeats each.
"""

from typing import Literal

import torch
from torch import Tensor

from fastgpt.ops import checks
from fastgpt.ops import fp8 as eight_bits
from fastgpt.ops.choice import (
    Backend,
    autograd,
    backend_for,
    backend_in_words,
    decoding_steps,
    explain,
    explain_token,
    fp8_obstacle,
    fp8_producers,
    interpreted,
    kernels_run_on,
    no_triton,
)
from fastgpt.ops.decoding import OnPyTorch as DecodingSteps
from fastgpt.ops.transforms import watcher

__all__ = [
    "FUNCTIONS",
    "Backend",
    "DecodingSteps",
    "add_layer_norm",
    "autograd",
    "backend_in_words",
    "causal_attention",
    "causal_attention_qkv",
    "decode_attention",
    "decoding_steps",
    "document_ids",
    "eight_bits",
    "embedding",
    "explain",
    "explain_token",
    "fp8_obstacle",
    "fp8_producers",
    "gelu_mlp",
    "interpreted",
    "kernels_run_on",
    "layer_norm",
    "linear_cross_entropy",
    "no_triton",
    "watcher",
]


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5, *, backend: Backend = "auto"
) -> Tensor:
    """LayerNorm over the last axis: (…, C) -> (…, C) in x's dtype, statistics in float32.

    weight, bias: (C,), in any floating dtype. Source: Ba, Kiros, Hinton, "Layer Normalization", 2016, section 3.
    """
    checks.norm("layer_norm", x, weight, bias, eps)
    return backend_for("layer_norm", backend, x).layer_norm(x, weight, bias, eps)


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    x_bias: Tensor | None = None,
    residual_dtype: torch.dtype | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """new_residual = residual + dropout(x + x_bias), then LayerNorm of it: returns (normed, new_residual).

    x, residual: (…, C), the branch and the stream it is added to. x_bias: (C,), the bias that the linear layer
    before left out. normed has x's dtype; new_residual has residual_dtype, or residual's own, and is rounded to it
    before it is normalised.
    """
    name = "add_layer_norm"
    checks.norm(name, x, weight, bias, eps)
    checks.floats(name, x=x, residual=residual, x_bias=x_bias)
    checks.shape(name, "residual", residual, x.shape)
    checks.shape(name, "x_bias", x_bias, x.shape[-1:])
    if residual_dtype is not None and residual_dtype not in checks.FLOATS:
        raise TypeError(f"{name}: residual_dtype is {residual_dtype}, not one of {checks.names(checks.FLOATS)}")
    checks.dropout(name, dropout_p, seed, x.device)
    return backend_for(name, backend, x).add_layer_norm(
        x, residual, weight, bias, eps, x_bias=x_bias, residual_dtype=residual_dtype, dropout_p=dropout_p, seed=seed
    )


def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    key_mask: Tensor | None = None,
    documents: Tensor | None = None,
    window: int | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Softmax(scale q kᵀ) v, each query over the keys up to its own place: (B, H, Tq, D) -> (B, H, Tq, D).

    k, v: (B, Hkv, Tk, D), where Hkv divides H (grouped heads) and Tq <= Tk: the last query sits at the last key.
    scale: 1 / sqrt(D) if None. key_mask: (B, Tk) bool, False hides a key (padding on either side). documents: (B, T)
    integers, a query sees only keys of its own document; numbered in order they cost least (`document_ids` makes them
    from cu_seqlens). window: a query sees the last `window` keys up to its own place, itself included; the time and
    memory of what lies before is not spent. FlashAttention's window_size=(left, 0) is a window of left + 1.
    A query that sees no key gives zeros and zero gradients. What a query does not see changes no bit of its result, NaN
    in hidden keys and other documents included. One exception: NaN or infinity in the value of a key that is later, or
    before the window, may reach it, as in PyTorch, where zero times it is a term of the sum.
    Sources: Vaswani et al., "Attention Is All You Need", 2017, section 3.2.1; of the window: Beltagy, Peters, Cohan,
    "Longformer: The Long-Document Transformer", 2020, section 3.1.
    """
    name = "causal_attention"
    checks.heads(name, q=q, k=k, v=v)
    if q.shape[2] > k.shape[2]:
        raise ValueError(
            f"{name}: {q.shape[2]} queries but only {k.shape[2]} keys; the last query sits at the last key"
        )
    asked = scale, dropout_p, seed, key_mask, documents, window
    options = checks.attention_options(name, q.shape, k.shape[2], q.device, *asked)
    return backend_for(name, backend, q).causal_attention(q, k, v, seed=seed, **options)


def causal_attention_qkv(
    qkv: Tensor,
    heads: int,
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    key_mask: Tensor | None = None,
    documents: Tensor | None = None,
    window: int | None = None,
    qkv_bias: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """causal_attention of a packed projection: queries, keys, values (B, T, 3C) -> heads merged again, (B, T, C).

    qkv_bias: (3C,), a bias that is in qkv already, added as a constant (`F.linear(x, weight, bias.detach())`); its
    gradient, the sum of qkv's over all tokens, is made here, by the kernels that make qkv's.
    """
    name = "causal_attention_qkv"
    checks.floats(name, qkv=qkv, qkv_bias=qkv_bias)
    if qkv.dim() != 3 or qkv.shape[2] % 3:
        raise ValueError(f"{name}: qkv has shape {tuple(qkv.shape)}, not (B, T, 3C)")
    checks.shape(name, "qkv_bias", qkv_bias, qkv.shape[2:])
    batch, time, packed = qkv.shape
    if not isinstance(heads, int) or heads < 1 or (packed // 3) % heads or packed == 0:
        raise ValueError(f"{name}: {packed // 3} channels do not divide into {heads} heads")
    shape = (batch, heads, time, packed // 3 // heads)
    asked = scale, dropout_p, seed, key_mask, documents, window
    options = checks.attention_options(name, shape, time, qkv.device, *asked) | dict(qkv_bias=qkv_bias)
    return backend_for(name, backend, qkv, heads=heads).causal_attention_qkv(qkv, heads, seed=seed, **options)


def document_ids(cu_seqlens: Tensor, time: int) -> Tensor:
    """The `documents` of one packed row of `time` tokens from its cumulative lengths: (N + 1,) -> (1, time) int32.

    cu_seqlens: int32 or int64, as variable-length attention takes them elsewhere: document i fills the places from
    cu_seqlens[i] up to cu_seqlens[i + 1]. What lies before the first or after the last is a document of its own. Made
    once it serves every layer; nothing waits for the device, so a CUDA graph can hold it. On a CPU lengths that
    decrease or pass `time` are a ValueError.
    """
    name = "document_ids"
    checks.integers(name, getattr(cu_seqlens, "device", None), cu_seqlens=cu_seqlens)
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() == 0:
        raise ValueError(f"{name}: cu_seqlens has shape {tuple(cu_seqlens.shape)}, not (N + 1,)")
    checks.cumulative(name, cu_seqlens, time)
    places = torch.arange(time, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens, places, right=True, out_int32=True)[None]


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Attention of the newest 1 to 16 tokens over a preallocated cache: (B, H, Tq, D) -> (B, H, Tq, D).

    k_cache, v_cache: (B, Hkv, Tmax, D), where Hkv divides H. lengths: (B,) int32 or int64, the filled slots of each
    row with q's own tokens, which are the last Tq of them, counted in. Slots past a row's length are never read into
    the result, whatever they hold. window: as in causal_attention. With one, a cache of
    window + Tq - 1 slots or more may be a ring: the token at place p lies in slot p % Tmax, and lengths may pass Tmax.
    A length out of range is a ValueError on a CPU; elsewhere one past Tmax that no ring allows counts as
    Tmax. Only the fallback has a derivative, so "auto" takes it where one is required.
    """
    name = "decode_attention"
    checks.heads(name, q=q, k_cache=k_cache, v_cache=v_cache)
    if not 1 <= q.shape[2] <= 16:
        raise ValueError(f"{name}: {q.shape[2]} new tokens; from 1 to 16 are decoded at once")
    checks.attention_scale(name, scale)
    checks.integers(name, q.device, lengths=lengths)
    checks.shape(name, "lengths", lengths, q.shape[:1])
    steps, slots = q.shape[2], k_cache.shape[2]
    window = checks.window(name, window, slots + (steps == 1))  # one of all slots may go round
    ring = window is not None and window + steps - 1 <= slots
    checks.in_range(name, "length", lengths, 2**31 - 1 if ring else slots + 1, f"a cache of {slots} slots")
    return backend_for(name, backend, q, k_cache=k_cache, v_cache=v_cache).decode_attention(
        q, k_cache, v_cache, lengths, scale=scale, window=window
    )


def gelu_mlp(
    x: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None = None,
    *,
    approximate: Literal["tanh", "none"] = "tanh",
    recompute: bool = False,
    backend: Backend = "auto",
) -> Tensor:
    """gelu(x w_inᵀ + b_in) w_outᵀ + b_out: (…, C) -> (…, C) through F hidden units.

    w_in: (F, C) and b_in: (F,); w_out: (C, F) and b_out: (C,); strides are free, so a transposed Conv1D weight needs
    no copy. approximate: "tanh" is GPT-2's GELU, "none" the exact one. recompute saves only what goes into the GELU
    and computes it again in the backward. Source: Hendrycks, Gimpel, "Gaussian Error Linear Units", 2016.
    """
    name = "gelu_mlp"
    checks.floats(name, x=x, w_in=w_in, b_in=b_in, w_out=w_out, b_out=b_out)
    checks.one_dtype(name, x=x, w_in=w_in, b_in=b_in, w_out=w_out, b_out=b_out)
    checks.columns(name, x)
    if w_in.dim() != 2 or w_in.shape[1] != x.shape[-1]:
        raise ValueError(f"{name}: w_in has shape {tuple(w_in.shape)}, not (F, {x.shape[-1]})")
    checks.shape(name, "b_in", b_in, w_in.shape[:1])
    checks.shape(name, "w_out", w_out, (x.shape[-1], w_in.shape[0]))
    checks.shape(name, "b_out", b_out, x.shape[-1:])
    if approximate not in ("tanh", "none"):
        raise ValueError(f"{name}: approximate is {approximate!r}, not 'tanh' or 'none'")
    return backend_for(name, backend, x).gelu_mlp(
        x, w_in, b_in, w_out, b_out, approximate=approximate, recompute=recompute
    )


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    reduction: Literal["mean", "sum", "none"] = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    backend: Backend = "auto",
) -> Tensor:
    """Cross entropy of the logits x weightᵀ, in nats, without ever holding all of them; the loss is float32.

    x: (…, C), weight: (V, C), targets: (…) int32 or int64 -> a scalar, or (…) for reduction "none", which computes
    logits a second time in the backward. z_loss adds z_loss · logsumexp² a row. Beside the gradients it takes about a
    twelfth of the memory of the logits (on Triton 256 rows of them at least, and a padded copy of the weight). A
    target out of range is a ValueError on a CPU;
    elsewhere, where a check would wait for the device, its loss is NaN. The mean over no target is NaN,
    its gradients are 0.
    """
    name = "linear_cross_entropy"
    checks.floats(name, x=x, weight=weight)
    checks.gathered(name, x=x, weight=weight)
    checks.one_dtype(name, x=x, weight=weight)
    checks.columns(name, x)
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1] or weight.shape[0] == 0:
        raise ValueError(f"{name}: weight has shape {tuple(weight.shape)}, not (V, {x.shape[-1]}) with V at least 1")
    checks.integers(name, x.device, targets=targets)
    checks.shape(name, "targets", targets, x.shape[:-1])
    checks.loss(name, reduction, label_smoothing, z_loss)
    checks.in_range(name, "target", targets, weight.shape[0], f"a vocabulary of {weight.shape[0]}", ignore_index)
    return backend_for(name, backend, x).linear_cross_entropy(
        x,
        weight,
        targets,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
    )


def embedding(
    ids: Tensor,
    token_weight: Tensor,
    position_weight: Tensor,
    positions: Tensor | None = None,
    *,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    dtype: torch.dtype | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """dropout(token_weight[ids] + position_weight[positions]): (B, T) -> (B, T, C) in dtype, or the weights' if None.

    ids, positions: int32 or int64; positions is (B, T) or (T,), and 0, 1, …, T-1 if None. token_weight: (V, C),
    position_weight: (Tmax, C). Ids out of range are a ValueError on a CPU; elsewhere,
    where a check would wait for the device, the kernel gives NaN for their rows, and they get no gradient.
    """
    name = "embedding"
    checks.integers(name, token_weight.device, ids=ids, positions=positions)
    checks.floats(name, token_weight=token_weight, position_weight=position_weight)
    checks.one_dtype(name, token_weight=token_weight, position_weight=position_weight)
    if ids.dim() != 2:
        raise ValueError(f"{name}: ids has shape {tuple(ids.shape)}, not (B, T)")
    if token_weight.dim() != 2 or position_weight.dim() != 2 or token_weight.shape[1] != position_weight.shape[1]:
        shapes = f"{tuple(token_weight.shape)} and {tuple(position_weight.shape)}"
        raise ValueError(f"{name}: token_weight and position_weight have shapes {shapes}, not (V, C) and (Tmax, C)")
    context = position_weight.shape[0]
    if positions is None and ids.shape[1] > context:
        raise ValueError(f"{name}: {ids.shape[1]} tokens are more than the context of {context}")
    if positions is not None and positions.shape not in (ids.shape, ids.shape[1:]):
        raise ValueError(f"{name}: positions has shape {tuple(positions.shape)}, ids {tuple(ids.shape)}")
    if dtype is not None and dtype not in checks.FLOATS:
        raise TypeError(f"{name}: dtype is {dtype}, not one of {checks.names(checks.FLOATS)}")
    checks.dropout(name, dropout_p, seed, token_weight.device)
    checks.in_range(name, "token", ids, token_weight.shape[0], f"a vocabulary of {token_weight.shape[0]}")
    if positions is not None:
        checks.in_range(name, "position", positions, context, f"a context of {context}")
    return backend_for(name, backend, token_weight).embedding(
        ids, token_weight, position_weight, positions, dropout_p=dropout_p, seed=seed, dtype=dtype
    )


FUNCTIONS = (
    layer_norm,
    add_layer_norm,
    causal_attention,
    causal_attention_qkv,
    decode_attention,
    gelu_mlp,
    linear_cross_entropy,
    embedding,
)
