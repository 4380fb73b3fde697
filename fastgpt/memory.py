"""How much memory a machine has, what a process does with what it freed, and pages for what is read over and over."""

import contextlib
import ctypes
import math
import mmap
import os
from collections.abc import Sequence

import torch
from torch import Tensor

_LARGE_PAGE, _CHUNK, _CACHE_LINE = 2**21, 2**26, 64
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # glibc's malloc.h


def keep_freed() -> bool:
    """Have the C library keep freed blocks for the next one who asks, whatever their size. For a process that trains on
    a CPU: each step asks for the same blocks, and to get their pages from the system again takes a fifth of a step
    (GPT-2 124M, a virtual machine of 2 cores). False where the C library, not being glibc, has no such switch.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # macOS, musl, Windows
        return False
    return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, -1))


def physical_bytes() -> int | None:
    """Of the machine's main memory; None where the system does not say (Windows)."""
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", ()):
        return None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def available_bytes(device: torch.device) -> int | None:
    """What new tensors there may take: what a GPU has free and what PyTorch keeps of it for itself, or all of the main
    memory; None where the system does not say."""
    if device.type != "cuda":
        return physical_bytes()
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept


class LargePages:
    """Tensors in main memory, close together on the system's large pages where it has them: Linux, whose setting
    transparent_hugepage is madvise or always. Weights that are read once a token come 4 to 19% faster from pages of
    2 MiB than from those of 4 KiB (Xeon, a virtual machine of 2 cores). Memory goes back with a chunk's last tensor.
    """

    def __init__(self) -> None:
        self._left = torch.empty(0, dtype=torch.uint8, device="cpu")

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """As torch.empty, on the CPU."""
        size = math.prod(shape) * dtype.itemsize
        if size > len(self._left):
            self._left = _mapped(max(size, _CHUNK))
        taken = self._left[:size]
        self._left = self._left[-(-size // _CACHE_LINE) * _CACHE_LINE :]
        return taken.view(dtype).view(torch.Size(shape))


def _mapped(size: int) -> Tensor:
    """Bytes that begin at a large page."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(size, dtype=torch.uint8, device="cpu")
    area = mmap.mmap(-1, size + _LARGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without them
        area.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(area, dtype=torch.uint8)  # which keeps the area mapped as long as it is used
    return whole[-whole.data_ptr() % _LARGE_PAGE :][:size]
