"""Every launch of one token with its bytes, flops and floor, for each way that generation has, with no GPU.

A step runs on a card that isn't there (bench.gates.feign), as the second token of a call would: what a CUDA graph of it
replays. `floor` is what the bytes take at the memory's rate, or the flops; launches do not overlap. What is beside the
launches, a copy of four tokens to the host for every four and the start of a graph for each, is not counted.
"""

import argparse
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch

from bench import work
from bench.gates import feign
from bench.launches import predict, show
from bench.launches.parts import Sizes
from bench.launches.record import Launch, recorded
from bench.launches.rows import _UNDRAWN, CAPABILITY
from fastgpt.generation.batch import Batch, plan
from fastgpt.generation.decoder import Decoder
from fastgpt.generation.sampling import Sampling
from fastgpt.model import GPT, GPTConfig
from fastgpt.ops import token

ROOM = 320  # tokens of a row: 32 and 256, as a captured batch rounds them up
GREEDY = Sampling(temperature=0)


class Way(NamedTuple):
    rows: int
    sampling: Sampling
    one_launch: bool = False


WAYS = {
    "one sequence, greedy, in one launch": Way(1, GREEDY, True),
    "one sequence, greedy": Way(1, GREEDY),
    "one sequence, top_k 50": Way(1, Sampling(top_k=50)),
    "one sequence, top_p 0.9": Way(1, Sampling(top_p=0.9)),
    "one sequence, temperature 0.8": Way(1, Sampling(temperature=0.8)),
    "8 sequences, greedy": Way(8, GREEDY),
    "64 sequences, greedy": Way(64, GREEDY),
    "64 sequences, top_k 50": Way(64, Sampling(top_k=50)),
}


def account(way: Way, config: GPTConfig) -> list[Launch]:
    """The launches of a step, in order."""
    ran = token.TRITONS if way.one_launch else ()
    with feign.card(CAPABILITY), mock.patch.multiple(torch.Tensor, **_UNDRAWN), mock.patch.object(token, "RAN", ran):
        with torch.device("cuda"):
            model = GPT(config).bfloat16().eval()
        decoder = Decoder(model)
        if way.one_launch != (decoder.one_launch == ""):
            raise ValueError(f"tokens of this model take many launches: {decoder.one_launch}")
        batch = Batch(decoder, plan(decoder, 32, way.rows, ROOM - 32, way.sampling))
        batch.begin(decoder, [[0] * 32] * way.rows)
        with recorded(Sizes(way.rows, config.n_embd, config.n_inner or 4 * config.n_embd, config.vocab_size)) as found:
            batch._draw_clocks(0)
            batch._step()
    return [_whole(launch, config) if launch.name == "token_kernel" else launch for launch in found]


def _whole(launch: Launch, config: GPTConfig) -> Launch:
    """A whole token's kernel, which finds its tensors by a table: each weight once, and the cache."""
    two, one = (work.generation(config, 1, ROOM - 1, new, 2) for new in (2, 1))
    return launch._replace(work=work.Work(two.flops - one.flops, two.bytes - one.bytes))


def summary(accounts: dict[str, list[Launch]], rates: tuple[float, float]) -> Iterator[list[str]]:
    yield ["a token of", "launches", "of them PyTorch's", "MB", "GFLOP", "floor µs"]
    for name, found in accounts.items():
        moved, flops = sum(each.work.bytes for each in found), sum(each.work.flops for each in found)
        theirs = sum(each.kernels for each in found if not each.name.endswith("_kernel"))
        floor = sum(each.work.floor(*rates) for each in found)
        counts = f"{sum(each.kernels for each in found)}", f"{theirs}"
        yield [name, *counts, f"{moved / 1e6:.1f}", f"{flops / 1e9:.2f}", f"{1e6 * floor:.1f}"]


def launches(found: list[Launch], rates: tuple[float, float]) -> Iterator[list[str]]:
    """Each kind, the largest floor first."""
    yield ["launches", "MB", "floor µs", "name", "tensors"]
    kinds: dict[Any, list[Launch]] = {}
    for each in found:
        kinds.setdefault((each.name, each.tensors), []).append(each)
    floors = Counter({kind: sum(each.work.floor(*rates) for each in same) for kind, same in kinds.items()})
    for kind, floor in floors.most_common():
        same = kinds[kind]
        moved = sum(each.work.bytes for each in same) / 1e6
        yield [f"{sum(each.kernels for each in same)}", f"{moved:.2f}", f"{1e6 * floor:.2f}", kind[0], kind[1]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--row", metavar="WORDS", help="the whole list of the rows whose names hold WORDS")


def main(options: argparse.Namespace) -> int:
    wanted = [name for name in WAYS if options.row is None or options.row in name]
    if not wanted:
        raise ValueError(f"no row's name holds {options.row!r}; there are: {'; '.join(WAYS)}")
    found = {name: account(WAYS[name], GPTConfig.preset("gpt2-124M")) for name in wanted}
    for name, each in found.items() if options.row is not None else ():
        print(f"{name}\n{show.aligned(launches(each, predict.RATES), 0, 2)}\n")
    rates = f"{predict.RATES[0] / 1e12:.0f} TFLOP/s and {predict.RATES[1] / 1e12:.1f} TB/s, an H100's"
    print(f"GPT-2 124M in bfloat16, rows of {ROOM} tokens; floors at {rates}\n")
    print(show.aligned(summary(found, predict.RATES)))
    return 0
