"""What matmuls of 8-bit floats cost in loss: a small GPT trained in bfloat16 and with each fp8 mode, over many seeds.

A pair is two runs of `fastgpt train`'s of equal weights, batches and learning rates, which differ in the mode alone;
every run is evaluated as bfloat16, for that is what its weights are used in. Told is the mean over seeds of a mode's
loss less bfloat16's, with its standard error. Where no hardware multiplies 8-bit floats the same numbers are simulated.
What is done stays in --out: the same command goes on from there, and with more --seeds adds to it.
"""

import argparse
import dataclasses
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from bench.machine import Machine, header
from fastgpt import GPT, GPTConfig, ops
from fastgpt.data import Corpus, load_corpus
from fastgpt.data.tokenizer import encoding
from fastgpt.training.distributed import join
from fastgpt.training.run import Run
from fastgpt.training.settings import TrainConfig
from fastgpt.training.signals import Signals

FILE, TABLE = "fp8-loss.json", "fp8-loss.md"
PLAIN, MODES = "none", ("head", "forward", "all")
# A mode that docs may recommend: nats a token that it loses at most, the standard error of that, and seeds at least.
LOSES, ERROR, SEEDS = 0.002, 0.001, 8


def trained(shape: GPTConfig, settings: dict[str, Any], corpus: Corpus) -> tuple[float, float]:
    """The validation loss at the end of one run, and the seconds it took."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, Signals() as signals:
        config = TrainConfig(**settings)
        torch.manual_seed(config.seed)
        world = join(config.device)
        run = Run(GPT(shape).to(world.device), config, encoding("byte"), corpus, Path(folder), world, signals)
        for _ in range(config.max_iters):
            loss, _, _ = run.step()
        if not loss.isfinite():
            raise ValueError(f"fp8-loss: {shape.fp8} with seed {config.seed} ended at a loss of {loss.item()}")
        found = run.evaluate()
        run.close()
    return found, time.perf_counter() - start


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--n_layer", type=int, default=5, help="of 128 channels (default: 5, of a million parameters)")
    parser.add_argument("--batch_size", type=int, default=16, help="windows of 128 bytes")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=SEEDS, help="1, 2, … so many")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no run after that")
    parser.add_argument("--out", type=Path, required=True, help=f"a folder: {FILE} and {TABLE} go there")
    parser.add_argument("--dry-run", action="store_true", help="tiny: what it writes is of no worth")


def main(options: argparse.Namespace) -> int:
    """0 once every pair is there, 1 where time ran out before."""
    if options.seeds < 1 or options.steps < 1:
        raise ValueError(f"fp8-loss: {options.seeds} seeds and {options.steps} steps, not at least 1 of each")
    end = time.monotonic() + options.seconds
    torch.set_num_threads(options.threads)
    small = dict(n_layer=1, n_embd=32, n_head=2, block_size=16) if options.dry_run else dict(n_layer=options.n_layer)
    shape = GPTConfig.preset("byte-0.8M", **small)
    settings = {"max_iters": options.steps, "batch_size": options.batch_size, "device": options.device}
    settings |= {"dtype": "bfloat16", "eval_iters": 2 if options.dry_run else 100, "sample_tokens": 0}
    obstacle = ops.fp8_obstacle(join(options.device).device)
    state = _state(options, shape, settings, obstacle)
    corpus = load_corpus(None, encoding("byte"), shape.block_size)
    wanted = [(seed, mode) for seed in range(1, options.seeds + 1) for mode in (PLAIN, *options.modes)]
    done = {(each["seed"], each["mode"]) for each in state["runs"]}
    for seed, mode in wanted:
        if (seed, mode) in done:
            continue
        if time.monotonic() > end:
            print("no time left; the same command goes on from here", flush=True)
            break
        of_it = dataclasses.replace(shape, fp8=mode, fp8_simulate=mode != PLAIN and obstacle is not None)
        loss, seconds = trained(of_it, {**settings, "seed": seed}, corpus)
        state["runs"].append({"seed": seed, "mode": mode, "loss": loss, "seconds": seconds})
        done.add((seed, mode))
        (options.out / FILE).write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
        print(f"seed {seed}, {mode}: {loss:.5f} ({seconds:.0f} s)", flush=True)
    text = "\n".join(table(state))
    (options.out / TABLE).write_text(text + "\n", encoding="utf-8")
    print(f"\n{text}")
    return int(not done.issuperset(wanted))


def _state(options: argparse.Namespace, shape: GPTConfig, settings: dict, obstacle: str | None) -> dict:
    """What an earlier start left in --out, which must be of the same settings and the same kind of numbers."""
    options.out.mkdir(parents=True, exist_ok=True)
    machine = header(Machine.of(None if options.device == "auto" else options.device))
    asked = {"model": dataclasses.asdict(shape), "train": settings, "simulated": obstacle}
    file = options.out / FILE
    if not file.exists():
        return {**asked, "machine": machine, "runs": []}
    state = json.loads(file.read_text(encoding="utf-8"))
    state["model"] = dataclasses.asdict(GPTConfig(**state["model"]))  # with the fields that came since
    for name, value in asked.items():
        if state[name] != value:
            raise ValueError(f"fp8-loss: {file} has {name} = {state[name]}, not {value}; choose another --out")
    for name in ("device", "torch", "commit"):
        if state["machine"][name] != machine[name]:
            raise ValueError(f"fp8-loss: {file} is of {name} {state['machine'][name]}, this is {machine[name]}")
    return state


def differences(runs: list[dict], mode: str) -> list[float]:
    """A mode's loss less bfloat16's, for each seed that has both."""
    of = {(each["seed"], each["mode"]): each["loss"] for each in runs}
    return [of[seed, mode] - of[seed, PLAIN] for seed, other in sorted(of) if other == mode and (seed, PLAIN) in of]


def verdict(apart: list[float]) -> str:
    """What may be said of a mode with these differences."""
    if len(apart) < SEEDS:
        return f"not decided: {len(apart)} seeds are fewer than {SEEDS}"
    mean, error = statistics.mean(apart), statistics.stdev(apart) / len(apart) ** 0.5
    if error > ERROR:
        return f"not decided: the error is above {ERROR}"
    return f"loses at most {LOSES}" if mean <= LOSES else f"loses more than {LOSES}"


def table(state: dict) -> list[str]:
    """Markdown's lines."""
    runs, train, machine = state["runs"], state["train"], state["machine"]
    shape = GPTConfig(**state["model"])
    with torch.device("meta"):
        gpt = GPT(shape)
    blocks = sum(parameter.numel() for parameter in gpt.h.parameters())
    where = machine["cpu"] if machine["kind"] == "cpu" else machine["device"]
    how = "multiplied by the hardware" if state["simulated"] is None else "simulated in float32"
    lines = [
        f"{where}, PyTorch {machine['torch']}, commit {machine['commit']}: {blocks:,} parameters in {shape.n_layer} "
        f"blocks of {shape.n_embd} channels, {train['max_iters']} steps of {train['batch_size']} x {shape.block_size} "
        f"bytes of the built-in corpus, all other settings `fastgpt train`'s defaults in bfloat16; 8-bit floats are "
        f"{how}.",
        "",
        "| mode | seeds | validation loss | less bfloat16's | standard error | |",
        "|---|--:|--:|--:|--:|---|",
    ]
    plain = [each["loss"] for each in runs if each["mode"] == PLAIN]
    lines.append(f"| bfloat16 | {len(plain)} | {_mean(plain)} | | | |")
    for mode in MODES:
        apart = differences(runs, mode)
        if not apart:
            continue
        own = [each["loss"] for each in runs if each["mode"] == mode]
        error = f"{statistics.stdev(apart) / len(apart) ** 0.5:.5f}" if len(apart) > 1 else ""
        mean = f"{statistics.mean(apart):+.5f}"
        lines.append(f"| fp8 {mode} | {len(apart)} | {_mean(own)} | {mean} | {error} | {verdict(apart)} |")
    return lines


def _mean(losses: list[float]) -> str:
    return f"{statistics.mean(losses):.4f}" if losses else ""
