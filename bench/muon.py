"""Muon beside AdamW: how far each has come after so many steps, and after so many seconds.

Two runs of `fastgpt train`'s, of equal weights on equal batches, take their steps in turns, so that a busy machine
slows both; only such a pair's seconds are to be compared. A first pair for each learning rate chooses one for each
optimizer, by the loss at its end; the other seeds then run with these. What is done stays in --out: the same command
goes on from there.
"""

import argparse
import dataclasses
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.machine import Machine, header
from fastgpt import GPT, GPTConfig
from fastgpt.data import Corpus, load_corpus
from fastgpt.data.tokenizer import encoding
from fastgpt.training.distributed import join
from fastgpt.training.run import Run
from fastgpt.training.settings import TrainConfig
from fastgpt.training.signals import Signals

FILE = "muon.json"
OPTIMIZERS = ("adamw", "muon")
LABELS = {"adamw": "AdamW", "muon": "Muon"}
Curve = list[tuple[int, float, float]]  # steps, seconds of them, validation loss


def pair(shape: GPTConfig, settings: dict[str, Any], rates: Sequence[float], corpus: Corpus, every: int) -> list[Curve]:
    """The curves of both optimizers, each at its rate, in turns."""
    with tempfile.TemporaryDirectory() as folder, Signals() as signals:
        runs = []
        for name, rate in zip(OPTIMIZERS, rates, strict=True):
            config = TrainConfig(**settings, optimizer=name, learning_rate=rate)
            torch.manual_seed(config.seed)
            world, out = join(config.device), Path(folder, name)
            out.mkdir()
            runs.append(Run(GPT(shape).to(world.device), config, encoding("byte"), corpus, out, world, signals))
        seconds = [0.0, 0.0]
        curves: list[Curve] = [[(0, 0.0, run.evaluate())] for run in runs]
        for done in range(1, settings["max_iters"] + 1):
            for which in (0, 1) if done % 2 else (1, 0):
                start = time.perf_counter()
                loss, _, _ = runs[which].step()
                float(loss)  # waits for the device
                seconds[which] += time.perf_counter() - start
            if done % every == 0 or done == settings["max_iters"]:
                for curve, run, took in zip(curves, runs, seconds, strict=True):
                    curve.append((done, took, run.evaluate()))
    return curves


def best(found: list[dict], optimizer: str) -> float:
    """The learning rate whose run ended lowest."""
    return min(found, key=lambda each: each["curves"][optimizer][-1][2])["rates"][optimizer]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", default="byte-0.8M")
    parser.add_argument("--n_layer", type=int, help="in place of the preset's")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--every", type=int, default=100, help="steps between evaluations")
    parser.add_argument("--rates", type=float, nargs="+", default=[2e-3, 4e-3, 8e-3])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--data", type=Path, help="default: the built-in corpus")
    parser.add_argument("--out", type=Path, required=True, help="a folder: muon.json, muon.md and muon.png go there")


def main(options: argparse.Namespace) -> int:
    machine = header(Machine.of(None if options.device == "auto" else options.device))
    machine["cpu_threads"] = options.threads
    torch.set_num_threads(options.threads)
    changes = {} if options.n_layer is None else {"n_layer": options.n_layer}
    shape = GPTConfig.preset(options.preset, **changes)
    settings = {"max_iters": options.steps, "batch_size": options.batch_size, "device": options.device}
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / FILE
    asked = {"model": dataclasses.asdict(shape), "train": settings, "threads": options.threads}
    state = json.loads(file.read_text()) if file.exists() else {**asked, "machine": machine, "pairs": []}
    state["model"] = dataclasses.asdict(GPTConfig(**state["model"]))  # with the fields that came since
    if any(state[name] != value for name, value in asked.items()):
        raise ValueError(f"muon: {file} is of other settings; choose another --out")
    corpus = load_corpus(options.data, encoding("byte"), shape.block_size)

    def taken(seed: int, rates: Sequence[float]) -> dict:
        named = dict(zip(OPTIMIZERS, rates, strict=True))
        for each in state["pairs"]:
            if (each["seed"], each["rates"]) == (seed, named):
                return each
        curves = pair(shape, {**settings, "seed": seed}, rates, corpus, options.every)
        each = {"seed": seed, "rates": named, "curves": dict(zip(OPTIMIZERS, curves, strict=True))}
        state["pairs"].append(each)
        file.write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
        print(f"seed {seed}, {_ends(each)}", flush=True)
        return each

    tried = [taken(options.seeds[0], (rate, rate)) for rate in options.rates]
    rates = [best(tried, name) for name in OPTIMIZERS]
    kept = [taken(seed, rates) for seed in options.seeds]
    text = table(state, tried, kept)
    (options.out / "muon.md").write_text(text + "\n", encoding="utf-8")
    plot(kept, options.out / "muon.png")
    print(text)
    return 0


