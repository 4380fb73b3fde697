"""Fixtures for your own test suite: `pytest -p fastgpt.pytest_plugin`.

def test_my_model_is_the_same_accelerated(verify_accelerated):
    verify_accelerated(MyGPT())
"""

from collections.abc import Callable

import pytest
from torch import Tensor, nn

from fastgpt.testing import assert_accurate as _assert_accurate
from fastgpt.verify import TOLERANCE, Verification, random_ids, verify_model


@pytest.fixture
def verify_accelerated() -> Callable[..., Verification]:
    """verify_accelerated(model, ids=None, tolerance=4, **options of accelerate): fails the test past the tolerance.

    Without ids they are drawn at random: two rows, up to 33 tokens, from a generator of their own.
    """

    def check(model: nn.Module, ids: Tensor | None = None, tolerance: float = TOLERANCE, **options) -> Verification:
        if ids is None:
            ids = random_ids(model)
        found = verify_model(model, ids, tolerance=tolerance, **options)
        assert found.passed, f"\n{found}"
        return found

    return check


@pytest.fixture
def assert_accurate() -> Callable[..., float]:
    """fastgpt.testing.assert_accurate(actual, exact, same_dtype): the rule that fastgpt's own kernels are held to."""
    return _assert_accurate
