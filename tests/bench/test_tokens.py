"""The account of a token's launches: what a captured step does on a GPU, kernel by kernel."""

import sys
from collections import Counter

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not to be had on this platform")

from bench import tokens, work
from bench.__main__ import main
from bench.compiled_loop import CompiledLoop
from bench.gates import feign
from bench.launches.parts import Sizes
from bench.launches.record import recorded
from bench.machine import Machine
from fastgpt import generate
from fastgpt.generation import batch
from fastgpt.generation.decoder import Decoder
from fastgpt.generation.sampling import Sampling
from fastgpt.model import GPT, GPTConfig
from tests.generation.small_gpt import gpt

LAYERS = 2
CONFIG = GPTConfig(n_layer=LAYERS)


def kernels(way):
    """How many a step launches of each name."""
    found = Counter()
    for each in tokens.account(way, CONFIG):
        found[each.name] += each.kernels
    return found


def test_a_greedy_token_in_one_launch_is_three():
    """The others find the likeliest and write it down. Nothing is copied, gathered or counted beside them."""
    found = tokens.account(tokens.Way(1, tokens.GREEDY, True), CONFIG)
    assert [each.name for each in found] == ["token_kernel", "piece_kernel", "greedy_kernel"]
    weights = work.parameters(CONFIG) - CONFIG.block_size * CONFIG.n_embd
    assert 2 * weights < found[0].work.bytes < 2.04 * weights


def test_a_greedy_token_in_many_launches():
    """Six a layer; the embedding with its positions, the last norm, the head and the likeliest are the others."""
    expected = {"linear_kernel": 4 * LAYERS + 1, "decode_kernel": LAYERS}
    expected |= {"merge_kernel": LAYERS, "embedding_fwd_kernel": 1, "layer_norm_fwd_kernel": 1, "greedy_kernel": 1}
    expected |= {"piece_kernel": 1}
    assert kernels(tokens.Way(1, tokens.GREEDY)) == expected | {"sub": 1}


@pytest.mark.parametrize(
    ("sampling", "more"),
    [
        (Sampling(), 18),
        (Sampling(top_k=50), 1),
        (Sampling(top_k=100, top_p=0.9, min_p=0.1), 1),
        (Sampling(top_k=200), 35),
        (Sampling(top_p=0.9), 36),
        (Sampling(temperature=0, repetition_penalty=1.2), 16),
    ],
)
def test_what_sampling_launches_beside_a_greedy_token(sampling, more):
    """A launch more here is a few microseconds a token."""
    greedy, found = (sum(kernels(tokens.Way(1, each)).values()) for each in (tokens.GREEDY, sampling))
    assert found - greedy <= more


def test_a_later_call_launches_its_tokens_and_little_else(monkeypatch):
    """Of a model that is given itself: what is not in a graph, the third time. Nothing is captured, and no layer is
    launched one by one. A replay on this card launches nothing."""
    made, captured = [], batch.captured
    monkeypatch.setattr(batch, "captured", lambda *given: made.append(given) or captured(*given))
    counts = []
    with feign.card(90):
        with torch.device("cuda"):
            model = GPT(CONFIG).bfloat16().eval()
        for _ in range(4):
            with recorded(Sizes(1, 768, 3072, 50257)) as found:
                generate(model, [[1, 2, 3]], 24, temperature=0)
            counts.append(sum(each.kernels for each in found))
    assert len(made) == 2 and counts[2] == counts[3] < 16 < counts[1] < counts[0]


def test_a_later_call_of_a_model_costs_the_host_what_one_of_its_decoder_does():
    """Of as many calls of Python's functions, for each has its price: a look at each part of the model is few."""
    with feign.card(90), recorded(Sizes(1, 768, 3072, 50257)):
        with torch.device("cuda"):
            model = GPT(CONFIG).bfloat16().eval()
        counts = []
        for given in (model, Decoder(model, tokens=64)):
            for prompt in ([1, 2, 3], [1, 2, 3], [1, 2]):
                calls = Counter()
                sys.setprofile(lambda frame, event, arg, calls=calls: calls.update([event]))
                try:
                    generate(given, [prompt], 64, temperature=0)
                finally:
                    sys.setprofile(None)
            counts.append(calls["call"])
    assert counts[0] < 1.05 * counts[1]


def test_the_table(capsys):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokens, "WAYS", {name: tokens.WAYS[name] for name in list(tokens.WAYS)[:2]})
        patch.setattr(GPTConfig, "preset", lambda name: CONFIG)
        assert main(["tokens"]) == 0 and main(["tokens", "--row", "one launch"]) == 0
        assert main(["tokens", "--row", "nine"]) == 2
    shown = capsys.readouterr()
    assert "one sequence, greedy, in one launch         3" in shown.out and "token_kernel" in shown.out
    assert "no row's name holds 'nine'" in shown.err


def greedy_by_the_rival(compiler, **changes):
    """And by fastgpt: twice each, for a graph's first step differs from the next ones."""
    torch.manual_seed(0)
    model, ids = gpt(32, **changes), torch.tensor([[3, 1, 4], [7, 2, 9]])
    machine = Machine("cpu", "cpu", torch.float32, None, compiler, 0.0, (1, 1))
    loop = CompiledLoop(model, 2, 20, machine)
    for _ in range(2):
        assert loop.generate(ids, 12)[:, 3:].tolist() == generate(model, ids, 12, temperature=0).tokens


@pytest.mark.parametrize("changes", [{}, dict(tie=False, bias=False, gelu="none")])
def test_the_plain_loop_writes_fastgpts_tokens(changes):
    greedy_by_the_rival("eager", **changes)


@pytest.mark.slow
def test_the_plain_loop_compiled():
    greedy_by_the_rival("inductor")
