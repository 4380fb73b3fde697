"""Seeded bugs, to prove that the tests can fail: `python -m tests.mutate [NAME …]`.

Each mutant changes one place of a function in a copy of the tree and names the test that must kill it. It is killed
only by an assertion of that test or a finding of the sanitizer: a crash, an import error or another test's failure is
no kill, and a mutant whose place is no longer there is an error. All named tests must pass without a mutation.
"""

import argparse
import ast
import contextlib
import io
import itertools
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tokenize
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.mutants import MUTANTS, Mutant

ROOT = Path(__file__).resolve().parent.parent
_FINDING = r"AssertionError|assert |Failed: DID NOT RAISE|fastgpt\.sanitizer\.launch\.SanitizerError"
_ENVIRONMENT = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "COLUMNS": "400"}
_LAYOUT = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)


def _tokens(text: str) -> list[tokenize.TokenInfo]:
    """Names, numbers, strings and operators; of a part of a line too."""
    found = []
    with contextlib.suppress(tokenize.TokenError, IndentationError):  # at the end of a part
        found += (token for token in tokenize.generate_tokens(io.StringIO(text).readline) if token.string.strip())
    return [token for token in found if token.type not in _LAYOUT]


def _lines(tree: ast.AST, function: str) -> tuple[int, int] | None:
    """The first and the last line of a function or class, by its qualified name."""
    name, _, rest = function.partition(".")
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name == name:
            if rest:
                return _lines(node, rest)
            return min([node.lineno, *(each.lineno for each in node.decorator_list)]), node.end_lineno
    return None


def mutated(mutant: Mutant) -> str:
    """The text of the mutant's file, changed at the first such place of the function. ValueError if there is none."""
    text = (ROOT / mutant.file).read_text(encoding="utf-8")
    first, last = 1, text.count("\n") + 1
    if mutant.function:
        first, last = _lines(ast.parse(text), mutant.function) or (0, 0)
    there = [token for token in _tokens(text) if first <= token.start[0] <= last]
    old = [token.string for line in mutant.old.splitlines() for token in _tokens(line.strip())]
    for at in range(len(there) - len(old) + 1):
        if [token.string for token in there[at : at + len(old)]] == old:
            begins = [0, *itertools.accumulate(map(len, text.splitlines(keepends=True)))]
            start, end = there[at].start, there[at + len(old) - 1].end
            before, after = text[: begins[start[0] - 1] + start[1]], text[begins[end[0] - 1] + end[1] :]
            return before + mutant.new.strip() + after
    raise ValueError(
        f"{mutant.name}: {mutant.function or 'no function'} of {mutant.file} no longer holds {mutant.old!r}"
    )


def run(mutant: Mutant | None, tests: list[str], interpreted: bool = True) -> tuple[bool, str]:
    """Whether the tests failed by an assertion, and what they said, in a copy of the tree with the mutation."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if interpreted:
        inherited["TRITON_INTERPRET"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        for name in ("fastgpt", "kernels", "bench", "tests"):
            shutil.copytree(ROOT / name, Path(folder, name))  # with what Python compiled before
        shutil.copy(ROOT / "pyproject.toml", folder)
        if mutant is not None:
            Path(folder, mutant.file).write_text(mutated(mutant), encoding="utf-8")
        result = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-x", "--tb=line", "-p", "no:cacheprovider"]
            + ["-m", "interpreter" if interpreted else "not interpreter and not gpu"]
            + [_path(test) for test in tests],
            cwd=folder,
            env={**inherited, **_ENVIRONMENT, "PYTHONPATH": folder},
            capture_output=True,
            text=True,
        )  # fmt: skip
    said = re.findall(r"^FAILED .*? - (.*)$", result.stdout, re.MULTILINE)
    by_assertion = result.returncode == 1 and any(re.match(_FINDING, line) for line in said)
    return by_assertion, (said or result.stdout.splitlines() or [result.stderr])[-1][:110]


def _path(test: str) -> str:
    """A test of a file that stands in some folder of tests/."""
    file, colons, name = test.partition("::")
    return str(next((ROOT / "tests").rglob(file)).relative_to(ROOT)) + colons + name


def main(names: list[str]) -> int:
    """Print a line a mutant; 1 if one survived, died of something else, or the tests fail unmutated."""
    chosen = [mutant for mutant in MUTANTS if not names or mutant.name in names]
    if unknown := set(names) - {mutant.name for mutant in MUTANTS}:
        raise ValueError(f"no mutant {', '.join(sorted(unknown))}")
    for interpreted in sorted({mutant.interpreted for mutant in chosen}):
        tests = sorted({mutant.test for mutant in chosen if mutant.interpreted == interpreted})
        failed, said = run(None, tests, interpreted)
        if failed or "passed" not in said:
            print(f"the tests fail without a mutation: {said}")
            return 1
    survivors = 0
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for mutant, (killed, said) in zip(
            chosen, pool.map(lambda m: run(m, [m.test], m.interpreted), chosen), strict=True
        ):
            survivors += not killed
            print(f"{'killed  ' if killed else 'SURVIVED'} {mutant.name:40} {mutant.test:68} {said}", flush=True)
    print(f"{len(chosen) - survivors} of {len(chosen)} killed")
    return int(survivors > 0)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.mutate", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="of mutants; all if none is given")
    parser.add_argument("--random", type=int, metavar="N", help="of mutants drawn by rule: tests/mutate_random.py")
    parser.add_argument("--seed", type=int, default=0, help="of that draw")
    parser.add_argument("--at", nargs="+", default=[], metavar="FILE:LINE", help="of them only those")
    parser.add_argument("--seconds", type=float, default=40.0, help="of tests that a mutant drawn by rule meets; 40")
    parser.add_argument("--known", action="store_true", help="only the tests whose lines are known: no run of them")
    return parser


if __name__ == "__main__":
    given = parser().parse_args()
    if given.random is not None:
        from tests import mutate_random

        sys.exit(mutate_random.main(given.random, given.seed, given.at, given.known, given.seconds))
    sys.exit(main(given.names))
