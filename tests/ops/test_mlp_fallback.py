"""The fallback's MLP, and its backward on a CPU (fastgpt/ops/cpu/mlp.py), against the naive reference."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from fastgpt import ops
from fastgpt.ops import pytorch, reference
from fastgpt.ops.cpu import mlp
from fastgpt.testing import assert_accurate

F64 = torch.float64


@pytest.mark.parametrize("approximate", ["tanh", "none"])
@pytest.mark.parametrize("biases", [(True, True), (True, False), (False, False)])
def test_gelu_mlp(approximate, biases):
    x = torch.randn(2, 3, 8, dtype=F64, requires_grad=True)
    w_in = torch.randn(8, 20, dtype=F64, requires_grad=True).t()  # as Conv1D stores it
    w_out = torch.randn(20, 8, dtype=F64, requires_grad=True).t()
    b_in = torch.randn(20, dtype=F64, requires_grad=True) if biases[0] else None
    b_out = torch.randn(8, dtype=F64, requires_grad=True) if biases[1] else None
    expected = reference.gelu_mlp(x, w_in, b_in, w_out, b_out, approximate=approximate)
    leaves = [t for t in (x, w_in, b_in, w_out, b_out) if t is not None]
    for recompute in (False, True):
        got = ops.gelu_mlp(x, w_in, b_in, w_out, b_out, approximate=approximate, recompute=recompute)
        torch.testing.assert_close(got, expected)
        grads = (torch.autograd.grad(y.square().sum(), leaves, retain_graph=True) for y in (got, expected))
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b)


def mlp_operands(rows, channels, hidden, dtype):
    """x, w_in, b_in, w_out, b_out, and the gradient of y."""
    shapes = ((rows, channels), (hidden, channels), (hidden,), (channels, hidden), (channels,), (rows, channels))
    scales = (1.0, channels**-0.5, 1.0, hidden**-0.5, 1.0, 1.0)
    return [(torch.randn(shape) * scale).to(dtype) for shape, scale in zip(shapes, scales, strict=True)]


def mlp_results(function, operands, dy, **options):
    leaves = [t.detach().requires_grad_() for t in operands]
    y = function(*leaves, **options)
    return y, *torch.autograd.grad(y, leaves, dy)


@pytest.mark.parametrize("approximate", ["tanh", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gelu_mlp_of_many_rows(approximate, dtype):
    """As many as go through the GELU in several parts, the last one short."""
    *operands, dy = mlp_operands(3000, 40, 200, dtype)
    wide = [t.double() for t in (*operands, dy)]
    got = mlp_results(ops.gelu_mlp, operands, dy, approximate=approximate)
    expected = mlp_results(reference.gelu_mlp, wide[:5], wide[5], approximate=approximate)
    theirs = mlp_results(reference.gelu_mlp, operands, dy, approximate=approximate)
    for name, a, b, c in zip(("y", "dx", "dw_in", "db_in", "dw_out", "db_out"), got, expected, theirs, strict=True):
        assert_accurate(a, b, c, name=name)
    with torch.no_grad():
        assert torch.equal(ops.gelu_mlp(*operands, approximate=approximate), got[0])


def test_gelu_of_large_numbers():
    """Where the sigmoid is 0 or 1 to the last digit, and where its argument is infinite."""
    x = torch.tensor([-1e20, -100.0, -10.0, -5.0, 0.0, 5.0, 10.0, 100.0, 1e20]).repeat(2**14)
    torch.testing.assert_close(
        mlp.gelu(x, "tanh"), F.gelu(x.double(), approximate="tanh").float(), rtol=1e-5, atol=1e-7
    )


def test_a_second_backward_and_a_second_derivative_of_gelu_mlp():
    *operands, dy = mlp_operands(6, 4, 12, F64)
    leaves = [t.requires_grad_() for t in operands]
    y = ops.gelu_mlp(*leaves)
    first, second = (torch.autograd.grad(y, leaves, dy, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.autograd.gradcheck(ops.gelu_mlp, leaves) and torch.autograd.gradgradcheck(ops.gelu_mlp, leaves)


def test_gelu_mlp_makes_the_gradients_that_are_wanted():
    *operands, dy = mlp_operands(6, 4, 12, torch.float32)
    _, *whole = mlp_results(ops.gelu_mlp, operands, dy)
    for wanted in itertools.product((False, True), repeat=5):
        leaves = [t.detach().requires_grad_(needed) for t, needed in zip(operands, wanted, strict=True)]
        if any(wanted):
            ops.gelu_mlp(*leaves).backward(dy)
        for leaf, needed, expected in zip(leaves, wanted, whole, strict=True):
            assert torch.equal(leaf.grad, expected) if needed else leaf.grad is None


def test_gelu_mlp_under_vmap_and_grad():
    *operands, _ = mlp_operands(6, 4, 12, torch.float32)
    each = torch.func.vmap(torch.func.grad(lambda x: ops.gelu_mlp(x, *operands[1:]).square().sum()))(operands[0])
    whole = operands[0].requires_grad_()
    (expected,) = torch.autograd.grad(ops.gelu_mlp(whole, *operands[1:]).square().sum(), whole)
    torch.testing.assert_close(each, expected)


def test_gelu_mlp_leaves_autocast_no_weight_without_a_derivative():
    """It remembers what it cast: cast without a derivative, the weight would have none for a later user either."""
    *operands, dy = mlp_operands(6, 4, 12, torch.float32)
    leaves = [t.requires_grad_() for t in operands]
    with torch.autocast("cpu", torch.bfloat16):
        y = ops.gelu_mlp(*leaves)
        again = F.linear(leaves[0], leaves[1])
    assert y.dtype == torch.bfloat16
    grads = torch.autograd.grad(y, leaves, dy.bfloat16(), retain_graph=True)
    expected = mlp_results(reference.gelu_mlp, [t.bfloat16() for t in operands], dy.bfloat16())[1:]
    for a, b in zip(grads, expected, strict=True):
        torch.testing.assert_close(a.bfloat16(), b, rtol=2e-2, atol=2e-2)
    assert torch.autograd.grad(again.sum(), leaves[1])[0].abs().sum() > 0


@pytest.mark.parametrize("rows", [(1, 1), (1,), (), (2, 1)], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_a_row_of_bfloat16_is_multiplied_as_a_vector(rows, transposed, monkeypatch):
    """Whatever this CPU has."""
    monkeypatch.setattr(pytorch, "AVX512", True)
    x, weight, bias = (
        torch.randn(shape).bfloat16() for shape in ((*rows, 24), (24, 40) if transposed else (40, 24), 40)
    )
    weight = weight.t() if transposed else weight
    vectors = []
    mv = torch.mv
    monkeypatch.setattr(torch, "mv", lambda *args: vectors.append(1) or mv(*args))
    for b in (None, bias):
        got = pytorch.linear(x, weight, b)
        wide = [None if t is None else t.double() for t in (x, weight, b)]
        assert_accurate(got, F.linear(*wide), F.linear(x, weight, b), name="y")
    assert len(vectors) == (0 if transposed or rows == (2, 1) else 2)


def held_bytes(call):
    """What the allocator had given out after the call beyond what it had before, by PyTorch's own profiler."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = call()
    del result
    return sum(event.self_cpu_memory_usage for event in profile.key_averages())


def test_recompute_keeps_no_activation():
    *operands, _ = mlp_operands(100, 8, 32, torch.float32)
    leaves = [t.requires_grad_() for t in operands]
    kept, made_again = (held_bytes(lambda r=r: ops.gelu_mlp(*leaves, recompute=r)) for r in (False, True))
    assert kept - made_again >= 100 * 32 * 4


def test_a_checkpointed_gelu_mlp_keeps_its_result_alone():
    *operands, _ = mlp_operands(100, 8, 32, torch.float32)
    leaves = [t.requires_grad_() for t in operands]
    options = dict(use_reentrant=False, preserve_rng_state=False)
    assert held_bytes(lambda: checkpoint(ops.gelu_mlp, *leaves, **options)) < 100 * 8 * 4 + 1000
