"""What users install and import: the wheel, an editable install, a bare checkout, with and without their neighbours.

All of it happens in processes and environments of their own, on copies of the checkout, without a network. Those
environments are made of links, as POSIX has them.
"""

import os
import re
import runpy
import shutil
import subprocess
import sys
import venv
from importlib import metadata
from pathlib import Path

import pytest
import setuptools
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import fastgpt

ROOT = Path(__file__).parents[1]
OFFLINE = ("--isolated", "--no-index", "--no-deps", "--no-build-isolation")
WHERE_IT_IS = """
import fastgpt, importlib.util
print(fastgpt.__file__)
print(importlib.util.find_spec("fastgpt.kernels.layernorm").origin)  # to import it takes a Triton
"""


def copy_checkout(to):
    """The sources, without what git ignores: a build leaves folders behind."""
    ignored = [line.strip("/") for line in (ROOT / ".gitignore").read_text().split()]
    return Path(shutil.copytree(ROOT, to, ignore=shutil.ignore_patterns(".git", *ignored)))


def environment(folder, without=()):
    """A fresh virtual environment that links to the running one's packages, except fastgpt and those of `without`."""
    venv.create(folder, symlinks=True)
    for entry in (entry for path in sys.path if path.endswith("-packages") for entry in Path(path).iterdir()):
        link = packages(folder) / entry.name
        if not link.exists() and not any(name in entry.name for name in ("__pycache__", "fastgpt", *without)):
            link.symlink_to(entry)
    return folder


def packages(environment):
    (folder,) = environment.glob("lib/python*/site-packages")
    return folder


