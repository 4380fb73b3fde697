"""The interpreter road, in processes of its own: Triton reads TRITON_INTERPRET when a kernel is defined."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
ROADS = [  # by the time they take, the longest first
    ["test_attention_masks.py", "test_embedding.py"],
    ["test_attention.py", "test_linear_gelu.py", "test_model.py"],
    ["test_autograd.py", "test_mlp.py", "test_ops.py"],
    ["test_layernorm.py", "test_decode.py", "test_generation.py"],
    ["test_cross_entropy.py", "test_sanitizer.py", "test_swap.py"],
]
SLOW = [pytest.param(["test_parity.py"], marks=pytest.mark.slow)]


@pytest.mark.parametrize("files", [*ROADS, *SLOW], ids=" ".join)
def test_the_kernels_pass_their_tests_in_tritons_interpreter(files):
    pytest.importorskip("triton", reason="Triton is not to be had on this platform")
    command = [sys.executable, "-m", "pytest", "-m", "interpreter", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    run = subprocess.run(
        [*command, *(str(TESTS / file) for file in files)],
        cwd=TESTS.parent,
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-15000:]


def test_no_file_is_forgotten(interpreted_files):
    listed = [*ROADS, *(parameter.values[0] for parameter in SLOW)]
    assert interpreted_files <= {file for files in listed for file in files}
