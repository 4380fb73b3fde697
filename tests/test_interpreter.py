"""The kernels in Triton's interpreter, in processes of their own: TRITON_INTERPRET is read as a kernel is defined."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not to be had on this platform")

TESTS = Path(__file__).parent
GROUPS = [  # each about a minute's work
    ["test_attention_masks.py", "test_embedding.py"],
    ["test_sanitizer.py", "test_sanitizer_numbers.py", "test_sanitizer_memory.py", "test_judges.py"],
    ["test_attention.py", "test_model_memory.py"],
    ["test_autograd.py", "test_mlp.py", "test_explain.py", "test_several_gradients.py"],
    ["test_layernorm.py", "test_decode.py", "test_few_rows.py", "test_generation.py", "test_decoder.py"],
    ["test_views.py", "test_pairs.py"],
    ["test_token.py", "test_words.py", "test_sanitizer_turns.py", "test_fp8_copies.py"],
    ["test_windows.py", "test_rings.py", "test_qkv_bias.py", "test_draw.py", "test_sanitizer_edges.py",
     "test_families_gpt2.py"],
    ["test_cross_entropy.py", "test_swap.py", "test_large.py", "test_holes.py", "test_other_defaults.py"],
]  # fmt: skip


def interpret(marks, files):
    command = [sys.executable, "-m", "pytest", "-m", marks, "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    run = subprocess.run(
        [*command, *(str(path) for file in files for path in TESTS.rglob(file))],
        cwd=TESTS.parent,
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-15000:]


@pytest.mark.parametrize("files", GROUPS, ids=" ".join)
def test_the_kernels_pass_their_tests_in_tritons_interpreter(files):
    interpret("interpreter and not slow", files)


@pytest.mark.slow
def test_the_slow_ones_pass_too():
    interpret("interpreter and slow", [])


def test_no_file_is_forgotten(interpreted_files):
    slow_alone = {"test_parity.py", "test_swap_graphs.py", "test_verify.py"}
    assert interpreted_files <= {*slow_alone, *(file for files in GROUPS for file in files)}
