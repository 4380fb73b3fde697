"""What became of each module, as a table."""

import re
from typing import NamedTuple


class Row(NamedTuple):
    """What became of one module: `now` is what took its place, None where it was left, and then `why` says why."""

    name: str
    kind: str  # its class
    now: str | None
    why: str | None = None


class Report(NamedTuple):
    """What accelerate did, a Row a module; as text a table, where layers that fared alike share a line, and a note."""

    rows: tuple[Row, ...]
    note: str = ""  # on what no row says

    def __str__(self) -> str:
        lines: dict[tuple, int] = {}
        for row in self.rows:
            outcome = row.now if row.why is None else f"left: {row.why}"
            line = (re.sub(r"\b\d+\b", "*", row.name) or "(the model)", row.kind, outcome)
            lines[line] = lines.get(line, 0) + 1
        if not lines:
            return "fastgpt recognised nothing in this model"
        cells = [("module", "class", "", "now")]
        cells += [(name, kind, f"x{count}", outcome) for (name, kind, outcome), count in lines.items()]
        widths = [max(len(row[i]) for row in cells) for i in range(3)]
        table = [
            "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]) for row in cells
        ]
        return "\n".join([*table, self.note] if self.note else table)
