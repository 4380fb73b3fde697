"""How the fallback's attention in a window grows with the length of a row, on a CPU: time and memory of a forward and a
backward, at each length as a multiple of those at half of it. Linear is 2, quadratic 4.

All lengths are taken in turns, and what counts is the process's own seconds on all processors, so that a neighbour
changes little; the ratio is of the medians. Only ratios are told: they hold on a busy machine.
"""

import argparse
import itertools
import statistics
from collections.abc import Callable
from time import process_time

import torch

from bench.timing import HostClock
from fastgpt import ops

LENGTHS = (2048, 4096, 8192, 16384)
HEADS, HEAD_DIM = 4, 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--window", type=int, default=256, help="keys that a query sees (default: 256)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each length (default: 5)")


def main(options: argparse.Namespace) -> int:
    if options.rounds < 1:
        raise ValueError(f"--rounds is {options.rounds}, not at least 1")
    print("\n".join(table(options.window, options.rounds, LENGTHS)))
    return 0


def table(window: int, rounds: int, lengths: tuple[int, ...]) -> list[str]:
    """Markdown's lines; lengths: each twice the one before."""
    clock = HostClock()
    kinds = {"a window": window, "no window": None}
    calls = {(kind, time): _call(time, size) for kind, size in kinds.items() for time in lengths}
    memory = {name: clock.peak_bytes(call) for name, call in calls.items()}
    seconds: dict[tuple[str, int], list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = process_time()
            call()
            seconds[name].append(process_time() - start)
    lines = [
        f"Attention of {HEADS} heads of {HEAD_DIM} in float32, forward and backward, a window of {window}, "
        f"{torch.get_num_threads()} threads, PyTorch {torch.__version__}; medians of {rounds} turns",
        "",
        "| tokens | time in a window / at half | without | memory in a window / at half | without |",
        "|--:|--:|--:|--:|--:|",
    ]
    for half, time in itertools.pairwise(lengths):
        ratios = []
        for of in ({name: statistics.median(each) for name, each in seconds.items()}, memory):
            ratios += [f"{of[kind, time] / of[kind, half]:.2f}" for kind in kinds]
        lines.append(f"| {time} | {' | '.join(ratios)} |")
    last = lengths[-1]
    fewer = statistics.median(seconds["no window", last]) / statistics.median(seconds["a window", last])
    return [*lines, "", f"At {last} tokens attention without a window takes {fewer:.1f} times as long."]


def _call(time: int, window: int | None) -> Callable[[], object]:
    tensors = [torch.randn(1, HEADS, time, HEAD_DIM).requires_grad_() for _ in range(3)]

    def call() -> object:
        y = ops.causal_attention(*tensors, window=window, backend="torch")
        return torch.autograd.grad(y, tensors, torch.ones_like(y))

    return call
