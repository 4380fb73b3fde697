"""The README does what it says."""

import importlib
import inspect
import re
import shlex
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

import fastgpt
from fastgpt import GPT, GPTConfig, cli
from fastgpt.training import monitor
from tests import models

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")

SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_ci_runs_the_readmes_test_command():
    command = next(line for line in README.splitlines() if line.startswith("pip install") and "pytest" in line)
    assert command in (ROOT / ".ci" / "run").read_text().splitlines()


def test_the_ten_lines_run(capsys):
    snippet = SNIPPETS[0]
    small = snippet.replace('"gpt2-124M", ', '"gpt2-124M", n_layer=1, n_embd=24, ')
    assert small != snippet
    exec(compile(small, "README.md", "exec"), {})
    assert "layer_norm runs on PyTorch" in capsys.readouterr().out


@pytest.fixture
def nanogpts_model_py(monkeypatch):
    module = ModuleType("model")
    shape = dict(vocab_size=models.VOCAB, block_size=models.CONTEXT, n_embd=48, n_layer=2, n_head=4)
    module.GPT, module.GPTConfig = models.NanoGPT, lambda: SimpleNamespace(**shape, bias=True, dropout=0.1, flash=True)
    monkeypatch.setitem(sys.modules, "model", module)


@pytest.mark.parametrize("family", ["transformers", "model", "llms_from_scratch"])
def test_the_three_swaps_run_with_and_without_their_new_lines(family, nanogpts_model_py, capsys):
    (after,) = [snippet for snippet in SNIPPETS if snippet.startswith(f"from {family}")]
    before = "".join(line for line in after.splitlines(keepends=True) if not line.endswith("# new\n"))
    assert len(after.splitlines()) == len(before.splitlines()) + 2 and "fastgpt" not in before
    wanted, found = "logits" if family == "llms_from_scratch" else "loss", []
    if wanted == "logits":
        models.book_package()
    cfg = dict(vocab_size=models.VOCAB, context_length=models.CONTEXT, emb_dim=48, n_layers=2, n_heads=4)
    for snippet in (before, after):
        names = {"idx": torch.arange(16).view(2, 8), "GPT_CONFIG_124M": {**cfg, "drop_rate": 0.1, "qkv_bias": False}}
        small = snippet.replace("GPT2Config()", "GPT2Config(vocab_size=61, n_embd=48, n_positions=32)")
        torch.manual_seed(0)  # of the weights and of dropout
        exec(compile(small, "README.md", "exec"), names)
        found.append(names[wanted])
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-5)
    printed = capsys.readouterr().out.strip()
    assert "gelu_mlp" in printed and "left" not in printed
    if family == "transformers":
        assert printed in README


def test_the_snippet_about_text_runs(capsys):
    (snippet,) = [snippet for snippet in SNIPPETS if snippet.startswith("from fastgpt import generate, stream")]
    model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=8, block_size=32))
    exec(compile(snippet, "README.md", "exec"), {"model": model, "idx": torch.arange(8).view(2, 4)})
    assert "['length', 'length', 'length', 'length']" in capsys.readouterr().out


def test_what_is_public_is_there_and_documented():
    (listing,) = re.findall(r"## What is public\n.*?```\n(.*?)```", README, re.DOTALL)
    names: dict[str, list[str]] = {}
    for line in listing.splitlines():
        first, *others = line.split()
        if line.startswith("fastgpt"):
            module, names[first] = first, others
        else:
            names[module] += [first, *others]
    assert sorted(names.pop("fastgpt")) == sorted(fastgpt.__all__)
    names.pop("fastgpt.families.huggingface")
    for module, public in names.items():
        if module == "fastgpt.sanitizer" and fastgpt.ops.no_triton():
            continue  # it is Triton's interpreter
        for name in public:
            assert inspect.getdoc(getattr(importlib.import_module(module), name)), f"{module}.{name}"


def test_the_map_names_every_file():
    (listing,) = re.findall(r"```\n(fastgpt/\n.*?)```", README, re.DOTALL)
    for folder in ("fastgpt", "fastgpt/families", "kernels"):
        for file in (ROOT / folder).glob("*.py"):
            assert file.name in listing or file.name.startswith("__"), f"{folder}/{file.name} is not on the map"


def test_the_five_commands_of_training_run(tmp_path, monkeypatch, capsys):
    """As a user's first hour, at a small size: the shape and the steps are smaller than README's, the words are its."""
    (commands,) = re.findall(r"```\n(fastgpt tokenize .*?)```", README, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(monitor, "plot_losses", lambda rows, path: None)
    Path("texts").mkdir()
    for name in ("one.txt", "two.txt"):
        Path("texts", name).write_text("It was a quick brown fox. " * 60)
    small = shlex.split("--preset byte-0.1M --n_layer 1 --block_size 16 --eval_iters 1 --sample_tokens 20 --device cpu")
    lines = commands.splitlines()
    assert len(lines) == 5
    for line in lines:
        program, *arguments = shlex.split(line.replace("1200", "4").replace("600", "2"))
        first = arguments[0] == "train" and "--resume" not in arguments
        assert program == "fastgpt"
        assert cli.main([*arguments, *(small if first else [])]) == 0, line
    told = capsys.readouterr().out
    assert "2 documents, 3,120 bytes" in told and "step 2: train 5." in told and "step 4: train 5." in told
    assert "resuming from run/checkpoints/step-00000002" in told and "not to the bit" not in told
    assert "\nIt was" in told and "saved in run-huggingface" in told
    from transformers import GPT2LMHeadModel

    assert GPT2LMHeadModel.from_pretrained("run-huggingface").config.n_layer == 1
