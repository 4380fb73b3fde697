"""The README does what it says."""

import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from fastgpt import GPT, GPTConfig
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


def test_the_map_names_every_file():
    (listing,) = re.findall(r"```\n(fastgpt/\n.*?)```", README, re.DOTALL)
    for folder in ("fastgpt", "fastgpt/families", "kernels"):
        for file in (ROOT / folder).glob("*.py"):
            assert file.name in listing or file.name.startswith("__"), f"{folder}/{file.name} is not on the map"
