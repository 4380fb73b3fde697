"""What launchers ask of their tensors and their card.

What Triton does not compile, for who writes a kernel (its layout pass then fails with "operand #1 does not dominate
this use", for some dtypes and widths alone):
- A tensor that a loop carries, stored in three branches of the loop's body (3.6.0): store it in two at most, with the
  pointer selected by tl.where, or by masks without a branch. The kernel of runs in embedding.py does the former.
- A tensor carried through a `while`: count the turns first, then go over them by `for`. The kernel that joins runs in
  embedding.py does.
"""

import torch
import triton.language as tl


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
