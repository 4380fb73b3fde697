"""accelerate(model): fastgpt's functions in place of a live model's own, on the instance; restore(model) undoes it.

Nothing is recognised by name alone. A module that looks like one of the families' is tried: a copy of it with random
weights, on the CPU in float64, must give the same numbers by its class's forward and by ours, in eval and in training
mode; else it is left as it is, and the report says so. One trial serves all modules of a class and shape.
"""

import contextlib
import copy
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastgpt import families, ops
from fastgpt.families import Swap, gpt2, nanogpt, raschka

_TOKENS = 16  # the vocabulary and context of a whole model's trial
_DROPOUT = 0.25  # of a trial in training, so that its place shows
_RECOGNISE = (gpt2.recognise, nanogpt.recognise, raschka.recognise, families.recognise_mlp, families.recognise_norm)


class Row(NamedTuple):
    """What became of one module: `now` is what took its place, None where it was left, and then `why` says why."""

    name: str
    kind: str  # its class
    now: str | None
    why: str | None = None


class Report(NamedTuple):
    """What accelerate did, a Row a module; as text a table, in which layers that fared alike share a line."""

    rows: tuple[Row, ...]

    def __str__(self) -> str:
        lines: dict[tuple, int] = {}
        for row in self.rows:
            outcome = row.now if row.why is None else f"left: {row.why}"
            line = (re.sub(r"\b\d+\b", "*", row.name) or "(the model)", row.kind, outcome)
            lines[line] = lines.get(line, 0) + 1
        if not lines:
            return "fastgpt recognised nothing in this model"
        cells = [("module", "class", "", "now")]
        cells += [(name, kind, f"x{count}", outcome) for (name, kind, outcome), count in lines.items()]
        widths = [max(len(row[i]) for row in cells) for i in range(3)]
        return "\n".join(
            "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]) for row in cells
        )


