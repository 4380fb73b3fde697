"""Imports go down, and through doors: who may import whom, read from the sources' syntax.

`import a.b`, `from a import b` and relative forms count alike, at the top of a file and inside functions.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import fastgpt

PACKAGE = Path(fastgpt.__file__).parent
BEHIND_OPS = {"fastgpt.ops.autograd", "fastgpt.kernels"}  # what only ops may know


def dotted(node: ast.expr) -> str:
    """a.b.c of an attribute of a name, "" for the attribute of anything else."""
    if isinstance(node, ast.Attribute):
        owner = dotted(node.value)
        return f"{owner}.{node.attr}" if owner else ""
    return node.id if isinstance(node, ast.Name) else ""


def reached(source: str, package: str) -> Iterator[tuple[int, str]]:
    """(line, module or attribute) of all that a file of `package` imports, and of all attributes of imported modules
    that it takes, by their full names."""
    tree = ast.parse(source)
    names: dict[str, str] = {}  # in the file: what each imported name stands for
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
                names[alias.asname or alias.name.partition(".")[0]] = alias.name if alias.asname else (
                    alias.name.partition(".")[0]
                )  # fmt: skip
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*above, *filter(None, [node.module])])
            for alias in node.names:
                yield node.lineno, f"{module}.{alias.name}"
                names[alias.asname or alias.name] = f"{module}.{alias.name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and (path := dotted(node)):
            first, _, rest = path.partition(".")
            if first in names:
                yield node.lineno, f"{names[first]}.{rest}"
        elif isinstance(node, ast.Call) and dotted(node.func).rpartition(".")[2] in ("import_module", "__import__"):
            for argument in node.args[:1]:
                if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                    yield node.lineno, argument.value
        elif isinstance(node, ast.Call) and dotted(node.func) in ("getattr", "setattr") and len(node.args) > 1:
            owner, attribute = dotted(node.args[0]), node.args[1]
            if owner in names and isinstance(attribute, ast.Constant):
                yield node.lineno, f"{names[owner]}.{attribute.value}"


def behind_the_door(source: str, package: str) -> list[tuple[int, str]]:
    found = {
        (line, name)
        for line, name in reached(source, package)
        for door in BEHIND_OPS
        if name == door or name.startswith(f"{door}.")
    }
    return sorted(found)


def files() -> list[Path]:
    """All of fastgpt/ but ops/, and but the kernels, which lie there where it is installed."""
    return [file for file in PACKAGE.rglob("*.py") if file.relative_to(PACKAGE).parts[0] not in ("ops", "kernels")]


def test_only_ops_knows_whether_there_is_a_triton():
    """What is reached past ops works where its author's Triton is, and is None for everyone without one."""
    found = []
    for file in files():
        package = ".".join(["fastgpt", *file.relative_to(PACKAGE).parts[:-1]])
        told = behind_the_door(file.read_text(encoding="utf-8"), package)
        found += [f"{file.relative_to(PACKAGE)}:{line} reaches {name}" for line, name in told]
    assert not found, "\n".join(found)


JUDGES = {"verify.py", "testing.py"}  # which compare with the naive reference


def past_the_door(source: str, package: str) -> list[tuple[int, str]]:
    """Modules of ops/ that are reached, not ops itself."""
    rooms = {file.stem for file in (PACKAGE / "ops").iterdir()} - {"__init__", "__pycache__"}
    found = {(line, name) for line, name in reached(source, package) if name.startswith("fastgpt.ops.")}
    return sorted((line, name) for line, name in found if name.split(".")[2] in rooms)


def test_above_ops_its_functions_alone_are_reached():
    found = []
    for file in files():
        package = ".".join(["fastgpt", *file.relative_to(PACKAGE).parts[:-1]])
        for line, name in past_the_door(file.read_text(encoding="utf-8"), package):
            if not (file.name in JUDGES and name.split(".")[2] == "reference"):
                found.append(f"{file.relative_to(PACKAGE)}:{line} reaches {name}")
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "source",
    [
        "from fastgpt.ops import pytorch",
        "from fastgpt.ops.cpu.linears import Layout",
        "from fastgpt.ops.decoding import OnPyTorch",
        "from fastgpt import ops\nops.cpu.mlp.gelu",
    ],
)
def test_every_way_past_the_door_is_seen(source):
    assert past_the_door(source, "fastgpt")
    assert not past_the_door("from fastgpt import ops\nops.embedding\nops.decoding_steps", "fastgpt")


@pytest.mark.parametrize(
    "source",
    [
        "from fastgpt.ops import autograd",
        "import fastgpt.kernels.decode",
        "from fastgpt.kernels import decode",
        "from fastgpt.ops.autograd import layer_norm_fwd",
        "from .ops import autograd",
        "from .kernels import decode",
        "def later():\n    from fastgpt.ops import autograd as launchers",
        "from fastgpt import ops\nops.autograd.few_rows",
        "from fastgpt import ops\nif ops.autograd is None: pass",
        "import fastgpt\nfastgpt.ops.autograd",
        "import fastgpt.ops as functions\nfunctions.autograd",
        "from fastgpt import ops\ngetattr(ops, 'autograd')",
        "import importlib\nimportlib.import_module('fastgpt.ops.autograd')",
    ],
)
def test_every_way_past_ops_is_seen(source):
    assert behind_the_door(source, "fastgpt")


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.autograd.Function",
        "from torch import autograd",
        "from fastgpt import ops\nops.layer_norm",
        "autograd = 1\nmodel.autograd",
        "import kernels",
    ],
)
def test_what_only_has_the_name_is_none(source):
    assert not behind_the_door(source, "fastgpt")
