"""Two runs of one kernel on the same numbers at other strides."""

import torch
from torch import Tensor


def alike(a: Tensor, b: Tensor) -> bool:
    """The same bits in the interpreter. On a GPU other strides compile to other layouts of threads, which add up in
    another order: float32 numbers that differ by roundoffs."""
    return torch.allclose(a, b, rtol=1e-5, atol=3e-6) if a.is_cuda else torch.equal(a, b)
