"""Whether a result is right enough to be timed: held to the naive reference in float64, whole and in its worst row.

The tests judge kernels far more sharply (fastgpt.testing); here a bug must not be mistaken for speed, and no honest
baseline, whatever order it sums in, may be called wrong. With e the relative error of plain PyTorch in the same dtype
(the naive reference, or for a whole model its eager run) and u the dtype's unit roundoff, a result may be off by
max(3 e, 2 u) of the expected norm, in float32 by 128 u, or a sixteenth of the operands' u if those are halves (a loss,
say), and each row by 8 times that share of its own norm and an average row's. A model's eager run itself is held to a
fixed share.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# What eager may be off as a whole, by dtype: a deep model's gradients in half precision are off by per cents.
_EAGER = {torch.float32: 1e-4, torch.bfloat16: 0.2, torch.float16: 0.05}
_LEAST_UNITS = {torch.float32: 128, torch.bfloat16: 2, torch.float16: 2}  # of roundoff


class Verdict(NamedTuple):
    error: float  # the relative error as a whole, of the worst result
    reason: str  # why it is wrong, or ""


def judge(
    results: Sequence[Tensor | None],
    exact: Sequence[Tensor | None],
    eager: Sequence[Tensor | None] | None,
    operands: torch.dtype = torch.float32,
) -> Verdict:
    """`results` against `exact`, in float64, by `eager`, plain PyTorch's in the operands' dtype (None: these are). A
    None among the results is one that can't be seen from outside."""
    if len(results) != len(exact):
        return Verdict(math.inf, f"{len(results)} results instead of {len(exact)}")
    worst, reasons = 0.0, []
    for index, (result, expected) in enumerate(zip(results, exact, strict=True)):
        if result is None or expected is None:
            continue
        their = None if eager is None or eager[index] is None else _errors(eager[index], expected)[0]
        error, row_share = (math.inf, math.inf) if result.shape != expected.shape else _errors(result, expected)
        limit = max(_limit(result.dtype, their), torch.finfo(operands).eps / 32)
        worst = max(worst, error)
        if not error <= limit:  # NaN is wrong too
            reasons.append(f"result {index} is off by {error:.2g} of its norm, {limit:.2g} is allowed")
        elif not row_share <= 8 * limit:
            reasons.append(f"a row of result {index} is off by {row_share:.2g} of its norm, {8 * limit:.2g} is allowed")
    return Verdict(worst, "; ".join(reasons))


def _limit(dtype: torch.dtype, their_error: float | None) -> float:
    if their_error is None:
        return _EAGER[dtype]
    return max(3 * their_error, _LEAST_UNITS[dtype] * torch.finfo(dtype).eps / 2)


def _errors(result: Tensor, expected: Tensor) -> tuple[float, float]:
    """|error| / |exact| as a whole, and the largest of any row; infinite where either is not finite."""
    result, expected = _rows(result), _rows(expected)
    if result.shape != expected.shape:
        return math.inf, math.inf
    difference = result - expected
    norm = expected.norm()
    whole = difference.norm() / norm if norm > 0 else difference.norm()
    rows = difference.norm(dim=-1)
    sizes = expected.norm(dim=-1) + norm / math.sqrt(len(rows))
    share = (rows / sizes.clamp(min=torch.finfo(torch.float64).tiny)).max()
    whole, share = whole.item(), share.item()
    return (whole, share) if math.isfinite(whole) else (math.inf, math.inf)


def _rows(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().double()
    return tensor.reshape(-1, tensor.shape[-1]) if tensor.dim() > 1 else tensor.reshape(1, -1)
