"""assert_accurate: passes what it should, and can fail in each of its ways."""

import pytest
import torch

from fastgpt.testing import assert_accurate


def rounded(dtype):
    oracle = torch.randn(50, 64, dtype=torch.float64)
    return oracle, oracle.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_result_rounded_once_passes(dtype):
    oracle, actual = rounded(dtype)
    assert 0 <= assert_accurate(actual, oracle, actual) <= 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_whole_result_slightly_off_fails(dtype):
    oracle, actual = rounded(dtype)
    worse = (oracle + 8 * torch.finfo(dtype).eps * torch.randn_like(oracle)).to(dtype)
    with pytest.raises(AssertionError, match="limit"):
        assert_accurate(worse, oracle, actual)


def test_one_bad_row_fails():
    oracle, _ = rounded(torch.float32)
    oracle = oracle.repeat(400, 1)  # the whole tensor's norm hides one row
    worse = oracle.float()
    worse[7] += 1e-5 * torch.randn(64)
    with pytest.raises(AssertionError, match="row limit"):
        assert_accurate(worse, oracle, oracle.float())


def test_one_bad_element_fails():
    oracle = torch.randn(300, 4096, dtype=torch.float64)
    worse = oracle.float()
    worse[3, 5] += 1e-5
    with pytest.raises(AssertionError, match="element limit"):
        assert_accurate(worse, oracle, oracle.float())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_must_be_expected(value):
    oracle, actual = rounded(torch.float32)
    worse = actual.clone()
    worse[2, 3] = value
    with pytest.raises(AssertionError, match="elsewhere"):
        assert_accurate(worse, oracle, actual)
    expected = oracle.clone()
    expected[2, 3] = value
    assert_accurate(worse, expected, worse)


def test_exact_zeros_must_be_zero():
    oracle = torch.zeros(3, 4, dtype=torch.float64)
    assert_accurate(oracle.float(), oracle)
    with pytest.raises(AssertionError, match="limit"):
        assert_accurate(oracle.float() + 1e-30, oracle)


def test_cancellation_is_allowed_what_its_magnitude_allows():
    oracle = torch.full((3, 4), 1e-6, dtype=torch.float64)  # what is left of terms of size 1
    off = (oracle + 5e-8).float()
    with pytest.raises(AssertionError):
        assert_accurate(off, oracle)
    assert_accurate(off, oracle, magnitude=torch.ones_like(oracle))


def test_another_shape_is_no_error_of_rounding():
    with pytest.raises(ValueError, match=r"y: \(2, 3\) against \(3, 2\)"):
        assert_accurate(torch.zeros(2, 3), torch.zeros(3, 2, dtype=torch.float64), name="y")
