"""What a test can run on. `pytest` alone takes all that the machine has, and leaves out what is marked slow.

A test that asks for `device` runs Triton kernels. It is made twice: marked `interpreter`, on CPU tensors, which runs
only under TRITON_INTERPRET=1, in a process that test_interpreter.py starts; and marked `gpu`, which runs where there is
a GPU. Everything else runs where Triton is not interpreted. What a process can't run is deselected, never skipped.
"""

import os

import pytest
import torch

from fastgpt import ops
from tests.models import FAMILIES

LONGEST = ("test_interpreter.py", "test_verify.py", "test_gpu_uses.py")
INTERPRETED = ops.interpreted()
_INTERPRETED = pytest.StashKey[set[str]]()
HAS_GPU = torch.cuda.is_available() and torch.version.hip is None and torch.cuda.get_device_capability() >= (8, 0)


@pytest.fixture(
    params=[
        pytest.param("cpu", marks=pytest.mark.interpreter, id="interpreter"),
        pytest.param("cuda", marks=pytest.mark.gpu, id="gpu"),
    ]
)
def device(request):
    return torch.device(request.param)


@pytest.fixture(params=FAMILIES)
def family(request):
    """A function that makes a small model of one of the families; keywords change its configuration."""
    return FAMILIES[request.param]


@pytest.fixture(autouse=True)
def _deterministic():
    """The same draws in every test, and memory that a kernel forgot to write is NaN."""
    torch.manual_seed(0)
    torch.set_num_threads(1)  # the tensors are small, and two busy threads wait for each other on a busy machine
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    if HAS_GPU:  # many processes share it
        torch.cuda.empty_cache()


@pytest.fixture(autouse=True)
def _sanitized(request):
    """What the interpreter lets pass and a GPU would not fails the test that does it."""
    if request.node.get_closest_marker("interpreter") is None:
        yield
        return
    from fastgpt.sanitizer import sanitized  # needs Triton

    with sanitized():
        yield


@pytest.fixture
def interpreted_files(pytestconfig):
    """Names of those collected files that hold tests for the interpreter."""
    return pytestconfig.stash[_INTERPRETED]


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

    kept = [item for item in items if runs_here(item)]
    config.stash[_INTERPRETED] = {item.path.name for item in items if item.get_closest_marker("interpreter")}
    if dropped := [item for item in items if not runs_here(item)]:
        config.hook.pytest_deselected(items=dropped)
    items[:] = sorted(kept, key=lambda item: item.path.name not in LONGEST)  # first, for pytest -n
