"""The rows of a run, one after the other: each is built, held to the reference, and timed in turns with fastgpt's."""

import dataclasses
import gc
import time
from pathlib import Path
from typing import NamedTuple

import torch

from bench.baselines import Unavailable
from bench.machine import Machine
from bench.measure import device_is_lost
from bench.models import gpt
from bench.steps.entries import BASELINE, Entry, Problem, Step, entries
from bench.steps.reference import COMPARED, Expected, reference, wrong
from bench.steps.rows import StepRow, Steps
from bench.timing import interleaved
from fastgpt.model import PRESETS, GPTConfig

_TINY = dict(vocab_size=65, block_size=16, n_layer=1, n_head=2, n_embd=32)


class Sizes(NamedTuple):
    shape: dict
    batch: int
    time: int
    steps: int  # that are timed
    burst: int  # of them that are queued without waiting


DEFAULTS = {
    "cuda": Sizes(PRESETS["gpt2-124M"], 32, 1024, 20, 4),
    "cpu": Sizes(PRESETS["byte-0.1M"], 4, 64, 6, 2),
    "dry": Sizes(_TINY, 1, 8, 2, 1),
}


def setting(autocast: torch.dtype | None, whose: str) -> str:
    """Whose way to train it is, in words."""
    matmuls = "no autocast" if autocast is None else f"autocast {autocast}".replace("torch.", "")
    return f"float32 weights, {matmuls}, as {whose}"


