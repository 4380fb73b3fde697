"""Mutants that nobody chose: `python -m tests.mutate --random N --seed S`.

Draws N of the mutants that tests.mutate_rules finds in fastgpt/ and kernels/, from all files and by all rules alike,
and runs the tests that enter the line (tests.reached tells which, after a run of them all that is made once): ordinary
ones and those in Triton's interpreter, one of each test function and the quick ones first, up to so many SECONDS of
what they take unmutated. A seed draws the same from the same tree.

Killed is a mutant for which a test fails, by an assertion or by any error, for which the process dies, or that hangs
(takes HANGS times as long as its tests do, and PATIENCE seconds more). One that lives after all the tests that it was
to meet is a survivor, which someone reads: `--at FILE:LINE --seconds 1000` meets it with more of them.
"""

import ast
import collections
import contextlib
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from tests import reached
from tests.mutate_rules import Place, is_another, mutated, places

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 40.0  # of tests a mutant
HANGS, PATIENCE = 5, 60.0
_START_OTHERS = ("test_interpreter.py", "test_mutate.py", "test_mutate_random.py")  # which are asked themselves
_LEFT_OUT = shutil.ignore_patterns(".*", "out", "*.egg-info", "build", "dist")


class Case(NamedTuple):
    name: str  # as pytest gives it
    interpreted: bool
    seconds: float


class Lines(dict[tuple[str, int], list[Case]]):
    """The tests that enter each line of a file."""

    def of(self, file: str, place: Place) -> list[Case]:
        """Those that can see a mutant, one of each test function and the quick ones first: the likeliest to see it."""
        found = {test for line in range(place.first, place.last + 1) for test in self.get((file, line), ())}
        if (begin_end := _entered_instead(ROOT / file, place)) is not None:
            begin, end = begin_end
            found |= {
                test for (other, n), tests in self.items() if other == file and begin <= n <= end for test in tests
            }
        quick = sorted(found, key=lambda test: (test.seconds, test.name))
        turn: collections.Counter = collections.Counter()
        order = []
        for test in quick:
            function = test.name.partition("[")[0]
            order.append((turn[function], test))
            turn[function] += 1
        return [test for _, test in sorted(order, key=lambda each: each[0])]


def _entered_instead(path: Path, place: Place) -> tuple[int, int] | None:
    """Of a line that an import runs, and so hardly a test: the lines of the function whose defaults or decorators it
    has, or all of the file. None for a line in a function."""
    functions = [
        (node.lineno, node.body[0].lineno, node.end_lineno)
        for node in (ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if path.exists() else ())
        if isinstance(node, ast.FunctionDef)
    ]
    if any(body <= place.first <= end for _, body, end in functions):
        return None
    return next(((body, end) for begin, body, end in functions if begin <= place.first < body), (1, 1 << 30))


def lines(already: bool = False) -> Lines:
    """What all tests enter, measured where that is not known, or only what is known `already`."""
    found = Lines()
    everything = [file for file in sorted((ROOT / "tests").rglob("test_*.py")) if file.name not in _START_OTHERS]
    for interpreted in (False, True):
        files = reached.already(everything, interpreted) if already else everything
        for each in reached.known(files, interpreted).values():
            for file, by_line in each["lines"].items():
                for line, tests in by_line.items():
                    entering = (Case(name, interpreted, each["seconds"][name]) for name in tests)
                    found.setdefault((file, int(line)), []).extend(entering)
    return found


def drawn(count: int, seed: int) -> list[tuple[str, Place]]:
    """Mutants of all files, of each as its share of all there are is, at least one, by all the rules in turn."""
    draw = random.Random(seed)
    files = sorted([*(ROOT / "fastgpt").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])
    texts = {file.relative_to(ROOT).as_posix(): file.read_text(encoding="utf-8") for file in files}
    chances = {name: found for name, text in texts.items() if (found := places(text))}
    total = sum(map(len, chances.values()))
    chosen = []
    for name, found in chances.items():
        rules = collections.defaultdict(list)
        for place in draw.sample(found, len(found)):
            rules[place.rule].append(place)
        wanted, turn = max(1, round(count * len(found) / total)), draw.sample(sorted(rules), len(rules))
        while wanted and any(rules.values()):
            for rule in turn:
                if wanted and rules[rule] and is_another(texts[name], place := rules[rule].pop()):
                    chosen.append((name, place))
                    wanted -= 1
    return draw.sample(chosen, min(count, len(chosen)))


class _Chosen:
    """A plugin of pytest: these tests alone, in this order."""

    def __init__(self, names: list[str]):
        self.order = {name: number for number, name in enumerate(names)}

    def pytest_collection_modifyitems(self, items):
        items[:] = sorted((i for i in items if i.nodeid in self.order), key=lambda item: self.order[item.nodeid])


