"""The sanitizing interpreter: for each thing that it mends or refuses, a kernel that shows it and one that is right."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not to be had on this platform")

import triton
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

from fastgpt import ops
from fastgpt.sanitizer import SanitizerError, sanitized

pytestmark = pytest.mark.interpreter


@pytest.fixture(autouse=True)
def _sanitized():
    """In place of conftest's: these tests say where it begins and ends."""


def launch(kernel, grid, *args, order=None, **kwargs):
    with sanitized(order=order):
        kernel[grid](*args, **kwargs)


# Grids and the order of programs


@triton.jit
def _ticket_kernel(counter_ptr, tickets_ptr):
    """Which turn each program had."""
    x, y, z = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    place = (x * tl.num_programs(1) + y) * tl.num_programs(2) + z
    tl.store(tickets_ptr + place, tl.atomic_add(counter_ptr, 1))


def tickets(order=None):
    counter, turns = torch.zeros(1, dtype=torch.int32), torch.full((24,), -1, dtype=torch.int32)
    launch(_ticket_kernel, lambda meta: (2, 3, 4), counter, turns, order=order)
    return turns.tolist()


def test_programs_run_in_order_or_shuffled():
    assert tickets() == list(range(24))
    assert sorted(tickets(order=1)) == list(range(24))
    assert tickets(order=1) == tickets(order=1)
    assert len({tuple(tickets(order)) for order in (None, 0, 1, 2)}) == 4


def test_the_innermost_order_counts():
    def turns():
        counter, turns = torch.zeros(1, dtype=torch.int32), torch.empty(24, dtype=torch.int32)
        _ticket_kernel[(2, 3, 4)](counter, turns)
        return turns.tolist()

    first, second = tickets(order=1), tickets(order=2)
    with sanitized(order=1):
        assert turns() == first
        with sanitized(order=2):
            assert turns() == second
        assert turns() == first


@pytest.mark.parametrize("grid", [(0,), (2, 0), (1, 1, 0)])
def test_empty_grids_are_refused(grid):
    with pytest.raises(SanitizerError, match=r"^_ticket_kernel: the grid \(.*0.*\) is empty"):
        launch(_ticket_kernel, grid, *torch.zeros(2, 24, dtype=torch.int32))


@pytest.mark.parametrize("grid", [(1, 65536), (1, 1, 65536), (2**31,)])
def test_grids_past_the_limits_are_refused(grid):
    with pytest.raises(SanitizerError, match="is past CUDA's limits"):
        launch(_ticket_kernel, grid, *torch.zeros(2, 24, dtype=torch.int32))


def test_layer_norm_does_not_depend_on_the_order():
    x, residual, dy, ds = torch.randn(4, 64, 300)
    weight, bias, x_bias = torch.randn(3, 300)

    def results(order):
        leaves = [t.clone().requires_grad_() for t in (x, residual, weight, bias, x_bias)]
        with sanitized(order=order):
            outputs = ops.add_layer_norm(*leaves[:4], x_bias=leaves[4], dropout_p=0.5, seed=1, backend="triton")
            torch.autograd.backward(outputs, (dy, ds))
        return [*outputs, *(leaf.grad for leaf in leaves)]

    for shuffled in (1, 2):
        assert all(torch.equal(a, b) for a, b in zip(results(None), results(shuffled), strict=True))


# The interpreter itself


@triton.jit
def _strided_kernel(y_ptr, N):
    for i in range(tl.program_id(0), N, tl.num_programs(0)):
        tl.store(y_ptr + i, tl.program_id(0))


def test_bounds_of_a_range_may_be_tensors():
    y = torch.full((10,), -1, dtype=torch.int32)
    launch(_strided_kernel, (4,), y, 10)
    assert y.tolist() == [i % 4 for i in range(10)]


@triton.jit
def _out_of_bounds(x_ptr):
    return tl.sum(tl.load(x_ptr + tl.arange(0, 8)))


@triton.jit
def _calling_kernel(x_ptr):
    tl.store(x_ptr, _out_of_bounds(x_ptr))


def test_a_finding_in_a_device_function_is_the_kernels():
    with pytest.raises(SanitizerError, match=r"_calling_kernel: load out of bounds of x_ptr .*: 4 of 8 lanes"):
        launch(_calling_kernel, (1,), torch.zeros(4))


@triton.jit
def _failing_kernel(x_ptr):
    tl.static_assert(False, "as it says")


def test_a_kernels_own_errors_pass_through():
    with pytest.raises(interpreter.InterpreterError, match="as it says"):
        launch(_failing_kernel, (1,), torch.zeros(4))


PATCHED = [
    *(interpreter, interpreter.InterpreterBuilder, interpreter.ReduceScanOpInterface, TritonSemantic),
    *(tl, tl.core, tl.math, tl.tensor, tl.dtype, tl.core.tensor_descriptor_base),
]


def patched_things():
    """All that Triton or the sanitizer replaces."""
    return [type(interpreter.interpreter_builder), *(dict(vars(owner)) for owner in PATCHED)]


def test_everything_is_put_back():
    launch(_calling_kernel, (1,), torch.zeros(8))  # Triton rewrites a kernel and its callees once, for good
    before = patched_things()
    ours = [value for things in before[1:5] for value in things.values() if "fastgpt" in str(value)]
    assert before[0] is interpreter.InterpreterBuilder and ours == []
    with sanitized():
        inside = patched_things()
        assert inside != before
        with sanitized(order=3):
            launch(_calling_kernel, (1,), torch.zeros(8))
            with pytest.raises(SanitizerError):
                launch(_calling_kernel, (1,), torch.zeros(4))
        assert patched_things() == inside
    assert patched_things() == before


def test_compiled_kernels_are_not_silently_unchecked(monkeypatch):
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"), sanitized():
        pass


def test_an_unknown_interpreter_is_refused(monkeypatch):
    monkeypatch.delattr(interpreter.InterpreterBuilder, "create_atomic_cas")
    before = patched_things()
    with pytest.raises(RuntimeError, match=r"Triton .* has no create_atomic_cas"), sanitized():
        pass
    assert patched_things() == before
