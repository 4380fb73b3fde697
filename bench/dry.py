"""What stands for torch.cuda in a dry run: the same names, a clock that moves on by a fixed step, no device.

The code that will run on a GPU runs as it is, with Triton's interpreter behind the kernels; only this object differs.
"""

import contextlib
import types

_sanitizing = contextlib.ExitStack()  # until the process ends


def interpret() -> None:
    """Have every launch of this process checked by the sanitizing interpreter, which is also faster than Triton's."""
    from fastgpt import ops

    if not ops.interpreted():
        raise ValueError("a dry run needs Triton and TRITON_INTERPRET=1 in the environment before it starts")
    from fastgpt.sanitizer import sanitized  # needs Triton

    _sanitizing.enter_context(sanitized())


class FakeCuda:
    """Events are a millisecond apart; a graph replays nothing, as its kernels have run while it was captured."""

    def __init__(self):
        self.milliseconds = 0.0
        self.allocated = 0

    def Event(self, enable_timing: bool = False):
        return _Event(self)

    def Stream(self):
        return _Stream()

    def CUDAGraph(self):
        return types.SimpleNamespace(replay=lambda: None)

    def current_stream(self):
        return _Stream()

    def stream(self, stream):
        return contextlib.nullcontext()

    def graph(self, cuda_graph, stream=None):
        return contextlib.nullcontext()

    def synchronize(self):
        pass

    def reset_peak_memory_stats(self):
        self.allocated = 0

    def memory_allocated(self):
        return self.allocated

    def max_memory_allocated(self):
        return self.allocated + 2**20

    def empty_cache(self):
        pass

    def is_available(self):
        return True

    def get_device_name(self, device=None):
        return "dry run"

    def get_device_capability(self, device=None):
        return 9, 0

    def get_device_properties(self, device=None):
        return types.SimpleNamespace(
            name="dry run", major=9, minor=0, multi_processor_count=132, total_memory=2**30, L2_cache_size=2**12
        )


class _Event:
    def __init__(self, cuda: FakeCuda):
        self._cuda, self._at = cuda, 0.0

    def record(self):
        self._cuda.milliseconds += 1.0
        self._at = self._cuda.milliseconds

    def synchronize(self):
        pass

    def elapsed_time(self, end_event):
        return end_event._at - self._at


class _Stream:
    def wait_stream(self, stream):
        pass


def interpreter_environment() -> dict[str, str]:
    """For a process that runs the kernels without a GPU."""
    return {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
