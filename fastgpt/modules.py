"""What fastgpt puts in place of a live module's forward, and the parts that every family shares.

A swapped module keeps its class, its parameters and its hooks. Two plain attributes are set on the instance:
`fastgpt_swap`, a Swap that says what runs, and `forward`, a partial of `run` below. Both survive deepcopy and pickle,
and a module whose `fastgpt_swap` is taken away does what its class says, even where a stranger wrapped its forward.

A function of a Swap reads eps, scale, dropout and weights from the module at each call, and calls the class's own
forward for what it does not cover. A child is bypassed only where `free` says so: one with hooks, a parametrization, an
adapter around it, a quantised weight or a forward of its own is called.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from fastgpt import ops


class Swap(NamedTuple):
    """What runs in place of a module's forward: function(module, swap, *args, **kwargs)."""

    function: Callable
    flag: Literal["attention", "layer_norm", "mlp", "loss", "model"]  # the flag of accelerate() it belongs to
    what: str  # for the report
    names: tuple = ()  # of the module's children or parameters that the function asks for
    width: int = 0  # channels of the input, for the trial; 0 needs none
    gelu: Literal["tanh", "none"] = "tanh"
    act: Any = None  # the activation that was found to be that GELU
    backend: ops.Backend = "auto"


def run(module: nn.Module, /, *args, **kwargs):
    """The forward of a swapped module."""
    swap = module.__dict__.get("fastgpt_swap")
    if swap is None:
        return class_forward(module, *args, **kwargs)
    return swap.function(module, swap, *args, **kwargs)


def class_forward(module: nn.Module, *args, **kwargs):
    """What the module did before."""
    return type(module).forward(module, *args, **kwargs)


def of_one_input(function: Callable) -> Callable:
    """`function`(module, swap, x) for a class that may take more: a call of anything but x is the class's own."""

    @functools.wraps(function)
    def call(module: nn.Module, swap: Swap, /, *args, **kwargs):
        if kwargs or len(args) != 1:
            return class_forward(module, *args, **kwargs)
        return function(module, swap, *args)

    return call


def swap_of(module) -> Swap | None:
    """The module's Swap, where its forward is still ours and calling it would do nothing more."""
    if not isinstance(module, nn.Module) or occupied(module):
        return None
    return module.__dict__.get("fastgpt_swap")


def is_ours(forward) -> bool:
    return isinstance(forward, functools.partial) and forward.func is run


# What a module's call does beside its class's forward.


def occupied(module: nn.Module) -> str | None:
    """Why the module must be called, or None where its forward is all that a call does."""
    state = module.__dict__
    if (
        state["_forward_hooks"] or state["_forward_pre_hooks"] or state["_backward_hooks"]
        or state["_backward_pre_hooks"] or torch.nn.modules.module._has_any_global_hook()
    ):  # fmt: skip
        return "it has hooks"
    if "parametrizations" in state["_modules"]:
        return "it is parametrized"
    if state.get("_compiled_call_impl") is not None:
        return "it is compiled by itself"
    if "forward" in state and not is_ours(state["forward"]):
        return "it has a forward of its own"
    return None


_ORDINARY = (nn.Parameter, Tensor)


def plain(*tensors) -> bool:
    """Ordinary floating-point tensors: not quantised, not distributed, no other subclass. None is passed over."""
    for tensor in tensors:  # no generator: a layer asks a dozen times a step
        if tensor is not None and not (type(tensor) in _ORDINARY and tensor.is_floating_point()):
            return False
    return True


def own_type(module: nn.Module) -> Any:
    """The module's class as it was written: fully_shard puts one of its own in front."""
    kind = type(module)
    return kind.__mro__[2] if kind.__mro__[1].__name__ == "FSDPModule" else kind


def width_of(norm: Any) -> int | None:
    """Channels of a norm, by its first parameter; None where it has none."""
    parameter = next(norm.parameters(), None)
    return None if parameter is None or parameter.dim() != 1 else parameter.shape[0]


def is_linear(module) -> bool:
    """An nn.Linear, or a Conv1D, Hugging Face's linear layer with a weight of (in, out); not a subclass's forward."""
    if not isinstance(module, nn.Module):
        return False
    return type(module).forward is nn.Linear.forward or (
        own_type(module).__name__ == "Conv1D"
        and hasattr(module, "nf")
        and list(module._parameters) == ["weight", "bias"]
    )


def free_linear(module) -> bool:
    if not is_linear(module) or occupied(module):
        return False
    own = module._parameters  # quicker to look into than attributes
    return plain(*own.values()) if "weight" in own else plain(module.weight, module.bias)


def free_embedding(module: nn.Module) -> bool:
    return type(module).forward is nn.Embedding.forward and not occupied(module) and plain(module.weight)


def linear_weight(module: Any) -> Tensor:
    """(out, in): a Conv1D's is a view."""
    return module.weight if isinstance(module, nn.Linear) else module.weight.t()


def dropout_p(module) -> float | None:
    """The probability that an nn.Dropout applies now, 0 for an nn.Identity; None where it must be called."""
    if not isinstance(module, nn.Module) or occupied(module):
        return None
    if isinstance(module, nn.Dropout) and type(module).forward is nn.Dropout.forward:
        return float(module.p) if module.training else 0.0
    return 0.0 if type(module).forward is nn.Identity.forward else None
