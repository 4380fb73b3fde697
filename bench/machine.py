"""The machine that is measured: what it is, which clock times it, and the rates that it reaches itself.

Three kinds: "cuda", "cpu", and "dry", which does what a GPU would on a CPU: Triton's interpreter for the kernels, and
bench.dry for torch.cuda.
"""

import argparse
import dataclasses
import datetime
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import torch
from torch.nn.attention import SDPBackend

from bench.timing import DeviceClock, HostClock
from fastgpt import memory

CPU_THREADS = 2


@dataclasses.dataclass(frozen=True)
class Machine:
    kind: Literal["cuda", "cpu", "dry"]
    device: str
    dtype: torch.dtype  # of the operands
    clock: Any  # HostClock or DeviceClock
    compiler: str  # torch.compile's backend
    seconds: float  # of sampling a variant
    rounds: tuple[int, int]  # the fewest and the most samples of a variant
    nanogpt: Path | None = None  # a folder with nanoGPT's model.py, to compare with
    book: Path | None = None  # the book's file with a cache
    compiles_models: bool = False  # whether a CPU compiles whole models too, half a minute each
    large: bool = False  # whether a CPU measures models beyond 124M too

    @classmethod
    def of(cls, kind: str | None = None) -> "Machine":
        """This machine; kind None is "cuda" where there is a GPU that the kernels run on, else "cpu"."""
        usable = torch.cuda.is_available() and torch.version.hip is None
        usable = usable and torch.cuda.get_device_capability() >= (8, 0)
        kind = kind or ("cuda" if usable else "cpu")
        if kind == "cuda" and not usable:
            raise ValueError("there is no NVIDIA GPU of compute capability 8.0 or newer here")
        if kind == "cuda":
            return cls(kind, "cuda", torch.bfloat16, DeviceClock(), "inductor", 0.3, (5, 200))
        if kind == "dry":
            from bench import dry

            dry.interpret()
            torch.set_num_threads(1)
            clock = DeviceClock(dry.FakeCuda(), "cpu")
            return cls(kind, "cpu", torch.float32, clock, "eager", 0.0, (2, 2))
        torch.set_num_threads(CPU_THREADS)
        memory.keep_freed()  # or whoever allocates more, or after a larger one, would be timed with the system's pages
        return cls("cpu", "cpu", torch.float32, HostClock(), "inductor", 0.5, (3, 100))

    @property
    def cuda(self) -> Any:
        """torch.cuda, or its stand-in."""
        return self.clock.cuda

    @property
    def memory_bytes(self) -> int | None:
        """What tensors have room in; None if nobody says."""
        return self.cuda.mem_get_info()[0] if self.kind == "cuda" else memory.physical_bytes()

    @property
    def name(self) -> str:
        if self.kind == "cpu":
            return f"{_cpu_name()}, {CPU_THREADS} threads"
        return self.cuda.get_device_name(0)


def header(machine: Machine) -> dict[str, Any]:
    """What a reader must know of the machine to believe a figure: names, versions, clocks, the SDPA backend chosen."""
    facts = {
        "device": machine.name,
        "measured": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="minutes"),
        "kind": machine.kind,
        "dtype": str(machine.dtype).removeprefix("torch."),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "triton": _version("triton"),
        "ptxas": _ptxas(),
        "cpu": _cpu_name(),
        "cpu_threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,  # of its last minute
        "sdpa": {f"D {dim}": _sdpa_choice(machine, dim) for dim in (64, 128)},
        "command": _command(),
        **commit(),
    }
    if machine.kind == "cpu":
        return facts
    card = machine.cuda.get_device_properties(0)
    return facts | {
        "capability": f"{card.major}.{card.minor}",
        "multiprocessors": card.multi_processor_count,
        "memory_bytes": card.total_memory,
        "l2_bytes": card.L2_cache_size,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None,
        "float32_matmul": torch.backends.cuda.matmul.fp32_precision,
        **_nvidia_smi(),
    }


