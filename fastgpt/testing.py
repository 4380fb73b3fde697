"""How a kernel's result is judged: against float64, by PyTorch's own error in the same dtype."""

import copy
from typing import Any

import torch
from torch import Tensor

from fastgpt.model import GPT
from fastgpt.ops import reference

# How many times PyTorch's own error (or, where that happens to be small, the floor) a result may be off.
_ALLOWED = {torch.float64: 8.0, torch.float32: 4.0, torch.bfloat16: 2.0, torch.float16: 2.0}


def assert_accurate(
    actual: Tensor,
    exact: Tensor,
    same_dtype: Tensor | None = None,
    magnitude: Tensor | None = None,
    *,
    logit_max: float = 0.0,
    name: str = "result",
) -> float:
    """Hold `actual` to `exact`, the float64 result, as a whole, in its worst row and in its worst element.

    same_dtype: PyTorch's result in actual's dtype; None allows no more than the floor. magnitude: the same formula on
    absolute values, which tells how much rounding its cancellations may show; |exact| if None. logit_max: the largest
    |score| under an exponential, which rounding of the score and of its scale makes less certain by as many units. Rows
    are the last axis.

    With u the unit roundoff, K from _ALLOWED and a floor c of u / 2 · (1 + logit_max / 2), u / 4 in half precision:
        whole    |actual - exact|  <=    K max(|same_dtype - exact|, c |magnitude|)
        rows     the same norms     <=   4K (c |magnitude| + e |exact|),  e PyTorch's relative error as a whole
        elements the same, in place <=  16K (c m + e r),                   m, r the element's own + its row's rms
    NaN and infinities must stand where `exact` has them. Prints and returns the largest share of a limit.
    AssertionError names the limit that was passed.
    """
    if actual.shape != exact.shape or exact.dtype != torch.float64:
        raise ValueError(f"{name}: {tuple(actual.shape)} against {tuple(exact.shape)} {exact.dtype}")
    allowed, half = _ALLOWED[actual.dtype], actual.dtype in (torch.bfloat16, torch.float16)
    unit = torch.finfo(actual.dtype).eps / 2
    floor = unit / 4 if half else unit / 2 * (1 + logit_max / 2)
    device = actual.device if actual.is_cuda else torch.device("cpu")  # others may lack float64
    got, expected = _rows(actual, device), _rows(exact, device)
    size = expected.abs() if magnitude is None else _rows(magnitude, device)
    theirs = expected if same_dtype is None else _rows(same_dtype, device)

    finite = expected.isfinite()
    places = "NaN and infinities stand elsewhere than in the float64 result"
    assert torch.equal(got.isnan(), expected.isnan()) and torch.equal(got.isinf(), expected.isinf()), (
        f"{name}: {places}"
    )
    got, expected, size, theirs = (torch.where(finite, t, 0.0) for t in (got, expected, size, theirs))

    error, their_error = got - expected, (theirs - expected).norm()
    relative = their_error / expected.norm().clamp(min=torch.finfo(torch.float64).tiny)
    width = expected.shape[-1] ** 0.5
    row_size, row_norm = (t.norm(dim=-1, keepdim=True) for t in (size, expected))
    limits = {
        "whole": (error.norm(), allowed * torch.maximum(their_error, floor * size.norm())),
        "row": (error.norm(dim=-1, keepdim=True), 4 * allowed * (floor * row_size + relative * row_norm)),
        "element": (
            error.abs(),
            16 * allowed * (floor * (size + row_size / width) + relative * (expected.abs() + row_norm / width)),
        ),
    }
    shares = {what: _share(value, limit) for what, (value, limit) in limits.items()}
    worst = max(shares, key=lambda what: shares[what])
    print(f"{name}: {shares[worst]:.2f} of the {worst} limit ({actual.dtype})")
    assert shares[worst] <= 1, f"{name}: the error is {shares[worst]:.3g} times the {worst} limit ({actual.dtype})"
    return shares[worst]


def _rows(tensor: Tensor, device: torch.device) -> Tensor:
    tensor = tensor.detach().to(device, torch.float64)
    return tensor.reshape(-1, tensor.shape[-1]) if tensor.dim() > 1 else tensor.reshape(1, -1)


def _share(value: Tensor, limit: Tensor) -> float:
    """The largest value / limit; an exact zero needs no limit."""
    if value.numel() == 0:
        return 0.0
    return torch.where(value == 0, 0.0, value / limit).max().item()


def on_reference(model: GPT) -> GPT:
    """A copy of `model`, in its weights' dtype, that calls fastgpt.ops.reference for every function of fastgpt.ops."""
    twin = copy.deepcopy(model)
    module: Any
    for module in (twin.config, *twin.modules()):
        if hasattr(module, "backend"):
            object.__setattr__(module, "backend", reference)  # a GPTConfig is frozen
    return twin
