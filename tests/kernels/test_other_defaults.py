"""A default dtype or device that the user set reaches no tensor of the kernels' launchers."""

import pytest
import torch

from fastgpt import ops

pytest.importorskip("triton", reason="Triton is not to be had on this platform")

from tests.test_defaults import WORLDS, calls, forward_and_backward, the_same_bits

LABELS = [label for label in calls(torch.float32) if label not in ("decode", "exact", "smoothed")]
worlds = pytest.mark.parametrize("world", [WORLDS["bfloat16"], WORLDS["meta"]], ids=["bfloat16", "meta"])


@worlds
@pytest.mark.parametrize("label", LABELS)
def test_a_kernel(label, world, device):
    name, operands, options = calls(torch.float32)[label]
    operands = [operand.to(device) for operand in operands]
    options = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    options["backend"] = "triton"
    the_same_bits(world, lambda: forward_and_backward(ops, name, operands, options))


@worlds
def test_decoding(world, device):
    q, k, v = torch.randn(3, 2, 4, 32, 12, device=device)
    lengths = torch.tensor([9, 32], device=device)
    the_same_bits(world, lambda: ops.decode_attention(q[:, :, :2], k, v, lengths, backend="triton"))
