"""One generator of views: the same numbers at other strides, drawn for each operand of a call by itself."""

import random
from collections.abc import Callable

import torch
from torch import Tensor


def _transposed(values: Tensor) -> Tensor:
    return _laid_out(values, range(values.dim())[::-1])


def _turned(values: Tensor) -> Tensor:
    """The last axis is still dense, the others lie the other way round."""
    return _laid_out(values, [*range(values.dim() - 1)[::-1], values.dim() - 1])


def _laid_out(values: Tensor, order) -> Tensor:
    order = list(order)
    return values.permute(order).contiguous().permute([order.index(axis) for axis in range(values.dim())])


def _sliced(values: Tensor) -> Tensor:
    """The middle of a larger tensor: rows are apart, and it begins far into its memory."""
    larger = torch.full([size + 3 + axis for axis, size in enumerate(values.shape)], 7, dtype=values.dtype)
    inside = larger.to(values.device)[tuple(slice(2, 2 + size) for size in values.shape)]
    return inside.copy_(values)


def _spaced(values: Tensor) -> Tensor:
    """Every third of the last axis, from the second on."""
    return values.repeat_interleave(3, dim=-1)[..., 1::3]


def _expanded(values: Tensor) -> Tensor:
    """The first slice again and again, by a stride of 0."""
    return values[:1].expand(values.shape)


def _alike(values: Tensor) -> Tensor:
    """The first element again and again, by strides of 0, as the gradient of a sum arrives."""
    return values[(slice(0, 1),) * values.dim()].expand(values.shape)


def _far(values: Tensor) -> Tensor:
    """The last axis spread until its end lies past an offset of 32 bits; its memory is holes that no one touches."""
    if not values.is_floating_point() or values.element_size() > 4 or values.shape[-1] < 2:
        return _spaced(values)
    filling = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = False  # with NaN, which would make all pages real
    apart, rows = -(-(2**31) // (values.shape[-1] - 1)), values.numel() // values.shape[-1]
    try:
        holes = torch.empty(2**31 + apart + rows, dtype=values.dtype, device=values.device)
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = filling
    strides = (*values[..., 0].contiguous().stride(), apart)
    return holes.as_strided(values.shape, strides, 1).copy_(values)


DENSE: dict[str, Callable[[Tensor], Tensor]] = {  # the elements of a row are adjacent
    "contiguous": lambda values: values.contiguous(),
    "turned": _turned,
    "sliced": _sliced,
    "expanded": _expanded,
}
KINDS = {**DENSE, "transposed": _transposed, "spaced": _spaced, "alike": _alike, "far": _far}


def drawn(name: str, number: int, operands: dict[str, Tensor], dense: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """`operands`, each as a view of some kind: of the draws 0 to len(KINDS) - 1 of a name each operand gets every kind
    once, in an order of its own. dense: the operands whose rows must be in one piece. What is expanded changes its
    numbers, so compare with contiguous copies of what is returned."""
    views = {}
    for operand, values in operands.items():
        kinds = DENSE if operand in dense else KINDS
        order = random.Random(f"{name} {operand}").sample(sorted(kinds), len(kinds))
        views[operand] = kinds[order[number % len(order)]](values) if values.dim() else values
    return views
