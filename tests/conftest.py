"""The roads a test can take. `pytest` alone takes all that the machine has.

A test that asks for `device` runs Triton kernels. It is made twice: marked `interpreter`, on CPU tensors, which runs
only under TRITON_INTERPRET=1, in a process that test_roads.py waits for; and marked `gpu`, which runs where there is a
GPU. Everything else runs in the main process alone. What a process can't run is deselected there, never skipped.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from fastgpt import ops

INTERPRETED = ops.autograd is not None and ops.autograd.INTERPRETED
HAS_GPU = torch.cuda.is_available() and torch.version.hip is None and torch.cuda.get_device_capability() >= (8, 0)


@pytest.fixture(
    params=[
        pytest.param("cpu", marks=pytest.mark.interpreter, id="interpreter"),
        pytest.param("cuda", marks=pytest.mark.gpu, id="gpu"),
    ]
)
def device(request):
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def _deterministic():
    """The same draws in every test, and memory that a kernel forgot to write is NaN."""
    torch.manual_seed(0)
    torch.set_num_threads(1)  # the tensors are small, and two busy threads wait for each other on a busy machine
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _sanitized(request):
    """What the interpreter lets pass and a GPU would not fails the test that does it."""
    if request.node.get_closest_marker("interpreter") is None:
        yield
        return
    from fastgpt.sanitizer import sanitized  # needs Triton

    with sanitized():
        yield


def pytest_configure(config):
    # cuBLAS is deterministic only with a workspace of a fixed size; set before the first handle is made
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def pytest_collection_modifyitems(config, items):
    def runs_here(item):
        if item.get_closest_marker("interpreter"):
            return INTERPRETED
        if item.get_closest_marker("gpu"):
            return HAS_GPU and not INTERPRETED
        return not INTERPRETED

    share, shares = map(int, (config.getoption("--share") or "0/1").split("/"))
    files = sorted({item.path for item in items if runs_here(item)})
    mine = set(files[share::shares])
    kept = [item for item in items if runs_here(item) and item.path in mine]
    dropped = [item for item in items if not (runs_here(item) and item.path in mine)]
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = kept
    items.sort(key=_waits_for_the_interpreter)  # last, when it has nothing else to do


class Road(NamedTuple):
    """A process that runs its share of the interpreter's tests, and where it reports."""

    process: subprocess.Popen
    report: Path


_ROADS = pytest.StashKey[list[Road]]()
_SHARES = 2  # this process is busy too, but waits at times


def pytest_addoption(parser):
    parser.addoption("--share", help="I/N: only every Nth file's tests, from the Ith on")


def _waits_for_the_interpreter(item):
    return "interpreter_roads" in getattr(item, "fixturenames", ())


def pytest_collection_finish(session):
    """Start the interpreter's processes where a test will wait for them."""
    if not any(map(_waits_for_the_interpreter, session.items)) or session.config.option.collectonly:
        return
    roads = session.config.stash[_ROADS] = []
    for share in range(_SHARES):
        handle, name = tempfile.mkstemp(prefix="interpreter-", suffix=".txt")
        with open(handle, "wb") as report:
            command = [sys.executable, "-m", "pytest", "tests", "-m", "interpreter", "-q", "-p", "no:cacheprovider"]
            process = subprocess.Popen(
                [*command, f"--share={share}/{_SHARES}"],
                cwd=Path(__file__).parent.parent,
                env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
                stdout=report,
                stderr=subprocess.STDOUT,
            )
        roads.append(Road(process, Path(name)))


def pytest_sessionfinish(session):
    for road in session.config.stash.get(_ROADS, []):
        road.process.kill()  # nothing if it has ended
        road.process.wait()
        road.report.unlink()


@pytest.fixture
def interpreter_roads(pytestconfig):
    return pytestconfig.stash[_ROADS]
