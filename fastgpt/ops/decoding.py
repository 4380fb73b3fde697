"""The steps of decoding that a Decoder takes at each layer and token, on either backend; ops.decoding hands them out.

Their arguments are not checked: whoever asks for them has checked a model once and calls often. `B` batch, `Tq` new
tokens, `H` heads, `D` head dim, `V` vocabulary; `N K` a linear layer's weight.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt.ops import pytorch
from fastgpt.ops.cpu import mlp
from fastgpt.ops.cpu.linears import Layout


class OnPyTorch:
    """PyTorch's own functions."""

    on_kernels = False

    def layout(self, tokens: int, rows: int) -> Layout:
        """How the linear layers lie of a model that is to write about so many tokens, `rows` at a time."""
        return Layout(tokens, rows, self.on_kernels)

    def embedding(
        self, ids: Tensor, token_weight: Tensor, position_weight: Tensor, positions: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        """ops.embedding of ids (B, Tq) at positions (B, Tq) or (Tq,), or the first ones."""
        return pytorch.embedding(ids, token_weight, position_weight, positions, dtype=dtype)

    def causal_attention(self, qkv: Tensor, heads: int, scale: float | None, window: int | None = None) -> Tensor:
        """ops.causal_attention_qkv: (B, T, 3C) -> (B, T, C). window: None or below T."""
        return pytorch.causal_attention_qkv(qkv, heads, scale=scale, window=window)

    def attend(
        self,
        q: Tensor,
        keys: Tensor,
        values: Tensor,
        lengths: Tensor | None,
        scale: float | None,
        window: int | None = None,
    ) -> Tensor:
        """ops.decode_attention: q (B, H, Tq, D) over the caches (B, H, Tmax, D). lengths: None where the caches are
        full in every row, which only this backend is told."""
        if lengths is not None:
            return pytorch.decode_attention(q, keys, values, lengths, scale=scale, window=window)
        if window is not None:
            reach = window + q.shape[2] - 1
            keys, values = keys[:, :, -reach:], values[:, :, -reach:]
            window = window if window < keys.shape[2] else None
            return pytorch.causal_attention(q, keys, values, scale=scale, window=window)
        if q.shape[2] == 1:  # nothing to be hidden: no mask
            return F.scaled_dot_product_attention(q, keys, values, scale=scale)
        return pytorch.causal_attention(q, keys, values, scale=scale)

    def append(self, qkv: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, ring: bool = False) -> None:
        """The keys and values of the newest tokens, in qkv (B, Tq, 3HD), into the caches (B, H, Tmax, D).

        lengths: (B,), with the new tokens counted in. ring: a token's slot is its place modulo Tmax.
        """
        batch, new, heads = *qkv.shape[:2], keys.shape[1]
        k, v = qkv.view(batch, new, 3, heads, -1)[:, :, 1:].unbind(2)  # (B, Tq, H, D)
        rows = torch.arange(batch, dtype=torch.int64, device=qkv.device)[:, None]
        places = (lengths[:, None] - new) + torch.arange(new, dtype=torch.int64, device=qkv.device)
        if ring:
            places = places % keys.shape[2]
        keys[rows, :, places] = k
        values[rows, :, places] = v

    def fuses(self, width: int, dtype: torch.dtype) -> bool:
        """Whether a layer of that width and dtype may take norm_linear and product."""
        return True

    def fits(self, rows: int, *weights: Tensor) -> bool:
        """Whether so few rows of products with these weights (N, K) are faster by norm_linear and product."""
        return True

    def whole_token(self, layers: list, norm: tuple, tables: tuple, head: Any, heads: int, stream: torch.dtype) -> Any:
        """What gives one sequence's logits in one launch, as ops.token has it, or a str: why nothing does."""
        return "it runs on PyTorch"

    def norm_linear(
        self, x: Tensor, branch: Tensor | None, branch_bias: Tensor | None, norm: Any, linear: Any, gelu: str
    ) -> tuple[Tensor, Tensor]:
        """The sum x + branch + branch_bias (M, K), and its norm (weight, bias, eps) through a linear layer (weight,
        bias) and a GELU, (M, N), in the order (M, N), sum. gelu: "tanh", "none" for the exact one, "" for no GELU."""
        x = _sum(x, branch, branch_bias)
        y = linear(_norm(x, linear.weight.dtype, norm))
        return (_gelu(y, gelu) if gelu else y), x

    def product(self, x: Tensor, linear: Any) -> tuple[Tensor, Tensor | None]:
        """x (M, K) through a linear layer -> (M, N), and the bias that it still lacks."""
        return linear(x), None

    def add_norm(self, x: Tensor, branch: Any, branch_bias: Tensor | None, norm: Any) -> Tensor:
        """The norm of x + branch + branch_bias (M, K), in branch's dtype."""
        return _norm(_sum(x, branch, branch_bias), branch.dtype, norm)


class OnKernels(OnPyTorch):
    """The Triton kernels."""

    on_kernels = True

    def __init__(self, autograd: Any, choose: Callable):
        """autograd: the module of that name, which only ops imports. choose(function's name, operand, **arguments)
        gives the backend's module that serves a call."""
        self._choose = choose
        self._append, self._likeliest = autograd.append_to_cache, autograd.take_likeliest
        self._drawn, self.most_drawn = autograd.take_drawn, autograd.draw.MOST
        self._fits, self._linear, self._norm_linear = autograd.fits_few, autograd.few_linear, autograd.few_norm_linear
        self._add_norm = autograd.add_layer_norm
        self._whole_token = autograd.whole_token
        self._widest: int = autograd.few_rows.MAX_NORMED

    def embedding(
        self, ids: Tensor, token_weight: Tensor, position_weight: Tensor, positions: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        functions = self._choose("embedding", token_weight)
        return functions.embedding(ids, token_weight, position_weight, positions, dtype=dtype)

    def causal_attention(self, qkv: Tensor, heads: int, scale: float | None, window: int | None = None) -> Tensor:
        functions = self._choose("causal_attention_qkv", qkv, heads=heads)
        return functions.causal_attention_qkv(qkv, heads, scale=scale, window=window)

    def attend(
        self,
        q: Tensor,
        keys: Tensor,
        values: Tensor,
        lengths: Any,
        scale: float | None,
        window: int | None = None,
    ) -> Tensor:
        functions = self._choose("decode_attention", q, k_cache=keys, v_cache=values)
        return functions.decode_attention(q, keys, values, lengths, scale=scale, window=window)

    def append(self, qkv: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, ring: bool = False) -> None:
        self._append(qkv, keys, values, lengths, ring)

    def fuses(self, width: int, dtype: torch.dtype) -> bool:
        return width <= self._widest and dtype != torch.float64

    def fits(self, rows: int, *weights: Tensor) -> bool:
        return all(self._fits(rows, weight) for weight in weights)

    def whole_token(self, layers: list, norm: tuple, tables: tuple, head: Any, heads: int, stream: torch.dtype) -> Any:
        return self._whole_token(layers, norm, tables, head, heads, stream)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype | None = None) -> Tensor:
        """x (M, K) -> (M, N), rounded to weight's dtype and given in it or in `dtype`."""
        return self._linear(x, weight, bias, dtype)

    def product(self, x: Tensor, linear: Any) -> tuple[Tensor, Tensor | None]:
        return self._linear(x, linear.weight, None), linear.bias

    def add_norm(self, x: Tensor, branch: Any, branch_bias: Tensor | None, norm: Any) -> Tensor:
        return self._add_norm(branch, x, *norm, x_bias=branch_bias)[0]

    def norm_linear(
        self, x: Tensor, branch: Tensor | None, branch_bias: Tensor | None, norm: Any, linear: Any, gelu: str
    ) -> tuple[Tensor, Tensor]:
        return self._norm_linear(x, branch, branch_bias, *norm, *linear, gelu)

    def take_likeliest(self, logits: Tensor, history: Tensor, lengths: Tensor, news: Tensor, last: Tensor) -> None:
        """The likeliest of (B, V) into history (B, room) at lengths (B,), which grow by one, into last (B, 1), and into
        news (B, ring) at lengths modulo ring, which gets -1 where a logit is not finite."""
        self._likeliest(logits, history, lengths, news, last)

    def take_drawn(
        self, logits: Tensor, clocks: Tensor, filters: tuple[float, float, float], history: Tensor, lengths: Tensor,
        news: Tensor, last: Tensor,
    ) -> None:  # fmt: skip
        """The same, but that it is drawn among the k likeliest, k at most most_drawn, by exponential clocks (B, k).
        filters: temperature, top_p, min_p."""
        self._drawn(logits, clocks, *filters, history, lengths, news, last)


def _sum(x: Tensor, branch: Tensor | None, bias: Tensor | None) -> Tensor:
    total = x if branch is None else x + branch
    return total if bias is None else total + bias


def _gelu(x: Tensor, approximate: str) -> Tensor:
    return mlp.gelu(x, approximate) if x.is_cpu else F.gelu(x, approximate=approximate)


def _norm(x: Tensor, dtype: torch.dtype, norm: Any) -> Tensor:
    """x was rounded when it was summed up: to centre it, a twentieth of a token's time, would not make it exact."""
    y = pytorch.uncentred_layer_norm(x, *norm)
    return y if y.dtype == dtype else y.to(dtype)
