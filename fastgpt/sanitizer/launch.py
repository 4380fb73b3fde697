"""What is known of a running launch: where its arguments lie, which program runs, and who touched what."""

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
from triton.runtime import interpreter

from fastgpt.sanitizer.turns import Turns

_TAG_SHIFT = 48  # user addresses have 47 bits; the number of the argument that a pointer came from rides above them
_ADDRESS_BITS = np.uint64((1 << _TAG_SHIFT) - 1)
_GRID_LIMITS = (2**31 - 1, 65535, 65535)
_RACES = (("store", "store"), ("load", "store"), ("atomic", "store"), ("atomic", "load"))
_FOLD_LANES = 1 << 22  # so many accesses are noted before they are folded: some 100 MB

_Touched = tuple[np.ndarray, np.ndarray, np.ndarray]  # sorted addresses, the lowest and the highest program at each


class SanitizerError(AssertionError):
    """What a kernel did that is wrong on a GPU; the message begins with the kernel's name."""


class Launch:
    """A running launch: where its arguments lie, which program runs, who touched what."""

    def __init__(self, kernel: str, arguments: dict[str, Any], order: int | None, behind: Sequence[Any] = ()):
        """behind: tensors that pointers may lead to which are made of numbers."""
        self.kernel, self.arguments, self.order = kernel, arguments, order
        self.views: list[_View] = [_View(tensor) for tensor in behind]
        self.behind = len(behind)
        self.turns: Turns | None = None  # where the programs run by turns
        self.footprints = {kind: _Footprint() for kind in ("load", "store", "atomic")}
        self.patched: set[int] = set()  # modules in which tl is the interpreter's
        self.patches: Any = None
        self.program = -1  # its place in `programs`

    def fail(self, finding: str) -> None:
        where = "" if self.program < 0 else f" (program {self.programs[self.program]})"
        raise SanitizerError(f"{self.kernel}: {finding}{where}")

    def begin(self, grid: tuple[int, ...]) -> None:
        if min(grid) <= 0:
            self.fail(f"the grid {grid} is empty, which CUDA refuses; the launcher must return before")
        if any(size > limit for size, limit in zip(grid, _GRID_LIMITS, strict=True)):
            self.fail(f"the grid {grid} is past CUDA's limits of {_GRID_LIMITS}")
        self.programs = list(np.ndindex(*grid))
        if self.order is not None:
            random.Random(self.order).shuffle(self.programs)

    def next_program(self) -> tuple[int, ...]:
        self.program += 1
        return self.programs[self.program]

    def tag(self, tensor: Any) -> np.uint64:
        """Numbers begin with 1: 0 is left to pointers that no argument gave."""
        self.views.append(_View(tensor))
        return np.uint64(len(self.views) << _TAG_SHIFT)

    def tagged(self, addresses: np.ndarray) -> np.ndarray:
        """Pointers made of numbers: each with the tag of the tensor behind them that it lies in, where there is one."""
        tagged, plain = addresses.copy(), (addresses & _ADDRESS_BITS).astype(np.int64)
        for number, view in enumerate(self.views[: self.behind]):
            inside = view.holds(plain, 1) & (tagged >> np.uint64(_TAG_SHIFT) == 0)
            tagged[inside] |= np.uint64((number + 1) << _TAG_SHIFT)
        return tagged

    def access(self, kind: str, pointers: Any, mask: Any = None) -> Any:
        """Note and check an access; the pointers come back without tags, fit to be followed."""
        active = True if mask is None else np.asarray(mask.data, bool)  # of integers, where a scalar took part in it
        lanes = pointers.data[np.broadcast_to(active, pointers.data.shape)]
        if lanes.size:
            addresses = (lanes & _ADDRESS_BITS).astype(np.int64)
            width = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
            self.refuse_out_of_bounds(kind, lanes >> np.uint64(_TAG_SHIFT), addresses, width)
            self.footprints[kind].add(addresses, self.program)
        return interpreter.TensorHandle(pointers.data & _ADDRESS_BITS, pointers.dtype)

    def refuse_out_of_bounds(self, kind: str, tags: np.ndarray, addresses: np.ndarray, width: int) -> None:
        for tag in tags[:1] if (tags == tags[0]).all() else np.unique(tags):
            mine = addresses[tags == tag]
            view = self.views[tag - 1] if 1 <= tag <= len(self.views) else None
            outside = mine.size if view is None else mine.size - np.count_nonzero(view.holds(mine, width))
            if outside:
                self.fail(f"{kind} out of bounds of {self.describe(view)}: {outside} of {mine.size} lanes")

    def refuse_races(self) -> None:
        self.program = -1
        touched = {kind: footprint.folded() for kind, footprint in self.footprints.items()}
        for one, other in _RACES:
            (these, first, last), (those, others_first, others_last) = touched[one], touched[other]
            shared, i, j = np.intersect1d(these, those, assume_unique=True, return_indices=True)
            first, last = np.minimum(first[i], others_first[j]), np.maximum(last[i], others_last[j])
            racing = np.flatnonzero(first != last)
            if racing.size:
                at = racing[:1]
                view = next(view for view in self.views if view.holds(shared[at], 1))
                programs = f"programs {self.programs[first[at].item()]} and {self.programs[last[at].item()]}"
                self.fail(f"{one}/{other} race on {racing.size} elements of {self.describe(view)}: {programs}")

    def describe(self, view: "_View | None") -> str:
        if view is None:
            return "all arguments"
        tensors = {name: value for name, value in self.arguments.items() if hasattr(value, "data_ptr")}
        names = [name for name, tensor in tensors.items() if vars(_View(tensor)) == vars(view)]
        return f"{' or '.join(names) or 'a tensor'} {view.shape} strided {view.strides}"