def accelerate(
    model: nn.Module,
    attention: bool = True,
    layer_norm: bool = True,
    mlp: bool = True,
    loss: bool = False,
    backend: ops.Backend = "auto",
) -> Report:
    """Let fastgpt's functions do the work of `model`'s blocks, attention, norms and MLPs, on this instance alone.

    The model stays the same object with the same parameters, state-dict keys, hooks, mode, dtype and device; no class
    is touched. A module that is served gets a class of its own, a subclass of its class with the same name. Known are
    Hugging Face's GPT-2, nanoGPT and the book's models, in any model that holds them, and any nn.LayerNorm and
    linear-GELU-linear. loss=True lets a model that computes its own loss do so without ever holding all logits: while
    it trains, it then returns None in their place. A second call replaces the first. A class that is set later, or
    whose forward is patched later, is heard: that module then does what its class says. Random generators stay as
    they are, of every device.
    Returns a Report; print it. TypeError and ValueError for bad arguments, before anything is changed.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"accelerate: model is a {type(model).__name__}, not an nn.Module")
    if backend not in ("auto", "triton", "torch"):
        raise ValueError(f"accelerate: backend is {backend!r}, not 'auto', 'triton' or 'torch'")
    flags = {"attention": attention, "layer_norm": layer_norm, "mlp": mlp, "loss": loss, "model": attention}
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise TypeError(f"accelerate: {name} is {value!r}, not True or False")
    all_found = [(name, module, _recognised(module)) for name, module in model.named_modules()]
    restore(model)
    tried: dict[Any, str | None] = {}
    rows, losses = [], 0
    for name, module, found in reversed(all_found):  # children first: a block's trial asks for them
        kind = families.own_type(module).__name__
        if isinstance(found, str):
            rows.append(Row(name, kind, None, found))
        elif found is not None and flags[found.flag]:
            losses += found.flag == "loss"
            why = _install(module, found._replace(backend=backend), tried)
            rows.append(Row(name, kind, None if why else found.what, why))
    if loss and not losses:
        why = "loss=True was asked for, and it holds no model that computes its own loss"
        rows.append(Row("", families.own_type(model).__name__, None, why))
    return Report(tuple(reversed(rows)))


def _recognised(module: nn.Module) -> Swap | str | None:
    return next((found for recognise in _RECOGNISE if (found := recognise(module)) is not None), None)


def restore(model: nn.Module) -> None:
    """Undo accelerate: every module does again what its class says. Another model stays as it is."""
    for module in model.modules():
        _put_back(module)


@contextlib.contextmanager
def accelerated(model: nn.Module, **options) -> Iterator[nn.Module]:
    """accelerate(model, **options) for the length of a with block; then the model is as it was before."""
    before = {module: module.__dict__.get("fastgpt_swap") for module in model.modules()}
    try:
        accelerate(model, **options)
        yield model
    finally:
        for module in model.modules():
            _put_back(module)
            if (swap := before.get(module)) is not None:
                _put_in(module, swap)


def _put_back(module: nn.Module) -> None:
    """Take the Swap and its class away. A forward that a stranger wrapped around ours stays."""
    module.__dict__.pop("fastgpt_swap", None)
    if "forward" in module.__dict__ and families.is_ours(module, module.__dict__["forward"]):
        del module.__dict__["forward"]
    if "fastgpt_made" in type(module).__dict__:  # else it is below a class that fully_shard made, and does nothing
        module.__class__ = type(module).__mro__[2]


def _put_in(module: nn.Module, swap: Swap) -> None:
    module.__dict__["fastgpt_swap"] = swap
    if not families.runs(module):
        module.__class__ = families.swapped_class(type(module))


def _install(module: nn.Module, swap: Swap, tried: dict) -> str | None:
    """Put the swap in, or say why not."""
    if "forward" in module.__dict__:
        return "it has a forward of its own"
    if hasattr(type(module), "fastgpt_made") and families.made_of(type(module)) is None:
        return "its class was made of a swapped module's"
    shapes = tuple((name, tuple(parameter.shape)) for name, parameter in module.named_parameters())
    buffers = tuple((name, _bytes(buffer)) for name, buffer in module.named_buffers())
    parts = tuple(
        (families.own_type(part), "fastgpt_swap" in part.__dict__, *_settings(part)) for part in module.modules()
    )
    key = (shapes, buffers, parts, swap.function, swap.names, swap.gelu)
    if key not in tried:
        tried[key] = _trial(module, swap)
    if tried[key] is None:
        _put_in(module, swap)
    return tried[key]


def _settings(module: nn.Module) -> list[tuple]:
    """The numbers and words that may change what the module computes; transformers' own forwards do not ask for their
    place among their like."""
    place = "layer_idx" if families.own_type(module).forward.__module__.startswith("transformers.") else None
    return [(name, value) for name, value in module.__dict__.items() if name != place and _is_setting(value)]


def _is_setting(value: Any) -> bool:
    return isinstance(value, int | float | str) or (isinstance(value, tuple) and all(map(_is_setting, value)))


def _bytes(buffer: Tensor) -> int:
    """What a buffer holds, as a number; of one that does not show it, as a sparse or a distributed one, its own."""
    if buffer.is_meta:
        return hash((buffer.shape, buffer.dtype))
    try:
        return hash(buffer.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    except (RuntimeError, TypeError, NotImplementedError):
        return id(buffer)


def _trial(module: nn.Module, swap: Swap) -> str | None:
    """Why the swap won't do for modules like this one: other numbers, or an error. None if it will."""
    if swap.width == 0:
        return None
    if not any(buffer.is_meta for buffer in module.buffers()):
        return _tried(module, swap)
    # what a buffer on the meta device will hold is not known: a mask may say where to look, or where not to
    lower = _tried(module, swap, torch.tril)
    return lower and _tried(module, swap, lambda ones: ones.triu(1)) and lower


def _tried(module: nn.Module, swap: Swap, mask: Callable[[Tensor], Tensor] = torch.tril) -> str | None:
    kind = families.own_type(module).__name__
    whose = "a copy of it"
    try:
        with families.aside():
            torch.default_generator.manual_seed(0)
            twin, inputs = _twin(module, swap, mask), _inputs(swap)
            for training in (False, True):
                twin.train(training)
                torch.default_generator.manual_seed(1)  # dropout, or a stranger's part, must draw the same both times
                whose = "its own forward"
                expected = families.class_forward(twin, *inputs)
                torch.default_generator.manual_seed(1)
                whose = "fastgpt's"
                actual = twin.fastgpt_swap.function(twin, twin.fastgpt_swap, *inputs)
                if swap.flag == "loss" and training:  # without its logits
                    expected, actual = expected[-1], actual[-1]
                if not _agree(actual, expected):
                    return f"this {kind} computes something else"
    except Exception as error:  # a stranger's code: whatever it raises, it is left alone
        said = str(error).splitlines()[0] if str(error) else ""
        return f"a trial of {whose} failed with {type(error).__name__}: {said}"
    return None


