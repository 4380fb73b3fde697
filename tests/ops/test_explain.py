"""The choice of a backend, and what explain says of it."""

import functools
import subprocess
import sys

import pytest
import torch

from fastgpt import ops
from tests.ops.test_ops import F32, F64, I64, ROOT, TABLES, W, X, ids, t


def test_on_a_cpu_explain_says_so():
    assert ops.explain(ops.layer_norm, X, W) == (
        "layer_norm runs on PyTorch: the tensors are on cpu, the kernels run on NVIDIA GPUs"
    )
    assert "asked for" in ops.explain(ops.layer_norm, X, W, backend="torch")
    assert "embedding runs on PyTorch" in ops.explain(ops.embedding, ids([1]), *TABLES)


def test_explain_tells_the_form_of_the_mlp():
    """The one that runs: each sentence is of its own condition alone."""
    x, w_in, w_out = t(32, 8), t(2048, 8), t(8, 2048)
    grad = w_in.clone().requires_grad_()
    mlp = functools.partial(ops.explain, ops.gelu_mlp)
    assert mlp(x, w_in, None, w_out).endswith(
        "; without a derivative on a CPU 65,536 hidden units in torch.float32 make its GELU passes over what a core's "
        "cache holds"
    )
    assert "65,536 hidden units in torch.float32 make its GELU PyTorch's own" in mlp(
        x, w_in, None, w_out, approximate="none"
    )
    assert "63,488 hidden units in torch.float32 make its GELU PyTorch's own" in mlp(x[:31], w_in, None, w_out)
    assert "on a CPU its backward writes over the hidden units" in mlp(x, grad, None, w_out)
    assert mlp(x, grad, None, w_out, recompute=True).endswith("; its hidden units are computed again in the backward")
    with torch.no_grad():
        assert "without a derivative" in mlp(x, grad, None, w_out)


@pytest.mark.parametrize(
    ("rows", "vocab", "dtype", "words"),
    [
        (1335, 50257, F32, "1,335 rows of 50,257 logits are made at once"),
        (1336, 50257, F32, "1,336 rows of 50,257 logits are made 1,335 rows at a time"),
        (6000, 50257, F32, "1,500 rows at a time"),
        (2000, 50257, torch.bfloat16, "2,000 rows of 50,257 logits are made at once"),
    ],
)
def test_explain_tells_the_way_over_the_logits(rows, vocab, dtype, words):
    x, weight, targets = t(rows, 16, dtype=dtype), t(vocab, 16, dtype=dtype), torch.zeros(rows, dtype=I64)
    assert words in ops.explain(ops.linear_cross_entropy, x, weight, targets)


def test_triton_on_a_cpu_is_refused_with_the_reason():
    with pytest.raises(ValueError, match="layer_norm: backend='triton' can't be had: the tensors are on cpu"):
        ops.layer_norm(X, W, backend="triton")


class OnGPU(torch.Tensor):
    """A tensor that claims to be on a GPU, for the choice alone."""

    device = torch.device("cuda:0")
    is_cuda = True


@pytest.mark.parametrize(
    ("capability", "hip", "shape", "dtype", "words"),
    [
        ((9, 0), None, (2, 8), F32, "runs on its Triton kernel on cuda:0"),
        ((8, 0), None, (2, 8), torch.bfloat16, "runs on its Triton kernel"),
        ((7, 5), None, (2, 8), F32, "compute capability 7.5, the kernels need 8.0 or newer"),
        ((9, 0), "6.2", (2, 8), F32, "an AMD GPU"),
        ((9, 0), None, (2, 8), F64, "float32 at most"),
        ((9, 0), None, (2, 20000), F32, "20000 channels are wider than the kernel's 16384"),
    ],
)
def test_the_choice_by_card(monkeypatch, capability, hip, shape, dtype, words):
    if hip is None:
        pytest.importorskip("triton", reason="Triton is not to be had on this platform")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    x = torch.zeros(shape, dtype=dtype).as_subclass(OnGPU)
    assert words in ops.explain(ops.layer_norm, x, torch.zeros(shape[-1]))


@pytest.mark.interpreter
def test_the_interpreter_takes_cpu_tensors():
    assert ops.explain(ops.layer_norm, X, W) == "layer_norm runs on Triton's interpreter"


def test_an_old_triton_is_as_good_as_none():
    pytest.importorskip("triton", reason="Triton is not to be had on this platform")
    code = "import triton; triton.__version__ = '3.5.1'; from fastgpt.ops import interpreted, no_triton\n"
    code += "print(interpreted(), no_triton())"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout == "False Triton is 3.5.1, the kernels need 3.6 or newer\n"
