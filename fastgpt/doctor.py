"""What this machine has, what fastgpt will use on it and why, and what to do about each problem: `fastgpt doctor`.

A problem is what keeps the Triton kernels from a GPU that is here. A machine without a GPU has none: PyTorch serves it.
"""

import json
import os
import platform
import shutil
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastgpt import ops
from fastgpt.private import FakeTensorMode

DRIVER = Path("/proc/driver/nvidia/version")  # there while NVIDIA's module is loaded; Linux alone has it


class Finding(NamedTuple):
    what: str
    found: str
    problem: str = ""  # what it keeps from working
    remedy: str = ""


class Diagnosis(NamedTuple):
    findings: tuple[Finding, ...]
    functions: dict[str, str]  # of fastgpt.ops: which backend each takes for GPT-2's tensors, and why

    @property
    def healthy(self) -> bool:
        return not any(finding.problem for finding in self.findings)

    def __str__(self) -> str:
        lines = [f"{finding.what:18} {finding.found}" for finding in self.findings]
        lines += ["", *self._said_once(), ""]
        for finding in self.findings:
            if finding.problem:
                lines += [f"PROBLEM: {finding.problem}", f"  what to do: {finding.remedy}"]
        return "\n".join([*lines, *(["nothing is wrong"] if self.healthy else [])])

    def _said_once(self) -> list[str]:
        """What serves each function, in one line where it is the same for all but special forms."""
        parts = {name: said.removeprefix(f"{name} ").partition("; ")[::2] for name, said in self.functions.items()}
        if len({reason for reason, _ in parts.values()}) == 1:
            forms = [f"{name}: {form}" for name, (_, form) in parts.items() if form]
            return [f"every function of fastgpt.ops {next(iter(parts.values()))[0]}", *forms]
        return list(self.functions.values())

    def json(self) -> str:
        findings = [finding._asdict() for finding in self.findings]
        return json.dumps({"healthy": self.healthy, "findings": findings, "functions": self.functions}, indent=2)


def examine() -> Diagnosis:
    """Look at everything. Nothing is compiled, and what can't be looked at is a finding, not an exception."""
    looks: dict[str, Callable[[], Iterator[Finding]]] = {
        "system": _system,
        "PyTorch": _torch,
        "GPU": _gpus,
        "Triton": _triton,
        "C compiler": _compiler,
        "kernel cache": _cache,
        "SDPA": _sdpa,
        "a token": _token,
    }
    findings: list[Finding] = []
    for what, look in looks.items():
        try:
            findings += look()
        except Exception as error:  # a broken machine is what this is for
            findings.append(Finding(what, "can't be looked at", f"{what}: {_said(error)}", "mend what it names"))
    return Diagnosis(tuple(findings), _functions())


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _has_gpu() -> bool:
    return DRIVER.exists() or (torch.cuda.is_available() and torch.version.hip is None)


def _system() -> Iterator[Finding]:
    yield Finding("system", f"Python {platform.python_version()}, {platform.system()} {platform.machine()}")


def _torch() -> Iterator[Finding]:
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "ROCm" if torch.version.hip else "no GPU"
    found = f"{torch.__version__}, built for {build}"
    if DRIVER.exists() and torch.version.cuda is None:
        problem = "an NVIDIA driver is loaded, but this PyTorch is built without CUDA"
        yield Finding("PyTorch", found, problem, "install a CUDA build of PyTorch (pytorch.org, Get Started)")
    else:
        yield Finding("PyTorch", found)


_OLD_CARD = (
    "nothing; all of fastgpt runs on it by PyTorch's own functions, and no faster than these: fastgpt train takes "
    "float16 with loss scaling there, for the card has no bfloat16; generate has --dtype float16; accelerate leaves "
    "models alone"
)


def _gpus() -> Iterator[Finding]:
    if DRIVER.exists():
        yield Finding("driver", DRIVER.read_text().splitlines()[0].removeprefix("NVRM version: "))
    if not torch.cuda.is_available():
        if DRIVER.exists() and torch.version.cuda:
            hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
            old = "the driver may be older than its CUDA"
            reason = old if hidden is None else f"CUDA_VISIBLE_DEVICES is {hidden!r}"
            problem = f"PyTorch can't use the GPU: {reason}"
            yield Finding("GPU", "not usable", problem, "update the driver, or unset CUDA_VISIBLE_DEVICES")
        else:
            yield Finding("GPU", "none; PyTorch serves on the CPU")
        return
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        name = f"{card.name}, compute capability {card.major}.{card.minor}, {card.total_memory / 2**30:.0f} GiB"
        shared = getattr(card, "shared_memory_per_block_optin", None)
        name += "" if shared is None else f", {shared / 2**10:.0f} KiB shared memory a block"
        if torch.version.hip is None and card.major < 8:
            problem = f"{card.name} has compute capability {card.major}.{card.minor}, the kernels need 8.0 or newer"
            yield Finding(f"GPU {index}", name, problem, _OLD_CARD)
        else:
            yield Finding(f"GPU {index}", name)


