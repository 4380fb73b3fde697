"""assert_accurate: passes what it should, and can fail in each of its ways."""

import pytest
import torch

from fastgpt.testing import assert_accurate


def rounded(dtype):
    exact = torch.randn(50, 64, dtype=torch.float64)
    return exact, exact.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_result_rounded_once_passes(dtype):
    exact, actual = rounded(dtype)
    assert 0 <= assert_accurate(actual, exact, actual) <= 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_whole_result_slightly_off_fails(dtype):
    exact, actual = rounded(dtype)
    worse = (exact + 8 * torch.finfo(dtype).eps * torch.randn_like(exact)).to(dtype)
    with pytest.raises(AssertionError, match="limit"):
        assert_accurate(worse, exact, actual)


def test_one_bad_row_fails():
    exact, _ = rounded(torch.float32)
    exact = exact.repeat(400, 1)  # the whole tensor's norm hides one row
    worse = exact.float()
    worse[7] += 1e-5 * torch.randn(64)
    with pytest.raises(AssertionError, match="row limit"):
        assert_accurate(worse, exact, exact.float())


def test_one_bad_element_fails():
    exact = torch.randn(300, 4096, dtype=torch.float64)
    worse = exact.float()
    worse[3, 5] += 1e-5
    with pytest.raises(AssertionError, match="element limit"):
        assert_accurate(worse, exact, exact.float())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_must_be_expected(value):
    exact, actual = rounded(torch.float32)
    worse = actual.clone()
    worse[2, 3] = value
    with pytest.raises(AssertionError, match="elsewhere"):
        assert_accurate(worse, exact, actual)
    expected = exact.clone()
    expected[2, 3] = value
    assert_accurate(worse, expected, worse)


def test_exact_zeros_must_be_zero():
    exact = torch.zeros(3, 4, dtype=torch.float64)
    assert_accurate(exact.float(), exact)
    with pytest.raises(AssertionError, match="limit"):
        assert_accurate(exact.float() + 1e-30, exact)


def test_cancellation_is_allowed_what_its_magnitude_allows():
    exact = torch.full((3, 4), 1e-6, dtype=torch.float64)  # what is left of terms of size 1
    off = (exact + 5e-8).float()
    with pytest.raises(AssertionError):
        assert_accurate(off, exact)
    assert_accurate(off, exact, magnitude=torch.ones_like(exact))


def test_another_shape_is_no_error_of_rounding():
    with pytest.raises(ValueError, match=r"y: \(2, 3\) against \(3, 2\)"):
        assert_accurate(torch.zeros(2, 3), torch.zeros(3, 2, dtype=torch.float64), name="y")


def test_an_error_that_is_small_everywhere_is_too_much_as_a_whole():
    """Twice what the whole may be off by, and half of what each row may."""
    exact, unit = torch.randn(8, 64, dtype=torch.float64), torch.finfo(torch.float32).eps / 2
    assert_accurate((exact * (1 + unit)).float(), exact)
    with pytest.raises(AssertionError, match="times the whole limit"):
        assert_accurate((exact * (1 + 4 * unit)).float(), exact)
