"""How kernels are launched, and what launchers ask of their tensors and their card.

What Triton does not compile, for who writes a kernel (its layout pass then fails with "operand #1 does not dominate
this use", for some dtypes and widths alone):
- A tensor that a loop carries, stored in three branches of the loop's body (3.6.0): store it in two at most, with the
  pointer selected by tl.where, or by masks without a branch. The kernel of runs in embedding.py does the former.
- A tensor carried through a `while`: count the turns first, then go over them by `for`. The kernel that joins runs in
  embedding.py does.
"""

from types import NoneType
from typing import Any

import torch
import triton.language as tl

# By launch's key: the kernel, which keeps its id its own; what Triton compiled; the names of the arguments that follow
# those by place, in the kernel's order, and their defaults.
COMPILED: dict[tuple, tuple[Any, Any, list[tuple[str, Any]]]] = {}
_MOST = 16_384  # a thousand bytes each: lengths that never come again must not fill the memory
_PLAIN = (int, NoneType, bool, str, tl.dtype)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **named: Any) -> None:
    """kernel[grid](*args, **named), but what Triton asks of each argument of each launch (9 to 26 µs in all, by the
    number of arguments) is asked of the first one with such arguments alone.

    Such arguments: tensors of the same dtypes on the same device, all of which begin at multiples of 16 bytes or each
    as far past one, and the same numbers but for floats, of whose values Triton asks nothing. Its own key is no finer.
    """
    key: list = [id(kernel), len(args), *named]
    add, tensor, begins = key.append, None, 0
    for value in (*args, *named.values()):
        kind = type(value)
        if kind in _PLAIN:
            add(value)
        elif kind is float:
            add(float)
        else:
            tensor = value
            add(tensor.dtype)
            begins |= tensor.data_ptr()
    if tensor is not None:
        add(tensor.get_device())
    if begins & 15:
        key += [v.data_ptr() & 15 for v in (*args, *named.values()) if isinstance(v, torch.Tensor)]
    found = COMPILED.get(whole := tuple(key))
    if found is not None:
        _, compiled, rest = found
        compiled[(*grid, 1, 1)](*args, *[named.get(name, default) for name, default in rest])
        return
    compiled = kernel[grid](*args, **named)
    if compiled is None:  # in the interpreter, and where launches are only recorded
        return
    if len(COMPILED) >= _MOST:
        COMPILED.clear()
    rest = list(kernel.signature.parameters.values())[len(args) :]
    COMPILED[whole] = kernel, compiled, [(each.name, each.default) for each in rest]


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. Triton's own can be called in kernels too, and takes microseconds for it."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least that is not below n, which is at least 1."""
    return 1 << (n - 1).bit_length()


def statistics_dtype(x: torch.Tensor) -> torch.dtype:
    """Of statistics and partial sums: float32, but float64 for float64: gradcheck is sharp in the interpreter then."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def accumulator(x: torch.Tensor) -> tl.dtype:
    """The same, as kernels take it."""
    return tl.float64 if x.dtype == torch.float64 else tl.float32


def dropout_numbers(dropout_p: float) -> tuple[int, float]:
    """The threshold that a kept element's word reaches, and the factor that scales it."""
    return int(dropout_p * 2**32), 0.0 if dropout_p == 1 else 1 / (1 - dropout_p)


def matmul_precision() -> str:
    """Of products of float32: torch's own setting, IEEE unless the user allowed TF32."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def capability(x: torch.Tensor) -> int | None:
    """The compute capability of x's card, 90 for 9.0; None in the interpreter."""
    if not x.is_cuda:
        return None
    major, minor = torch.cuda.get_device_capability(x.device)
    return 10 * major + minor


def multiprocessors(x: torch.Tensor) -> int | None:
    """How many multiprocessors x's card has; None in the interpreter."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else None
