"""What takes the place of any LayerNorm, with the residual add before it, and of any linear-GELU-linear."""

import contextlib
from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgpt import ops
from fastgpt.modules import (
    Swap,
    class_forward,
    free_linear,
    is_linear,
    linear_weight,
    occupied,
    of_one_input,
    own_type,
    plain,
    swap_of,
)

# LayerNorm, and the residual add before it.


@of_one_input
def layer_norm(norm: Any, swap: Swap, x: Tensor) -> Tensor:
    weight, bias = _affine(norm, swap)
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


def _affine(norm: Any, swap: Swap) -> tuple[Any, Any]:
    weight, bias = swap.names
    return getattr(norm, weight), getattr(norm, bias)


_AFFINE = (["weight", "bias"], ["weight"], ["scale", "shift"])  # a norm's parameters; nanoGPT's bias may be None


def recognise_norm(module: Any) -> Swap | str | None:
    """nn.LayerNorm, nanoGPT's (weight, bias or none) and the book's (scale, shift)."""
    own = list(module._parameters)
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
    if module._modules or weight is None or weight.dim() != 1:
        return None
    return Swap(layer_norm, "layer_norm", "layer_norm", names, width=weight.shape[0])


def add_then_norm(
    branch: Tensor, x: Tensor, norm: Any, bias: Tensor | None, p: float, then: Any
) -> tuple[Tensor, Tensor]:
    """The stream x with dropout(branch + bias) added: its norm and itself, in one pass where the norm is ours.

    then: the module that takes the norm. In one pass that comes in the branch's dtype, which under autocast is not the
    stream's: only an MLP of ours, which casts it to that at once, is given it.
    """
    swap = swap_of(norm)
    alike = branch.dtype == x.dtype or swap_of(then) is not None
    if alike and swap is not None and swap.function is layer_norm:
        weight, shift = _affine(norm, swap)
        if plain(branch, x, weight, shift):
            eps = getattr(norm, "eps", 1e-5)
            return ops.add_layer_norm(branch, x, weight, shift, eps, x_bias=bias, dropout_p=p, backend=swap.backend)
    x = x + F.dropout(branch if bias is None else branch + bias, p)
    return norm(x), x


# Linear, GELU, Linear, and perhaps a dropout.


@of_one_input
def mlp(module: Any, swap: Swap, x: Tensor) -> Tensor:
    if tuple(module._modules) != swap.children:  # one was added to an nn.Sequential, or taken from it
        return class_forward(module, x)
    parts: list[Any] = [getattr(module, name) if name else None for name in swap.names]
    linear_in, linear_out, act, dropout = parts
    if act is not swap.act or occupied(act) or not (free_linear(linear_in) and free_linear(linear_out)):
        return class_forward(module, x)
    y = ops.gelu_mlp(
        x,
        linear_weight(linear_in),
        linear_in.bias,
        linear_weight(linear_out),
        linear_out.bias,
        approximate=swap.gelu,
        backend=swap.backend,
    )
    return y if dropout is None else dropout(y)


def recognise_mlp(module: nn.Module) -> Swap | str | None:
    """A module whose children are two linear layers, an activation and perhaps a dropout, under any names."""
    children = module._modules
    linears = [name for name, child in children.items() if is_linear(child)]
    dropouts = [name for name, child in children.items() if isinstance(child, nn.Dropout)]
    others = [name for name in children if name not in linears + dropouts]
    if {"c_fc", "c_proj"} <= children.keys() and len(linears) != 2:
        return "its layers are of another kind"
    if len(linears) != 2 or len(others) != 1 or len(dropouts) > 1 or module._parameters:
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
