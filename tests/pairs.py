"""Options two at a time: rows in which every pair of values of two options stands at least once."""

import itertools
from typing import Any


def covering(**options: list) -> list[dict[str, Any]]:
    """A covering array of strength two: for any two options and a value of each some row has both. Some values' square
    of rows instead of their product. The same rows each time: each begins with the first pair that is still missing,
    and takes of every other option the value that covers most of what is left."""
    numbers = {name: range(len(values)) for name, values in options.items()}
    missing = {
        ((one, a), (other, b)): None
        for one, other in itertools.combinations(options, 2)
        for a, b in itertools.product(numbers[one], numbers[other])
    }
    rows = []
    while missing:
        row = dict(next(iter(missing)))
        for name in options:
            if name not in row:
                gains = [len(_pairs({**row, name: value}, options, missing)) for value in numbers[name]]
                row[name] = gains.index(max(gains))
        for pair in _pairs(row, options, missing):
            del missing[pair]
        rows.append({name: options[name][row[name]] for name in options})
    return rows


def _pairs(row, options, missing):
    chosen = [(name, row[name]) for name in options if name in row]
    return [pair for pair in itertools.combinations(chosen, 2) if pair in missing]


def named(row: dict[str, Any]) -> str:
    """A row as the name of a test."""
    return ",".join(f"{name}={str(value).removeprefix('torch.')}" for name, value in row.items())
