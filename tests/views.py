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
    sizes = [size + 3 + axis for axis, size in enumerate(values.shape)]
    larger = torch.ones(sizes, dtype=values.dtype, device=values.device)
    return larger[tuple(slice(2, 2 + size) for size in values.shape)].copy_(values)


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
    """The last axis spread until its end lies past an offset of 32 bits: 4 GB, of holes that no one touches."""
    if values.dtype != torch.float16 or values.shape[-1] < 2 or values.is_cuda:
        return _spaced(values)  # a GPU's memory has no holes
    return spread(values, values.dim() - 1)


def spread(values: Tensor, axis: int) -> Tensor:
    """A copy whose slices of `axis` lie so far apart that the last begins 2^31 elements after the first."""
    filling = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = False  # with NaN, which would make all pages real
    apart = -(-(2**31) // (values.shape[axis] - 1))
    try:
        holes = torch.empty(2**31 + apart + values.numel(), dtype=values.dtype, device=values.device)
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = filling
    strides = list(values.select(axis, 0).contiguous().stride())
    strides.insert(axis, apart)
    return holes.as_strided(values.shape, strides, 1).copy_(values)


WRITABLE: dict[str, Callable[[Tensor], Tensor]] = {  # the elements of a row are adjacent, and every place is its own
    "contiguous": lambda values: values.clone(memory_format=torch.contiguous_format),
    "turned": _turned,
    "sliced": _sliced,
}
DENSE = {**WRITABLE, "expanded": _expanded}
KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    **DENSE,
    "transposed": _transposed,
    "spaced": _spaced,
    "alike": _alike,
    "far": _far,
}


def drawn(
    name: str,
    number: int,
    operands: dict[str, Tensor],
    dense: tuple[str, ...] = (),
    written: tuple[str, ...] = (),
    far: bool = True,
) -> dict[str, Tensor]:
    """`operands`, each as a view of some kind: of the draws 0 to len(KINDS) - 1 of a name each operand gets every kind
    once, in an order of its own. dense, written: the operands whose rows must be in one piece, and those that the call
    writes to as well. far: whether some may be, in draws whose floats are all rounded to float16. What is expanded
    changes its numbers: compare with contiguous copies of what is returned."""
    chosen = {}
    for operand in operands:
        kinds = [*(WRITABLE if operand in written else DENSE if operand in dense else KINDS)]
        kinds = random.Random(f"{name} {operand} {number // len(kinds)}").sample(kinds, len(kinds))
        chosen[operand] = kinds[number % len(kinds)]
        if chosen[operand] == "far" and not far:
            chosen[operand] = "contiguous"
    if "far" in chosen.values():
        operands = {key: each.half() if each.is_floating_point() else each for key, each in operands.items()}
    return {key: KINDS[chosen[key]](each) for key, each in operands.items()}
