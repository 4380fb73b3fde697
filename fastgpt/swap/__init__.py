"""accelerate(model): fastgpt's functions in place of a live model's own, on the instance; restore(model) undoes it.

Nothing is recognised by name alone. A module that looks like one of the families' is tried: a copy of it with random
weights, on the CPU in float64, must give the same numbers by its class's forward and by ours, in eval and in training
mode; else it is left as it is, and the report says so. One trial serves all modules of a class and shape.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

from fastgpt import modules, ops, private
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
    is touched. A module that is served gets a class of its own, a subclass of its class with the same name. Known are
    Hugging Face's GPT-2, nanoGPT and the book's models, in any model that holds them, and any nn.LayerNorm and
    linear-GELU-linear. Where no kernel can run, as on a CPU, a module does what its class says, for that is no slower,
    unless backend="torch" asks for ours. loss=True lets a model that computes its own loss do so without ever holding
    all logits: while it trains, it then returns None in their place. A second call replaces the first. A class that is
    set later, or whose forward is patched later, is heard: that module then does what its class says.
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
    largest = max((m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)), default=0)
    for name, module, found in reversed(all_found):  # children first: a block's trial asks for them
        kind = modules.own_type(module).__name__
        if isinstance(found, str):
            rows.append(Row(name, kind, None, found))
        elif found is not None and flags[found.flag]:
            losses += found.flag == "loss"
            why = _install(module, found._replace(backend=backend), tried, largest)
            rows.append(Row(name, kind, None if why else found.what, why))
    if loss and not losses:
        why = "loss=True was asked for, and it holds no model that computes its own loss"
        rows.append(Row("", modules.own_type(model).__name__, None, why))
    served = any(row.now for row in rows)
    return Report(tuple(reversed(rows)), _note(model, losses) if served and backend == "auto" else "")


def _note(model: nn.Module, losses: int) -> str:
    """What is to be said where the model is now."""
    weight = next(model.parameters(), None)
    if weight is None or weight.is_meta or ops.kernels_run_on(weight.device):
        return ""
    but = ", but for the loss" if losses else ""
    where = f"on {weight.device}, where no kernel runs"
    if weight.is_cuda:
        where += f" ({ops.backend_in_words('auto', weight).partition(': ')[2]})"
    return f"while the model is {where}, each module does what its class says{but}"


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
    if "forward" in module.__dict__ and modules.is_ours(module, module.__dict__["forward"]):
        del module.__dict__["forward"]
    if "fastgpt_made" in type(module).__dict__:  # else it is below a class that fully_shard made, and does nothing
        module.__class__ = type(module).__mro__[2]


def _put_in(module: nn.Module, swap: Swap) -> None:
    module.__dict__["fastgpt_swap"] = swap
    if not modules.runs(module):
        module.__class__ = modules.swapped_class(type(module))


def _install(module: nn.Module, swap: Swap, tried: dict, largest: int) -> str | None:
    """Put the swap in, or say why not."""
    if "forward" in module.__dict__:
        return "it has a forward of its own"
    if "parametrizations" in private.children(
        module
    ):  # whose removal looks for its own class right behind the module's
        return "it is parametrized"
    if hasattr(type(module), "fastgpt_made") and modules.made_of(type(module)) is None:
        return "its class was made of a swapped module's"
    key = trial.key(module, swap)
    if key not in tried:
        tried[key] = trial.why_not(module, swap, largest)
    if tried[key] is None:
        _put_in(module, swap)
    return tried[key]
