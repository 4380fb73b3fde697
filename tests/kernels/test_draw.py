"""kernels/draw.py: what Sampling draws among the likeliest, at the same clocks."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not to be had on this platform")

from fastgpt import GPT, GPTConfig, generate
from fastgpt.generation.sampling import Sampling
from fastgpt.ops import autograd
from tests.generation.small_gpt import gpt

CASES = [  # vocabulary, and how
    (13, dict(top_k=5, top_p=0.5)),
    (70, dict(top_k=8, min_p=0.05, temperature=0.3)),
    (49, dict(top_k=6, top_p=0.9, temperature=2.0, min_p=0.2)),
    (17, dict(top_k=1)),
    (300, dict(top_k=33)),
    (40, dict()),
    (2100, dict(temperature=0.5)),
    (30, dict(temperature=3.0, min_p=0.2)),
]
ON_A_CARD = [
    *[(50257, dict(top_k=50)), (50257, dict(top_k=128, top_p=0.8)), (2049, dict(top_k=100, min_p=0.01))],
    *[(50257, dict(top_k=1)), (131072, dict(top_k=64)), (50257, dict()), (50257, dict(min_p=0.01, temperature=0.7))],
]


def drawn(logits, clocks, sampling, lengths, rounded=None):
    """The tokens (B,), and history and news beside them. rounded: a dtype that holds the logits."""
    rows, device = len(logits), logits.device
    history = torch.zeros(rows, 9, dtype=torch.int64, device=device)
    news, last = torch.full((rows, 3), 7, device=device), torch.full((rows, 1), 7, device=device)
    places = history, lengths, news, last
    if sampling.top_k is None:
        autograd.draw.race(logits, clocks, sampling.temperature, sampling.min_p, *places)
    else:
        autograd.take_drawn(logits, clocks, *sampling.filters, *places, rounded)
    return last[:, 0], history, news


def candidates(logits, sampling):
    """As Sampling has them, with the first of equal ones first."""
    if sampling.top_k is None:
        return sampling._candidates(logits.float(), None)[0], torch.arange(logits.shape[1], device=logits.device)
    ids = logits.float().sort(dim=-1, descending=True, stable=True).indices
    weights, order = sampling._candidates(logits.float().gather(1, ids), None)
    return weights.gather(1, order.argsort(-1)), ids[:, : sampling.top_k]


def check(vocabulary, how, device, draws=2, dtype=torch.float32):
    torch.manual_seed(0)
    sampling, rows = Sampling(**how), 3
    for number in range(draws):
        logits = (3 * torch.randn(rows, vocabulary + 3, device=device)[:, :vocabulary]).to(dtype)
        logits[1, vocabulary // 2 :] += 4  # where the likeliest are neighbours
        clocks = torch.empty(rows, sampling.clocks(vocabulary), device=device).exponential_()
        weights, ids = candidates(logits, sampling)
        chosen = (weights / clocks).argmax(-1)
        expected = (ids[chosen] if ids.dim() == 1 else ids.gather(-1, chosen[:, None])[:, 0]).tolist()
        given = logits.float() if number % 2 else logits  # the same numbers
        lengths = torch.tensor([1, 2, 5], device=device)
        found, history, news = drawn(given, clocks, sampling, lengths, None if dtype == torch.float32 else dtype)
        assert found.tolist() == expected and lengths.tolist() == [2, 3, 6]
        assert [history[row, place].item() for row, place in enumerate((1, 2, 5))] == expected
        assert history.count_nonzero() <= rows
        assert [news[row, place % 3].item() for row, place in enumerate((1, 2, 5))] == expected
        assert (news == 7).sum() >= 2 * rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("vocabulary", "how"), CASES, ids=str)
def test_the_same_clocks_ring_for_the_same_tokens(vocabulary, how, dtype, device):
    check(vocabulary, how, device, dtype=dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("vocabulary", "how"), ON_A_CARD, ids=str)
def test_the_same_clocks_ring_for_the_same_tokens_of_gpt2(vocabulary, how, dtype):
    check(vocabulary, how, "cuda", draws=100, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_sign_and_equal_logits_keep_their_order(dtype, device):
    """Of equal ones the first is the likelier; what lies past the vocabulary is never one."""
    numbers = [[-5.0, -0.0, 3.0, 0.0, 3.0, -7.0, 2.0, -1e30] + [-1e38] * 10]
    logits = torch.tensor(numbers, dtype=dtype, device=device)
    order = [2, 4, 6, 1, 3, 0, 5, 7]
    for place, token in enumerate(order):
        clocks = torch.full((1, 8), 1e30, device=device)
        clocks[0, place] = 1e-30
        flat = Sampling(temperature=1e35, top_k=8)
        assert drawn(logits, clocks, flat, torch.tensor([0], device=device))[0].tolist() == [token]


def test_the_token_that_reaches_top_p_is_left_and_none_after_it(device):
    logits = torch.tensor([[0.2, 0.5, 0.3]], device=device).log()
    for place, token in ((0, 1), (1, 2), (2, 1)):
        clocks = torch.ones(1, 3, device=device)
        clocks[0, place] = 1e-6
        assert drawn(logits, clocks, Sampling(top_k=3, top_p=0.6), torch.tensor([0], device=device))[0].tolist() == [
            token
        ]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("top_k", [4, None])
def test_a_row_that_is_not_finite_is_told_and_goes_on(value, top_k, device):
    logits, sampling = torch.randn(2, 40, device=device), Sampling(top_k=top_k)
    logits[1, 33] = value
    found, history, news = drawn(
        logits, torch.ones(2, sampling.clocks(40), device=device), sampling, torch.tensor([0, 0], device=device)
    )
    assert found.tolist()[1] == 0 == history[1].count_nonzero() and news[:, 0].tolist() == [found.tolist()[0], -1]


def test_the_kernels_draw_the_fallbacks_tokens(device):
    """And go on after them: the penalty knows them, and so does the next step."""
    fallback = gpt(32, backend="torch", n_layer=1, n_embd=32, vocab_size=32).to(device)
    kernels = GPT(GPTConfig(**{**vars(fallback.config), "backend": "triton"})).to(device)
    kernels.load_state_dict(fallback.state_dict())
    for more in (dict(top_k=4, top_p=0.95), dict(min_p=0.01)):
        how = dict(seed=3, temperature=2.0, repetition_penalty=1.3, **more)
        assert generate(kernels, [[3, 1, 4], [7]], 4, **how) == generate(fallback, [[3, 1, 4], [7]], 4, **how)