def _triton() -> Iterator[Finding]:
    if (reason := ops.no_triton()) is not None:
        if _has_gpu():
            problem = f"{reason}, so PyTorch serves on the GPU too"
            yield Finding("Triton", reason, problem, "pip install -U 'triton>=3.6'")
        else:
            found = reason.removeprefix("Triton is ")
            yield Finding("Triton", f"{found}; only the kernels for NVIDIA GPUs need it")
        return
    import triton

    yield Finding("Triton", triton.__version__)
    ptxas = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    lost = _has_gpu() and not ptxas.exists() and "TRITON_PTXAS_PATH" not in os.environ
    problem = "Triton has no ptxas, which makes the GPU's code" if lost else ""
    found = os.environ.get("TRITON_PTXAS_PATH", str(ptxas) if ptxas.exists() else "none")
    yield Finding("ptxas", found, problem, "reinstall triton, or set TRITON_PTXAS_PATH" if problem else "")
    if ops.interpreted():
        problem = "TRITON_INTERPRET is set: kernels run in Python, not on the GPU" if _has_gpu() else ""
        yield Finding("TRITON_INTERPRET", "set", problem, "unset it" if problem else "")


def _compiler() -> Iterator[Finding]:
    """Triton compiles the code that launches a kernel, once, with a C compiler and Python's headers."""
    asked = os.environ.get("CC")
    found = shutil.which(asked) if asked else next(filter(None, map(shutil.which, ("gcc", "clang", "cc"))), None)
    header = Path(sysconfig.get_path("include"), "Python.h")
    needed = _has_gpu() and ops.no_triton() is None
    name = found or (f"CC is {asked!r}, which is not there" if asked else "none")
    lost = needed and found is None
    problem = "Triton finds no C compiler for what launches its kernels" if lost else ""
    yield Finding("C compiler", name, problem, "install gcc, or set CC" if problem else "")
    lost = needed and not header.exists()
    problem = f"Triton needs Python's headers, there is no {header}" if lost else ""
    remedy = "install them: python3-dev (Debian), python3-devel (Fedora)" if problem else ""
    yield Finding("Python headers", str(header) if header.exists() else "none", problem, remedy)


def _cache() -> Iterator[Finding]:
    """Where Triton keeps what it compiled."""
    folder = Path(os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache")
    there = next(each for each in (folder, *folder.parents) if each.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        needed = _has_gpu() and ops.no_triton() is None
        problem = f"compiled kernels can't be kept in {folder}: {error.strerror}" if needed else ""
        remedy = "set TRITON_CACHE_DIR to a folder that can be written" if problem else ""
        yield Finding("kernel cache", f"{folder}, not writable", problem, remedy)
    else:
        yield Finding("kernel cache", str(folder))


def _sdpa() -> Iterator[Finding]:
    allowed = {
        "cuDNN": torch.backends.cuda.cudnn_sdp_enabled(),
        "flash": torch.backends.cuda.flash_sdp_enabled(),
        "efficient": torch.backends.cuda.mem_efficient_sdp_enabled(),
        "math": torch.backends.cuda.math_sdp_enabled(),
    }
    yield Finding("SDPA may use", ", ".join(name for name, on in allowed.items() if on) or "nothing")


def _token() -> Iterator[Finding]:
    """How generate writes a token of GPT-2 124M, one sequence alone."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with FakeTensorMode(allow_non_fake_inputs=True):
        head = torch.empty(50257, 768, device=device, dtype=torch.bfloat16 if device == "cuda" else torch.float32)
        yield Finding("a token", ops.explain_token(head, 12, 3072, 1024))


def _functions() -> dict[str, str]:
    """ops.explain for a few of GPT-2's tensors, which are made of nothing."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with FakeTensorMode(allow_non_fake_inputs=True):

        def floats(*shape: int) -> torch.Tensor:
            return torch.empty(shape, device=device, dtype=torch.bfloat16 if device == "cuda" else torch.float32)

        def numbers(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, device=device, dtype=torch.int64)

        batch, time = (32, 1024) if device == "cuda" else (2, 8)  # as GPT-2 is trained on a GPU
        x, weight, cache = floats(batch, time, 768), floats(768), floats(2, 12, 64, 64)
        strides = (time * 768, 64, 768, 1)  # as a projection leaves them
        heads = torch.empty_strided((batch, 12, time, 64), strides, device=device, dtype=x.dtype)
        calls: dict[Callable, tuple[Any, ...]] = {
            ops.layer_norm: (x, weight),
            ops.add_layer_norm: (x, x, weight),
            ops.causal_attention: (heads, heads, heads),
            ops.causal_attention_qkv: (floats(batch, time, 3 * 768), 12),
            ops.decode_attention: (floats(2, 12, 8, 64), cache, cache, numbers(2)),
            ops.gelu_mlp: (x, floats(3072, 768), floats(3072), floats(768, 3072)),
            ops.linear_cross_entropy: (x, floats(50257, 768), numbers(batch, time)),
            ops.embedding: (numbers(batch, time), floats(50257, 768), floats(1024, 768)),
        }
        found = {}
        for function, arguments in calls.items():
            try:
                found[function.__name__] = ops.explain(function, *arguments)
            except Exception as error:
                found[function.__name__] = f"{function.__name__}: {_said(error)}"
        return found
