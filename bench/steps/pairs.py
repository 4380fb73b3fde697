"""Two ways to train a GPT-2, or to read a prompt, in turns until their ratio is known: what is promised on a CPU.

A turn is one call of each, in an order that changes from turn to turn, and gives one ratio. The mean of their
logarithms has a 95% interval; the pair is done when that is narrow, so that a busy machine costs time and not truth.
"""

import argparse
import dataclasses
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from bench.baselines import Unavailable
from bench.families import BOOK, FAMILIES, HUGGING_FACE, NANOGPT
from bench.machine import Machine, header
from bench.steps.entries import BASELINE, built
from bench.steps.rows import Steps
from bench.steps.run import DEFAULTS, Bench
from fastgpt.generation import generate
from fastgpt.generation.decoder import Decoder
from fastgpt.model import PRESETS
from fastgpt.ops.loss import multiplies

FILE = "pairs.json"
_STUDENT = 2.1  # of 18 degrees of freedom; there are rarely fewer, and with more it is a little smaller
_FEWEST = 8  # turns
PREFILL, TOKENS = "a prompt of 128 tokens", 128


class Pair(NamedTuple):
    ours: str  # rows of `python -m bench steps`, or what reads a prompt
    other: str
    target: float  # the other's time over ours, at least


class Ratio(NamedTuple):
    """The other's time over ours: above 1, ours is faster."""

    mean: float
    low: float  # of the 95% interval
    high: float
    turns: int
    seconds: tuple[float, float]  # medians, ours and the other's

    def verdict(self, target: float, width: float) -> str:
        """On a promise of `target`, by an interval that is `width` of the ratio at most, or lies on one side."""
        narrow = self.high - self.low < width * self.mean
        if self.low >= target or (narrow and self.mean >= target):
            return "kept"
        return "missed" if narrow or self.high < target else "not decided"


@dataclasses.dataclass
class Row:
    autocast: str | None
    ours: str
    other: str
    target: float
    note: str = ""  # why there is no ratio
    ratio: Ratio | None = None


def pairs(half: bool) -> Iterator[Pair]:
    """half: under autocast in bfloat16."""
    for name in (HUGGING_FACE, NANOGPT, BOOK):
        yield Pair(f"{name}, accelerate", f"{name}, eager", 0.98)
    for name in (HUGGING_FACE, NANOGPT):
        yield Pair(f"{name}, accelerate(loss=True)", f"{name}, eager", 0.98)
    for name in (HUGGING_FACE, NANOGPT, BOOK):
        yield Pair(BASELINE, f"{name}, eager", 1.0)
    if not half:
        yield Pair(f"{BASELINE}: {PREFILL}", f"{NANOGPT}: {PREFILL}", 1.0)
    yield Pair(BASELINE, f"{NANOGPT}, compiled", 0.9 if half else 0.97)


def in_turns(ours: Callable, other: Callable, clock, width: float, most: int) -> Ratio:
    """Until the 95% interval is narrower than `width` of the ratio, or `most` turns."""
    calls = ours, other
    times: tuple[list[float], list[float]] = [], []
    for call in calls:
        call()
    while True:
        for which in (0, 1) if len(times[0]) % 2 else (1, 0):
            times[which].append(clock.once(calls[which]))
        logs = [math.log(b / a) for a, b in zip(*times, strict=True)]
        turns = len(logs)
        if turns < 2:
            continue
        mean, off = statistics.mean(logs), _STUDENT * statistics.stdev(logs) / math.sqrt(turns)
        low, high = math.exp(mean - off), math.exp(mean + off)
        if turns >= most or (turns >= _FEWEST and high - low < width * math.exp(mean)):
            return Ratio(math.exp(mean), low, high, turns, (statistics.median(times[0]), statistics.median(times[1])))


def measured(pair: Pair, bench: Bench, width: float, most: int) -> Row:
    row = Row(bench.steps.settings["autocast"], *pair)
    try:
        if PREFILL in pair.ours:
            ours, other = _prefills(bench)
        else:
            entries = {entry.what: entry for entry in bench.entries}
            ours, other = (bench.ready(entries[what]) for what in (pair.ours, pair.other))
        row.ratio = in_turns(ours, other, bench.machine.clock, width, most)
    except (Unavailable, RuntimeError) as reason:
        row.note = str(reason)
    bench.tidy()
    return row


