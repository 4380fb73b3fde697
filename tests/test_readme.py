"""README, CONTRIBUTING and docs/ do what they say: their Python runs as printed, their commands parse, their links lead
somewhere."""

import contextlib
import importlib
import inspect
import io
import itertools
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
from fastgpt import cli, ops
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


def fences(page: Path) -> list[tuple[str, str]]:
    """(language, text) of each fenced block, in order."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def blocks(page: Path, language: str) -> list[str]:
    return [text for of, text in fences(page) if of == language]


def commands(block: str) -> list[str]:
    """The command lines of a shell block; none of a block that holds a map or a list of names."""
    if not re.match(r"(fastgpt|python|pytest|pip|git|torchrun|for|TRITON_INTERPRET=1) (?! )", block):
        return []
    lines = block.replace("\\\n", " ").splitlines()
    return [command.strip() for line in lines for command in re.split(r" && |; ", line)]


SWAPS = [snippet for snippet in blocks(ROOT / "README.md", "python") if "# new" in snippet]
SNIPPETS = [
    pytest.param(snippet, id=f"{page.name}-{number}")
    for page in PAGES
    for number, snippet in enumerate(blocks(page, "python"))
    if snippet not in SWAPS  # which are run below, as printed and without fastgpt's lines
]
COMMANDS = {page.name: [line for block in blocks(page, "") for line in commands(block)] for page in PAGES}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder that holds nanoGPT's model.py, as the snippet about it asks."""
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


@pytest.mark.parametrize("after", SWAPS, ids=["hugging face", "nanogpt", "book"])  # an error if they are not three
def test_a_swap_gives_the_same_without_its_new_lines(after, folder):
    before = "".join(line for line in after.splitlines(keepends=True) if not line.endswith("# new\n"))
    assert len(after.splitlines()) == len(before.splitlines()) + 2 and "fastgpt" not in before
    (was, _), (now, printed) = run(before), run(after)
    name = "loss" if "loss" in was else "logits"
    torch.testing.assert_close(now[name], was[name], rtol=1e-4, atol=1e-4)
    assert "gelu_mlp" in printed and "left" not in printed


def test_what_stands_under_a_snippet_is_what_it_prints(folder):
    pairs = [
        (first[1], second[1])
        for page in PAGES
        for first, second in itertools.pairwise(fences(page))
        if (first[0], second[0]) == ("python", "text")
    ]
    assert pairs
    for snippet, output in pairs:
        assert run(snippet)[1] == output


def parsed(command: str) -> None:
    """SystemExit or AssertionError for a command line that would be refused. Nothing of it is run."""
    words = shlex.split(command)
    while words and words[0] in ("do", "TRITON_INTERPRET=1"):
        words = words[1:]
    if not words:
        return
    if "fastgpt" in words and words[0] in ("fastgpt", "torchrun", "python"):
        cli._parser().parse_args([cli._underscored(word) for word in words[words.index("fastgpt") + 1 :]])
    elif words[:3] == ["python", "-m", "bench"]:
        with contextlib.ExitStack() as stack:
            if words[3] in bench.COMMANDS:
                module = bench.MODULES.get(words[3], words[3])
                stack.enter_context(mock.patch(f"bench.{module}.main", return_value=0))
            assert bench.main(words[3:]) == 0
    elif words[:3] == ["python", "-m", "tests.mutate"]:
        assert set(mutate.parser().parse_args(words[3:]).names) <= {mutant.name for mutant in mutate.MUTANTS}, command
    elif words[0] == "pytest":
        for word in words[1:]:
            assert not word.endswith((".py", "/")) or (ROOT / word).exists(), command
        options = (ROOT / "bench" / "conftest.py").read_text(encoding="utf-8")  # pytest adds them where it is loaded
        for word in words[1:]:
            assert not word.startswith("--") or word in ("--dist",) or f'"{word}"' in options, command
    else:
        assert words[0] in ("git", "cd", "pip", "ruff", "mypy", "for", "sleep", "done", "break"), command


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_commands_of_every_page_parse(page):
    assert COMMANDS[page.name] or page.name in ("architecture.md", "kernels.md")
    for command in COMMANDS[page.name]:
        if ops.no_triton() and command.startswith(
            ("python -m bench compile", "python -m bench launches", "python -m bench tokens")
        ):
            continue  # they compile or record Triton kernels, and say so where there is none
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
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    (listing,) = re.findall(r"```\n(fastgpt/\n.*?)```", page, re.DOTALL)
    folders: list[str] = []
    named: set[str] = set()
    for line in listing.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        opened = re.match(r"\s*(\w+)/ ?", line)
        folders = folders[:depth] + ([opened[1]] if opened else [])
        named |= {"/".join([*folders, name]) for name in re.findall(r"\b\w+\.py\b", line)}
    files = {file.relative_to(ROOT).as_posix() for top in ("fastgpt", "kernels") for file in (ROOT / top).rglob("*.py")}
    assert {name for name in named if not name.endswith("__init__.py")} == {
        name for name in files if not name.endswith("__init__.py")
    }


def test_ci_runs_the_readmes_two_commands():
    """Line by line, as they are typed; and it ends where a line fails."""
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    installs = [block for block in blocks(ROOT / "README.md", "") if block.startswith("pip install -c")]
    assert [len(block.splitlines()) for block in installs] == [2, 2]
    for block in installs:
        first, second = block.splitlines()
        assert second in [after for line, after in itertools.pairwise(lines) if line == first]
    assert next(line for line in lines if not line.startswith("#")) == "set -euo pipefail"
    assert not [line for line in lines if line.startswith("(") or " && " in line or "set +" in line]


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "examples/README.md"], ids=["README", "examples"])
def test_powershell_takes_the_commands_of_the_pages_that_all_read(page):
    """Of 5.1, as Windows brings it: no &&, no variable before a command, no line that goes on after a backslash."""
    for block in blocks(page, ""):
        assert not re.search(r"&&|\|\||\\$|^[A-Z_]+=", block, re.MULTILINE), block


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
