"""What the trainer's loop adds to a bare step: data, learning rate, checks, logging; and when its first step is done.

The loop's steps and bare ones, of two equal models on batches of one shape and as one CUDA graph both or neither, are
taken in turns, so that a neighbour falls on both; the ratio is of the medians of the pairs. On a GPU most of what the
loop adds is hidden behind what the card has to do: the host's own time is measured with a step that does nothing.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch

from bench import first_step
from fastgpt import GPT, GPTConfig
from fastgpt.data import load_corpus
from fastgpt.data.tokenizer import encoding
from fastgpt.training.distributed import join
from fastgpt.training.optimizer import TrainingStep, adamw
from fastgpt.training.run import Run
from fastgpt.training.settings import TrainConfig, autocast_dtype
from fastgpt.training.signals import Signals


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", default="byte-0.8M")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=60, help="pairs of steps")
    parser.add_argument("--device", default="auto")


def main(options: argparse.Namespace) -> int:
    found = measure(options.preset, options.batch_size, options.steps, options.device)
    ratio = statistics.median(a / b for a, b in zip(found.loop, found.bare, strict=True))
    loop, bare, host, launched = (1e3 * statistics.median(each) for each in found)
    print(
        f"{options.preset}, batch {options.batch_size}, {torch.get_num_threads()} threads, torch {torch.__version__}: "
        f"{loop:.2f} ms in the loop, {bare:.2f} ms bare, {100 * (ratio - 1):+.2f}% (median of {options.steps} pairs)"
    )
    print(f"the host's work a step, beside the step's own: {host:.3f} ms, {100 * host / bare:.2f}% of a bare step")
    if launched < 0.9 * loop:  # on a CPU the step's own work is the host's
        print(f"a step in the loop is launched within {launched:.2f} ms")
    parts = first_step.parts(options.preset, options.batch_size, options.device)
    each = ", ".join(f"{name} {seconds:.1f}" for name, seconds in parts.items())
    print(f"the first step is done {sum(parts.values()):.1f} s after the command, its kernels compiled before: {each}")
    return 0


class Seconds(NamedTuple):
    """Of each step."""

    loop: list[float]
    bare: list[float]
    host: list[float]  # of the loop with a step that does nothing
    launched: list[float]  # until the host is done with one in the loop, whatever the card still does


class _NoStep:
    """In place of a run's step: nothing is computed."""

    def __init__(self, step):
        self.own, self.scaler, self.result = step.own, step.scaler, (torch.ones_like(step.own),) * 2

    def __call__(self, idx, targets):
        return self.result


def measure(preset: str, batch_size: int, steps: int, device: str) -> Seconds:
    """What `steps` pairs of steps took."""
    shape = GPTConfig.preset(preset)
    tokens = encoding("byte")  # whatever the vocabulary: it needs no file
    config = TrainConfig(batch_size=batch_size, device=device, max_iters=10**6)
    with tempfile.TemporaryDirectory() as folder:
        world = join(device)
        run = Run(GPT(shape).to(world.device), config, tokens, _corpus(tokens, shape), Path(folder), world, Signals())
        assert run.monitor is not None
        run.monitor.start(0, config.max_iters)
        model = GPT(shape).to(world.device)
        autocast, graph = autocast_dtype(config, world.device), run.step_on.graph
        bare = TrainingStep(model, adamw(model, 1e-3, graph=graph), autocast=autocast, graph=graph)
        idx, targets = run.batches(0)
        unread: list = []

        def looped():
            unread.append(run.step())
            stop = world.agree(run.signals.got)
            if stop or run.steps_done % config.log_interval == 0:
                losses, norm = run.read(unread)
                run.monitor.stepped(run.steps_done, len(losses), losses[-1], norm, 1e-3, 1.0)

        def timed(call) -> tuple[float, float]:
            """Until it has returned, and until the device is done."""
            start = time.perf_counter()
            call()
            returned = time.perf_counter() - start
            if world.device.type == "cuda":
                torch.cuda.synchronize()
            return returned, time.perf_counter() - start

        # the first ones compile, and the third is captured where there is a graph
        pairs = [(timed(looped), timed(lambda: bare(idx[0], targets[0]))) for _ in range(steps + 3)][3:]
        run.step_on = _NoStep(run.step_on)
        host = [timed(looped)[1] for _ in range(steps + 3)][3:]
        run.monitor.close()
    return Seconds([a for (_, a), _ in pairs], [b for _, (_, b) in pairs], host, [a for (a, _), _ in pairs])


def _corpus(tokens, shape: GPTConfig):
    """Text enough to draw windows from."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "text.txt")
        path.write_text("the quick brown fox jumps over the lazy dog. " * (shape.block_size * 10))
        return load_corpus(path, tokens, shape.block_size)