def run(*command, cwd):
    """The result of `command`, which must succeed. The test run's own settings stay out of it."""
    inherited = {name: x for name, x in os.environ.items() if not name.startswith(("PYTHON", "PIP_", "TRITON_"))}
    result = subprocess.run(command, cwd=cwd, env=inherited, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr
    return result


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """An environment in which fastgpt is not installed."""
    return environment(tmp_path_factory.mktemp("bare"))


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    return copy_checkout(tmp_path_factory.mktemp("checkout") / "here")


@pytest.fixture(scope="module")
def wheel(bare, tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    source = copy_checkout(folder / "source")
    run(bare / "bin/python", "-m", "pip", "wheel", *OFFLINE, "--wheel-dir", folder, source, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """An environment in which the wheel is installed."""
    folder = environment(tmp_path_factory.mktemp("installed"))
    run(folder / "bin/python", "-m", "pip", "install", *OFFLINE, wheel, cwd=folder)
    return folder


def test_wheel_holds_one_package_and_every_module(wheel, checkout):
    (distribution,) = metadata.distributions(path=[str(wheel)])
    files = {str(file) for file in distribution.files if not file.parts[0].endswith(".dist-info")}
    modules = {f"fastgpt/{file.relative_to(checkout / 'fastgpt')}" for file in (checkout / "fastgpt").rglob("*.py")}
    kernels = {f"fastgpt/{file.relative_to(checkout)}" for file in (checkout / "kernels").rglob("*.py")}
    assert files == modules | kernels | {"fastgpt/py.typed"}
    assert {"fastgpt/kernels/layernorm.py", "fastgpt/kernels/hopper/attention.py"} <= files
    assert not {"fastgpt/kernels/__init__.py", "fastgpt/kernels/hopper/__init__.py"} & files
    assert distribution.read_text("top_level.txt").split() == ["fastgpt"]


def test_wheel_says_what_it_is(wheel):
    (distribution,) = metadata.distributions(path=[str(wheel)])
    about = distribution.metadata
    assert about["Name"] == "fastgpt-triton" and about["Version"] == fastgpt.__version__
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(rf"^## \[{re.escape(about['Version'])}\] - 20\d\d-\d\d-\d\d$", changelog, re.MULTILINE)
    assert about["Requires-Python"] == ">=3.10" and "Typing :: Typed" in about.get_all("Classifier")
    assert (about["License-Expression"] or about["License"]) == "MIT"
    assert distribution.read_text("licenses/LICENSE") == (ROOT / "LICENSE").read_text()
    (entry,) = distribution.entry_points
    assert (entry.group, entry.name, entry.value) == ("console_scripts", "fastgpt", "fastgpt.cli:main")


def test_installed_wheel_imports_from_its_own_folder(installed, tmp_path):
    package, kernel = run(installed / "bin/python", "-c", WHERE_IT_IS, cwd=tmp_path).stdout.splitlines()
    assert Path(package) == packages(installed) / "fastgpt/__init__.py"
    assert Path(kernel) == packages(installed) / "fastgpt/kernels/layernorm.py"


def test_installed_command_runs(installed, tmp_path):
    assert run(installed / "bin/fastgpt", "--help", cwd=tmp_path).stdout.startswith("usage: fastgpt ")
    assert run(installed / "bin/fastgpt", "--version", cwd=tmp_path).stdout == f"fastgpt {fastgpt.__version__}\n"


def test_editable_install_imports_the_sources(tmp_path):
    source = copy_checkout(tmp_path / "source")
    python = environment(tmp_path / "environment") / "bin/python"
    run(python, "-m", "pip", "install", *OFFLINE, "-e", source, cwd=tmp_path)
    package, kernel = run(python, "-c", WHERE_IT_IS, cwd=tmp_path).stdout.splitlines()
    assert Path(package) == source / "fastgpt/__init__.py"
    assert Path(kernel) == source / "kernels/layernorm.py"


def test_bare_checkout_imports_and_runs_from_its_root(bare, checkout):
    package, kernel = run(bare / "bin/python", "-c", WHERE_IT_IS, cwd=checkout).stdout.splitlines()
    assert Path(package) == checkout / "fastgpt/__init__.py"
    assert Path(kernel) == checkout / "kernels/layernorm.py"
    assert run(bare / "bin/python", "-m", "fastgpt", "--help", cwd=checkout).stdout.startswith("usage: fastgpt ")


@pytest.mark.parametrize(
    "version, reason",
    [(None, "Triton is not installed"), ("3.5.1", "Triton is 3.5.1, the kernels need 3.6 or newer")],
)
def test_everything_runs_on_pytorch_without_a_triton_that_serves(tmp_path, checkout, version, reason):
    environment(tmp_path, without=["triton"])
    if version is not None:
        (packages(tmp_path) / "triton.py").write_text(f"__version__ = {version!r}")
    code = f"""
import importlib.util, torch
assert (importlib.util.find_spec("triton") is None) == {version is None}
from fastgpt import ops
x, weight = torch.randn(3, 8), torch.ones(8)
torch.testing.assert_close(ops.layer_norm(x, weight), torch.nn.functional.layer_norm(x, (8,)))
print(ops.explain(ops.layer_norm, x, weight))
try:
    ops.layer_norm(x, weight, backend="triton")
except ValueError as error:
    print(error)
print(ops.no_triton())
"""
    why = "the tensors are on cpu, the kernels run on NVIDIA GPUs"  # which no Triton would change
    assert run(tmp_path / "bin/python", "-c", code, cwd=checkout).stdout.splitlines() == [
        f"layer_norm runs on PyTorch: {why}",
        f"layer_norm: backend='triton' can't be had: {why}",
        reason,
    ]


@pytest.mark.parametrize("first, last", [("fastgpt", "kernels"), ("kernels", "fastgpt")])
def test_checkout_leaves_hugging_face_its_kernels(bare, checkout, first, last):
    code = f"import {first}; from transformers import GPT2LMHeadModel; import {last}, kernels; print(kernels.__file__)"
    found = run(bare / "bin/python", "-c", code, cwd=checkout).stdout.strip()
    assert found == str(packages(bare) / "kernels/__init__.py")


def test_import_has_no_side_effects(bare, checkout):
    code = """
import os, sys, torch

def state():
    spaces = [torch.nn, torch.nn.functional, torch.Tensor, *(x for x in vars(torch.nn).values() if isinstance(x, type))]
    return dict(os.environ), [dict(vars(space)) for space in spaces]

before = state()
import fastgpt, fastgpt.cli
environ, attributes = state()
assert environ == before[0], "the environment changed"
assert attributes == before[1], "torch.nn changed"
assert not torch.cuda.is_initialized(), "CUDA was initialised"
assert not {"matplotlib", "transformers"} & set(sys.modules), "a heavy import"
"""
    result = run(bare / "bin/python", "-c", code, cwd=checkout)
    assert result.stdout + result.stderr == ""


@pytest.fixture
def described(monkeypatch):
    """The arguments of setup() in setup.py."""
    described = {}
    monkeypatch.setattr(setuptools, "setup", described.update)
    runpy.run_path(str(ROOT / "setup.py"))
    return described


def test_the_description_links_to_nothing_that_is_not_beside_it(described):
    text = described["long_description"]
    assert text.startswith("# fastgpt\n") and "fastgpt.accelerate(model" in text
    assert "](" not in text and "Time and memory of a training step" not in text  # no link, no picture
    assert "docs/swap.md says what is replaced" in text  # the text of a link stays


def needs(described):
    """(extra, requirement) for each requirement in setup.py; "" stands for those of every install."""
    extras = {"": described["install_requires"], **described["extras_require"]}
    return [(extra, Requirement(line)) for extra, lines in extras.items() for line in lines]


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.14"])
def test_constraints_pin_every_requirement_once(described, python):
    lines = [line.partition("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    here = [pin for pin in map(Requirement, filter(None, lines)) if applies(pin, python)]
    for extra, need in needs(described):
        pins = [str(pin.specifier) for pin in here if canonicalize_name(pin.name) == canonicalize_name(need.name)]
        assert len(pins) == 1, f"{need} of extra {extra!r} is pinned by {pins}"
        assert pins[0].startswith("==") and pins[0].removeprefix("==") in need.specifier


def applies(requirement, python):
    return requirement.marker is None or requirement.marker.evaluate({"python_version": python})


def test_setup_sets_no_upper_bounds(described):
    assert {bound.operator for bound in SpecifierSet(described["python_requires"])} <= {">="}
    for extra, need in needs(described):
        allowed = {">=", "=="} if extra in ("test", "test-cpu", "dev") else {">="}
        assert {bound.operator for bound in need.specifier} <= allowed, f"{need} of extra {extra!r}"