def _inputs(swap: Swap) -> tuple[Tensor, ...]:
    if swap.flag == "loss":
        ids = torch.randint(0, _TOKENS, (2, 6))
        targets = ids.roll(1, dims=1).index_put((torch.tensor(0), torch.tensor(2)), torch.tensor(-1))
        return ids, targets
    x = torch.randn(2, 5, swap.width, dtype=torch.float64)
    x[:, 1:3] *= 1e-2  # where eps counts
    x[1, 4] *= 30  # where a bound would
    return (x,)


def _agree(actual, expected) -> bool:
    """Tensors, or tuples of them, equal within what a constant kept in float32 makes."""
    if isinstance(expected, tuple):
        return (
            isinstance(actual, tuple)
            and len(actual) == len(expected)
            and all(_agree(a, e) for a, e in zip(actual, expected, strict=True))
        )
    if not isinstance(expected, Tensor) or not isinstance(actual, Tensor):
        return actual is None and expected is None
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return False
    return bool((actual - expected).norm() <= 1e-6 * expected.norm())


def _twin(module: nn.Module, swap: Swap, mask: Callable[[Tensor], Tensor]) -> Any:
    """A copy with random float64 weights on the CPU, without hooks and with dropout everywhere, its children swapped as
    the module's.

    copy.deepcopy would do, but for hooks that hold half a process group, classes that forbid it (fully_shard's), and
    weights that are on another device, distributed or large.
    """
    memo: dict[int, Any] = {}
    lists = [part for part in module.modules() if isinstance(part, nn.ModuleList) and swap.flag == "loss"]
    skipped = {part for layers in lists for layer in list(layers)[1:] for part in layer.modules()}
    parts = [part for part in module.modules() if part not in skipped]
    for part in parts:
        kind = families.own_type(part)
        if part is not module and families.swap_of(part) is not None:
            kind = families.swapped_class(kind)
        memo[id(part)] = kind.__new__(kind)
        for name, value in part.__dict__.items():
            if name.endswith("_hooks") or "hooks_with_kwargs" in name or "hooks_always_called" in name:
                memo[id(value)] = type(value)()
        for parameter in part._parameters.values():
            if parameter is not None and id(parameter) not in memo:  # tied
                shape = list(parameter.shape)
                if swap.flag == "loss" and (isinstance(part, nn.Embedding) or part is getattr(module, "lm_head", None)):
                    shape[0] = _TOKENS
                memo[id(parameter)] = nn.Parameter(_random(shape), requires_grad=False)
        for buffer in part._buffers.values():
            if buffer is not None:
                memo[id(buffer)] = _filled(buffer, mask) if buffer.is_meta else buffer.detach().to("cpu", copy=True)
    for layers in lists:  # a whole model is tried with its first layer in the place of all
        memo.update({id(layer): memo[id(layers[0])] for layer in list(layers)[1:]})
    for part in parts:
        twin = memo[id(part)]
        own = {name: value for name, value in part.__dict__.items() if not name.startswith("__composable_api")}
        twin.__dict__.update({name: copy.deepcopy(value, memo) for name, value in own.items()})
        twin.__dict__.pop("gradient_checkpointing", None)
        if "fastgpt_swap" in twin.__dict__:
            twin.fastgpt_swap = twin.fastgpt_swap._replace(backend="torch")
        if isinstance(twin, nn.Dropout):
            twin.p = _DROPOUT
        elif isinstance(twin.__dict__.get("dropout"), float):  # nanoGPT's attention and the book's fast one
            twin.dropout = _DROPOUT
        if hasattr(twin.__dict__.get("config"), "_attn_implementation"):
            twin.config._attn_implementation = "sdpa"
    twin = memo[id(module)]
    twin.__dict__["fastgpt_swap"] = copy.deepcopy(swap._replace(backend="torch"), memo)
    return twin


def _filled(buffer: Tensor, mask: Callable[[Tensor], Tensor]) -> Tensor:
    """What a buffer on the meta device may hold: a square matrix is taken for a mask."""
    if buffer.dim() > 1 and buffer.shape[-1] == buffer.shape[-2]:
        return mask(torch.ones(buffer.shape)).to(buffer.dtype)
    return torch.randn(buffer.shape).to(buffer.dtype)


def _random(shape: list[int]) -> Tensor:
    """Values of the size that a trained weight's outputs have: neither lost beside others nor past a GELU's bend."""
    deviation = 0.5 if len(shape) < 2 else max(shape) ** -0.5
    return torch.randn(shape, dtype=torch.float64) * deviation + (len(shape) < 2)