def _prefills(bench: Bench) -> tuple[Callable, Callable]:
    """What writes the first token after a prompt, by a Decoder that is kept and by nanoGPT's forward."""
    model = bench.problem.model.eval()
    decoder, theirs = Decoder(model), built(NANOGPT, FAMILIES[NANOGPT], model, bench.machine).eval()
    ids = bench.problem.idx[:1, :TOKENS]

    @torch.no_grad()
    def other():
        return theirs(ids)[0][:, -1]  # it computes no other position's

    def ours():
        return generate(decoder, ids, 1, temperature=0)

    mine = decoder.logits(decoder.features(ids)[:, -1])
    if not (mine - other()).norm() < 1e-2 * mine.norm():  # their GELUs differ by a thousandth
        raise RuntimeError("WRONG: their logits differ")
    return ours, other


def table(rows: list[Row], width: float) -> str:
    head = ["autocast", "ours", "the other", "its time / ours", "95%", "turns", "at least", ""]
    lines = [f"| {' | '.join(head)} |", "|---|---|---|--:|---|--:|--:|---|"]
    for row in rows:
        begin = f"| {row.autocast or 'none'} | {row.ours} | {row.other} |"
        if row.ratio is None:
            lines.append(f"{begin} {row.note} | | | {row.target} | |")
            continue
        r = row.ratio
        said = f"{r.low:.3f} to {r.high:.3f} | {r.turns} | {row.target} | {r.verdict(row.target, width)}"
        lines.append(f"{begin} {r.mean:.3f} | {said} |")
    return "\n".join(lines)


def conditions(facts: dict, options: argparse.Namespace) -> str:
    changed = " with changes" if facts["changed"] else ""
    return (
        f"{facts['device']}; PyTorch {facts['torch']}; commit {facts['commit']}{changed}; `{facts['command']}`. "
        f"{options.preset}, B = {options.batch}, T = {options.time}, dropout 0, random tokens, float32 weights, fused "
        f"AdamW, clipping at 1.0. Each pair in turns until the 95% interval of its ratio is narrower than "
        f"{options.width:.0%}, or {options.most} turns."
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", choices=PRESETS, default="gpt2-124M")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--time", type=int, default=256)
    parser.add_argument("--width", type=float, default=0.03, help="of the interval, at which a pair is done")
    parser.add_argument("--most", type=int, default=60, help="turns of a pair")
    parser.add_argument("--nanogpt", type=Path, metavar="DIR", help="nanoGPT's checkout, for its own model.py")
    parser.add_argument("--only", action="append", default=[], metavar="WORDS", help="pairs whose names hold WORDS")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), action="append", help="of autocast; default: both")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no pair after that")
    parser.add_argument("--out", type=Path, default=Path("out/pairs"), help="default: out/pairs")


def main(options: argparse.Namespace) -> int:
    """0 if every promise is kept."""
    end, machine = time.monotonic() + options.seconds, Machine.of("cpu")
    machine = dataclasses.replace(machine, nanogpt=options.nanogpt, compiles_models=True, dtype=torch.float32)
    shape = {"vocab_size": 50257, **PRESETS[options.preset]}
    sizes = DEFAULTS["cpu"]._replace(shape=shape, batch=options.batch, time=options.time)
    rows: list[Row] = []
    options.out.mkdir(parents=True, exist_ok=True)
    facts = header(machine)
    for dtype in options.dtype or ("float32", "bfloat16"):
        autocast = None if dtype == "float32" else torch.bfloat16
        if autocast is not None and not multiplies(autocast):
            print("this CPU does not multiply bfloat16: float32 alone")
            continue
        steps = Steps(facts, {"autocast": None if autocast is None else dtype}, [])
        bench = Bench(machine, sizes, autocast, options.out, steps)
        for pair in pairs(autocast is not None):
            if all(word not in f"{pair.ours} / {pair.other}" for word in options.only or [""]):
                continue
            if time.monotonic() > end:
                rows.append(Row(steps.settings["autocast"], *pair, note="no time left"))
                continue
            rows.append(measured(pair, bench, options.width, options.most))
            kept = {"machine": facts, "shape": shape, "batch": options.batch, "time": options.time}
            kept["rows"] = [dataclasses.asdict(row) for row in rows]
            (options.out / FILE).write_text(json.dumps(kept, indent=1) + "\n")
            print(table(rows[-1:], options.width).splitlines()[-1], flush=True)
    (options.out / "pairs.md").write_text(
        f"# Pairs on a CPU\n\n{conditions(facts, options)}\n\n{table(rows, options.width)}\n"
    )
    print("", table(rows, options.width), "", f"written: {options.out / FILE}", sep="\n")
    return int(any(row.ratio is None or row.ratio.verdict(row.target, options.width) != "kept" for row in rows))
