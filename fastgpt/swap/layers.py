"""What takes the place of any LayerNorm, and of any linear-GELU-linear."""

import contextlib
from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgpt import ops, private
from fastgpt.modules import (
    Swap,
    class_forward,
    dropout_p,
    free_linear,
    is_linear,
    linear_weight,
    occupied,
    of_one_input,
    own_type,
    plain,
    swap_of,
)

# LayerNorm.


@of_one_input
def layer_norm(norm: Any, swap: Swap, x: Tensor) -> Tensor:
    weight, bias = affine(norm, swap)
    if not plain(x, weight, bias):
        return class_forward(norm, x)
    if x.dtype.itemsize < 4:
        x = x.to(_dtype_of_its_class(swap, x, weight, bias))
    return ops.layer_norm(x, weight, bias, getattr(norm, "eps", 1e-5), backend=swap.backend)


def _dtype_of_its_class(swap: Swap, x: Tensor, weight: Tensor, bias: Tensor | None) -> torch.dtype:
    """Of what the class's own forward makes of x in half precision."""
    if swap.names[0] == "scale":  # the book's is written out: scale * normed + shift
        return torch.promote_types(
            x.dtype, weight.dtype if bias is None else torch.promote_types(weight.dtype, bias.dtype)
        )
    device = x.device.type
    return torch.float32 if device != "cpu" and torch.is_autocast_enabled(device) else x.dtype  # a CPU's leaves norms


def affine(norm: Any, swap: Swap) -> tuple[Any, Any]:
    """Its weight and bias."""
    weight, bias = swap.names
    return getattr(norm, weight), getattr(norm, bias)


_AFFINE = (["weight", "bias"], ["weight"], ["scale", "shift"])  # a norm's parameters; nanoGPT's bias may be None


def recognise_norm(module: Any) -> Swap | str | None:
    """nn.LayerNorm, nanoGPT's (weight, bias or none) and the book's (scale, shift)."""
    own = list(private.parameters(module))
    if own_type(module).forward is nn.LayerNorm.forward:
        if len(module.normalized_shape) != 1:
            return f"it normalises {len(module.normalized_shape)} axes"
        if module.weight is None:
            return "it has no weight"
    elif own not in _AFFINE or not own_type(module).__name__.endswith("LayerNorm"):
        return None
    if own == ["weight"] and getattr(module, "bias", ...) is not None:  # T5's has none at all and takes no mean off
        return None
    names = ("scale", "shift") if own == ["scale", "shift"] else ("weight", "bias")
    weight = getattr(module, names[0])
    if private.children(module) or weight is None or weight.dim() != 1:
        return None
    return Swap(layer_norm, "layer_norm", "layer_norm", names, width=weight.shape[0])


# Linear, GELU, Linear, and perhaps a dropout.


@of_one_input
def mlp(module: Any, swap: Swap, x: Tensor) -> Tensor:
    parts = _parts(module, swap)
    if parts is None:
        return class_forward(module, x)
    linear_in, linear_out, dropout = parts
    y = _gelu_mlp(swap, x, linear_in, linear_out, linear_out.bias)
    return y if dropout is None else dropout(y)


def mlp_branch(module: Any, x: Tensor) -> tuple[Tensor, Tensor | None, float] | None:
    """An MLP of ours in three: what comes before the bias of its last layer, that bias, and the dropout's probability.
    None for a module that must be called."""
    swap = swap_of(module)
    parts = _parts(module, swap) if swap is not None and swap.function is mlp else None
    if swap is None or parts is None:
        return None
    linear_in, linear_out, dropout = parts
    p = 0.0 if dropout is None else dropout_p(dropout)
    return None if p is None else (_gelu_mlp(swap, x, linear_in, linear_out, None), linear_out.bias, p)


def _parts(module: Any, swap: Swap) -> tuple[Any, Any, Any] | None:
    """Its linear layers and its dropout, which may be None; None where they are no longer what was found."""
    if tuple(private.children(module)) != swap.children:  # one was added to an nn.Sequential, or taken from it
        return None
    linear_in, linear_out, act, dropout = (getattr(module, name) if name else None for name in swap.names)
    if act is not swap.act or occupied(act) or not (free_linear(linear_in) and free_linear(linear_out)):
        return None
    return linear_in, linear_out, dropout


def _gelu_mlp(swap: Swap, x: Tensor, linear_in: Any, linear_out: Any, last_bias: Tensor | None) -> Tensor:
    return ops.gelu_mlp(
        x,
        linear_weight(linear_in),
        linear_in.bias,
        linear_weight(linear_out),
        last_bias,
        approximate=swap.gelu,
        backend=swap.backend,
    )


def recognise_mlp(module: nn.Module) -> Swap | str | None:
    """A module whose children are two linear layers, an activation and perhaps a dropout, under any names."""
    children = private.children(module)
    linears = [name for name, child in children.items() if is_linear(child)]
    dropouts = [name for name, child in children.items() if isinstance(child, nn.Dropout)]
    others = [name for name in children if name not in linears + dropouts]
    if {"c_fc", "c_proj"} <= children.keys() and len(linears) != 2:
        return "its layers are of another kind"
    if len(linears) != 2 or len(others) != 1 or len(dropouts) > 1 or private.parameters(module):
        return None
    first, last = (linear_weight(children[name]) for name in linears)
    act = children[others[0]]
    if act is None or first.dim() != 2 or last.dim() != 2 or first.shape[0] != last.shape[1]:
        return None
    if first.shape != last.t().shape:
        return f"its output is {last.shape[0]} wide, its input {first.shape[1]}"
    gelu = None if list(act.parameters()) else gelu_kind(act)
    if gelu is None:
        return f"its activation, {type(act).__name__}, is no GELU"
    names = (*linears, others[0], dropouts[0] if dropouts else None)
    return Swap(mlp, "mlp", f"gelu_mlp ({gelu})", names, first.shape[1], gelu, act, children=tuple(children))


def gelu_kind(act: nn.Module) -> Literal["tanh", "none"] | None:
    """Which GELU an activation computes, by its values: GPT-2's or the exact one; None for anything else."""
    with aside():
        wide: Any = dict(dtype=torch.float64, device="cpu")
        points = torch.cat((torch.linspace(-6, 6, 241, **wide), torch.tensor([-40.0, -13.0, 13.0, 40.0], **wide)))
        try:
            values = type(act).forward(act, points.clone())
        except Exception:  # whatever it is, it takes no tensor alone
            return None
        if not isinstance(values, Tensor) or values.shape != points.shape:
            return None
        kinds: tuple[Literal["tanh", "none"], ...] = ("tanh", "none")
        for kind in kinds:  # the two differ by 5e-4; a constant kept in float32 makes 1e-7
            if (values - F.gelu(points, approximate=kind)).abs().max() < 1e-6:
                return kind
        return None


@contextlib.contextmanager
def aside() -> Iterator[None]:
    """Where a trial computes: on the CPU, and in float32 where nothing is said, whatever the user's defaults are.

    What is drawn comes from the CPU's generator, which is put back: torch.manual_seed would move those of all devices.
    """
    dtype, generator = torch.get_default_dtype(), torch.default_generator
    drawn = generator.get_state()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.no_grad(), torch.device("cpu"), torch.autocast("cpu", enabled=False):
            yield
    finally:
        torch.set_default_dtype(dtype)
        generator.set_state(drawn)