class _View:
    """Where a tensor's elements lie in memory."""

    def __init__(self, tensor: Any):
        self.base, self.shape, self.strides = tensor.data_ptr(), tuple(tensor.shape), tuple(tensor.stride())
        self.dims = _dims_in_bytes(self.shape, self.strides, tensor.element_size())

    def holds(self, addresses: np.ndarray, width: int) -> np.ndarray:
        """Whether `width` bytes from each address on are the tensor's."""
        rest = addresses - self.base
        inside = rest >= 0
        for size, stride in self.dims[:-1]:
            index, rest = np.divmod(rest, stride)
            inside &= index < size
        return inside & (rest + width <= self.dims[-1][0])


def _dims_in_bytes(shape: tuple, strides: tuple, width: int) -> list[tuple[int, int]]:
    """(size, stride), each stride as long as all that follow it reach, the last a run of bytes.

    Dimensions that continue one another are joined, those that only repeat elements dropped.
    """
    if 0 in shape:
        return [(0, 1)]
    dims = [(width, 1)]
    reach = width
    nested = True
    for stride, size in sorted((stride * width, size) for size, stride in zip(shape, strides, strict=True)):
        if size == 1 or stride == 0:
            continue
        nested &= stride >= reach
        reach += (size - 1) * stride
        if stride == dims[-1][0] * dims[-1][1]:
            dims[-1] = (dims[-1][0] * size, dims[-1][1])
        else:
            dims.append((size, stride))
    return dims[::-1] if nested else [(reach, 1)]


class _Footprint:
    """The addresses that a launch touched in one way, and which programs did."""

    def __init__(self) -> None:
        self.noted: list[_Touched] = [(np.empty(0, np.int64),) * 3]
        self.lanes = 0

    def add(self, addresses: np.ndarray, program: int) -> None:
        programs = np.broadcast_to(np.int64(program), addresses.shape)
        self.noted.append((addresses, programs, programs))
        self.lanes += addresses.size
        if self.lanes > _FOLD_LANES:
            self.folded()

    def folded(self) -> _Touched:
        addresses, first, last = (np.concatenate(column) for column in zip(*self.noted, strict=True))
        if addresses.size:
            order = np.argsort(addresses)
            addresses, first, last = addresses[order], first[order], last[order]
            starts = np.flatnonzero(np.diff(addresses, prepend=-1))
            addresses = addresses[starts]
            first, last = np.minimum.reduceat(first, starts), np.maximum.reduceat(last, starts)
        self.noted, self.lanes = [(addresses, first, last)], 0
        return self.noted[0]


running: list[Launch] = []  # the builder is called for the last
