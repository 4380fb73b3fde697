"""The rows of the account: the ways to train of `python -m bench steps`, recorded on a card that isn't there."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from unittest import mock

import torch

from bench.baselines import Unavailable
from bench.families import BOOK as BOOK_ROW
from bench.gates import feign
from bench.launches.parts import Sizes
from bench.launches.record import Launch, step
from bench.machine import Machine
from bench.steps.entries import BASELINE, Entry, Problem, entries
from bench.work import Work
from fastgpt.model import GPT, GPTConfig

CAPABILITY = 90  # an H100's
HALF = f"{BASELINE}, bfloat16 weights"
FEW, MORE = 2, 3  # layers, from which it is told how many launches are a layer's, and how many a step's


@dataclasses.dataclass
class Line:
    """Calls that differ in nothing but when they are made."""

    phase: str
    part: str
    name: str
    tensors: str
    a_layer: int  # calls of a layer
    a_step: int  # and those that there are once, whatever the layers
    launches: int  # kernels, of the whole step
    flops: float  # of the whole step, as the bytes
    bytes: float

    @property
    def calls(self) -> tuple[str, str, str, str]:
        return self.phase, self.part, self.name, self.tensors

    @property
    def work(self) -> Work:
        return Work(self.flops, self.bytes)

    def floor(self, rates: tuple[float, float]) -> float:
        """Seconds: launches do not overlap, and those of a line are alike."""
        return self.work.floor(*rates)


def names() -> list[str]:
    """Of all rows; what torch.compile or a CUDA graph launches is not seen operator by operator."""
    found = [BASELINE, HALF]
    return found + [entry.what for entry in entries(GPTConfig()) if _is_eager(entry) and entry.what != BASELINE]


def _is_eager(entry: Entry) -> bool:
    return "compiled" not in entry.what and "graph" not in entry.what


def account(name: str, config: GPTConfig, batch: int) -> list[Line]:
    """What one step of the row launches; of rows of config.block_size tokens. Unavailable where its package is not
    there."""
    whole, few, more = (
        calls(name, dataclasses.replace(config, n_layer=layers), batch) for layers in (config.n_layer, FEW, MORE)
    )
    counts = {number: Counter(map(key, found)) for number, found in ((FEW, few), (MORE, more))}
    lines: dict[tuple, Line] = {}
    for launch in whole:
        own = key(launch)
        line = lines.get(own)
        if line is None:
            a_layer = counts[MORE][own] - counts[FEW][own]
            line = lines[own] = Line(*own, a_layer, counts[FEW][own] - FEW * a_layer, 0, 0.0, 0.0)
        line.launches += launch.kernels
        line.flops += launch.work.flops
        line.bytes += launch.work.bytes
    for own, number in Counter(map(key, whole)).items():
        line = lines[own]
        if number != line.a_step + config.n_layer * line.a_layer:
            raise AssertionError(f"{name}: {number} calls of {own}, not {line.a_step} and {line.a_layer} a layer")
    return list(lines.values())


def key(launch: Launch) -> tuple[str, str, str, str]:
    """Calls that share it make one line."""
    return launch.phase, launch.part, launch.name, launch.tensors


def calls(name: str, config: GPTConfig, batch: int) -> list[Launch]:
    """The launches of one step of the row, in order."""
    entry = next(each for each in entries(config) if each.what == (BASELINE if name == HALF else name))
    if entry.what.startswith(BOOK_ROW):
        _find_the_book()
    machine = Machine("cuda", "cuda", torch.bfloat16, None, "inductor", 0.0, (1, 1))
    with feign.card(CAPABILITY), mock.patch.multiple(torch.Tensor, **_UNDRAWN):
        with torch.device("cuda"):
            model = GPT(config)
        idx = torch.zeros(batch, config.block_size, dtype=torch.int64, device="cuda")
        half = name == HALF
        problem = Problem(
            model.bfloat16() if half else model, idx, torch.zeros_like(idx), None if half else torch.bfloat16
        )
        run = entry.build(problem, machine)
        hidden = config.n_inner or 4 * config.n_embd
        return step(run, Sizes(idx.numel(), config.n_embd, hidden, entry.vocabulary))


# What a model's author draws its weights with: it takes seconds, and nobody looks at them.
_UNDRAWN: dict[str, Callable] = dict.fromkeys(("normal_", "uniform_"), lambda tensor, *_, **__: tensor.zero_())


def _find_the_book() -> None:
    from tests.models import BOOK, ROOT, book_package

    if find_spec("llms_from_scratch") is None and not (ROOT / ".pytest_cache" / BOOK).is_dir():
        raise Unavailable("llms-from-scratch is not installed (pip install --no-deps llms-from-scratch)")
    book_package("ch04")


def accounts(wanted: list[str], config: GPTConfig, batch: int) -> Iterator[tuple[str, list[Line] | str]]:
    """Each row's lines, or why there are none."""
    for name in wanted:
        try:
            yield name, account(name, config, batch)
        except Unavailable as reason:
            yield name, str(reason)
