"""How calls are timed: in turns, as graphs or between events, with their peak memory."""

import inspect
import time

import pytest
import torch

from bench import dry
from bench.timing import DeviceClock, HostClock, interleaved


def test_calls_are_sampled_in_turns_that_rotate():
    order = []

    class Clock:
        def sample(self, call):
            call()
            return float(len(order))

    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    timings = interleaved(calls, Clock(), 0.0, (3, 3))
    assert "".join(order[3:]) == "abcbcacab"  # after one warm turn
    assert [len(timing.samples) for timing in timings.values()] == [3, 3, 3]
    assert timings["a"].median == 9.0 and timings["a"].low <= 9.0 <= timings["a"].high


def test_what_cannot_be_captured_is_timed_by_events():
    clock = DeviceClock(dry.FakeCuda(), "cpu")
    calls = []
    replay, method = clock.ready(lambda: calls.append(1), capture=True)
    assert method == "graph replay" and calls == [1]

    def syncs():
        raise RuntimeError("operation not permitted when stream is capturing")

    call, method = clock.ready(syncs, capture=True)
    assert call is syncs and "can't be captured: operation not permitted" in method
    assert clock.ready(syncs, capture=False) == (syncs, "events")
    assert clock.sample(replay) == 1e-3


def test_what_stands_for_torch_cuda_has_its_names():
    """A name that only the stand-in has would pass the dry run and fail on a GPU."""
    for name, _ in inspect.getmembers(dry.FakeCuda, inspect.isfunction):
        if not name.startswith("_"):
            assert hasattr(torch.cuda, name), name
    for name in ("record", "synchronize", "elapsed_time"):
        assert hasattr(torch.cuda.Event, name)
    assert hasattr(torch.cuda.Stream, "wait_stream") and hasattr(torch.cuda.CUDAGraph, "replay")
    real = set(inspect.signature(torch.cuda.graph.__init__).parameters)
    assert set(inspect.signature(dry.FakeCuda.graph).parameters) <= real
    used = {"enable_timing"}
    assert used <= set(inspect.signature(torch.cuda.Event.__new__).parameters)


def test_peak_memory_on_a_cpu():
    clock = HostClock(2**10)

    def call():
        first = torch.ones(2**18)  # 1 MiB
        second = first + 1
        del first, second
        return torch.ones(2**10)

    assert clock.peak_bytes(call) == pytest.approx(2 * 2**20, rel=1e-3)

    kept = [torch.ones(2**18)]

    def replaces():
        kept.clear()
        kept.append(torch.ones(2**18) + 1)

    for _ in range(3):  # the first frees a block that no profile has seen, the others one that the last has
        assert clock.peak_bytes(replaces) == pytest.approx(2 * 2**20, rel=1e-3)


def test_a_sample_takes_as_long_as_its_call():
    assert 0.01 <= HostClock(2**10).sample(lambda: time.sleep(0.01)) < 1
