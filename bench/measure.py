"""One case measured: checked against float64 first, then all that is right sampled in turns; a Row for each variant."""

import dataclasses
import gc
import json
import math
import statistics
from pathlib import Path
from typing import Literal

import torch

from bench.baselines import Unavailable
from bench.case import EAGER, SUBJECT, Case, Subject
from bench.check import judge
from bench.machine import Machine
from bench.timing import Timing, interleaved

AGAIN = "fastgpt again"  # the same version a second time: what two rows differ by without a reason


class DeviceLost(RuntimeError):
    """The device can't be used any more in this process."""


@dataclasses.dataclass
class Row:
    """What is known of one variant of a case. Times are seconds; a variant that is not "ok" has none."""

    case: str
    op: str
    shape: dict[str, int]
    dtype: str
    variant: str
    status: Literal["ok", "WRONG", "skipped", "FAILED"]
    note: str = ""  # why there is no time, or how it was taken
    median: float | None = None
    low: float | None = None  # the quartiles
    high: float | None = None
    rounds: int = 0
    first_call: float | None = None  # seconds, compilation included
    peak_bytes: int | None = None  # of one call, beyond its inputs
    error: float | None = None  # relative to float64
    flops: float = 0.0
    bytes: float = 0.0
    floor: float | None = None
    bound: str = ""  # "flops" or "bytes": what the floor is made of
    share: float | None = None  # floor / median: of the roofs measured in the same run
    setting: str = ""  # whose it is: the dtype of weights, autocast; "" in what was measured before this was told

    @property
    def label(self) -> str:
        return f"{self.case}: {self.variant}"

    @property
    def ours(self) -> bool:
        """fastgpt itself or its fallback, called in whatever way: what is wrong here is our fault."""
        return self.variant.startswith((SUBJECT, EAGER))

    @property
    def rival(self) -> bool:
        """What a user could have instead of fastgpt, and does all of the case."""
        return not self.variant.startswith(SUBJECT) and not self.variant.endswith("alone")


def measure(case: Case, machine: Machine, roofs: dict[str, float]) -> tuple[list[Row], dict[str, list[float]]]:
    """The rows of a case and the samples of those that were timed. DeviceLost after an error that the device keeps."""
    torch._dynamo.reset()  # or the shapes of earlier cases would use up its recompilations, and it would fall back
    try:
        with torch._functorch.config.patch(donated_buffer=False), machine.clock.session():  # backwards are repeated
            rows, samples = _measure(case, machine, roofs)
    except DeviceLost:
        raise
    except RuntimeError as error:
        if device_is_lost(error):
            raise DeviceLost(f"{case.name}: {error}") from error
        raise
    gc.collect()
    if machine.kind != "cpu":
        machine.cuda.empty_cache()
    return rows, samples


def _measure(case, machine, roofs):
    rates = roofs["flops_a_second"], roofs["bytes_a_second"]
    facts = dict(
        case=case.name,
        op=case.op,
        shape=case.shape,
        dtype=str(machine.dtype).removeprefix("torch."),
        flops=case.work.flops,
        bytes=case.work.bytes,
        floor=case.work.floor(*rates),
        bound=case.work.bound(*rates),
        setting=_setting(case, machine),
    )
    there = machine.memory_bytes
    if there is not None and case.memory > there:
        note = f"it takes about {case.memory / 2**30:.0f} GiB, this machine has {there / 2**30:.0f}"
        return [Row(**facts, variant=name, status="skipped", note=note) for name in case.variants], {}
    problem = case.problem()
    exact = case.exact(problem)
    rows, calls, eager = {}, {}, None if case.rounded is None else case.rounded(problem)
    for name in sorted(case.variants, key=lambda name: name != case.eager):  # the others are judged by its error
        row, call, results = _prepare(case, name, problem, exact, eager, machine, facts)
        rows[name] = row
        if case.rounded is None and (name == case.eager or (name == SUBJECT and case.eager not in case.variants)):
            eager = results
        if call is not None:
            calls[name] = call
    del exact, eager
    if SUBJECT in calls:
        calls[AGAIN] = calls[SUBJECT]
        rows[AGAIN] = dataclasses.replace(rows[SUBJECT], variant=AGAIN)
    timings = interleaved(calls, machine.clock, machine.seconds * len(calls), machine.rounds) if calls else {}
    for name, timing in timings.items():
        _enter(rows[name], timing)
    ordered = [name for name in (*case.variants, AGAIN) if name in rows]
    return [rows[name] for name in ordered], {name: timing.samples for name, timing in timings.items()}


