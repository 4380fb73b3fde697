"""What the trainer's loop adds to a bare step: data, learning rate, checks, logging.

The loop's steps and bare ones, of two equal models on batches of one shape, are taken in turns, so that a neighbour
falls on both; the ratio is of the medians of the pairs.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from fastgpt import GPT, GPTConfig
from fastgpt.data import load_corpus
from fastgpt.data.tokenizer import encoding
from fastgpt.training.distributed import join
from fastgpt.training.optimizer import TrainingStep, adamw
from fastgpt.training.run import Run, autocast_dtype
from fastgpt.training.settings import TrainConfig
from fastgpt.training.signals import Signals


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", default="byte-0.8M")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=60, help="pairs of steps")
    parser.add_argument("--device", default="auto")


def main(options: argparse.Namespace) -> int:
    loop, bare = measure(options.preset, options.batch_size, options.steps, options.device)
    ratio = statistics.median(a / b for a, b in zip(loop, bare, strict=True))
    print(
        f"{options.preset}, batch {options.batch_size}, {torch.get_num_threads()} threads, torch {torch.__version__}: "
        f"{1e3 * statistics.median(loop):.2f} ms in the loop, {1e3 * statistics.median(bare):.2f} ms bare, "
        f"{100 * (ratio - 1):+.2f}% (median of {options.steps} pairs)"
    )
    return 0


def measure(preset: str, batch_size: int, steps: int, device: str) -> tuple[list[float], list[float]]:
    """Seconds of each step in the loop, and of each bare one."""
    shape = GPTConfig.preset(preset)
    tokens = encoding("byte" if preset.startswith("byte") else "gpt2")
    config = TrainConfig(batch_size=batch_size, device=device, max_iters=10**6)
    with tempfile.TemporaryDirectory() as folder:
        world = join(device)
        run = Run(GPT(shape).to(world.device), config, tokens, _corpus(tokens, shape), Path(folder), world, Signals())
        assert run.monitor is not None
        run.monitor.start(0, config.max_iters)
        model = GPT(shape).to(world.device)
        bare = TrainingStep(model, adamw(model, 1e-3), autocast=autocast_dtype(config, world.device))
        idx, targets = run.batches(0)
        unread: list = []

        def looped():
            unread.append(run.step())
            stop = world.agree(run.signals.got)
            if stop or run.steps_done % config.log_interval == 0:
                losses, norm = run.read(unread)
                run.monitor.stepped(run.steps_done, len(losses), losses[-1], norm, 1e-3, 1.0)

        def timed(call) -> float:
            start = time.perf_counter()
            call()
            if world.device.type == "cuda":
                torch.cuda.synchronize()
            return time.perf_counter() - start

        found = [(timed(looped), timed(lambda: bare(idx[0], targets[0]))) for _ in range(steps + 3)][3:]
        run.monitor.close()
    return [a for a, _ in found], [b for _, b in found]


def _corpus(tokens, shape: GPTConfig):
    """Text enough to draw windows from."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "text.txt")
        path.write_text("the quick brown fox jumps over the lazy dog. " * (shape.block_size * 10))
        return load_corpus(path, tokens, shape.block_size)
