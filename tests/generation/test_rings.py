"""Models with windows are decoded from rings, and give the tokens that their own forward gives without a cache."""

import pytest
import torch

from fastgpt import generate
from fastgpt.generation import stream
from fastgpt.generation.cache import MAX_STEP, Cache
from fastgpt.generation.decoder import Decoder
from tests.generation.small_gpt import VOCABULARY, gpt
from tests.generation.test_generation import likeliest

CONTEXT = 96


def windowed(window, pattern="SL", layers=3, **changes):
    """A ring is of window + 15 slots."""
    return gpt(CONTEXT, n_layer=layers, window=window, window_pattern=pattern, **changes)


def prompts(*lengths):
    return [torch.arange(n).mul(7).add(n).remainder(VOCABULARY).tolist() for n in lengths]


def is_its_own(model, given, together):
    for prompt, tokens in zip(given, together, strict=True):
        assert likeliest(model, (prompt + tokens)[:-1])[len(prompt) - 1 :] == tokens and len(set(tokens)) > 3


@pytest.mark.parametrize("lengths", [(3, 17, 1, 40, 52), (40, 40), (1,)], ids=str)
@pytest.mark.parametrize("window", [1, 5, 16, 90])
def test_greedy_tokens_are_those_of_the_models_own_forward(window, lengths):
    """Prompts shorter and longer than a ring, of one length and of several; 90 leaves no ring."""
    model, given = windowed(window), prompts(*lengths)
    together = generate(model, given, CONTEXT - max(lengths) + 1, temperature=0).tokens
    is_its_own(model, given, together)
    assert generate(model, given[:1], 20, temperature=0).tokens[0] == together[0][:20]
    assert [step.tokens[0][0] for step in stream(model, given[:1], 20, temperature=0)] == together[0][:20]


def test_the_window_counts():
    model, given = windowed(5), prompts(40)
    alike = windowed(None)
    alike.load_state_dict(model.state_dict())
    assert generate(model, given, 30, temperature=0).tokens != generate(alike, given, 30, temperature=0).tokens


@pytest.mark.parametrize("count", [1, 4, 15])
@pytest.mark.parametrize("same", [True, False])
def test_speculation_takes_steps_back(count, same):
    """Drafts of another model are nearly all refused, so that rings go back by as many tokens as went in."""
    model, given = windowed(5), prompts(3, 40, 20)
    expected = generate(model, given, 50, temperature=0).tokens
    draft = model if same else windowed(3, "S", 2)
    assert generate(model, given, 50, temperature=0, draft=draft, draft_tokens=count).tokens == expected


def test_samples_of_one_prompt_and_a_context_that_slides():
    model, given = windowed(4), prompts(40)
    several = generate(model, given, 20, num_samples=3, temperature=0).tokens
    assert several == generate(model, given, 20, temperature=0).tokens * 3
    torch.manual_seed(0)
    ids = list(given[0])
    for _ in range(70):
        ids.append(likeliest(model, ids[-CONTEXT:])[-1])
    assert generate(model, given, 70, temperature=0, overflow="slide").tokens == [ids[40:]]


def test_a_ring_takes_no_more_memory_than_window_and_step():
    """Two of three layers have 5 + 15 slots instead of 96."""
    decoder = Decoder(windowed(5, "S"))
    cache = decoder.cache(2, CONTEXT)
    assert [len(k[0, 0]) for k in cache.k] == [5 + MAX_STEP - 1] * 2 + [CONTEXT]
    told = Cache.size(decoder.gpt.config, 2, CONTEXT, decoder.dtype, decoder.windows)
    assert told == sum(t.numel() * t.itemsize for t in (cache.whole, cache.round))
    assert "one with a window of 5" in decoder.one_launch


@pytest.mark.interpreter
@pytest.mark.parametrize("draft", [False, True])
def test_the_kernels_give_the_same_tokens(draft):
    model = windowed(5, backend="triton")
    on_torch = windowed(5, backend="torch")
    on_torch.load_state_dict(model.state_dict())
    how = dict(draft=model, draft_tokens=3) if draft else {}
    expected = generate(on_torch, prompts(3, 30), 12, temperature=0).tokens
    assert generate(model, prompts(3, 30), 12, temperature=0, **how).tokens == expected


@pytest.mark.gpu
@pytest.mark.parametrize("draft", [False, True])
def test_a_graph_goes_round(draft):
    model = windowed(5).cuda()
    how = dict(draft=windowed(3).cuda(), draft_tokens=4) if draft else {}
    given = prompts(3, 30)
    together = generate(model, given, 60, temperature=0, **how).tokens
    is_its_own(model.cpu(), given, together)
