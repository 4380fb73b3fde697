"""Whole training steps as people run them: nanoGPT's and Hugging Face's model eager, compiled and accelerated, the
book's, and fastgpt's own GPT through its TrainingStep, plain and as one CUDA graph.

Float32 weights, autocast, a fused AdamW, gradients clipped, no dropout, random tokens: what `fastgpt train` does, and
what nanoGPT's train.py and Hugging Face's Trainer do with bf16. A row is timed in turns with fastgpt's step, so a clock
that drifts falls on both and its ratio is of the same minute; a few steps are queued a turn, as a training loop queues
them. Before that its first losses and the norm of its gradients are held to a plain reference at the same weights: a
row that computes something else is WRONG and has no time. Each row is written as soon as it is there.
"""

import argparse
import dataclasses
import math
import time
from pathlib import Path

import torch

from bench.machine import Machine, header
from bench.measure import device_is_lost
from bench.steps.entries import BASELINE, CLIP, LEARNING_RATE
from bench.steps.rows import FILE, StepRow, Steps
from bench.steps.run import DEFAULTS, Bench, Sizes
from fastgpt.model import PRESETS

DEVICE_LOST = 3  # the exit status after which --resume goes on in a new process


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", choices=PRESETS, help="default: gpt2-124M on a GPU, byte-0.1M on a CPU")
    parser.add_argument("--layers", type=int, help="instead of the preset's")
    parser.add_argument("--batch", type=int, help="rows of a step; default: 32 on a GPU, 4 on a CPU")
    parser.add_argument("--time", type=int, help="tokens of a row; default: 1024 on a GPU, 64 on a CPU")
    parser.add_argument("--steps", type=int, help="timed steps of a row; default: 20 on a GPU, 6 on a CPU")
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="of autocast; auto: bfloat16 on a GPU, float32 (no autocast) on a CPU, as fastgpt train",
    )
    parser.add_argument("--nanogpt", type=Path, metavar="DIR", help="nanoGPT's checkout, for its own model.py")
    parser.add_argument("--only", action="append", default=[], metavar="WORDS", help="rows whose names hold WORDS")
    parser.add_argument("--compiled", action="store_true", help="on a CPU too, whole models by torch.compile")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no row after that")
    parser.add_argument("--resume", action="store_true", help="keep the rows that are in that folder already")
    parser.add_argument("--out", type=Path, default=Path("out/steps"), help="default: out/steps")
    parser.add_argument("--dry-run", action="store_true", help="tiny, in Triton's interpreter, with a fake clock")


def main(options: argparse.Namespace) -> int:
    """0 if no row with fastgpt in it failed or was wrong and none is missing; 3 if the device was lost."""
    end = time.monotonic() + options.seconds
    machine = Machine.of("dry" if options.dry_run else None)
    machine = dataclasses.replace(machine, nanogpt=options.nanogpt, compiles_models=options.compiled)
    sizes = _sizes(options, machine)
    autocast = _autocast(options.dtype, machine)
    facts = header(dataclasses.replace(machine, dtype=autocast or torch.float32)) | _versions()
    settings = _settings(options, machine, sizes, autocast)
    steps = Steps(facts, settings, _kept(options, facts, settings))
    bench = Bench(machine, sizes, autocast, options.out, steps)
    stopped = {row.what for row in steps.rows if not row.ended}
    done = {row.what for row in steps.rows} - stopped
    wanted = [entry for entry in bench.entries if not options.only or any(w in entry.what for w in options.only)]
    missing = [entry for entry in wanted if entry.what not in done]
    if not missing and not steps.rows:
        raise ValueError(f"steps: no row's name holds {' or '.join(options.only)}")
    if missing and BASELINE not in done and missing[0].what != BASELINE:
        missing.insert(0, bench.entries[0])  # what the others are compared with
    missing.sort(key=lambda entry: entry.what in stopped)  # what did not end before comes last
    print(steps.conditions(), flush=True)
    steps.write(options.out)
    try:
        bench.run(missing, end)
    except RuntimeError as error:
        if not device_is_lost(error):
            raise
        print(f"the device is lost; --resume goes on after this row: {error}", flush=True)
        return DEVICE_LOST
    print("", steps.table(), "", f"written: {options.out / FILE}", sep="\n")
    there = {row.what: row for row in steps.rows}
    bad = [row for row in steps.rows if row.ours and row.status in ("FAILED", "WRONG")]
    return int(bool(bad) or any(entry.what not in there for entry in wanted))


def _sizes(options: argparse.Namespace, machine: Machine) -> Sizes:
    sizes = DEFAULTS[machine.kind]
    shape = dict(PRESETS[options.preset]) if options.preset else dict(sizes.shape)
    shape.setdefault("vocab_size", 50257)
    if options.layers is not None:
        shape["n_layer"] = options.layers
    given = {name: getattr(options, name) for name in ("batch", "time", "steps")}
    for name, value in {**given, "layers": options.layers}.items():
        if value is not None and value < 1:
            raise ValueError(f"steps: {name} is {value}, not at least 1")
    return sizes._replace(shape=shape, **{name: value for name, value in given.items() if value is not None})


def _autocast(dtype: str, machine: Machine) -> torch.dtype | None:
    if dtype == "auto":
        return torch.bfloat16 if machine.kind == "cuda" else None
    return None if dtype == "float32" else getattr(torch, dtype)


def _settings(
    options: argparse.Namespace, machine: Machine, sizes: Sizes, autocast: torch.dtype | None
) -> dict[str, object]:
    shape = sizes.shape
    preset = next((name for name, fields in PRESETS.items() if {"vocab_size": 50257, **fields} == shape), None)
    layers = f"{shape['n_layer']} layers of {shape['n_embd']}, vocabulary {shape['vocab_size']}"
    turns = max(2, sizes.steps // sizes.burst)
    theirs = "its own model.py" if options.nanogpt else "a model of its form, written for fastgpt's tests"
    return {
        "model": preset or layers,
        "shape": shape,
        "batch": sizes.batch,
        "time": sizes.time,
        "weights": "float32",
        "autocast": None if autocast is None else str(autocast).removeprefix("torch."),
        "clip": CLIP,
        "learning_rate": LEARNING_RATE,
        "turns": turns,
        "steps_a_turn": sizes.burst,
        "nanogpt": theirs,
        "how": (
            f"Medians of {turns} turns of {sizes.burst} steps, each row in turns with fastgpt's step, and the last "
            f"column is of the same turns; first losses and gradients held to a plain reference. nanoGPT is {theirs}, "
            f"with a padded vocabulary as its train.py has it."
        ),
    }


def _versions() -> dict[str, str | None]:
    found = {}
    for package in ("transformers", "llms_from_scratch"):
        try:
            found[package] = __import__(package).__version__
        except (ModuleNotFoundError, AttributeError):
            found[package] = None
    return found


def _kept(options: argparse.Namespace, facts: dict, settings: dict) -> list[StepRow]:
    """The rows of an earlier start of the same measurement."""
    file = options.out / FILE
    if not options.resume or not file.exists():
        return []
    before = Steps.load(file)
    for name in ("device", "commit", "torch", "triton"):
        if before.machine[name] != facts[name]:
            raise ValueError(f"steps: {file} is of {name} {before.machine[name]}, this is {facts[name]}")
    for name, value in settings.items():
        if name != "how" and before.settings.get(name) != value:
            raise ValueError(f"steps: {file} has {name} = {before.settings.get(name)}, not {value}")
    return before.rows
