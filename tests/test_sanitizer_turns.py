"""Programs that wait for each other, and pointers made of numbers, in the sanitizing interpreter."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not to be had on this platform")

import triton
import triton.language as tl

from fastgpt.sanitizer import SanitizerError, sanitized

pytestmark = pytest.mark.interpreter


@triton.jit
def _chain_kernel(flags_ptr, order_ptr, count_ptr, LAST: tl.constexpr):
    """Program i waits for the flag of i + 1; LAST waits for none."""
    program = tl.program_id(0)
    if program != LAST:
        while tl.atomic_add(flags_ptr + program + 1, 0) == 0:
            pass
    tl.store(order_ptr + program, tl.atomic_add(count_ptr, 1))
    tl.atomic_xchg(flags_ptr + program, 1)


def chain(seed, last=4):
    flags, order, count = (torch.zeros(n, dtype=torch.int32) for n in (6, 5, 1))
    with sanitized(order=seed, in_turns=True):
        _chain_kernel[(5,)](flags, order, count, LAST=last)
    return order.tolist()


@pytest.mark.parametrize("seed", [None, 0, 1, 2])
def test_those_that_wait_for_later_ones_come_to_an_end(seed):
    assert chain(seed) == [4, 3, 2, 1, 0]


def test_those_that_wait_for_nobody_are_found():
    with pytest.raises(SanitizerError, match="_chain_kernel: 5 programs wait for what none of them writes"):
        chain(0, last=9)


@triton.jit
def _first_come_kernel(count_ptr, order_ptr):
    tl.atomic_add(count_ptr, 0)
    tl.store(order_ptr + tl.program_id(0), tl.atomic_add(count_ptr, 1))


def test_the_seed_draws_whose_turn_it_is():
    def drawn(seed):
        count, order = torch.zeros(1, dtype=torch.int32), torch.zeros(6, dtype=torch.int32)
        with sanitized(order=seed, in_turns=True):
            _first_come_kernel[(6,)](count, order)
        return order.tolist()

    found = [drawn(seed) for seed in (0, 1, 2, 0)]
    assert found[0] == found[3] and len(set(map(tuple, found))) == 3
    assert all(sorted(order) == list(range(6)) for order in found)


@triton.jit
def _locked_kernel(lock_ptr, order_ptr, count_ptr):
    """Each takes the lock, counts, and gives it back."""
    while tl.atomic_cas(lock_ptr, 0, 1) == 1:
        pass
    tl.store(order_ptr + tl.program_id(0), tl.atomic_add(count_ptr, 1))
    tl.atomic_xchg(lock_ptr, 0)


def test_those_that_wait_for_a_lock():
    lock, count, order = (torch.zeros(n, dtype=torch.int32) for n in (1, 1, 4))
    with sanitized(order=3, in_turns=True):
        _locked_kernel[(4,)](lock, order, count)
    assert sorted(order.tolist()) == [0, 1, 2, 3] and lock.item() == 0


@triton.jit
def _racing_kernel(x_ptr, flag_ptr):
    tl.atomic_add(flag_ptr, 1)
    tl.store(x_ptr, tl.program_id(0))


def test_races_and_errors_are_told_there_too():
    x, flag = torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    with pytest.raises(SanitizerError, match="store/store race"), sanitized(in_turns=True):
        _racing_kernel[(3,)](x, flag)
    with pytest.raises(SanitizerError, match="store out of bounds of x_ptr"), sanitized(in_turns=True):
        _racing_kernel[(3,)](x[:0], flag)


@triton.jit
def _behind_kernel(table_ptr, out_ptr, place):
    x_ptr = tl.load(table_ptr).to(tl.pointer_type(tl.float32))
    tl.store(out_ptr, tl.load(x_ptr + place))


def test_a_pointer_made_of_a_number_is_held_to_the_tensors_behind_it():
    x, other, out = torch.arange(8.0), torch.zeros(4), torch.zeros(1)
    table = torch.tensor([x[2:5].data_ptr()])
    with sanitized(behind=[other, x[2:5]]):
        _behind_kernel[(1,)](table, out, 2)
        assert out.item() == 4
        with pytest.raises(SanitizerError, match="load out of bounds of a tensor"):
            _behind_kernel[(1,)](table, out, 3)
    with pytest.raises(SanitizerError, match="load out of bounds of all arguments"), sanitized():
        _behind_kernel[(1,)](table, out, 2)