def judge(folder: Path, tests: list[Case], interpreted: bool) -> tuple[str, str]:
    """("lives" or how it ends, what pytest said) of the copy of the tree in `folder`.

    In a fork of this process, which has imported PyTorch, and nothing of the tree, once for all of them.
    """
    names = [test.name for test in tests if test.interpreted == interpreted]
    if not names:
        return "lives", "no test"
    limit = PATIENCE + HANGS * sum(test.seconds for test in tests if test.interpreted == interpreted)
    said = folder / "said"
    child = os.fork()
    if child == 0:
        _become_pytest(folder, names, interpreted, said)
    code = _exit_code(child, limit)
    if code is None:
        return "hangs", f"after {limit:.0f} s"
    text = said.read_text(encoding="utf-8", errors="replace")
    failed = re.findall(r"^(?:FAILED|ERROR) (.*)$", text, re.MULTILINE)
    if code in (0, 5):  # 5: none of them is there any more, which is no kill
        return "lives", f"{len(names) if code == 0 else 'none of its'} tests pass"
    return ("fails" if code == 1 else "dies"), (failed or text.splitlines() or [f"exit code {code}"])[-1][:160]


def _exit_code(child: int, limit: float) -> int | None:
    """How the process ends, below 0 by a signal; None if it goes on past the limit. Nothing it started is left."""
    until, code = time.monotonic() + limit, None
    while code is None and time.monotonic() < until:
        ended, status = os.waitpid(child, os.WNOHANG)
        code = os.waitstatus_to_exitcode(status) if ended else time.sleep(0.05)
    with contextlib.suppress(ProcessLookupError):  # it has ended, and left no children
        os.killpg(child, signal.SIGKILL)
    if code is None:
        os.waitpid(child, 0)
    return code


def _become_pytest(folder: Path, names: list[str], interpreted: bool, said: Path) -> None:
    """The child: never returns."""
    code = 70
    try:
        os.setsid()
        written = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(written, 1)
        os.dup2(written, 2)
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(reached.environment(interpreted), PYTHONPATH=str(folder), PYTHONDONTWRITEBYTECODE="1")
        os.environ["COLUMNS"] = "400"
        sys.dont_write_bytecode = True
        ours = {"", ".", str(ROOT)}
        sys.path[:] = [str(folder), *(part for part in sys.path if part not in ours)]
        for module in [m for m in sys.modules if m.partition(".")[0] in ("tests", "fastgpt", "bench")]:
            del sys.modules[module]
        import pytest

        files = list(dict.fromkeys(name.partition("::")[0] for name in names))
        options = ["-q", "-x", "--tb=line", "-p", "no:xdist", *reached.mode(interpreted)]
        code = int(pytest.main([*options, *files], plugins=[_Chosen(names)]))
        sys.stdout.flush()
    finally:
        os._exit(code)


def _within(tests: list[Case], seconds: float) -> list[Case]:
    """The first tests, at least one, that take no longer than that together."""
    kept, spent = [], 0.0
    for test in tests:
        if not kept or spent + test.seconds <= seconds:
            kept.append(test)
            spent += test.seconds
    return kept


def meet(folder: Path, file: str, place: Place, tests: list[Case]) -> tuple[str, str]:
    """The verdict on one mutant, which stands in the copy of the tree only meanwhile."""
    original = (ROOT / file).read_text(encoding="utf-8")
    (folder / file).write_text(mutated(original, place), encoding="utf-8")
    try:
        first = tests[0].interpreted if tests else False
        for interpreted in (first, not first):
            verdict, said = judge(folder, tests, interpreted)
            if verdict != "lives":
                return verdict, said
        return "lives", f"{len(tests)} tests pass"
    finally:
        shutil.copy2(ROOT / file, folder / file)


def told(file: str, place: Place) -> str:
    """file:line function, rule: what it was -> what it is."""
    raw = (ROOT / file).read_bytes()
    line = raw[: place.start].count(b"\n") + 1
    old = " ".join(raw[place.start : place.end].decode().split())
    new = " ".join(place.new.split()) or "nothing"
    return f"{file}:{line} {place.function or 'the module'}, {place.rule}: {old} -> {new}"


def main(count: int, seed: int, at: list[str], already: bool, seconds: float = SECONDS) -> int:
    """Print a line a mutant, and how many live; 1 if one does."""
    import torch  # noqa: F401 - what every child needs, imported once

    known = lines(already)
    verdicts: collections.Counter = collections.Counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "tree")
        shutil.copytree(ROOT, folder, ignore=_LEFT_OUT)
        for file, place in drawn(count, seed):
            words = told(file, place)
            if at and words.split()[0] not in at:
                continue
            entering = known.of(file, place)
            tests = _within(entering, seconds)
            verdict, said = meet(folder, file, place, tests)
            verdicts[verdict] += 1
            print(f"{verdict:6} {words}    {said} ({len(tests)} of {len(entering)} tests)", flush=True)
    print(f"{verdicts.total() - verdicts['lives']} of {verdicts.total()} killed: {dict(verdicts)}")
    return int(verdicts["lives"] > 0)
