"""The fallback reads each of its operands, and each gradient, by that tensor's own strides."""

import itertools

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


@pytest.mark.parametrize("written", [(), ("a", "b", "c")])
def test_each_operand_gets_every_kind_and_no_two_the_same_ones(written):
    operands = {name: torch.arange(24.0).view(2, 3, 4) for name in "abc"}
    strides = [
        {key: view.stride() for key, view in drawn("x", n, operands, (), written, False).items()} for n in range(8)
    ]
    for one, other in itertools.combinations("abc", 2):
        assert sum(each[one] != each[other] for each in strides) >= 3
    assert all(len({each[name] for each in strides}) >= (2 if written else 6) for name in "abc")
