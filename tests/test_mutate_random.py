"""The mutants by rule: what is changed and what is not; a kill, a survivor, a death and a hang are told apart."""

import ast
import os
import subprocess
import sys

import pytest

from tests import mutate_random, mutate_rules
from tests.mutate_random import Case, Lines

TEXT = '''"""The module's 1 + 1."""
import other


def kernel(x_ptr, y_ptr, stride_xm, stride_xc, rows: "a < b", eps: float = 0.5, wide=True):
    """Its docstring says 3 < 4."""
    if rows < 7 and wide:
        raise ValueError(f"{rows} < 7")
    log(rows)
    total = load(x_ptr, y_ptr, stride_xm, mask=rows, fill=wide) + x_ptr.sum(dim=1, keepdim=True)
    return total.to(other.float32) if total is not None else [each for each in rows if each]
'''


def changed():
    return {(place.rule, " ".join(mutate_rules.mutated(TEXT, place).split())) for place in mutate_rules.places(TEXT)}


@pytest.mark.parametrize(
    ("rule", "old", "new"),
    [
        ("comparison", "rows < 7 and", "rows <= 7 and"),
        ("comparison", "total is not None", "total is None"),
        ("condition negated", "if rows < 7 and wide:", "if not (rows < 7 and wide):"),
        ("condition negated", "rows < 7 and wide", "((rows < 7) or (wide))"),
        ("condition negated", "rows if each]", "rows if (not (each))]"),
        ("condition left out", "rows < 7 and wide", "(rows < 7)"),
        ("off by one", "rows < 7 and", "rows < 8 and"),
        ("off by one", "rows < 7 and", "rows < 6 and"),
        ("default", "float = 0.5", "float = 1.1"),
        ("default", "wide=True", "wide=False"),
        ("statement left out", 'raise ValueError(f"{rows} < 7")', "pass"),
        ("statement left out", "log(rows)", "pass"),
        ("arguments swapped", "load(x_ptr, y_ptr,", "load(y_ptr, x_ptr,"),
        ("stride", "y_ptr, stride_xm, mask", "y_ptr, stride_xc, mask"),
        (
            "arithmetic",
            "load(x_ptr, y_ptr, stride_xm, mask=rows, fill=wide) + x_ptr",
            "(load(x_ptr, y_ptr, stride_xm, mask=rows, fill=wide) - x_ptr",
        ),
        ("axis", "dim=1", "dim=0"),
        ("boolean", "keepdim=True", "keepdim=False"),
        ("argument left out", "mask=rows, fill", "fill"),
        ("dtype", "other.float32", "other.float16"),
        ("conversion left out", "total.to(other.float32)", "total"),
    ],
)
def test_what_is_changed(rule, old, new):
    one_line = " ".join(TEXT.split())
    assert old in one_line
    if rule == "arithmetic":  # is put in brackets
        new, old = new + ".sum(dim=1, keepdim=True))", old + ".sum(dim=1, keepdim=True)"
    assert (rule, one_line.replace(old, new)) in changed()


def test_what_is_said_is_left_alone():
    kept = ("The module's 1 + 1.", "Its docstring says 3 < 4.", 'rows: "a < b"', "import other")
    for rule, text in changed():
        assert all(part in text for part in kept), rule
        assert '{rows} < 7")' in text or rule == "statement left out"


def test_a_mutant_is_another_program():
    for place in mutate_rules.places(TEXT):
        if mutate_rules.is_another(TEXT, place):
            assert ast.dump(ast.parse(mutate_rules.mutated(TEXT, place))) != ast.dump(ast.parse(TEXT))
    place = mutate_rules.places(TEXT)[0]
    assert not mutate_rules.is_another(TEXT, place._replace(new=TEXT.encode()[place.start : place.end].decode()))
    assert not mutate_rules.is_another(TEXT, place._replace(new="("))


