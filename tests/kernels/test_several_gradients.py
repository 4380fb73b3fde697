"""A backward of the kernels for several gradients at once: a launch for each."""

import pytest

pytest.importorskip("triton", reason="Triton is not to be had on this platform")

from tests.ops.test_transforms import CALLS, check_several


@pytest.mark.interpreter  # in float64, which the kernels compute in nowhere else
@pytest.mark.parametrize("mode", ["is_grads_batched", "vmap"])
@pytest.mark.parametrize("name", [name for name in CALLS if name != "decode_attention"])
def test_several_gradients_at_once(name, mode):
    check_several(name, mode, "triton")
