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

    def append_and_attend(
        self,
        qkv: Tensor,
        keys: Tensor,
        values: Tensor,
        lengths: Tensor,
        scale: float | None,
        window: int | None,
        ring: bool,
    ) -> Tensor:
        """`append`, and what the newest tokens attend to: (B, Tq, 3HD) -> (B, H, Tq, D)."""
        self.append(qkv, keys, values, lengths, ring)
        q = qkv.view(*qkv.shape[:2], 3, keys.shape[1], -1)[:, :, 0].transpose(1, 2)
        return self.attend(q, keys, values, lengths, scale, window)

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

    def mlp(
        self, x: Tensor, branch: Tensor, branch_bias: Tensor | None, norm: Any, first: Any, gelu: str, second: Any
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """The sum x + branch + branch_bias (M, K), and its norm through two linear layers with a GELU between them: the
        new branch, the bias that it still lacks, and the sum."""
        hidden, x = self.norm_linear(x, branch, branch_bias, norm, first, gelu)
        return *self.product(hidden, second), x

    def add_norm(self, x: Tensor, branch: Any, branch_bias: Tensor | None, norm: Any) -> Tensor:
        """The norm of x + branch + branch_bias (M, K), in branch's dtype."""
        return _norm(_sum(x, branch, branch_bias), branch.dtype, norm)

    def head(self, x: Tensor, linear: Any) -> Tensor:
        """x (…, K) -> (…, N): a linear layer whose outputs nobody asks to lie in one piece, but for each row's."""
        return linear(x)


class OnKernels(OnPyTorch):
    """The Triton kernels."""

    on_kernels = True

    def __init__(self, autograd: Any, choose: Callable):
        """autograd: the module of that name, which only ops imports. choose(function's name, operand, **arguments)
        gives the backend's module that serves a call."""
        self._choose, self._autograd = choose, autograd
        self._append, self._likeliest = autograd.append_to_cache, autograd.take_likeliest
        self._drawn, self.most_drawn = autograd.take_drawn, autograd.draw.MOST
        self._raced = autograd._on_its_device(autograd.draw.race)
        self._append_and_attend = autograd._on_its_device(autograd.decode.append_and_attend)
        self._fits, self._linear, self._norm_linear = autograd.fits_few, autograd.few_linear, autograd.few_norm_linear
        self.many = ManyRows(autograd)
        self._whole_token = autograd.whole_token
        self._widest: int = autograd.few_rows.MAX_NORMED

    def embedding(
        self, ids: Tensor, token_weight: Tensor, position_weight: Tensor, positions: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        functions = self._choose("embedding", token_weight)
        return functions.embedding(ids, token_weight, position_weight, positions, dtype=dtype)

    def causal_attention(self, qkv: Tensor, heads: int, scale: float | None, window: int | None = None) -> Tensor:
        functions = self._choose("causal_attention_qkv", qkv, heads=heads)
        if functions is not self._autograd:
            return functions.causal_attention_qkv(qkv, heads, scale=scale, window=window)
        scale = (qkv.shape[-1] // 3 // heads) ** -0.5 if scale is None else scale
        return functions.attention_qkv_fwd(qkv, None, None, None, heads, scale, 0.0, window)[0]

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

    def append_and_attend(
        self,
        qkv: Tensor,
        keys: Tensor,
        values: Tensor,
        lengths: Tensor,
        scale: float | None,
        window: int | None,
        ring: bool,
    ) -> Tensor:
        heads, dim = keys.shape[1], keys.shape[3]
        q = qkv.view(*qkv.shape[:2], 3, heads, dim)[:, :, 0].transpose(1, 2)
        kernels = self._choose("decode_attention", q, k_cache=keys, v_cache=values) is self._autograd
        if not kernels or qkv.shape[1] > 1 or (window is not None and not ring):
            return super().append_and_attend(qkv, keys, values, lengths, scale, window, ring)
        scale = dim**-0.5 if scale is None else scale
        return self._append_and_attend(qkv, keys, values, lengths, scale, window)

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
        return self.many.add_norm(x, branch, branch_bias, norm)

    def head(self, x: Tensor, linear: Any) -> Tensor:
        """A GPT's vocabulary is odd, and a product whose rows of results begin at odd places is one of cuBLAS's slow
        ones: for 64 rows of GPT-2's 156 µs instead of some 40 (H100, a profile). So they are written a multiple of 64
        apart, and the last few outputs, which are no multiple of 8, by a product of their own. No weight is copied."""
        outputs, whole = len(linear.weight), len(linear.weight) // 8 * 8
        if whole in (0, outputs) or linear.bias is not None:
            return linear(x)
        rows = x.flatten(0, -2)
        y = rows.new_empty(len(rows), -(-outputs // 64) * 64)
        for first, last in ((0, whole), (whole, outputs)):
            torch.mm(rows, linear.weight[first:last].t(), out=y[:, first:last])
        return y[:, :outputs].unflatten(0, x.shape[:-1])

    def norm_linear(
        self, x: Tensor, branch: Tensor | None, branch_bias: Tensor | None, norm: Any, linear: Any, gelu: str
    ) -> tuple[Tensor, Tensor]:
        return self._norm_linear(x, branch, branch_bias, *norm, *linear, gelu)

    def take_likeliest(self, logits: Tensor, history: Tensor, lengths: Tensor, news: Tensor, last: Tensor) -> None:
        """The likeliest of (B, V) into history (B, room) at lengths (B,), which grow by one, into last (B, 1), and into
        news (B, ring) at lengths modulo ring, which gets -1 where a logit is not finite."""
        self._likeliest(logits, history, lengths, news, last)

    def take_drawn(
        self, logits: Tensor, clocks: Tensor, filters: tuple[float, float, float], rounded: torch.dtype | None,
        history: Tensor, lengths: Tensor, news: Tensor, last: Tensor,
    ) -> None:  # fmt: skip
        """The same, but that it is drawn among the k likeliest, k at most most_drawn, by exponential clocks (B, k).
        filters: temperature, top_p, min_p. rounded: a dtype that holds the logits, whatever theirs is."""
        self._drawn(logits, clocks, *filters, history, lengths, news, last, rounded)

    def take_raced(
        self, logits: Tensor, clocks: Tensor, filters: tuple[float, float, float], rounded: torch.dtype | None,
        history: Tensor, lengths: Tensor, news: Tensor, last: Tensor,
    ) -> None:  # fmt: skip
        """The same among all tokens, by clocks (B, V) in their order; top_p is 1."""
        self._raced(logits, clocks, filters[0], filters[2], history, lengths, news, last)


class ManyRows:
    """The steps of a layer for more rows than few_rows' kernels serve: LayerNorm's kernel, with the residual add in it,
    cuBLAS's products, and the GELU's pass. The launchers are called as they are: nothing here has a derivative."""

    def __init__(self, autograd: Any):
        self._layer_norm, self._gelu_mlp = autograd.layer_norm_fwd, autograd.gelu_mlp_fwd

    def _normed(
        self, x: Tensor, branch: Tensor | None, branch_bias: Tensor | None, norm: Any, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        weight, bias, eps = norm
        if branch is None:
            y = self._layer_norm(x, None, weight, bias, None, None, eps, 0.0, x.dtype)[0]
        else:
            y, x, _ = self._layer_norm(branch, x, weight, bias, branch_bias, None, eps, 0.0, x.dtype)
        return (y if y.dtype == dtype else y.to(dtype)), x

    def norm_linear(
        self, x: Tensor, branch: Tensor | None, branch_bias: Tensor | None, norm: Any, linear: Any, gelu: str
    ) -> tuple[Tensor, Tensor]:
        """As OnPyTorch has it, without a GELU."""
        normed, x = self._normed(x, branch, branch_bias, norm, linear.weight.dtype)
        return linear(normed), x

    def product(self, x: Tensor, linear: Any) -> tuple[Tensor, Tensor | None]:
        return F.linear(x, linear.weight), linear.bias

    def mlp(
        self, x: Tensor, branch: Tensor, branch_bias: Tensor | None, norm: Any, first: Any, gelu: str, second: Any
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        normed, x = self._normed(x, branch, branch_bias, norm, first.weight.dtype)
        y = self._gelu_mlp(normed, first.weight, first.bias, second.weight, None, gelu == "tanh", False)[0]
        return y, second.bias, x

    def add_norm(self, x: Tensor, branch: Tensor, branch_bias: Tensor | None, norm: Any) -> Tensor:
        return self._normed(x, branch, branch_bias, norm, branch.dtype)[0]


def _sum(x: Tensor, branch: Tensor | None, bias: Tensor | None) -> Tensor:
    total = x if branch is None else x + branch
    return total if bias is None else total + bias


def _gelu(x: Tensor, approximate: str) -> Tensor:
    return mlp.gelu(x, approximate) if x.is_cpu else F.gelu(x, approximate=approximate)


def _norm(x: Tensor, dtype: torch.dtype, norm: Any) -> Tensor:
    """x was rounded when it was summed up: to centre it, a twentieth of a token's time, would not make it exact."""
    y = pytorch.uncentred_layer_norm(x, *norm)
    return y if y.dtype == dtype else y.to(dtype)
