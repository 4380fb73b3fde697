"""The interpreter road, as a process of its own: Triton reads TRITON_INTERPRET when a kernel is defined."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_the_kernels_pass_their_tests_in_tritons_interpreter():
    pytest.importorskip("triton", reason="Triton is not to be had on this platform")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "tests", "-m", "interpreter", "-q", "-p", "no:cacheprovider"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    print(run.stdout[-20000:], run.stderr[-5000:])
    assert run.returncode == 0, "the interpreter's own report is above"
