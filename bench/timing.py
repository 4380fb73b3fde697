"""Clocks, and the one loop that samples what they time.

A sample is one call after the caches were emptied. All calls of a case are sampled in turns, in an order that rotates,
so that a clock that drifts or a neighbour that wakes up falls on all of them alike; medians are what is reported.

On a GPU a sample is the time between two events on a stream. What can be captured is replayed as a CUDA graph, so that
short kernels are not drowned in the host's launches; the backward must then be built on the same stream, which is why
everything of a case happens inside `clock.session()`.
"""

import contextlib
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

Call = Callable[[], Any]


class HostClock:
    """A CPU: the wall clock, after a buffer twice the size of the last-level cache was rewritten."""

    def __init__(self, cache_bytes: int = 32 * 2**20):
        self._flush = torch.zeros(2 * cache_bytes, dtype=torch.uint8)

    def session(self):
        return contextlib.nullcontext()

    def ready(self, call: Call, capture: bool) -> tuple[Call, str]:
        return call, "wall clock"

    def sample(self, call: Call) -> float:
        """Seconds of one call."""
        self._flush.add_(1)
        return self.once(call)

    def once(self, call: Call) -> float:
        """Seconds of one call by the host's clock, everything it started included; the caches as they are."""
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    def peak_bytes(self, call: Call) -> int:
        """The most bytes at once of what PyTorch's allocator gave out during the call. What it was given before and is
        freed meanwhile counts nothing: the profiler tells of some such blocks, those that an earlier one saw, and not
        of others."""
        gc.collect()  # an earlier call's garbage, freed during this one, would count against it
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            result = call()
        with tempfile.TemporaryDirectory() as folder:
            trace = Path(folder, "trace.json")
            profile.export_chrome_trace(str(trace))
            events = [e for e in json.loads(trace.read_text())["traceEvents"] if e["name"] == "[memory]"]
        del result
        held: dict[int, int] = {}
        total = peak = 0
        for event in sorted(events, key=lambda event: event["ts"]):
            address, size = event["args"]["Addr"], event["args"]["Bytes"]
            if size > 0:
                held[address] = size
                total += size
                peak = max(peak, total)
            else:
                total -= held.pop(address, 0)
        return peak


class DeviceClock:
    """An NVIDIA GPU, by events. `cuda` is torch.cuda, or what stands for it in a dry run."""

    def __init__(self, cuda=torch.cuda, device: str = "cuda"):
        self.cuda = cuda
        self._stream = cuda.Stream()
        flush = 4 * cuda.get_device_properties(0).L2_cache_size
        self._flush = torch.zeros(flush, dtype=torch.uint8, device=device)

    def session(self):
        self._stream.wait_stream(self.cuda.current_stream())
        return self.cuda.stream(self._stream)

    def ready(self, call: Call, capture: bool) -> tuple[Call, str]:
        """`call` as a graph's replay where it can be captured, and how it will be timed. It has been called before."""
        if not capture:
            return call, "events"
        graph = self._captured(call)
        if isinstance(graph, str):
            gc.collect()  # a graph half captured keeps the generator from drawing
            self.cuda.synchronize()
            return call, graph

        def replay(kept=call):  # the graph reads the memory of what the call holds
            graph.replay()

        return replay, "graph replay"

    def _captured(self, call: Call) -> Any:
        """The graph of a call, or why there is none."""
        graph = self.cuda.CUDAGraph()
        self.cuda.synchronize()
        try:
            with self.cuda.graph(graph, stream=self._stream):
                call()
        except RuntimeError as error:  # a host sync inside, say
            return f"events, for it can't be captured: {str(error).splitlines()[0][:80]}"
        return graph

    def sample(self, call: Call) -> float:
        start, end = self.cuda.Event(enable_timing=True), self.cuda.Event(enable_timing=True)
        self._flush.zero_()  # also gives the host time to enqueue the call
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def once(self, call: Call) -> float:
        self.cuda.synchronize()
        start = time.perf_counter()
        call()
        self.cuda.synchronize()
        return time.perf_counter() - start

    def peak_bytes(self, call: Call) -> int:
        gc.collect()
        self.cuda.synchronize()
        self.cuda.reset_peak_memory_stats()
        before = self.cuda.memory_allocated()
        result = call()
        self.cuda.synchronize()
        peak = self.cuda.max_memory_allocated() - before
        del result
        return peak


class Timing(NamedTuple):
    median: float  # seconds
    low: float  # the quartiles
    high: float
    samples: list[float]


def interleaved(calls: dict[str, Call], clock, seconds: float, rounds: tuple[int, int]) -> dict[str, Timing]:
    """Sample every call in turns, for about `seconds` in all, within the fewest and the most `rounds`."""
    least, most = rounds
    once = sum(clock.sample(call) for call in calls.values())  # warm
    turns = max(least, min(most, int(seconds / max(once, 1e-6))))
    order, samples = list(calls), {name: [] for name in calls}
    for turn in range(turns):
        shift = turn % len(order)
        for name in order[shift:] + order[:shift]:
            samples[name].append(clock.sample(calls[name]))
    return {name: _timing(values) for name, values in samples.items()}


def _timing(values: list[float]) -> Timing:
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Timing(median, low, high, values)
