"""What a call may leave otherwise than it found it: of the process, of PyTorch, of a model, and in the working folder.

`with unchanged(model, …, but=("torch's generator",)):` asks before and after, and fails for whatever differs.
"""

import contextlib
import gc
import hashlib
import logging
import os
import random
import signal
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

_FILES = Path("/proc/self/fd")  # Linux tells which files a process has open


def process() -> dict[str, Any]:
    """By name, what can be asked of this process and of PyTorch in it."""
    module = nn.modules.module
    threads = {thread for thread in threading.enumerate() if not thread.daemon}
    return {
        "torch's generator": _digest(torch.get_rng_state()),
        "numpy's generator": repr(np.random.get_state()),
        "Python's generator": random.getstate(),
        "grad mode": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_anomaly_enabled()),
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "torch's threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "autocast": [(torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in ("cpu", "cuda")],
        "deterministic algorithms": (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            torch.utils.deterministic.fill_uninitialized_memory,
        ),
        "matmul precision": torch.get_float32_matmul_precision(),
        "hooks on all modules": [
            len(hooks)
            for hooks in (
                *(module._global_forward_hooks, module._global_forward_pre_hooks),
                *(module._global_backward_hooks, module._global_backward_pre_hooks),
            )
        ],
        "forwards of classes": [kind.forward for kind in (nn.Linear, nn.LayerNorm, nn.GELU, nn.Dropout, nn.Embedding)],
        "process groups": torch.distributed.is_available() and torch.distributed.is_initialized(),
        "environment": dict(os.environ),
        "working folder": os.getcwd(),
        "its files": sorted(str(path) for path in Path().rglob("*")),
        "module search path": list(sys.path),
        "warnings' filters": list(warnings.filters),
        "warnings' printer": warnings.showwarning,
        "handlers of signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
        "logging": (logging.root.level, list(logging.root.handlers)),
        "umask": _umask(),
        "threads": sorted(thread.name for thread in threads),
        "open files": sorted(_open_files()),
        "excepthook": (sys.excepthook, threading.excepthook),
    }


def of(model: nn.Module) -> dict[str, Any]:
    """By name, what can be asked of a model."""
    parts = list(model.named_modules())
    tensors = [*model.named_parameters(), *model.named_buffers()]
    hooks = [name for name in vars(nn.Module()) if name.endswith("_hooks")]
    return {
        "training mode": {name: part.training for name, part in parts},
        "classes": {name: type(part) for name, part in parts},
        "hooks": {name: [len(vars(part)[each]) for each in hooks] for name, part in parts},
        "attributes": {name: sorted(vars(part)) for name, part in parts},
        "parameters": {name: (id(t), t.data_ptr(), t.dtype, t.device, t.requires_grad) for name, t in tensors},
        "numbers": {name: _digest(tensor) for name, tensor in tensors},
        "gradients": {name: None if t.grad is None else _digest(t.grad) for name, t in tensors},
    }


def _digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()).hexdigest()


def _umask() -> int:
    before = os.umask(0)
    os.umask(before)
    return before


def _open_files() -> list[str]:
    found = []
    for each in _FILES.iterdir() if _FILES.is_dir() else ():
        with contextlib.suppress(OSError):  # the one that lists them
            found.append(os.readlink(each))
    return [name for name in found if name.startswith("/") and not name.startswith(("/proc", "/dev"))]


@contextlib.contextmanager
def unchanged(*models: nn.Module, but: tuple[str, ...] = ()):
    """Fails where the block leaves something else behind than it found, but for what is named, which must differ: what
    docs say that a call changes, it does change."""
    before = [process(), *map(of, models)]
    yield
    after = [process(), *map(of, models)]
    if after[0]["open files"] != before[0]["open files"]:  # by what waits to be collected, or for good
        gc.collect()
        after[0]["open files"] = sorted(_open_files())
    differ = {name for a, b in zip(before, after, strict=True) for name in a if a[name] != b[name]}
    said = [
        f"{name}: {_less(a[name], b[name])!r:.600} before, {_less(b[name], a[name])!r:.600} after"
        for a, b in zip(before, after, strict=True)
        for name in a
        if a[name] != b[name] and name not in but
    ]
    assert not said, "\n".join(said)
    assert differ == set(but), f"it changes {sorted(differ)}, and may change {sorted(but)}"


def _less(value: Any, other: Any) -> Any:
    """What is not in the other one, of what has parts."""
    if isinstance(value, dict):
        return {name: part for name, part in value.items() if name not in other or other[name] != part}
    return [part for part in value if part not in other] or value if isinstance(value, list) else value