def _prepare(case, name, problem, exact, eager, machine, facts):
    """Build a variant, judge it, and make it ready to be timed: its row, and its call and results where there are."""
    try:
        made: list[Subject] = []
        results: list[tuple] = []

        def first_call():
            made.append(case.variants[name](problem))
            results.append((made[0].results or made[0].run)())

        _poison(machine)
        seconds = machine.clock.once(first_call)
        subject, own = made[0], made[0].expected
        verdict = judge(results[0], own() if own else exact, None if own else eager, machine.dtype)
        if verdict.reason:
            return Row(**facts, variant=name, status="WRONG", note=verdict.reason, error=verdict.error), None, None
        subject.run()
        peak = machine.clock.peak_bytes(subject.run) if case.peak else None
        call, method = machine.clock.ready(subject.run, case.capture or subject.capture)
        row = Row(**facts, variant=name, status="ok", note=method, first_call=seconds, peak_bytes=peak)
        row.error = verdict.error if math.isfinite(verdict.error) else None
        return row, call, results[0]
    except Unavailable as reason:
        return Row(**facts, variant=name, status="skipped", note=str(reason)), None, None
    except torch.OutOfMemoryError as error:
        status = "FAILED" if name == SUBJECT else "skipped"  # what another takes is its own affair
        return Row(**facts, variant=name, status=status, note=f"out of memory: {str(error)[:200]}"), None, None
    except Exception as error:  # one variant's failure must not cost the others their time
        message = f"{type(error).__name__}: {' '.join(str(error).split()[:60])}"
        if device_is_lost(error):
            raise DeviceLost(f"{case.name}: {name}: {message}") from error
        kinds = {kind.__name__ for kind in type(error).__mro__}
        theirs = "BackendCompilerFailed" in kinds and name != SUBJECT  # a compiler's crash is its own
        return Row(**facts, variant=name, status="skipped" if theirs else "FAILED", note=message[:300]), None, None


def device_is_lost(error: Exception) -> bool:
    """Whether every later call would fail too, as after an illegal access; one that asked for too much does no harm."""
    text = str(error)
    too_much = "Triton Error [CUDA]: out of memory" in text or "Triton Error [CUDA]: invalid argument" in text
    return "CUDA error" in text or ("Triton Error [CUDA]" in text and not too_much)


def _poison(machine: Machine) -> None:
    """Leave NaN in memory that the allocator will give out next, so that what a kernel forgets to write shows."""
    torch.full((2**28 if machine.kind == "cuda" else 2**12,), math.nan, device=machine.device)


def _enter(row: Row, timing: Timing) -> None:
    row.median, row.low, row.high, row.rounds = timing.median, timing.low, timing.high, len(timing.samples)
    row.share = row.floor / row.median


def failed(case: Case, machine: Machine, reason: str) -> list[Row]:
    """Rows of a case that could not be measured at all."""
    facts = case.name, case.op, case.shape, str(machine.dtype).removeprefix("torch.")
    setting = _setting(case, machine)
    return [Row(*facts, name, "FAILED", reason[:300], setting=setting) for name in case.variants]


def _setting(case: Case, machine: Machine) -> str:
    return case.setting or f"all in {machine.dtype}".replace("torch.", "")


def noise(rows: list[Row]) -> float | None:
    """What the two timings of the same version differ by, as a share; the median over cases."""
    medians = {(row.case, row.variant): row.median for row in rows if row.median}
    ratios = [
        abs(medians[case, AGAIN] / median - 1)
        for (case, variant), median in medians.items()
        if variant == SUBJECT and (case, AGAIN) in medians
    ]
    return statistics.median(ratios) if ratios else None


class Folder:
    """Where a run leaves its rows, a line each as they come, so that an interrupted run keeps what it has."""

    def __init__(self, path: Path):
        self.path = path
        self.machine_file, self.rows_file = path / "machine.json", path / "rows.jsonl"

    def start(self, facts: dict, resume: bool) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        self.machine_file.write_text(json.dumps(facts, indent=2) + "\n")
        lines = self.rows_file.read_text().splitlines(keepends=True) if resume and self.rows_file.exists() else []
        self.rows_file.write_text("".join(line for line in lines if line.endswith("\n")))  # but one cut short

    def add(self, rows: list[Row]) -> None:
        with self.rows_file.open("a") as file:
            file.writelines(json.dumps(dataclasses.asdict(row)) + "\n" for row in rows)

    def rows(self) -> list[Row]:
        """Those that are there; a last line that was cut short is left out."""
        if not self.rows_file.exists():
            return []
        found = []
        for line in self.rows_file.read_text().splitlines():
            try:
                found.append(Row(**json.loads(line)))
            except json.JSONDecodeError:
                break
        return found

    def profile(self) -> dict | None:
        """What python -m bench profile left here or beside it, if that was at the same commit."""
        for file in (self.path / "profile.json", self.path.parent / "profile.json"):
            if file.exists():
                found = json.loads(file.read_text())
                if found["machine"]["commit"] == self.facts()["commit"]:
                    return found
        return None

    def facts(self) -> dict:
        return json.loads(self.machine_file.read_text())
