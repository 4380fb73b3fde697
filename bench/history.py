"""How fastgpt stood over time to what it was compared with, and where it fell back.

A time on a shared machine means little, so what is followed is a ratio within a run: the time of every rival that both
runs timed over fastgpt's, their geometric mean. A case fell back where that ratio is lower than in the run before by
more than LEAST and what the same version timed twice differed by in both, or where fastgpt has no time any more.

python -m bench history               the committed runs of each device, and their plot; 1 if a newest one fell back
python -m bench history out/bench     a run that was not kept, against the newest committed one of its device

Tables of training steps (`python -m bench steps`) are followed beside them: of each row that runs fastgpt's functions,
the time of what people would run without them over the row's.
"""

import argparse
import math
from pathlib import Path
from typing import NamedTuple

from bench.case import SUBJECT
from bench.measure import AGAIN, Folder, Row
from bench.report import RESULTS, Report, runs, slug
from bench.steps.rows import FILE as STEPS_FILE
from bench.steps.rows import Steps

LEAST = 0.1  # of the ratio before: the Xeon's first two runs differ by up to 8%, where nothing was changed


STEPS = ", training steps"  # after a device's name: its tables


class Change(NamedTuple):
    """How a case stood before and stands now: rivals' time over fastgpt's."""

    case: str
    before: float
    now: float  # 0 if fastgpt has no time
    allowed: float  # what share of `before` may be lost

    @property
    def fell_back(self) -> bool:
        return self.now < self.before * (1 - self.allowed)


def changes(before: Report, now: Report) -> list[Change]:
    """Of every case that both have and that had a time before. A case that is measured no more is none."""
    earlier, later = before.by_case(), now.by_case()
    found = []
    for case, old in earlier.items():
        new = later.get(case)
        if new is None or not _timed(old.get(SUBJECT)):
            continue
        both = [name for name, row in old.items() if row.rival and _timed(row) and _timed(new.get(name))]
        if SUBJECT in new and new[SUBJECT].status == "skipped":  # for want of memory, say
            continue
        if not _timed(new.get(SUBJECT)):
            found.append(Change(case, 1.0, 0.0, 0.0))
        elif both:
            allowed = LEAST + _wobble(old) + _wobble(new)
            found.append(Change(case, _standing(old, both), _standing(new, both), allowed))
    return found


def followed(steps: Steps) -> Report:
    """A table of training steps as a report: a case for each row of fastgpt's, with all rows without it as rivals."""
    settings = steps.settings
    shape = dict(B=settings["batch"], T=settings["time"])
    rows = []
    for ours in (row for row in steps.rows if row.ours):
        dtypes = f"{settings['weights']} weights, autocast {settings['autocast']}"
        case = f"{ours.what}, {settings['model']}, B {shape['B']} T {shape['T']}, {dtypes}"
        for row in (ours, *(row for row in steps.rows if not row.ours)):
            name = SUBJECT if row is ours else row.what
            rows.append(Row(case, "training step", shape, dtypes, name, row.status, row.note, row.median))
    return Report(steps.machine, rows)


def _followed_runs(device: Path) -> list[tuple[str, Report]]:
    """The committed tables of training steps in a device's folder, the oldest first."""
    found = [(file.parent.name, Steps.load(file)) for file in device.glob(f"*/{STEPS_FILE}")]
    return [(name, followed(steps)) for name, steps in sorted(found, key=lambda one: one[1].machine["measured"])]


def _timed(row: Row | None) -> bool:
    return row is not None and row.median is not None


def _standing(variants: dict[str, Row], rivals: list[str]) -> float:
    ours = variants[SUBJECT].median
    return math.exp(sum(math.log(variants[name].median / ours) for name in rivals) / len(rivals))


def _wobble(variants: dict[str, Row]) -> float:
    """What the same version, timed twice, differed by."""
    again = variants.get(AGAIN)
    return abs(again.median / variants[SUBJECT].median - 1) if _timed(again) else 0.0


def table(found: list[Change]) -> str:
    """The cases that fell back, and one line for the others."""
    lines = []
    for each in found:
        if each.fell_back:
            noise = f"; {each.allowed:.0%} may be noise"
            told = f"rivals took {each.before:.2f} times fastgpt's time, now {each.now:.2f}{noise}"
            lines.append(f"FELL BACK  {each.case}: {told if each.now else 'fastgpt has no time any more'}")
    better = sum(c.now > c.before * (1 + c.allowed) for c in found)
    return "\n".join([*lines, f"{len(found)} cases compared: {len(lines)} fell back, {better} got ahead"])


