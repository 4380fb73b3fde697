"""Imports go down, and through doors: who may import whom, read from the sources' syntax.

`import a.b`, `from a import b` and relative forms count alike, at the top of a file and inside functions.
"""

import ast
import graphlib
from collections.abc import Collection, Iterator
from pathlib import Path

import pytest

import fastgpt
import fastgpt.kernels

PACKAGE = Path(fastgpt.__file__).parent
KERNELS = Path(fastgpt.kernels.__path__[0])  # which lie beside the package in a checkout
FLOORS = (  # from the ground up: a file imports of its own floor and of those below
    {"kernels", "atomic", "memory", "fields", "cuda_graph", "private"},
    {"ops"},
    {"modules", "families", "fp8", "model"},
    {"swap", "weights", "data"},
    {"generation", "training"},
    {"cli", "verify", "doctor", "pytest_plugin", "testing", "sanitizer"},
)
UPWARDS = {("fastgpt.model", "fastgpt.weights")}  # GPT.from_pretrained and save_pretrained, as they are called
BEHIND_OPS = {"fastgpt.ops.autograd", "fastgpt.kernels"}  # what only ops may know
JUDGES = ("verify.py", "testing.py")  # who alone may know the naive reference


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


def behind_the_door(source: str, package: str, doors: Collection[str] = BEHIND_OPS) -> list[tuple[int, str]]:
    found = {
        (line, name)
        for line, name in reached(source, package)
        for door in doors
        if name == door or name.startswith(f"{door}.")
    }
    return sorted(found)


def modules() -> dict[str, Path]:
    """All files of fastgpt/ and kernels/ but the package's own two, by the module's name."""
    files = {("fastgpt", *file.relative_to(PACKAGE).parts): file for file in PACKAGE.rglob("*.py")}
    files |= {("fastgpt", "kernels", *file.relative_to(KERNELS).parts): file for file in KERNELS.rglob("*.py")}
    named = {".".join(parts).removesuffix(".py").removesuffix(".__init__"): file for parts, file in files.items()}
    return {name: file for name, file in named.items() if name not in ("fastgpt", "fastgpt.__main__")}


def package_of(name: str, file: Path) -> str:
    return name if file.name == "__init__.py" else name.rpartition(".")[0]


def floor(name: str) -> int:
    return next(number for number, rooms in enumerate(FLOORS) if name.split(".")[1] in rooms)


def imports(files: dict[str, Path]) -> dict[str, set[str]]:
    """Which modules each of them imports, at its top or in a function."""

    def module(name: str) -> str:
        return name if name in files or "." not in name else module(name.rpartition(".")[0])

    found = {
        name: {module(other) for _, other in reached(file.read_text(encoding="utf-8"), package_of(name, file))}
        for name, file in files.items()
    }
    return {name: {other for other in others if other in files} - {name} for name, others in found.items()}


def upwards(edges: dict[str, set[str]]) -> list[str]:
    pairs = [(name, other) for name, others in edges.items() for other in others if floor(other) > floor(name)]
    return [f"{name} imports {other}, which is above it" for name, other in pairs if (name, other) not in UPWARDS]


def circle(edges: dict[str, set[str]]) -> list[str]:
    """Modules that import each other round about; none where all can be put in a row."""
    order = graphlib.TopologicalSorter(edges)
    try:
        order.prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def test_every_room_has_a_floor():
    rooms = {name.split(".")[1] for name in modules()}
    assert rooms == set().union(*FLOORS) and len(rooms) <= 22


def test_imports_go_down():
    assert not upwards(imports(modules()))


def test_no_circle():
    edges = imports(modules())
    for name, other in UPWARDS:
        edges[name].remove(other)  # KeyError: it is imported no more, and may leave the list
    assert not circle(edges)


def test_an_import_that_goes_up_and_a_circle_are_seen(tmp_path):
    for name, source in (
        ("fastgpt.ops.loss", "def later():\n    from fastgpt.training import fit"),
        ("fastgpt.data.texts", "from fastgpt.data import tokens"),
        ("fastgpt.data.tokens", "import fastgpt.data.texts"),
        ("fastgpt.training", ""),
    ):
        tmp_path.joinpath(name).write_text(source)
    edges = imports({file.name: file for file in tmp_path.iterdir()})
    assert upwards(edges) == ["fastgpt.ops.loss imports fastgpt.training, which is above it"]
    assert set(circle(edges)) == {"fastgpt.data.texts", "fastgpt.data.tokens"}


def test_only_ops_knows_whether_there_is_a_triton():
    """What is reached past ops works where its author's Triton is, and is None for everyone without one."""
    found = []
    for name, file in modules().items():
        if name.split(".")[1] not in ("ops", "kernels"):
            told = behind_the_door(file.read_text(encoding="utf-8"), package_of(name, file))
            found += [f"{name}:{line} reaches {other}" for line, other in told]
    assert not found, "\n".join(found)


def test_only_judges_know_the_naive_reference():
    """A subject that is computed by what judges it would always pass."""
    found = []
    for name, file in modules().items():
        if file.name not in JUDGES:
            told = behind_the_door(file.read_text(encoding="utf-8"), package_of(name, file), {"fastgpt.ops.reference"})
            found += [f"{name}:{line} reaches {other}" for line, other in told]
    assert not found, "\n".join(found)


def past_the_door(source: str, package: str) -> list[tuple[int, str]]:
    """Modules of ops/ that are reached, not ops itself."""
    rooms = {file.stem for file in (PACKAGE / "ops").iterdir()} - {"__init__", "__pycache__"}
    found = {(line, name) for line, name in reached(source, package) if name.startswith("fastgpt.ops.")}
    return sorted((line, name) for line, name in found if name.split(".")[2] in rooms)


def test_above_ops_its_functions_alone_are_reached():
    found = []
    for name, file in modules().items():
        if name.split(".")[1] not in ("ops", "kernels"):
            for line, other in past_the_door(file.read_text(encoding="utf-8"), package_of(name, file)):
                if not (file.name in JUDGES and other.split(".")[2] == "reference"):
                    found.append(f"{name}:{line} reaches {other}")
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