def _command() -> str:
    """What was typed, as another would type it: without this machine's folders."""
    program, *arguments = sys.argv
    tool = Path(program)
    name = f"python -m {tool.parent.name}" if tool.name == "__main__.py" else tool.name
    return " ".join([name, *(Path(each).name if Path(each).is_absolute() else each for each in arguments)])


def measure_roofs(machine: Machine) -> dict[str, float]:
    """Bytes and flops a second that this machine reaches now: a large copy, counting bytes read and written, and a
    large product of random matrices in the dtype that is benchmarked. The best sample of each: a roof is what the
    machine can do, not what its neighbours leave of it."""
    elements, side = {"cuda": (2**29, 8192), "cpu": (2**25, 1024), "dry": (2**16, 64)}[machine.kind]
    source = torch.randn(elements, device=machine.device).to(machine.dtype)
    target = torch.empty_like(source)
    a, b = (torch.randn(side, side, device=machine.device).to(machine.dtype) for _ in range(2))
    product = torch.empty_like(a)
    with machine.clock.session():
        copy, matmul = lambda: target.copy_(source), lambda: torch.mm(a, b, out=product)
        timed = {}
        for name, call in {"copy": copy, "matmul": matmul}.items():  # apart: one would heat the card for the other
            for _ in range(3):
                call()
            timed[name] = min(machine.clock.sample(call) for _ in range(20))
    return {
        "bytes_a_second": 2 * source.numel() * source.element_size() / timed["copy"],
        "flops_a_second": 2 * side**3 / timed["matmul"],
    }


def commit() -> dict[str, str | bool]:
    """The commit that is measured, and whether the files differ from it. FASTGPT_COMMIT tells it of a copy that has no
    history, or an older one's."""
    if told := os.environ.get("FASTGPT_COMMIT"):
        return {"commit": told, "changed": False}
    root = Path(__file__).parent.parent

    def git(*arguments):
        return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return {"commit": git("rev-parse", "--short=9", "HEAD"), "changed": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):  # no git, or a checkout without its history
        return {"commit": "unknown", "changed": True}


def _sdpa_choice(machine: Machine, dim: int) -> str:
    """Which of scaled_dot_product_attention's kernels PyTorch picks for heads of this width."""
    q = torch.empty(1, 2, 64, dim, dtype=machine.dtype, device=machine.device, requires_grad=True)
    return SDPBackend(torch._fused_sdp_choice(q, q, q, None, 0.0, True)).name.lower()


def _version(package: str) -> str | None:
    try:
        return __import__(package).__version__
    except ModuleNotFoundError:
        return None


def _ptxas() -> str | None:
    try:
        import triton
    except ModuleNotFoundError:
        return None
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    text = _output(str(tool), "--version")
    found = re.search(r"V([\d.]+)", text or "")
    return found and found.group(1)


def _nvidia_smi() -> dict[str, str]:
    fields = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit", "temperature.gpu")
    text = _output("nvidia-smi", "--query-gpu=" + ",".join(fields), "--format=csv,noheader", "--id=0")
    return dict(zip(fields, text.strip().split(", "), strict=False)) if text else {}


def _output(tool: str, *arguments: str) -> str | None:
    """What a tool prints, or None where it can't be had."""
    if shutil.which(tool) is None:
        return None
    try:
        return subprocess.run([tool, *arguments], capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None


def _cpu_name() -> str:
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    name = found.group(1).strip() if found else platform.processor() or platform.machine()
    return f"{name} ({os.cpu_count()} cores)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dry-run", action="store_true", help="do what a GPU would, on a CPU")
    parser.add_argument("--out", type=Path, help="a JSON file to write")


def main(options: argparse.Namespace) -> int:
    """Print what this machine is and the rates it reaches."""
    machine = Machine.of("dry" if options.dry_run else None)
    facts = header(machine) | {"roofs": measure_roofs(machine)}
    text = json.dumps(facts, indent=2)
    print(text)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text + "\n")
    return 0
