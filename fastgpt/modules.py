"""What fastgpt puts in place of a live module's forward, and the parts that every family shares.

A swapped module keeps its parameters and its hooks. It gets an attribute, `fastgpt_swap`, a Swap that says what runs,
and the class that `swapped_class` makes of its own: a subclass with the same name, whose forward runs the Swap. Nothing
on the instance holds the instance, so it is freed with its last name, and a copy of any kind, DataParallel's replicas
among them, runs on its own weights. A class that is set later, or whose forward is patched later, is heard. A module
whose `fastgpt_swap` is taken away does what its class says, even where a stranger wrapped its forward.

A function of a Swap reads eps, scale, dropout and weights from the module at each call, and calls the class's own
forward for what it does not cover. A child is bypassed only where `free` says so: one with hooks, a parametrization, an
adapter around it, a quantised weight or a forward of its own is called.
"""

import functools
import inspect
import types
import weakref
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgpt import ops, private


class Swap(NamedTuple):
    """What runs in place of a module's forward: function(module, swap, *args, **kwargs)."""

    function: Callable
    flag: Literal["attention", "layer_norm", "mlp", "loss", "model"]  # the flag of accelerate() it belongs to
    what: str  # for the report
    names: tuple = ()  # of the module's children or parameters that the function asks for
    width: int = 0  # channels of the input, for the trial; 0 needs none
    gelu: Literal["tanh", "none"] = "tanh"
    act: Any = None  # the activation that was found to be that GELU
    children: tuple[str, ...] = ()  # all names of the MLP's children, in order
    backend: ops.Backend = "auto"


class _Swapped:
    """What the classes of swapped modules have in front of the module's own."""

    def __init_subclass__(cls, **_):
        """Not what a stranger's class does with its subclasses, as entering them in a list, but for one of
        transformers: it checkpoints the forward of a layer's very class, and wraps that of each subclass for it."""
        if any(each.__name__ == "GradientCheckpointingLayer" for each in cls.__mro__):
            super().__init_subclass__()

    def __reduce_ex__(self, protocol):
        """As the module's own class, and on the other side made swapped again: the subclass has no name to import."""
        reduced = super().__reduce_ex__(protocol)
        made = made_of(type(self))
        if made is None or isinstance(reduced, str):
            return reduced
        function, args, *state = reduced
        function, *args = (made.plain if each is type(self) else each for each in (function, *args))
        return (_swapped_again, (function, *args), *state)


def _swapped_again(function: Callable, *args) -> Any:
    module = function(*args)
    if not isinstance(module, _Swapped):
        module.__class__ = swapped_class(type(module))
    return module


class Made(NamedTuple):
    """What the class of a swapped module says of itself."""

    forward: Callable  # its own, and what __init_subclass__ put around it
    plain: Any  # the class whose forward that stands for
    written: Callable  # what `plain`'s forward was


_CLASSES: weakref.WeakValueDictionary[tuple, type] = weakref.WeakValueDictionary()


def swapped_class(kind: Any) -> Any:
    """A subclass of the module class `kind`, named as it is, whose forward runs the module's Swap.

    While the module has no Swap, once the forward of `kind` is another one than now, and where no kernel can run, it
    runs that of `kind`.
    """
    made = made_of(kind)
    plain: Any = kind if made is None else made.plain
    written = plain.forward
    found = _CLASSES.get((kind, written))
    if found is not None:
        return found

    def forward(self, /, *args, **kwargs):
        swap = self.__dict__.get("fastgpt_swap")
        if swap is None or plain.forward is not written or _left(swap, args, kwargs):
            return plain.forward(self, *args, **kwargs)
        return swap.function(self, swap, *args, **kwargs)

    # of its own code, by which torch.compile counts; and without __wrapped__, past which Accelerate would unwrap it
    own = types.FunctionType(forward.__code__.replace(), globals(), "forward", None, forward.__closure__)
    own.__dict__["__signature__"] = inspect.signature(written)
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    found = _CLASSES[kind, written] = type(kind)(kind.__name__, (_Swapped, kind), {**names, "forward": own})
    found.fastgpt_made = Made(found.forward, plain, written)
    return found


def _left(swap: Swap, args: tuple, kwargs: dict) -> bool:
    """Whether a call is left to the module's own forward: where no kernel can run, ours would win no time. The loss
    is not left, for it wins memory on any device."""
    if swap.backend != "auto" or swap.flag == "loss":
        return False
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            return not ops.kernels_run_on(value.device)
    return False