class Bench:
    """One run: the problem, the references, the baseline that stays ready, and the rows so far."""

    def __init__(self, machine: Machine, sizes: Sizes, autocast: torch.dtype | None, folder: Path, steps: Steps):
        self.machine, self.sizes, self.folder, self.steps = machine, sizes, folder, steps
        config = GPTConfig(**{**sizes.shape, "block_size": sizes.time})
        model = gpt(dataclasses.replace(machine, dtype=torch.float32), vars(config))
        idx = torch.randint(config.vocab_size, (sizes.batch, sizes.time), device=machine.device)
        targets = idx.roll(-1, dims=1)
        targets[:, -1] = -100
        self.problem = Problem(model, idx, targets, autocast)
        self.entries = entries(config)
        self.baseline: Step | None = None
        self._expected: dict[tuple[int, str, bool], Expected] = {}

    def expected(self, entry: Entry) -> Expected:
        key = (entry.vocabulary, entry.gelu, entry.tied)
        if key not in self._expected:
            # in float32 on a GPU, for few have float64 worth waiting for: a thousandth of what a half is off by
            dtype = torch.float32 if self.machine.kind == "cuda" else torch.float64
            self._expected[key] = reference(self.problem.model, self.problem, *key, dtype)
        return self._expected[key]

    def run(self, wanted: list[Entry], end: float) -> None:
        """Measure what is wanted until the clock says `end`; DeviceLost's reason is raised as RuntimeError."""
        for number, entry in enumerate(wanted):
            if time.monotonic() > end:
                print(f"no time left for {len(wanted) - number} rows", flush=True)
                return
            started = StepRow(entry.what, "FAILED", "the process was stopped while it was measured", entry.ours)
            self.keep(dataclasses.replace(started, ended=False))
            row = self.measured(entry)
            self.keep(row)
            said = f"{row.status}: {row.note}" if row.median is None else f"{1e3 * row.median:.4g} ms"
            print(f"{row.what}: {said}", flush=True)
            if device_is_lost(RuntimeError(row.note)):
                raise RuntimeError(row.note)

    def keep(self, row: StepRow) -> None:
        entry = next(entry for entry in self.entries if entry.what == row.what)
        row.setting = setting(self.problem.autocast, entry.whose)
        self.steps.put(row)
        order = [entry.what for entry in self.entries]
        self.steps.rows.sort(key=lambda row: order.index(row.what))
        self.steps.write(self.folder)

    def measured(self, entry: Entry) -> StepRow:
        if entry.what == BASELINE:
            row, self.baseline = self._tried(entry, None)
            return row
        if self.baseline is None and self._baseline_works():
            _, self.baseline = self._tried(self.entries[0], None, timed=False)
        row, _ = self._tried(entry, self.baseline)
        if not row.note.startswith("out of memory") or self.baseline is None:
            return row
        self.baseline = None  # both did not fit at once: one after the other
        self.tidy()
        row, _ = self._tried(entry, None)
        if row.median is None:
            return row
        after, self.baseline = self._tried(self.entries[0], None)
        if after.median is not None:
            row.baseline, row.ratio = after.median, row.median / after.median
            row.note = "fastgpt's step after it, for both did not fit at once"
        return row

    def ready(self, entry: Entry) -> Step:
        """Its step after the first ones. RuntimeError with the reason where they are not what they should be."""
        row, step = self._tried(entry, None, timed=False)
        if step is None:
            raise RuntimeError(f"{row.status}: {row.note}")
        return step

    def _baseline_works(self) -> bool:
        return any(row.what == BASELINE and row.status == "ok" for row in self.steps.rows)

    def _tried(self, entry: Entry, baseline: Step | None, timed: bool = True) -> tuple[StepRow, Step | None]:
        """Its row, and its step where that is right. One row's failure costs the others nothing."""
        row = StepRow(entry.what, "FAILED", ours=entry.ours)
        step = None
        try:
            expected = self.expected(entry)
            self.tidy()
            step = self._prepared(entry, row, expected)
            if step is not None and timed:
                self._timed(row, step, baseline)
            return row, step
        except Unavailable as reason:
            row.status, row.note = "skipped", str(reason)
        except torch.OutOfMemoryError as error:
            row.note = f"out of memory: {str(error).splitlines()[0][:200]}"
        except Exception as error:
            row.note = f"{type(error).__name__}: {' '.join(str(error).split()[:60])}"[:400]
        row = StepRow(row.what, row.status, row.note, row.ours)  # without what it had measured until then
        step = None
        self.tidy()
        return row, step

    def _prepared(self, entry: Entry, row: StepRow, expected: Expected) -> Step | None:
        """Its step after the first ones, None if these are wrong."""
        machine = self.machine
        held = 0
        if machine.kind != "cpu":
            held = machine.cuda.memory_allocated()
            machine.cuda.reset_peak_memory_stats()
        made: list[Step] = []
        found: list[tuple[float, float]] = []

        def one():  # read at once: a graph's next replay writes over them
            loss, norm = made[0]()
            found.append((loss.item(), norm.item()))

        def first():
            made.append(entry.build(self.problem, machine))
            one()

        row.first_call = machine.clock.once(first)
        for _ in range(COMPARED - 1):
            one()
        losses, norms = zip(*found, strict=True)
        row.loss, row.expected_loss = losses[0], expected.losses[0]
        reason = wrong(list(losses), norms[0], expected, self.problem.autocast, entry.eight_bits)
        if reason:
            row.status, row.note, row.first_call = "WRONG", reason, None
            return None
        if machine.kind != "cpu":
            row.peak_bytes = machine.cuda.max_memory_allocated() - held
        row.status = "ok"
        return made[0]

    def _timed(self, row: StepRow, step: Step, baseline: Step | None) -> None:
        burst = self.sizes.burst

        def queued(one: Step):
            def call():
                for _ in range(burst):
                    last = one()
                return last

            return call

        calls = {"row": queued(step)} | ({} if baseline is None else {"baseline": queued(baseline)})
        turns = max(2, self.sizes.steps // burst)
        timings = interleaved(calls, self.machine.clock, 0.0, (turns, turns))
        last, _ = step()
        if not last.isfinite():
            row.status, row.note = "WRONG", f"after the timed steps its loss is {last.item()}"
            return
        mine = timings["row"]
        row.median, row.low, row.high = mine.median / burst, mine.low / burst, mine.high / burst
        row.tokens_per_second = self.sizes.batch * self.sizes.time / row.median
        if row.what == BASELINE:
            row.baseline, row.ratio = row.median, 1.0
        elif baseline is not None:
            row.baseline = timings["baseline"].median / burst
            row.ratio = row.median / row.baseline

    def tidy(self) -> None:
        """No row finds what an earlier one left, in memory or in the compiler's caches."""
        torch._dynamo.reset()
        gc.collect()
        if self.machine.kind != "cpu":
            self.machine.cuda.empty_cache()
