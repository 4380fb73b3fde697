"""What `python -m bench steps` leaves: its rows, the file that keeps them, and the table that people read."""

import csv
import dataclasses
import json
import os
from pathlib import Path
from typing import Literal

FILE = "steps.json"


@dataclasses.dataclass
class StepRow:
    """One way to train a GPT-2. Times are seconds of one step; a row that is not "ok" has none."""

    what: str
    status: Literal["ok", "WRONG", "skipped", "FAILED"]
    note: str = ""  # why there is no time, or what a reader must know
    ours: bool = False  # whether fastgpt's code runs in it: what is wrong then is our fault
    median: float | None = None
    low: float | None = None  # the quartiles
    high: float | None = None
    tokens_per_second: float | None = None
    peak_bytes: int | None = None  # weights and moments included; only a GPU tells
    baseline: float | None = None  # the median of fastgpt's step in the same turns
    ratio: float | None = None  # median / baseline: above 1, fastgpt is faster
    loss: float | None = None  # of the first step
    expected_loss: float | None = None  # the reference's at the same weights
    first_call: float | None = None  # seconds until the first step was done, compilation included
    ended: bool = True  # False while it is measured: the process was then stopped in the middle of it
    setting: str = ""  # whose it is: the dtype of weights, autocast, and who trains so; "" before this was told


@dataclasses.dataclass
class Steps:
    machine: dict
    settings: dict
    rows: list[StepRow]

    @classmethod
    def load(cls, file: Path) -> "Steps":
        kept = json.loads(file.read_text())
        return cls(kept["machine"], kept["settings"], [StepRow(**row) for row in kept["rows"]])

    def write(self, folder: Path) -> None:
        """steps.json, replaced whole, and the same rows as steps.csv and steps.md."""
        folder.mkdir(parents=True, exist_ok=True)
        rows = [dataclasses.asdict(row) for row in self.rows]
        new = folder / (FILE + ".new")
        new.write_text(json.dumps({"machine": self.machine, "settings": self.settings, "rows": rows}, indent=1) + "\n")
        os.replace(new, folder / FILE)
        with (folder / "steps.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, [field.name for field in dataclasses.fields(StepRow)])
            writer.writeheader()
            writer.writerows(rows)
        (folder / "steps.md").write_text(self.markdown())

    def put(self, row: StepRow) -> None:
        """Add the row, in place of an earlier one of the same name."""
        self.rows = [*(old for old in self.rows if old.what != row.what), row]

    def conditions(self) -> str:
        """The machine, the versions, what a step is and how it was timed, in a few sentences."""
        machine, settings = self.machine, self.settings
        weights, how = settings["weights"], settings["how"]
        versions = f"PyTorch {machine['torch']}, Triton {machine['triton']}"
        for name, key in {"transformers": "transformers", "cuDNN": "cudnn", "driver": "driver_version"}.items():
            if machine.get(key) is not None:
                versions += f", {name} {machine[key]}"
        changed = " with changes" if machine["changed"] else ""
        matmuls = f"autocast {settings['autocast']}" if settings["autocast"] else "no autocast"
        return (
            f"{machine['device']}; {versions}; commit {machine['commit']}{changed}. {settings['model']}, "
            f"B = {settings['batch']}, T = {settings['time']}, dropout 0, random tokens, {weights} weights, "
            f"{matmuls}, fused AdamW, clipping at {settings['clip']}. {how}"
        )

    def table(self) -> str:
        lines = ["| a training step | ms | tokens/s | GiB at its peak | time / fastgpt's |", "|---|--:|--:|--:|--:|"]
        settings = any(row.setting for row in self.rows)
        if settings:
            lines = [f"{head} {cell} |" for head, cell in zip(lines, ("setting", "---"), strict=True)]
        for row in self.rows:
            whose = f" {row.setting} |" if settings else ""
            if row.median is None:
                note = row.note.replace("|", "\\|").replace("\n", " ")
                lines.append(f"| {row.what} | {row.status}: {note} | | | |{whose}")
                continue
            peak = "" if row.peak_bytes is None else f"{row.peak_bytes / 2**30:.1f}"
            ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
            tokens = f"{float(f'{row.tokens_per_second:.3g}'):,.0f}"
            said = f" ({row.note})" if row.note else ""
            milliseconds = f"{1e3 * row.median:.1f}" if row.median >= 0.01 else f"{1e3 * row.median:.3g}"
            lines.append(f"| {row.what}{said} | {milliseconds} | {tokens} | {peak} | {ratio} |{whose}")
        return "\n".join(lines)

    def markdown(self) -> str:
        facts = (f"- {name}: {value}" for name, value in self.machine.items() if value is not None)
        return "\n".join(
            ["# Training steps", "", self.conditions(), "", self.table(), "", "## Machine", "", *facts, ""]
        )
