"""A GPT of any family with a cache of keys and values: prompts in one pass, then a few tokens at a time.

The model itself is not called and not touched. Its parts' weights are read where they are, and where a part does more
than its class says (hooks, adapters, quantised weights) that part is called. `B` batch, `T` time, `C` channels, `H`
heads, `D` head dim, `V` vocabulary.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgpt import ops
from fastgpt.generation.parts import Mlp, Norm, Reader, anatomy, is_plain_gpt, unwrapped
from fastgpt.generation.walks import fused_step
from fastgpt.model import GPT
from fastgpt.modules import free_embedding
from fastgpt.ops import pytorch
from fastgpt.ops.cpu.linears import BagLinear, Layout, Linear
from fastgpt.ops.cpu.mlp import gelu as cpu_gelu

MAX_STEP = 16  # new tokens that decode_attention takes at once
_TRIAL_TOKENS = 16


class Cache:
    """Keys and values of `rows` sequences of up to `slots` tokens, allocated once."""

    def __init__(self, decoder: "Decoder", rows: int, slots: int):
        self.rows, self.slots = rows, slots
        shape = (len(decoder.layers), rows, decoder.heads, slots, decoder.head_dim)
        self.whole = torch.zeros((2, *shape), dtype=decoder.dtype, device=decoder.device)
        self.k, self.v = (half.unbind() for half in self.whole)  # of each layer

    def first(self, slots: int) -> "Cache":
        """A view of its first slots, for tokens that reach no further."""
        view = object.__new__(Cache)
        view.rows, view.slots, view.whole = self.rows, slots, self.whole[..., :slots, :]
        view.k, view.v = (half.unbind() for half in view.whole)
        return view

    @staticmethod
    def size(decoder: "Decoder", rows: int, slots: int) -> int:
        """Bytes."""
        elements = 2 * len(decoder.layers) * rows * slots * decoder.heads * decoder.head_dim
        return elements * decoder.dtype.itemsize


class Decoder:
    """A live model, made ready to be decoded from.

    dtype: of the weights, activations and cache; autocast's or the model's own if None.
    tokens, rows: about how many it will write, in all calls together, and how many at a time. From some number on the
    weights are laid out anew, so that few rows read them faster, or one alone on a CPU: that costs their memory up to
    twice more, and on a CPU the time of ten to fifty tokens.
    Weights that are neither laid out nor cast are the model's own, at every call as they are then. Where others are
    copies, a model that has been trained since is an error, and everywhere one whose parts are others than they were.
    TypeError and ValueError for a model that can't be served; one whose logits differ from what its parts say is tried
    and refused.
    """

    def __init__(self, model: Any, *, dtype: torch.dtype | None = None, tokens: int = 0, rows: int = 1):
        inner = unwrapped(model)
        self.anatomy = found = anatomy(inner)
        self._names = {id(module): name for name, module in inner.named_modules()}
        for module, reason in found.passed_by():
            raise ValueError(f"generate: {self.name(module)} would be passed by, and {reason}")
        head: Any = found.head
        self.device = head.weight.device
        if dtype is None and torch.is_autocast_enabled(self.device.type):
            dtype = torch.get_autocast_dtype(self.device.type)
        if dtype not in (None, torch.float16, torch.bfloat16, torch.float32, torch.float64):
            raise TypeError(f"generate: dtype is {dtype}, not a floating-point one")
        self._inner, self._modules = inner, list(inner.modules())
        embedded = found.tokens.weight.dtype
        self.dtype: torch.dtype = dtype or embedded
        self.stream_dtype = self.dtype
        if isinstance(inner, GPT) and inner.config.residual == "float32":
            self.stream_dtype = torch.float32
        self.heads = found.heads
        # On a CPU the checks of each call would take a tenth of a token's time: parts that fit are checked here, once.
        self.steps: Any = ops.decoding_steps(found.backend, head.weight)
        self._torch = not self.steps.on_kernels
        self._backend = {} if self._torch else {"backend": found.backend}
        self._functions: Any = pytorch if self._torch else ops
        reader = Reader(dtype, Layout(tokens, rows, on_kernels=not self._torch))
        self.layers = [reader.layer(layer) for layer in found.layers]
        self.norm = reader.norm(found.norm)
        self.head = reader.linear(found.head)
        self.called = reader.called
        self.vocabulary, width = found.tokens.weight.shape
        self.outputs: int = head.weight.shape[0]  # may be padded past the vocabulary, or cropped
        self.context = len(found.positions.weight)
        self.head_dim = width // self.heads
        short = self._all_plain()
        self._fused = short and self.steps.fuses(width, self.dtype)
        self._sources = reader.sources
        self._sources.seal()
        if self.called and dtype is not None and dtype != embedded:
            raise ValueError(f"generate: dtype is {dtype}, but {self.name(self.called[0])} must be called as it is")
        if not is_plain_gpt(inner):
            self._try(model)

    def check_unchanged(self) -> None:
        """ValueError where the model has other weights than this Decoder, which has copies or those of before."""
        if self._sources.changed() or list(self._inner.modules()) != self._modules:
            raise ValueError("generate: the model has changed since this Decoder read its weights; make a new one")

    @property
    def calls(self) -> bool:
        """Whether a step calls modules, which may do anything."""
        return bool(self.called) or not self._free_tables()

    def name(self, module: nn.Module) -> str:
        """The module's name in the model."""
        return self._names.get(id(module)) or "the model"

    @property
    def on_kernels(self) -> bool:
        """Whether it runs on the Triton kernels, and not on PyTorch's road."""
        return self.steps.on_kernels

    @contextlib.contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Modules that are called are in eval mode meanwhile, and in their own mode again after."""
        modes = [(module, module.training) for module in self._modules if module.training]
        try:
            for module, _ in modes:
                module.training = False
            yield
        finally:
            for module, training in modes:
                module.training = training

    # One pass.

    def prefill(self, ids: Tensor, lengths: Tensor, cache: Cache) -> Tensor:
        """Prompts (B, T), padded at their ends to one length, into the cache; the logits (B, V) after each prompt.

        lengths: (B,), of the prompts. A cache of a multiple of B rows gets each prompt that many times, in a row.
        """
        copies, time = cache.rows // len(ids), ids.shape[1]

        def attend(index: int, qkv: Tensor) -> Tensor:
            _, k, v = self._split(qkv)
            for kept, new in ((cache.k, k), (cache.v, v)):
                kept[index].unflatten(0, (-1, copies))[:, :, :, :time] = new[:, None]
            return self._attend_prompt(index, qkv)

        x = self._walk(ids, None, attend)
        return self.logits(x.gather(1, (lengths - 1)[:, None, None].expand(-1, 1, x.shape[2]))[:, 0])

    def decode(self, ids: Tensor, lengths: Tensor | None, cache: Cache) -> Tensor:
        """The next few tokens (B, Tq) of each row -> logits (B, Tq, V).

        lengths: (B,), of the rows with these tokens counted in, whose keys and values go into the cache first; None
        where they are the last slots of the cache in every row, which only PyTorch's functions are told
        (cache.first(n) is a cache of its first n slots).
        """
        batch, new = ids.shape
        newest = cache.whole[..., cache.slots - new :, :].unbind(1)  # of each layer, (2, B, H, Tq, D)
        steps = torch.arange(new, dtype=torch.int64, device=ids.device)
        positions = cache.slots - new + steps if lengths is None else (lengths[:, None] - new) + steps

        def attend(index: int, qkv: Tensor) -> Tensor:
            keys, values, scale = cache.k[index], cache.v[index], self.layers[index].scale
            if lengths is not None:
                q, _, _ = self._split(qkv)
                self.steps.append(qkv, keys, values, lengths)
                y = self._functions.decode_attention(q, keys, values, lengths, scale=scale, **self._backend)
            else:
                packed = qkv.view(batch, new, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4)
                newest[index].copy_(packed[1:])
                if new == 1:  # nothing to be hidden: no mask
                    y = F.scaled_dot_product_attention(packed[0], keys, values, scale=scale)
                else:
                    y = self._functions.causal_attention(packed[0], keys, values, scale=scale)
            return y.transpose(1, 2).reshape(batch, new, -1)

        with self._inference():
            if self._fused and all(self.steps.fits(ids.numel(), linear.weight) for linear in self._linears()):
                x = self._embed(ids, positions)
                norm: Any = self.norm
                return self._logits(fused_step(self.steps, self.layers, norm, x, attend))
            return self._logits(self._walk(ids, positions, attend))

    def features(self, ids: Tensor) -> Tensor:
        """ids (B, T) -> what the head sees, (B, T, C), without a cache."""
        return self._walk(ids, None, self._attend_prompt)

    def first_not_finite(self, ids: Tensor) -> str | None:
        """The name of the first part that makes a number of this row (T,) infinite or NaN."""
        found: list[str] = []

        def trace(module: nn.Module, x: Tensor) -> None:
            if not found and not x.isfinite().all():
                found.append(self.name(module))

        trace(self.anatomy.tokens, self.anatomy.tokens.weight[ids])
        trace(self.anatomy.positions, self.anatomy.positions.weight[: len(ids)])
        self._walk(ids[None], None, self._attend_prompt, trace)
        return found[0] if found else None

    def _split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, T, 3C) -> q, k, v, views (B, H, T, D)."""
        q, k, v = qkv.view(*qkv.shape[:2], 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4)
        return q, k, v

    def _attend_prompt(self, index: int, qkv: Tensor) -> Tensor:
        scale = self.layers[index].scale
        return self._functions.causal_attention_qkv(qkv, self.heads, scale=scale, **self._backend)

    def logits(self, x: Tensor) -> Tensor:
        """(…, C) -> (…, V), in float32 whatever the weights are, or float64."""
        with self._inference():
            return self._logits(x)

    def _logits(self, x: Tensor) -> Tensor:
        few = self._fused and self.on_kernels and isinstance(self.head, Linear) and x.dim() == 3
        if few and self.steps.fits(x.shape[0] * x.shape[1], self.head.weight):
            wide = torch.float64 if x.dtype == torch.float64 else torch.float32
            linear: Any = self.head
            return self.steps.linear(x.flatten(0, 1), *linear, wide).view(*x.shape[:2], -1)
        logits = self.head(x)
        return logits if logits.dtype == torch.float64 else logits.float()

    def _walk(
        self,
        ids: Tensor,
        positions: Tensor | None,
        attend: Callable[[int, Tensor], Tensor],
        trace: Callable[[nn.Module, Tensor], None] | None = None,
    ) -> Tensor:
        """ids (B, T) -> what the head sees (B, T, C). attend(layer, qkv) turns (B, T, 3C) into (B, T, C)."""
        told = trace or (lambda module, x: None)
        with self._inference():
            x = self._embed(ids, positions)
            branch: Tensor | None = None
            bias: Tensor | None = None
            for index, (parts, layer) in enumerate(zip(self.layers, self.anatomy.layers, strict=True)):
                normed, x = self.add_norm(parts.norm_1, branch, x, bias)
                told(layer.norm_1, normed)
                qkv = [linear(normed) for linear in parts.qkv]
                y = attend(index, qkv[0] if len(qkv) == 1 else torch.cat(qkv, dim=-1))
                branch, bias = self._project(parts.out, y)
                told(layer.attn, branch)
                normed, x = self.add_norm(parts.norm_2, branch, x, bias)
                told(layer.norm_2, normed)
                branch, bias = self._feed(parts.mlp, normed)
                told(layer.mlp, branch)
            normed, _ = self.add_norm(self.norm, branch, x, bias)
            told(self.anatomy.norm, normed)
        return normed

    def _all_plain(self) -> bool:
        """Whether every part of a layer, and the last norm, is read as weights, and none is called."""
        packed = all(len(layer.qkv) == 1 for layer in self.layers)
        parts = (*self._norms(), *self._linears())
        return packed and all(isinstance(part, (Norm, Linear, BagLinear)) for part in parts)

    def _norms(self) -> Iterator[Any]:
        for layer in self.layers:
            yield from (layer.norm_1, layer.norm_2)
        yield self.norm

    def _linears(self) -> Iterator[Any]:
        for layer in self.layers:
            yield from (*layer.qkv, layer.out)
            yield from ([layer.mlp.fc, layer.mlp.proj] if isinstance(layer.mlp, Mlp) else [layer.mlp])

    @contextlib.contextmanager
    def _inference(self) -> Iterator[None]:
        """No gradients, no autocast, and whatever is called in eval mode."""
        modes = self._evaluating() if self.calls else contextlib.nullcontext()
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False), modes:
            yield

    def _free_tables(self) -> bool:
        return free_embedding(self.anatomy.tokens) and free_embedding(self.anatomy.positions)

    def _embed(self, ids: Tensor, positions: Tensor | None) -> Tensor:
        """positions (B, T) or (T,), or None for the first T."""
        tokens, places = self.anatomy.tokens, self.anatomy.positions
        token_weight, weight = tokens.weight, places.weight
        if not self._free_tables():
            if positions is None:
                positions = torch.arange(ids.shape[1], dtype=torch.int64, device=ids.device)[None]
            return (tokens(ids) + places(positions)).to(self.stream_dtype)
        return self._functions.embedding(ids, token_weight, weight, positions, dtype=self.stream_dtype, **self._backend)

    def add_norm(
        self, norm: Norm | nn.Module, branch: Tensor | None, x: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The norm of x with branch + bias added, in the compute dtype, and that sum."""
        if isinstance(norm, Norm):
            if self._torch:  # the sum was rounded: to centre it, a twentieth of a token's time, would not make it exact
                x = x if branch is None else x + branch
                return pytorch.uncentred_layer_norm(x, *norm).to(self.dtype), x
            if branch is None:
                return self._functions.layer_norm(x, *norm, **self._backend).to(self.dtype), x
            return self._functions.add_layer_norm(branch, x, *norm, x_bias=bias, **self._backend)
        if branch is not None:
            x = x + (branch if bias is None else branch + bias)
        return norm(x), x

    def _project(self, layer: Linear | BagLinear | nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The product; on Triton's road without its bias, which whoever adds the product to the stream adds too."""
        if self._torch or not isinstance(layer, Linear):
            return layer(x), None
        return F.linear(x, layer.weight), layer.bias

    def _feed(self, mlp: Mlp | nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None]:
        if not isinstance(mlp, Mlp):
            return mlp(x), None
        fc, gelu, proj = mlp
        if self._torch:
            return proj((cpu_gelu if x.is_cpu else F.gelu)(fc(x), approximate=gelu)), None
        y = self._functions.gelu_mlp(x, fc.weight, fc.bias, proj.weight, approximate=gelu, **self._backend)
        return y, proj.bias

    def _try(self, model: Any) -> None:
        """ValueError unless the model's own forward gives the logits that its parts give."""
        count = min(_TRIAL_TOKENS, self.context)
        ids = torch.arange(count, dtype=torch.int64, device=self.device)[None] * 7919 % self.vocabulary
        kind = type(unwrapped(model)).__name__
        try:
            with torch.no_grad(), self._evaluating():
                output = model(ids)
            if isinstance(output, tuple):
                output = output[0]
            elif isinstance(output, dict):  # transformers' outputs too
                output = output["logits"]
            logits: Any = getattr(output, "logits", output)[:, -1]
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # a stranger's code
            raise ValueError(f"generate: a trial of this {kind} failed with {type(error).__name__}: {error}") from error
        expected = logits.float()
        actual = self.logits(self.features(ids)[:, -1])
        distance = ((actual - expected).norm() / expected.norm()).item()
        coarse = torch.float16 if self.dtype in (torch.float16, torch.bfloat16) else torch.float32
        if math.isfinite(distance) and distance > {torch.float16: 0.1, torch.float32: 1e-3}[coarse]:
            raise ValueError(
                f"generate: this {kind} computes something else than its parts say: its logits are off by "
                f"{distance:.1%}"
            )
