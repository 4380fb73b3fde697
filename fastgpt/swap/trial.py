"""The trial: whether what would take a module's place gives the numbers that the module gives.

A copy of the module with random weights, on the CPU in float64, must give the same by its class's forward and by ours,
in eval and in training mode. Attention is tried once more, in float32, on as many tokens as the model takes: it may
look back no further than a window. One trial serves all modules of a class and shape: `key` says which those are.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastgpt import private
from fastgpt.modules import Swap, class_forward, own_type, swap_of, swapped_class
from fastgpt.swap.layers import aside

_TOKENS = 16  # the vocabulary and context of a whole model's trial
_LONGEST = 2048  # tokens of attention's second trial at most: its scores take the square of them
_CONTEXTS = ("block_size", "n_positions", "max_position_embeddings", "context_length", "n_ctx")
_DROPOUT = 0.25  # of a trial in training, so that its place shows


def _above(ones: Tensor) -> Tensor:
    return ones.triu(1)


_LOWER_OR_UPPER = (torch.tril, _above)  # where a mask whose numbers are not known says where to look, or where not to


def key(module: nn.Module, swap: Swap) -> tuple:
    """The same for modules that one trial serves: of one class, shape, settings and contents of buffers."""
    shapes = tuple((name, tuple(parameter.shape)) for name, parameter in module.named_parameters())
    buffers = tuple((name, _bytes(buffer)) for name, buffer in module.named_buffers())
    parts = tuple((own_type(part), "fastgpt_swap" in part.__dict__, *_settings(part)) for part in module.modules())
    return (shapes, buffers, parts, swap.function, swap.names, swap.gelu)


def _settings(module: nn.Module) -> list[tuple]:
    """The numbers and words that may change what the module computes; transformers' own forwards do not ask for their
    place among their like."""
    place = "layer_idx" if own_type(module).forward.__module__.startswith("transformers.") else None
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


def why_not(module: nn.Module, swap: Swap, rows: int) -> str | None:
    """Why the swap won't do for modules like this one: other numbers, or an error. None if it will.

    rows: of the largest embedding in the model, which has that many tokens or places; 0 where there is none.
    """
    if swap.width == 0:
        return None
    why = _why_not_at_first(module, swap)
    if why is None and swap.flag == "attention":
        masks = _LOWER_OR_UPPER if any(buffer.is_meta for buffer in module.buffers()) else _LOWER_OR_UPPER[:1]
        found = [_looks_back_less(module, swap, rows, mask) for mask in masks]
        return None if None in found else found[0]
    return why


def _why_not_at_first(module: nn.Module, swap: Swap) -> str | None:
    if not any(buffer.is_meta for buffer in module.buffers()):
        why = _tried(module, swap)
        if why is None and any(map(_is_empty, module.buffers())):  # which may be filled later
            why = _tried(module, swap, fills=True)
        return why
    # what a buffer on the meta device will hold is not known: a mask may say where to look, or where not to
    lower, upper = (_tried(module, swap, mask) for mask in _LOWER_OR_UPPER)
    return lower and upper and lower


def windows(module: nn.Module) -> list[int]:
    """What its settings, or those of its config, call a window."""
    owners = module.__dict__, getattr(module.__dict__.get("config"), "__dict__", {})
    named = [value for owner in owners for name, value in owner.items() if "window" in name]
    return [value for value in named if isinstance(value, int) and not isinstance(value, bool)]


def _looks_back_less(module: nn.Module, swap: Swap, rows: int, mask: Callable[[Tensor], Tensor]) -> str | None:
    """Why attention of as many tokens as it takes is not ours: each row of the result must agree by itself, for a
    window may be one token short of them."""
    owners = module.__dict__, getattr(module.__dict__.get("config"), "__dict__", {})
    said = [owner.get(name) for owner in owners for name in _CONTEXTS]
    squares = [b.shape[-1] for b in module.buffers() if b.dim() > 1 and b.shape[-1] == b.shape[-2] > 1]
    limits = [*squares, *(value for value in said if isinstance(value, int) and value > 0)]
    time = min([*limits, max(rows or _LONGEST, _TOKENS), _LONGEST])
    kind = own_type(module).__name__
    beyond = [window for window in windows(module) if _LONGEST <= window < min(limits, default=rows)]
    if beyond:
        return f"this {kind} has a window of {beyond[0]}, and a trial has no more than {_LONGEST} tokens"
    whose = "a copy of it"
    try:
        with aside(), torch.no_grad():
            torch.default_generator.manual_seed(0)
            twin = _twin(module, swap, mask, False).float().eval()
            x = torch.randn(1, time, swap.width, dtype=torch.float32, device="cpu")
            whose = "its own forward"
            expected = class_forward(twin, x)
            whose = "fastgpt's"
            actual = twin.fastgpt_swap.function(twin, twin.fastgpt_swap, x)
            a, e = (t[0] if isinstance(t, tuple) else t for t in (actual, expected))
            if not bool(((a - e).norm(dim=-1) <= 3e-5 * e.norm(dim=-1)).all()):
                return f"this {kind} computes something else of {time} tokens, as with a window"
    except Exception as error:  # a stranger's code
        said_so = str(error).splitlines()[0] if str(error) else ""
        return f"a trial of {whose} on {time} tokens failed with {type(error).__name__}: {said_so}"
    return None


def _is_empty(buffer: Tensor) -> bool:
    """Whether it holds nothing but zeros, as what is counted or learned later does."""
    return buffer.is_floating_point() and buffer.numel() > 0 and not buffer.any()


def _tried(
    module: nn.Module, swap: Swap, mask: Callable[[Tensor], Tensor] = torch.tril, fills: bool = False
) -> str | None:
    kind = own_type(module).__name__
    whose = "a copy of it"
    try:
        with aside():
            torch.default_generator.manual_seed(0)
            twin, inputs = _twin(module, swap, mask, fills), _inputs(swap)
            for training in (False, True):
                twin.train(training)
                torch.default_generator.manual_seed(1)  # dropout, or a stranger's part, must draw the same both times
                whose = "its own forward"
                expected = class_forward(twin, *inputs)
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
        ids = torch.randint(0, _TOKENS, (2, 6), dtype=torch.int64, device="cpu")
        targets = ids.roll(1, dims=1)
        targets[0, 2] = -1
        return ids, targets
    x = torch.randn(2, 5, swap.width, dtype=torch.float64, device="cpu")
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


def _twin(module: nn.Module, swap: Swap, mask: Callable[[Tensor], Tensor], fills: bool) -> Any:
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
        kind = own_type(part)
        if part is not module and swap_of(part) is not None:
            kind = swapped_class(kind)
        memo[id(part)] = kind.__new__(kind)
        for name, value in part.__dict__.items():
            if name.endswith("_hooks") or "hooks_with_kwargs" in name or "hooks_always_called" in name:
                memo[id(value)] = type(value)()
        for parameter in private.parameters(part).values():
            if parameter is not None and id(parameter) not in memo:  # tied
                shape = list(parameter.shape)
                if swap.flag == "loss" and (isinstance(part, nn.Embedding) or part is getattr(module, "lm_head", None)):
                    shape[0] = _TOKENS
                memo[id(parameter)] = nn.Parameter(_random(shape), requires_grad=False)
        for buffer in private.buffers(part).values():
            if buffer is not None:
                unknown = buffer.is_meta or (fills and _is_empty(buffer))
                memo[id(buffer)] = _filled(buffer, mask) if unknown else buffer.detach().to("cpu", copy=True)
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
        return mask(torch.ones(buffer.shape, dtype=torch.float32, device="cpu")).to(buffer.dtype)
    return torch.randn(buffer.shape, dtype=torch.float32, device="cpu").to(buffer.dtype)


def _random(shape: list[int]) -> Tensor:
    """Values of the size that a trained weight's outputs have: neither lost beside others nor past a GELU's bend."""
    deviation = 0.5 if len(shape) < 2 else max(shape) ** -0.5
    return torch.randn(shape, dtype=torch.float64, device="cpu") * deviation + (len(shape) < 2)
