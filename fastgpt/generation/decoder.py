"""A GPT of any family with a cache of keys and values: prompts in one pass, then a few tokens at a time.

The model itself is not called and not touched: view.py makes a GPT of its tensors. `B` batch, `T` time, `Tq` new
tokens, `C` channels, `V` vocabulary.
"""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastgpt import ops
from fastgpt.generation.cache import MAX_STEP as MAX_STEP
from fastgpt.generation.cache import Cache, Prompts, Step
from fastgpt.generation.view import Called, View, anatomy, is_plain_gpt, unwrapped
from fastgpt.model import GPT, CachedPass
from fastgpt.swap import trial

_TRIAL_TOKENS = 16


def fused_step(steps: Any, layers: list, norm: tuple, x: Tensor, cache: CachedPass) -> Tensor:
    """Embedded tokens (B, Tq, C) -> what the head sees, (B, Tq, C), of a view none of whose layers calls a module. The
    block's formula, as model.Block has it: each norm is of one call with the residual add before it and the linear
    layer after it. steps: ops.DecodingSteps, or its `many`. layers: the forms of each, as Decoder lists them."""
    shape, x = x.shape, x.flatten(0, 1)
    branch: Tensor | None = None
    bias: Tensor | None = None
    for index, (ln_1, c_attn, scale, c_proj, ln_2, c_fc, gelu, mlp_proj) in enumerate(layers):
        qkv, x = steps.norm_linear(x, branch, bias, ln_1, c_attn, "")
        y = cache.attend(index, qkv.view(*shape[:2], -1), scale)
        branch, bias = steps.product(y.view(-1, shape[2]), c_proj)
        branch, bias, x = steps.mlp(x, branch, bias, ln_2, c_fc, gelu, mlp_proj)
    return steps.add_norm(x, branch, bias, norm).view(shape)


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

    passing = False  # made for one call, of a model that may be another one at the next
    kept: Any = None  # generation.kept's own

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
        self.inner, self._modules, self.tokens = inner, list(inner.modules()), found.tokens
        embedded = found.tokens.weight.dtype
        self.steps: Any = ops.decoding_steps(found.backend, head.weight)
        residual = inner.config.residual if isinstance(inner, GPT) else "compute"
        view = View(found, dtype, self.steps.layout(tokens, rows), residual)
        if view.called and dtype not in (None, embedded):
            raise ValueError(f"generate: dtype is {dtype}, but {self.name(view.called[0])} must be called as it is")
        self.dtype, self._sources = view.dtype, view.sources
        self.gpt: Any = view.gpt
        self.vocabulary, width = found.tokens.weight.shape
        self.outputs: int = head.weight.shape[0]  # may be padded past the vocabulary, or cropped
        self.context = len(found.positions.weight)
        self._stream_dtype = torch.float32 if residual == "float32" else self.dtype
        self._free_tables = not any(isinstance(table, Called) for table in (self.gpt.wte, self.gpt.wpe))
        self.calls = bool(view.called) or not self._free_tables  # modules, which may do anything
        self._fused = view.plain and self.steps.fuses(width, self.dtype)
        self._layers = [  # looked up once: modules find their parts slowly
            (block.ln_1.form, attn.c_attn.form, attn.scale, attn.c_proj.form,
             block.ln_2.form, mlp.c_fc.form, mlp.gelu, mlp.c_proj.form)
            for block, attn, mlp in ((block, block.attn, block.mlp) for block in self.gpt.h if self._fused)
        ]  # fmt: skip
        self.windows: tuple[int | None, ...] = tuple(block.attn.window for block in self.gpt.h)
        # whether its steps read the model's own tensors alone, so that another Decoder's may read the same
        self.lasts = self._fused and not self.calls and not self._sources.copied
        self._whole_token = self._one_launch()
        # why a token of one sequence does not come from one launch of a kernel; "" where it does
        self.one_launch: str = self._whole_token if isinstance(self._whole_token, str) else ""
        self._weights = [part.weight for part in self.gpt.h.modules() if isinstance(part, nn.Linear)]
        if not is_plain_gpt(inner):
            self._try(model)

    def check_unchanged(self) -> None:
        """ValueError where the model has other weights than this Decoder, which has copies or those of before."""
        if self._sources.changed() or list(self.inner.modules()) != self._modules:
            raise ValueError("generate: the model has changed since this Decoder read its weights; make a new one")

    def name(self, module: nn.Module) -> str:
        """The module's name in the model."""
        return self._names.get(id(module)) or "the model"

    @property
    def on_kernels(self) -> bool:
        """Whether it runs on the Triton kernels, and not on PyTorch's functions."""
        return self.steps.on_kernels

    def ready(self) -> None:
        """Made in full, as a capture needs it."""

    def read(self) -> Iterator[Any]:
        """All tensors, and numbers beside them, that steps read of the model, where it `lasts`."""
        found = [self._layers, self.gpt.ln_f.form, self.gpt.lm_head.form, self.gpt.wte.weight, self.gpt.wpe.weight]
        while found:
            each = found.pop()
            if isinstance(each, tuple | list):
                found.extend(each)
            else:
                yield each

    def own_tensors(self) -> tuple[Tensor, ...]:
        """What a step reads that is neither the model's nor a copy of what is."""
        return () if self.one_launch else self._whole_token.own_tensors

    def _one_launch(self) -> Any:
        gpt, head = self.gpt, getattr(self.gpt.lm_head, "form", None)
        if not self._fused or self.calls or head is None:
            return "it is made for models of which no part must be called"
        if window := next(filter(None, self.windows), None):
            return f"it is made for layers that see all tokens, and there is one with a window of {window}"
        tables = gpt.wte.weight, gpt.wpe.weight
        return self.steps.whole_token(self._layers, gpt.ln_f.form, tables, head, gpt.config.n_head, self._stream_dtype)

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

    def cache(self, rows: int, slots: int) -> Cache:
        """For so many sequences of up to `slots` tokens."""
        cache = Cache(self.gpt.config, rows, slots, self.dtype, self.device, self.windows)
        if rows == 1 and slots <= self.context and not self.one_launch:
            cache.words = self._whole_token.words()
        return cache

    # One pass.

    def prefill(self, ids: Tensor, lengths: Tensor, cache: Cache, wide: bool = True) -> Tensor:
        """Prompts (B, T), padded at their ends to one length, into the cache; the logits (B, V) after each prompt.

        lengths: (B,), of the prompts. A cache of a multiple of B rows gets each prompt that many times, in a row. What
        padding leaves there is written over before it is read. wide: as `logits` are; or in the weights' dtype, where
        that is how they are computed.
        """
        with self._inference():
            x = self._walk(ids, Prompts(self.steps, self.gpt.config.n_head, len(ids), ids.shape[1], cache, lengths))
            return self._logits(x.gather(1, (lengths - 1)[:, None, None].expand(-1, 1, x.shape[2]))[:, 0], wide)

    def decode(self, ids: Tensor, lengths: Tensor, cache: Cache, wide: bool = True) -> Tensor:
        """The next few tokens (B, Tq) of each row -> logits (B, Tq, V).

        lengths: (B,), of the rows with these tokens counted in, whose keys and values go into the cache first. wide: as
        in prefill.
        """
        with self._inference():
            if cache.words is not None and ids.shape == (1, 1):
                return self._whole_token(ids, lengths, cache.whole, cache.words)
            return self._logits(self._walk(ids, Step(self.steps, cache, lengths, ids.shape[1])), wide)

    def features(self, ids: Tensor) -> Tensor:
        """ids (B, T) -> what the head sees, (B, T, C), without a cache."""
        with self._inference():
            return self._walk(
                ids, Prompts(self.steps, self.gpt.config.n_head, len(ids), ids.shape[1], windows=self.windows)
            )

    def _walk(self, ids: Tensor, cache: Prompts | Step) -> Tensor:
        """ids (B, T) -> what the head sees, (B, T, C)."""
        gpt, steps, positions = self.gpt, self.steps, cache.positions
        if not self._fused:
            return gpt.features(ids, positions=positions, cache=cache)
        few = not (steps.on_kernels and isinstance(cache, Prompts)) and steps.fits(ids.numel(), *self._weights)
        if self._free_tables:
            x = steps.embedding(ids, gpt.wte.weight, gpt.wpe.weight, positions, self._stream_dtype)
        else:
            x = gpt.embed(ids, positions)
        return fused_step(steps if few else steps.many, self._layers, gpt.ln_f.form, x, cache)

    def first_not_finite(self, ids: Tensor) -> str | None:
        """The name of the first part that makes a number of this row (T,) infinite or NaN."""
        found: list[str] = []

        def look(name: str) -> Any:
            def hook(part: nn.Module, args: Any, output: Tensor) -> None:
                if not found and not output.isfinite().all():
                    found.append(name)

            return hook

        gpt, live = self.gpt, self.anatomy
        parts = [(gpt.wte, live.tokens), (gpt.wpe, live.positions), (gpt.ln_f, live.norm)]
        for block, layer in zip(gpt.h, live.layers, strict=True):
            parts += [(block.ln_1, layer.norm_1), (block.attn, layer.attn)]
            parts += [(block.ln_2, layer.norm_2), (block.mlp, layer.mlp)]
        hooks = [part.register_forward_hook(look(self.name(module))) for part, module in parts]
        try:
            with self._inference():
                self.gpt.features(ids[None])
        finally:
            for hook in hooks:
                hook.remove()
        return found[0] if found else None

    def logits(self, x: Tensor) -> Tensor:
        """(…, C) -> (…, V), in float32 whatever the weights are, or float64."""
        with self._inference():
            return self._logits(x)

    def _logits(self, x: Tensor, wide: bool = True) -> Tensor:
        head = self.gpt.lm_head
        form = getattr(head, "form", head)  # or it is called
        if not isinstance(head, Called) and self.on_kernels and x.dtype == form.weight.dtype:
            if self._fused and self.steps.fits(x.numel() // x.shape[-1], form.weight):
                dtype = torch.promote_types(x.dtype, torch.float32) if wide else None
                return self.steps.linear(x.flatten(0, -2), *form, dtype).unflatten(0, x.shape[:-1])
            logits = self.steps.head(x, form)
        else:
            logits = form(x)
        return logits if logits.dtype == torch.float64 or not wide else logits.float()

    @contextlib.contextmanager
    def _inference(self) -> Iterator[None]:
        """No gradients, no autocast, and whatever is called in eval mode."""
        modes = self._evaluating() if self.calls else contextlib.nullcontext()
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False), modes:
            yield

    def _try(self, model: Any) -> None:
        """ValueError unless the model's own forward gives the logits that its parts give."""
        windows = [window for module in self._modules for window in trial.windows(module) if window < self.context]
        count = min(max(_TRIAL_TOKENS, *(window + 1 for window in windows), 1), self.context)
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