def made_of(kind: Any) -> Made | None:
    """Where the forward of a class is ours, not a stranger's that was written over it."""
    made = getattr(kind, "fastgpt_made", None)
    return made if made is not None and kind.forward is made.forward else None


def is_ours(module: nn.Module, forward) -> bool:
    """Whether a forward on the instance is but its class's, and that ours: as Accelerate leaves it once unwrapped."""
    made = made_of(type(module))
    return made is not None and getattr(forward, "__func__", None) is made.forward and forward.__self__ is module


def class_forward(module: nn.Module, *args, **kwargs):
    """What the module did before."""
    made = getattr(type(module), "fastgpt_made", None)
    return (type(module) if made is None else made.plain).forward(module, *args, **kwargs)


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
    swap = module.__dict__.get("fastgpt_swap")
    return swap if swap is not None and runs(module) else None


def works(module, function: Callable, x: Tensor) -> bool:
    """Whether a call of the module with x would run `function` of ours and do nothing more."""
    swap = swap_of(module)
    return swap is not None and swap.function is function and not _left(swap, (x,), {})


def runs(module: nn.Module) -> bool:
    """Whether a call of the module runs its Swap: its class is ours, and the forward it stands for is as it was."""
    made = made_of(type(module))
    return made is not None and made.plain.forward is made.written


# What a module's call does beside its class's forward.


def occupied(module: nn.Module) -> str | None:
    """Why the module must be called, or None where its forward is all that a call does."""
    state = module.__dict__
    if private.has_hooks(state):
        return "it has hooks"
    if "parametrizations" in private.children(module):
        return "it is parametrized"
    if private.is_compiled(state):
        return "it is compiled by itself"
    if "forward" in state and not is_ours(module, state["forward"]):
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
    """The module's class as it was written: fully_shard puts one of its own in front, as accelerate does."""
    made = made_of(type(module))
    kind: Any = type(module) if made is None else made.plain
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
        and list(private.parameters(module)) == ["weight", "bias"]
    )


def free_linear(module) -> bool:
    if not is_linear(module) or occupied(module):
        return False
    own = private.parameters(module)  # quicker to look into than attributes
    return plain(*own.values()) if "weight" in own else plain(module.weight, module.bias)


def free_embedding(module: nn.Module) -> bool:
    return type(module).forward is nn.Embedding.forward and not occupied(module) and plain(module.weight)


def linear_weight(module: Any) -> Tensor:
    """(out, in): a Conv1D's is a view."""
    return module.weight if isinstance(module, nn.Linear) else module.weight.t()


def packed_projection(linear: Any, x: Tensor, backend: Any) -> tuple[Tensor, Tensor | None]:
    """A linear layer's queries, keys and values (B, T, 3C) for causal_attention_qkv alone, and what to give that as
    qkv_bias: the layer's bias, where it was added as a constant and attention's kernels can make its gradient."""
    if attention_makes_bias(linear, x.device, backend):
        return F.linear(x, linear_weight(linear), linear.bias.detach()), linear.bias
    return linear(x), None


def attention_makes_bias(linear: Any, device: torch.device, backend: Any) -> bool:
    """Whether attention's kernels are to make the gradient of its projection's bias."""
    kernels = backend in ("auto", "triton") and torch.is_grad_enabled() and ops.kernels_run_on(device)
    if kernels and not ops.watcher() and free_linear(linear):
        return linear.bias is not None and linear.bias.requires_grad
    return False


def dropout_p(module) -> float | None:
    """The probability that an nn.Dropout applies now, 0 for an nn.Identity; None where it must be called."""
    if not isinstance(module, nn.Module) or occupied(module):
        return None
    if isinstance(module, nn.Dropout) and type(module).forward is nn.Dropout.forward:
        return float(module.p) if module.training else 0.0
    return 0.0 if type(module).forward is nn.Identity.forward else None


def bare(kind: Any, **own: Any) -> Any:
    """A module of this class in eval mode with these attributes alone, tensors as parameters without a gradient. Its
    own __init__ would fill parameters first, which takes longer than a small model's first token, on "meta" too."""
    module = kind.__new__(kind)
    nn.Module.__init__(module)
    for name, value in dict(own, training=False).items():
        if isinstance(value, Tensor):
            private.parameters(module)[name] = nn.Parameter(value.detach(), requires_grad=False)
        else:
            (private.children(module) if isinstance(value, nn.Module) else module.__dict__)[name] = value
    return module
