"""README, CONTRIBUTING and docs/ do what they say: their Python runs as printed, their commands parse, their links lead
somewhere."""

import contextlib
import importlib
import inspect
import io
import re
import shlex
import sys
import urllib.parse
from pathlib import Path
from unittest import mock

import pytest
import torch

import fastgpt
from bench import __main__ as bench
from fastgpt import cli
from fastgpt.training import monitor
from tests import models, mutate

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
NANOGPT = '''"""nanoGPT's model.py, as far as these tests need it."""
import dataclasses

from tests.models import NanoGPT as GPT


@dataclasses.dataclass
class GPTConfig:
    block_size: int = 1024
    vocab_size: int = 50304
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True
    flash: bool = True
'''


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


SNIPPETS = [
    pytest.param(snippet, id=f"{page.name}-{number}")
    for page in PAGES
    for number, snippet in enumerate(blocks(page, "python"))
]
SWAPS = [snippet for snippet in blocks(ROOT / "README.md", "python") if "# new" in snippet]
COMMANDS = [
    pytest.param(command.strip(), id=f"{page.name}: {command.strip()[:60]}")
    for page in PAGES
    for block in blocks(page, "")
    for line in block.replace("\\\n", " ").splitlines()
    for command in re.split(r" && |; ", line)
    if not line.startswith((" ", "fastgpt.", "fastgpt/")) and len(command.split()) > 1
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder that holds nanoGPT's model.py, as the snippet about it asks, and a process that can import it."""
    (tmp_path / "model.py").write_text(NANOGPT)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "model", raising=False)
    yield tmp_path
    sys.modules.pop("model", None)


def run(snippet: str) -> tuple[dict, str]:
    """The names that a snippet leaves, and what it prints; it is given no name at all."""
    for package in ("transformers", "llms_from_scratch"):
        if package == "transformers" and package in snippet:
            pytest.importorskip(package, reason="the extra `test` brings transformers")
        elif package in snippet:
            models.book_package()
    names: dict = {"__name__": "__main__"}
    printed = io.StringIO()
    torch.manual_seed(0)  # of weights, tokens and dropout
    with contextlib.redirect_stdout(printed):
        exec(compile(snippet, "snippet", "exec"), names)
    return names, printed.getvalue()


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_the_python_of_every_page_runs_as_printed(snippet, folder):
    run(snippet)


def test_readme_swaps_three_families():
    assert [re.search(r"^from (\w+)", snippet, re.MULTILINE)[1] for snippet in SWAPS] == [
        "transformers",
        "model",
        "llms_from_scratch",
    ]


@pytest.mark.parametrize("after", SWAPS, ids=["hugging face", "nanogpt", "book"])
def test_a_swap_gives_the_same_without_its_new_lines(after, folder):
    before = "".join(line for line in after.splitlines(keepends=True) if not line.endswith("# new\n"))
    assert len(after.splitlines()) == len(before.splitlines()) + 2 and "fastgpt" not in before
    (was, _), (now, printed) = run(before), run(after)
    name = "loss" if "loss" in was else "logits"
    torch.testing.assert_close(now[name], was[name], rtol=1e-4, atol=1e-4)
    assert "gelu_mlp" in printed and "left" not in printed


def test_what_stands_under_a_snippet_is_what_it_prints(folder):
    pairs = [
        pair
        for page in PAGES
        for pair in re.findall(
            r"```python\n((?:(?!```).)*)```\n\n[^`\n]*\n\n```text\n(.*?)```", page.read_text("utf-8"), re.DOTALL
        )
    ]
    assert pairs
    for snippet, output in pairs:
        assert run(snippet)[1] == output


def parsed(command: str) -> None:
    """SystemExit for a command line that the program would refuse. Nothing of it is run."""
    words = shlex.split(command)
    if "fastgpt" in words and words[0] in ("fastgpt", "torchrun", "python", "TRITON_INTERPRET=1"):
        cli._parser().parse_args([cli._underscored(word) for word in words[words.index("fastgpt") + 1 :]])
    elif words[:3] == ["python", "-m", "bench"]:
        module = importlib.import_module("bench." + bench.MODULES.get(words[3], words[3]))
        with mock.patch.object(module, "main", return_value=0), mock.patch.object(bench, "_compile", return_value=0):
            assert bench.main(words[3:]) == 0
    elif words[:3] == ["python", "-m", "tests.mutate"]:
        assert set(words[3:]) <= {mutant.name for mutant in mutate.MUTANTS}
    elif "pytest" in words[:2]:
        for word in words[words.index("pytest") + 1 :]:
            if word.endswith((".py", "/")):
                assert (ROOT / word).exists(), command
    else:
        assert words[0] in ("git", "cd", "pip", "ruff", "mypy", "for", "sleep", "done", "do"), (
            f"no test reads: {command}"
        )


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_of_every_page_parse(command):
    parsed(command)


def test_a_command_that_is_not_there_is_refused(capsys):
    for command in ("fastgpt train --no_such_option 1", "python -m bench report --readme", "fastgpt generat"):
        with pytest.raises(SystemExit):
            parsed(command)
    with pytest.raises(AssertionError):
        parsed("pytest tests/test_no_such.py")
    capsys.readouterr()


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as Markdown is rendered on the usual hosts."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_relative_link_leads_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    assert links or page.name == "generation.md"
    for link in links:
        if urllib.parse.urlparse(link).scheme:
            continue
        path, _, anchor = link.partition("#")
        target = page if not path else (page.parent / path).resolve()
        assert target.exists() and target.is_relative_to(ROOT), f"{page.name}: {link}"
        assert not anchor or anchor in anchors(target), f"{page.name}: {link}"


def test_what_is_public_is_there_and_documented():
    text = (ROOT / "docs" / "guarantees.md").read_text(encoding="utf-8")
    (listing,) = re.findall(r"## What is public\n.*?```\n(.*?)```", text, re.DOTALL)
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


def test_the_map_is_the_tree():
    """Every file of fastgpt/ and kernels/ is on the map under its folder, and the map names no other."""
    (listing,) = re.findall(
        r"```\n(fastgpt/\n.*?)```", (ROOT / "docs" / "architecture.md").read_text("utf-8"), re.DOTALL
    )
    stack: list[str] = []
    found: set[str] = set()
    for line in listing.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        opens = re.match(r"\s*(\w+)/", line)
        stack = [*stack[:depth], opens[1]] if opens else stack[:depth]
        found |= {"/".join([*stack, name]) for name in re.findall(r"\b\w+\.py\b", line)}
    there = {
        path.relative_to(ROOT).as_posix()
        for top in ("fastgpt", "kernels")
        for path in (ROOT / top).rglob("*.py")
        if path.name != "__init__.py" or path.parent.name in ("fastgpt", "ops")
    }
    assert found - {"fastgpt/ops/__init__.py", "fastgpt/__init__.py"} == there - {
        "fastgpt/ops/__init__.py",
        "fastgpt/__init__.py",
    }


def test_ci_runs_the_readmes_test_command():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    command = next(line for line in readme.splitlines() if line.startswith("pip install") and "pytest" in line)
    assert command in (ROOT / ".ci" / "run").read_text().splitlines()


def test_the_five_commands_of_training_run(tmp_path, monkeypatch, capsys):
    """As a user's first hour, at a small size: the shape and the steps are smaller than README's, the words are its."""
    (commands,) = [block for block in blocks(ROOT / "README.md", "") if block.startswith("fastgpt tokenize")]
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
