"""matrix.txt has every row, and names only tests that are there."""

import re
from pathlib import Path

from tests.entered import LIST, listed

TESTS = Path(__file__).parent
PROMISES = TESTS.parent / "docs" / "guarantees.md"
TABLE = (TESTS / "matrix.txt").read_text(encoding="utf-8").split("\n\n", 1)[1]


def test_every_row_is_there_once_and_has_a_test():
    rows = re.findall(r"^([NST]\d+) +\S.*\n +test_", TABLE, re.M)
    assert rows == [
        *(f"N{i}" for i in range(1, 23)),
        *(f"S{i}" for i in range(1, 27)),
        *(f"T{i}" for i in range(1, 11)),
    ]
    assert len(rows) == len(re.findall(r"^\S", TABLE, re.M))


def test_every_test_that_it_names_is_there():
    named = re.findall(r"^ +(\S+)::(\S+)$", TABLE, re.M)
    assert len(named) + len(re.findall(r"^\S", TABLE, re.M)) == len(TABLE.splitlines())
    for file, name in named:
        assert re.search(rf"^def {name}\(", next(TESTS.rglob(file)).read_text(encoding="utf-8"), re.M), (
            f"{file}::{name}"
        )


def test_the_promises_name_rows_that_are_there():
    promises = re.findall(r"^\| .* \| (.*) \|$", PROMISES.read_text(encoding="utf-8"), re.M)
    named = [name for rows in promises for name in re.findall(r"\b[NST]\d+\b", rows)]
    assert len(named) >= 15
    assert not set(named) - set(re.findall(r"^([NST]\d+) ", TABLE, re.M))


def test_what_no_test_enters_is_short_and_has_reasons():
    """That nothing else is left out `python -m tests.entered` shows, which takes too long for every change."""
    lines = listed(LIST.read_text(encoding="utf-8"))
    assert 0 < len(lines) <= 20
    for line in lines:
        file, _, text = line.partition(": ")
        assert text in (TESTS.parent / file).read_text(encoding="utf-8"), line
