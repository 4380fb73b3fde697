"""The fallback reads each of its operands, and each gradient, by that tensor's own strides."""

import pytest
import torch

from tests.calls import CALLS, results
from tests.views import KINDS, drawn


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
def test_functions(call):
    for number in range(len(KINDS)):
        operands, options = call(torch.device("cpu"), torch.float32)
        views = drawn(call.__name__, number, operands, far=False)
        copies = {key: view.contiguous() for key, view in views.items()}
        got, expected = (results(call.__name__, each, options, "torch") for each in (views, copies))
        kinds = {key: (tuple(view.shape), view.stride()) for key, view in views.items()}
        for place, (a, b) in enumerate(zip(got, expected, strict=True)):
            close = torch.allclose(a, b, rtol=1e-4, atol=1e-4)
            assert close, f"result {place} of draw {number} is another than that of contiguous copies: {kinds}"