def test_a_seed_draws_the_same_from_every_file(tmp_path, monkeypatch):
    monkeypatch.setattr(mutate_random, "ROOT", tmp_path)
    files = {"fastgpt/one.py", "fastgpt/two.py", "kernels/three.py"}
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(TEXT)
    first = mutate_random.drawn(12, 1)
    assert first == mutate_random.drawn(12, 1) != mutate_random.drawn(12, 2)
    assert len(set(first)) == 12 and {file for file, _ in first} == {
        "fastgpt/one.py",
        "fastgpt/two.py",
        "kernels/three.py",
    }
    assert len({place.rule for _, place in first}) > 6


def test_who_enters_the_line_is_asked_and_other_functions_first(tmp_path, monkeypatch):
    """Of what an import runs, whoever enters the function that a default is of, or the file."""
    monkeypatch.setattr(mutate_random, "ROOT", tmp_path)
    (tmp_path / "file.py").write_text("A = 1\n\n\ndef f(a=2):\n    b = a\n    return b\n\n\ndef g():\n    return 4\n")
    tests = [Case("a.py::one[1]", False, 1.0), Case("a.py::one[2]", False, 2.0), Case("a.py::two", True, 9.0)]
    known = Lines(
        {("file.py", 5): tests[1:], ("file.py", 6): tests[:1], ("other.py", 5): [Case("b.py::x", False, 0.0)]}
    )
    known["file.py", 1] = known["file.py", 4] = known["file.py", 10] = [last := Case("c.py::all", False, 20.0)]
    place = mutate_rules.Place("comparison", "f", 5, 6, 0, 1, "")
    assert known.of("file.py", place) == [tests[0], tests[2], tests[1]]
    assert known.of("file.py", place._replace(first=10, last=10)) == [last]
    assert known.of("file.py", place._replace(first=4, last=4)) == [tests[0], tests[2], last, tests[1]]
    assert set(known.of("file.py", place._replace(first=1, last=1, function=""))) == {*tests, last}
    del known["file.py", 10]
    assert known.of("file.py", place._replace(first=10, last=10)) == []


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A tree of one function and its tests."""
    folder = tmp_path / "tree"
    test = "from fastgpt.small import larger\n\n\ndef test_larger():\n    assert larger(1, 2) == 2\n"
    for name, text in {
        "fastgpt/small.py": "def larger(a, b):\n    while a is None:\n        continue\n    return a if a > b else b\n",
        "tests/test_small.py": test,
        "pyproject.toml": "[tool.pytest.ini_options]\naddopts = '--import-mode=importlib'\npythonpath = ['.']\n",
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows has no fork")
@pytest.mark.parametrize(
    ("old", "new", "verdict"),
    [
        ("a > b", "a >= b", "lives"),
        ("a > b", "a < b", "fails"),
        ("a > b", "a > c", "fails"),
        ("def larger", "def smaller", "dies"),
        ("return", "import os; os._exit(3)\n    return", "dies"),
        ("a is None", "a is not None", "hangs"),
    ],
)
def test_verdicts(old, new, verdict, tree, monkeypatch):
    monkeypatch.setattr(mutate_random, "PATIENCE", 8.0 if verdict == "hangs" else 60.0)
    file = tree / "fastgpt" / "small.py"
    file.write_text(file.read_text().replace(old, new))
    tests = [Case("tests/test_small.py::test_larger", False, 0.01)]
    assert mutate_random.judge(tree, tests, False)[0] == verdict
    assert mutate_random.judge(tree, tests, True) == ("lives", "no test")


@pytest.mark.slow
def test_the_command(tree, tmp_path):
    for name in ("mutate", "mutate_random", "mutate_rules", "mutants", "reached"):
        (tree / "tests" / f"{name}.py").write_text((mutate_random.ROOT / "tests" / f"{name}.py").read_text())
    (tree / "kernels").mkdir()
    ran = subprocess.run(
        [sys.executable, "-m", "tests.mutate", "--random", "20"],
        cwd=tree,
        env={**os.environ, "PYTHONPATH": str(tree), "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 1, ran.stderr
    lines = ran.stdout.splitlines()
    assert any(line.startswith("lives  fastgpt/small.py:4 larger, comparison: a > b -> a >= b") for line in lines), (
        lines
    )
    assert any(line.startswith("fails  fastgpt/small.py:4 larger, condition negated") for line in lines), lines
    assert "killed" in lines[-1]