def _ends(each: dict) -> str:
    parts = (f"{LABELS[name]} at {each['rates'][name]:g}: {each['curves'][name][-1][2]:.4f}" for name in OPTIMIZERS)
    return ", ".join(parts)


def table(state: dict, tried: list[dict], kept: list[dict]) -> str:
    """What was run, the rates that were tried, and the loss by steps and by seconds."""
    rates = {name: kept[0]["rates"][name] for name in OPTIMIZERS}
    several = f"mean of {len(kept)} seeds" if len(kept) > 1 else "one seed"
    lines = [_conditions(state), "", "| learning rate | AdamW | Muon |", "|--:|--:|--:|"]
    for each in tried:
        ends = (f"{each['curves'][name][-1][2]:.4f}" for name in OPTIMIZERS)
        lines.append(f"| {each['rates']['adamw']:g} | {' | '.join(ends)} |")
    chosen = f"AdamW at {rates['adamw']:g}, Muon at {rates['muon']:g}"
    lines += ["", f"Validation loss in nats a token, {several} (lowest to highest), {chosen}:", ""]
    lines += ["| steps | AdamW | Muon | Muon's loss less AdamW's |", "|--:|--:|--:|--:|"]
    for index, (steps, _, _) in enumerate(kept[0]["curves"]["adamw"]):
        losses = {name: [each["curves"][name][index][2] for each in kept] for name in OPTIMIZERS}
        apart = [b - a for a, b in zip(losses["adamw"], losses["muon"], strict=True)]
        cells = [_spread(losses[name]) for name in OPTIMIZERS]
        lines.append(f"| {steps} | {cells[0]} | {cells[1]} | {_spread(apart, '+')} |")
    lines += ["", *_by_seconds(kept)]
    return "\n".join(lines)


def _conditions(state: dict) -> str:
    model, train, machine = state["model"], state["train"], state["machine"]
    shape = GPTConfig(**model)
    with torch.device("meta"):
        gpt = GPT(shape)
    blocks = sum(p.numel() for p in gpt.h.parameters())
    where = f"{machine['cpu']}, {state['threads']} thread{'s' * (state['threads'] > 1)}"
    where = where if machine["kind"] == "cpu" else machine["device"]
    return (
        f"{where}, PyTorch {machine['torch']}, commit {machine['commit']}: {blocks:,} parameters in {model['n_layer']} "
        f"blocks of {model['n_embd']} channels ({sum(p.numel() for p in gpt.parameters()):,} in all), "
        f"{train['max_iters']} steps of {train['batch_size']} x {model['block_size']} tokens, all other settings "
        "`fastgpt train`'s defaults.\nThe two optimizers' steps were taken in turns, from equal weights and on equal "
        "batches: their seconds have a ratio, and alone say nothing."
    )


def _spread(values: list[float], sign: str = "") -> str:
    mean = f"{statistics.mean(values):{sign}.4f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):{sign}.4f} to {max(values):{sign}.4f})"


def _by_seconds(kept: list[dict]) -> list[str]:
    """What a step of Muon's takes of AdamW's, and where AdamW was when Muon's time was up and the other way round."""
    ratios, steps, alike = [], [], []
    for each in kept:
        first, second = each["curves"]["adamw"], each["curves"]["muon"]
        ratios.append(second[-1][1] / first[-1][1])
        if (reached := reaches(second, first[-1][2], 0)) is not None:
            steps.append(reached / first[-1][0])
            alike.append((reaches(second, first[-1][2], 1) or 0.0) / first[-1][1])
    lines = [f"A step with Muon took {_spread(ratios)} times a step of AdamW's."]
    if len(alike) == len(kept):
        lines.append(
            f"Muon came to the loss that AdamW ended with after {_spread(steps)} of AdamW's steps, and {_spread(alike)}"
            " of its seconds."
        )
    else:
        lines.append(f"Muon came to the loss that AdamW ended with in {len(alike)} of {len(kept)} runs.")
    return lines


def reaches(curve: Sequence[Sequence[float]], loss: float, what: int) -> float | None:
    """The steps (what = 0) or seconds (1) at which a curve first is as low as `loss`, on straight lines between its
    points; None if it never is."""
    for before, after in itertools.pairwise(curve):
        if after[2] <= loss:
            share = (before[2] - loss) / (before[2] - after[2]) if before[2] > loss else 0.0
            return before[what] + share * (after[what] - before[what])
    return None


def plot(kept: list[dict], path: Path) -> None:
    """Loss over steps and over seconds, a line a seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for axis, what, label in zip(axes, (0, 1), ("steps", "seconds of its steps, taken in turns"), strict=True):
        for name, colour in (("adamw", "tab:blue"), ("muon", "tab:orange")):
            for number, each in enumerate(kept):
                curve = each["curves"][name][1:]
                text = f"{LABELS[name]}, {each['rates'][name]:g}" if number == 0 else None
                axis.plot([p[what] for p in curve], [p[2] for p in curve], color=colour, label=text, alpha=0.7)
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("validation loss, nats a token")
    axes[0].legend()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
