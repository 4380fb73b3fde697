"""Every command on a machine whose PyTorch brings no Triton: what a CPU build, macOS and Windows have.

Where there is a Triton it is hidden from a process of its own, so that this is tried everywhere.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HIDE = "import sys; sys.modules['triton'] = None\n"
COMMANDS = {
    "train": "train --data text.txt {shape} --max_iters 4 --eval_interval 2 --sample_tokens 9",
    "resume": "train --data text.txt --resume --max_iters 6",
    "generate": "generate --device cpu --prompt fox --max_new_tokens 20 --seed 1",
    "generate greedy": "generate --device cpu --prompt fox --max_new_tokens 20 --temperature 0",
    "generate in bfloat16": "generate --device cpu --prompt fox --max_new_tokens 20 --dtype bfloat16 --seed 1",
    "several samples": "generate --device cpu --prompt fox --max_new_tokens 20 --num_samples 3 --json",
    "a draft": "generate --device cpu --prompt fox --max_new_tokens 8 --draft out --seed 1",
    "eval": "eval text.txt --device cpu",
    "tokenize": "tokenize text.txt --encoding byte -o tokens",
    "train on tokens": "train --data tokens --out more {shape} --max_iters 2",
    "convert": "convert out nanogpt --to nanogpt",
    "verify": "verify --device cpu",
    "verify a model": "verify out --tokens 9 --device cpu",
    "doctor": "doctor",
}
SHAPE = "--n_layer 2 --n_head 2 --n_embd 16 --block_size 16 --batch_size 2 --eval_iters 1 --device cpu"
SCRIPT = """
import contextlib, io, json, sys
from fastgpt import cli
told = {}
for name, line in json.loads(sys.argv[1]).items():
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        code = cli.main(line.split())
    told[name] = [code, out.getvalue()]
json.dump(told, sys.stdout)
"""
KEPT = """
import torch
from fastgpt import GPT, GPTConfig, generate
from fastgpt.generation.decoder import Decoder
model = GPT(GPTConfig(vocab_size=13, block_size=32, n_layer=2, n_head=2, n_embd=16))
for dtype in (torch.float32, torch.bfloat16):
    decoder = Decoder(model, dtype=dtype, tokens=100)
    for prompts in ([[3, 1]], [[3, 1], [4]], [[1, 2, 3], [4, 5, 6]]):
        rows = generate(decoder, prompts, 6, temperature=0).tokens
        assert [len(row) for row in rows] == [6] * len(prompts)
        assert rows[0] == generate(decoder, prompts[:1], 6, temperature=0).tokens[0] or dtype == torch.bfloat16
print("kept")
"""


def without_triton(code, *arguments, cwd=ROOT):
    command = [sys.executable, "-c", f"{HIDE}sys.path.insert(0, {str(ROOT)!r})\n{code}", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """By command: its exit code and what it printed."""
    folder = tmp_path_factory.mktemp("bare")
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 50)
    lines = {name: line.format(shape=f"--preset byte-0.1M {SHAPE}") for name, line in COMMANDS.items()}
    result = without_triton(SCRIPT, json.dumps(lines), cwd=folder)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_works(told, name):
    code, out = told[name]
    assert code == int(name == "doctor" and "PROBLEM" in out), out  # a machine with a GPU and no Triton has one
    assert "None" not in out and "failed" not in out and "Traceback" not in out


def test_a_run_ends_with_a_sample(told):
    assert "saved in out; a sample:" in told["train"][1]
    assert told["generate"][1].startswith("fox")


def test_what_differs_is_said_once_and_is_no_defect(told):
    words = "on the CPU, with PyTorch's own functions; the Triton kernels need an NVIDIA GPU"
    for name in ("train", "verify", "verify a model"):
        assert told[name][1].count(words) == 1, name
    for name in COMMANDS.keys() - {"doctor"}:
        assert "not installed" not in told[name][1], name
    assert told["doctor"][1].count("every function of fastgpt.ops runs on PyTorch") in (0, 1)


def test_a_kept_decoder():
    result = without_triton(KEPT)
    assert (result.returncode, result.stdout) == (0, "kept\n"), result.stderr


@pytest.mark.parametrize("command", ["compile", "tune"])
def test_a_bench_that_needs_triton_says_so_in_a_line(command):
    result = without_triton(f"from bench.__main__ import main\nsys.exit(main([{command!r}]))")
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.count("\n") == 1 and "needs Triton, which is not installed" in result.stderr
