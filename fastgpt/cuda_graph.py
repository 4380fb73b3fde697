"""Steps that a GPU repeats without its host: captured once as a CUDA graph, then replayed."""

import functools
import threading
from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")
_ONE_AT_A_TIME = threading.Lock()  # a process can't make two captures at once


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """Of all captures on this device: PyTorch's own would be on the device of the first capture. cuBLAS keeps a
    workspace for every stream, so there is one."""
    return torch.cuda.Stream(device)


def warmed(device: torch.device, step: Callable[[], T]) -> T:
    """What `step` returns, run beside the current stream: what a capture can't do is compile kernels, and create
    handles and an optimizer's state."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        result = step()
    torch.cuda.current_stream(device).wait_stream(stream)
    return result


def captured(device: torch.device, step: Callable[[], T]) -> tuple[torch.cuda.CUDAGraph, T]:
    """A graph of `step`, and what replays write their results to. Other threads may work on the device meanwhile."""
    graph = torch.cuda.CUDAGraph()
    with _ONE_AT_A_TIME, torch.cuda.graph(graph, stream=_stream(device), capture_error_mode="thread_local"):
        result = step()
    return graph, result