def _lines(runs: list[dict[str, dict[str, Row]]]) -> dict[str, list[float]]:
    """Where each case stood in every run: of cases, and against rivals, that all of the runs timed."""
    found = {}
    for case in runs[0]:
        variants = [run.get(case, {}) for run in runs]
        rivals = [name for name, row in variants[0].items() if row.rival and all(_timed(v.get(name)) for v in variants)]
        if rivals and all(_timed(each.get(SUBJECT)) for each in variants):
            found[case] = [_standing(each, rivals) for each in variants]
    return found


def plot(past: dict[str, list[tuple[str, Report]]]):
    """A figure: where fastgpt stood in each run of each device, a thin line a case, a thick one for their mean, and red
    where a case fell back."""
    from matplotlib.figure import Figure  # which only this needs
    from matplotlib.ticker import LogLocator

    figure = Figure(figsize=(7 * len(past), 4.6), layout="constrained")
    title = "Rivals' time over fastgpt's, of the cases and rivals that all runs timed; higher is better"
    figure.suptitle(title, fontsize=12)
    panels = figure.subplots(1, len(past), squeeze=False).flat
    for axis, (device, each) in zip(panels, past.items(), strict=True):
        lines = _lines([report.by_case() for _, report in each])
        for points in lines.values():
            axis.plot(range(len(each)), points, color="#aab7b8", lw=0.8, marker=".", ms=4)
        for place in range(1, len(each)):
            for change in changes(each[place - 1][1], each[place][1]):
                if change.fell_back and change.case in lines:
                    axis.plot(place, lines[change.case][place], "o", color="#c0392b", ms=6)
                    axis.annotate(change.case, (place, lines[change.case][place]), fontsize=7, color="#c0392b")
        means = [math.exp(sum(map(math.log, column)) / len(column)) for column in zip(*lines.values(), strict=True)]
        axis.plot(range(len(means)), means, color="black", lw=2, marker="o", ms=5, label="all of them")
        axis.axhline(1, color="black", ls="--", lw=0.8)
        axis.set_yscale("log", base=2)
        axis.yaxis.set_major_locator(LogLocator(base=2, subs=(1, 1.2, 1.4, 1.7)))
        axis.yaxis.set_major_formatter("{x:.2g}")
        axis.set_xticks(range(len(each)), [name for name, _ in each], fontsize=8, rotation=15, ha="right")
        axis.set_title(device, fontsize=9)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    return figure


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, nargs="?", help="where pytest bench/ left rows.jsonl")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the committed runs (default: bench/results)")
    parser.add_argument("--plot", type=Path, help="a PNG to draw; bench/results/history.png without a folder")


def main(options: argparse.Namespace) -> int:
    """0 if nothing fell back."""
    devices = sorted(path for path in options.results.iterdir() if path.is_dir())
    past = {path.name: [(file.parent.name, report) for file, report in runs(path)] for path in devices}
    past |= {path.name + STEPS: _followed_runs(path) for path in devices}
    past = {device: each for device, each in past.items() if each}
    if options.folder is not None:
        steps = (options.folder / STEPS_FILE).exists()
        report = followed(Steps.load(options.folder / STEPS_FILE)) if steps else Report.of(Folder(options.folder))
        device = slug(report.machine) + (STEPS if steps else "")
        if device not in past:
            raise ValueError(f"history: no run of {report.machine['device']} is in {options.results}")
        past = {device: [*past[device], (str(options.folder), report)]}
    worst = 0
    for device, each in past.items():
        print(f"{device}: {', '.join(name for name, _ in each)}")
        if len(each) > 1:
            found = changes(each[-2][1], each[-1][1])
            print(table(found))
            worst |= any(change.fell_back for change in found)
    target = options.plot or (None if options.folder else options.results / "history.png")
    if target is not None and past:
        try:
            plot(past).savefig(target, dpi=100)
            print(f"drawn: {target}")
        except ModuleNotFoundError as error:
            print(f"no plot: {error.name} is not installed")
    return int(worst)
