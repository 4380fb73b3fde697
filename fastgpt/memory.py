"""How much memory a machine has, and what a process does with what it has freed."""

import ctypes
import os

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
