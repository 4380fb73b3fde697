"""NVIDIA's compute-sanitizer over `python -m bench smoke`: accesses out of bounds, races in shared memory, barriers.

Without PyTorch's caching allocator, so that a tensor's end is an allocation's end. initcheck is left out: it reports
the libraries' own kernels by the thousand.
"""

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

TOOLS = {"memcheck": 0.6, "racecheck": 0.7, "synccheck": 1.0}  # of the time that is left when it starts
_PLACES = ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer", "/opt/cuda/bin")


def find() -> str | None:
    """compute-sanitizer on PATH or in a CUDA toolkit."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    places = [*(f"{home}/{folder}" for home in homes for folder in ("bin", "compute-sanitizer")), *_PLACES]
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=os.pathsep.join(places))


def check(sanitizer: str, tool: str, dry_run: bool, seconds: float, log: Path) -> str:
    """One tool's verdict in a few words; what it printed is in `log`."""
    smoke = [sys.executable, "-m", "bench", "smoke", *(["--dry-run"] if dry_run else [])]
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9", *smoke]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONFAULTHANDLER": "1"}
    with log.open("w") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return f"stopped after {seconds:.0f} s, {_summary(log)}"
    return f"exit status {code}, {_summary(log)}"


def _summary(log: Path) -> str:
    text = log.read_text(errors="replace")
    found = re.findall(r"ERROR SUMMARY: .*|RACECHECK SUMMARY: .*", text)
    return found[-1] if found else "no summary"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("out/sanitize"), help="the folder for its reports")
    parser.add_argument("--seconds", type=float, default=120.0, help="for all tools together")
    parser.add_argument("--dry-run", action="store_true", help="over the interpreter, which finds nothing")


def main(options: argparse.Namespace) -> int:
    """1 if a tool found an error; 0, with the reason printed, where there is no sanitizer."""
    sanitizer = find()
    if sanitizer is None:
        print("compute-sanitizer is neither on PATH nor in a CUDA toolkit: nothing was sanitized")
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    end, failed = time.monotonic() + options.seconds, 0
    for tool, part in TOOLS.items():
        share = part * (end - time.monotonic())
        if share < 1:
            print(f"{tool}: no time left")
            continue
        verdict = check(sanitizer, tool, options.dry_run, share, options.out / f"{tool}.log")
        failed += not (verdict.startswith("exit status 0") or verdict.startswith("stopped"))
        print(f"{tool}: {verdict}", flush=True)
    return int(failed > 0)
