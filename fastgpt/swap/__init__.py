"""accelerate(model): fastgpt's functions in place of a live model's own, on the instance; restore(model) undoes it.

Nothing is recognised by name alone. A module that looks like one of the families' is tried: a copy of it with random
weights, on the CPU in float64, must give the same numbers by its class's forward and by ours, in eval and in training
mode; else it is left as it is, and the report says so. One trial serves all modules of a class and shape.
"""

import contextlib
import functools
import inspect
from collections.abc import Iterator
from typing import Any

from torch import nn

from fastgpt import modules, ops
from fastgpt.modules import Swap
from fastgpt.swap import book, gpt2, layers, nanogpt, trial
from fastgpt.swap.report import Report, Row

_RECOGNISE = (gpt2.recognise, nanogpt.recognise, book.recognise, layers.recognise_mlp, layers.recognise_norm)


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
    is touched. Known are Hugging Face's GPT-2, nanoGPT and the book's models, in any model that holds them, and any
    nn.LayerNorm and linear-GELU-linear. loss=True lets a model that computes its own loss do so without ever holding
    all logits: while it trains, it then returns None in their place. A second call replaces the first. nn.DataParallel
    is not served: its replicas would run on the first one's weights.
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
        kind = modules.own_type(module).__name__
        if isinstance(found, str):
            rows.append(Row(name, kind, None, found))
        elif found is not None and flags[found.flag]:
            losses += found.flag == "loss"
            why = _install(module, found._replace(backend=backend), tried)
            rows.append(Row(name, kind, None if why else found.what, why))
    if loss and not losses:
        why = "loss=True was asked for, and it holds no model that computes its own loss"
        rows.append(Row("", modules.own_type(model).__name__, None, why))
    return Report(tuple(reversed(rows)))


def _recognised(module: nn.Module) -> Swap | str | None:
    return next((found for recognise in _RECOGNISE if (found := recognise(module)) is not None), None)


def restore(model: nn.Module) -> None:
    """Undo accelerate: every module does again what its class says. Another model stays as it is."""
    for module in model.modules():
        _put_back(module, {})


@contextlib.contextmanager
def accelerated(model: nn.Module, **options) -> Iterator[nn.Module]:
    """accelerate(model, **options) for the length of a with block; then the model is as it was before."""
    before = {
        module: {name: module.__dict__[name] for name in ("forward", "fastgpt_swap") if name in module.__dict__}
        for module in model.modules()
    }
    try:
        accelerate(model, **options)
        yield model
    finally:
        for module in model.modules():
            _put_back(module, before.get(module, {}))


def _put_back(module: nn.Module, state: dict) -> None:
    """Take our two attributes away, or set them as they were. A forward that a stranger wrapped around ours stays."""
    module.__dict__.pop("fastgpt_swap", None)
    if modules.is_ours(module.__dict__.get("forward")):
        del module.__dict__["forward"]
    if "fastgpt_swap" in state:
        module.__dict__["fastgpt_swap"] = state["fastgpt_swap"]
        module.__dict__.setdefault("forward", state["forward"])


def _install(module: nn.Module, swap: Swap, tried: dict) -> str | None:
    """Set the module's two attributes, or say why not."""
    state = module.__dict__
    if "forward" in state:
        return "it has a forward of its own"
    key = trial.key(module, swap)
    if key not in tried:
        tried[key] = trial.why_not(module, swap)
    if tried[key] is None:
        state["fastgpt_swap"] = swap
        state["forward"] = forward = functools.partial(modules.run, module)
        forward.__dict__["__signature__"] = _signature(module)
    return tried[key]


def _signature(module: nn.Module) -> inspect.Signature:
    """Of the class's forward, for those who ask what it takes, as transformers' Trainer and generate() do.

    Without annotations, and with plain defaults alone, so that it can be pickled.
    """
    parameters = list(inspect.signature(modules.own_type(module).forward).parameters.values())[1:]
    empty = inspect.Parameter.empty
    plain = (type(None), bool, int, float, str, type)
    return inspect.Signature(
        [p.replace(annotation=empty, default=p.default if isinstance(p.default, plain) else None) for p in parameters]
    )
