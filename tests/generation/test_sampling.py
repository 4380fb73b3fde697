"""What is drawn: filters, seeds, samples; where a row stops; text; a draft."""

import pytest
import torch

from fastgpt import GPT, GPTConfig, generate
from fastgpt.data.tokenizer import encoding
from fastgpt.generation import sampling, stream
from fastgpt.generation.sampling import Sampling, race
from tests.generation.small_gpt import PROMPT, VOCABULARY, gpt, logits, recomputed

CHI_SQUARE_999 = {1: 10.83, 2: 13.82, 3: 16.27, 4: 18.47, 5: 20.52, 12: 32.91, 24: 51.18}  # passed by a thousandth


@pytest.fixture
def model():
    return gpt()


def draws(model, count, **options):
    """(count,): as many first tokens after PROMPT."""
    return torch.tensor(generate(model, PROMPT, 1, num_samples=count, seed=0, **options).tokens)[:, 0]


def assert_drawn_from(probabilities, seen):
    """A chi-square of counts against probabilities, none of which may be small without being 0."""
    expected = probabilities * seen.sum()
    possible = expected > 0
    assert (expected[possible] > 5).all(), "too few for a chi-square"
    assert seen[~possible].sum() == 0
    distance = ((seen - expected)[possible] ** 2 / expected[possible]).sum().item()
    assert distance < CHI_SQUARE_999[int(possible.sum()) - 1]


# Sampling.


def test_a_clock_of_zero_rings_for_no_token_that_was_filtered(monkeypatch):
    """As on a Mac's GPU, by a stand-in: one draw in 2^24 is 0 there."""

    def zero(self, generator=None):
        return self.fill_(1.0).select(-1, 3).zero_()._base

    monkeypatch.setattr(sampling, "_NEVER_ZERO", ())
    monkeypatch.setattr(torch.Tensor, "exponential_", zero)
    assert race(torch.tensor([[0.1, 0.6, 0.3, 0.0], [0.5, 0.25, 0.15, 0.1]]), None).tolist() == [1, 3]


def test_top_k_of_one_is_greedy(model):
    assert generate(model, PROMPT, 6, top_k=1).tokens == generate(model, PROMPT, 6, temperature=0).tokens


@pytest.mark.parametrize("temperature", [2e-38, 1e-40, 1e-300])
def test_a_small_temperature_is_greedy(model, temperature):
    model.ln_f.weight.data.mul_(100)  # the logits are in the hundreds, and divided they pass float32
    expected = generate(model, PROMPT, 6, temperature=0).tokens
    assert generate(model, PROMPT, 6, temperature=temperature).tokens == expected


def test_the_same_seed_gives_the_same_tokens(model):
    first, again, other = (generate(model, PROMPT, 6, seed=s, temperature=3.0).tokens for s in (7, 7, 8))
    assert first == again != other


def test_seed_leaves_the_global_generator_alone(model):
    before = torch.get_rng_state()
    generate(model, PROMPT, 6, seed=7)
    assert torch.equal(torch.get_rng_state(), before)


def test_without_seed_torch_manual_seed_repeats(model):
    torch.manual_seed(7)
    first = generate(model, PROMPT, 6, temperature=3.0).tokens
    assert generate(model, PROMPT, 6, temperature=3.0).tokens != first
    torch.manual_seed(7)
    assert generate(model, PROMPT, 6, temperature=3.0).tokens == first


FILTERS = {
    "softmax": {},
    "hot": dict(temperature=2.5),
    "top_k": dict(top_k=3),
    "top_k past the vocabulary": dict(top_k=VOCABULARY + 1),
    "top_p": dict(temperature=2.5, top_p=0.6),
    "min_p": dict(temperature=2.5, min_p=0.3),
    "all": dict(temperature=2.5, top_k=6, top_p=0.9, min_p=0.1, repetition_penalty=1.5),
}


def written_out(scores, seen=(), temperature=1.0, top_k=None, top_p=1.0, min_p=0.0, repetition_penalty=1.0):
    """(V,): the filters as their papers say them, one token at a time."""
    scores = scores.double().tolist()
    for token in set(seen):
        scores[token] = scores[token] / repetition_penalty if scores[token] > 0 else scores[token] * repetition_penalty
    order = sorted(range(len(scores)), key=lambda token: -scores[token])[:top_k]
    weights = (torch.tensor([scores[token] for token in order], dtype=torch.float64) / temperature).softmax(0)
    kept, total = {}, 0.0
    for token, weight in zip(order, weights.tolist(), strict=True):
        if total < top_p and weight >= min_p * weights[0].item():
            kept[token] = weight
        total += weight
    whole = sum(kept.values())
    return torch.tensor([kept.get(token, 0.0) / whole for token in range(len(scores))])


@pytest.mark.parametrize("name", FILTERS)
def test_draws_follow_the_softmax_with_its_filters(model, name):
    options = FILTERS[name]
    expected = written_out(logits(model, PROMPT)[0], PROMPT[0].tolist(), **options)
    assert name in ("softmax", "hot", "top_k past the vocabulary") or 1 < (expected > 0).sum() < VOCABULARY
    assert_drawn_from(expected, draws(model, 20_000, **options).bincount(minlength=VOCABULARY))


def test_a_tiny_top_p_leaves_the_likeliest():
    logits = torch.tensor([[0.0, 3.0, 1.0]])
    assert Sampling(top_p=1e-15).probabilities(logits, None).tolist() == [[0, 1, 0]]


@pytest.mark.parametrize(("top_p", "left"), [(0.5, 1), (0.5000001, 2), (0.75, 2), (0.8, 3), (1.0, 4), (1e-9, 1)])
def test_top_p_ends_with_the_token_that_reaches_it(top_p, left):
    probabilities = Sampling(top_p=top_p).probabilities(
        torch.tensor([[0.125, 0.5, 0.125, 0.25]]).log2().mul(0.6931472), None
    )
    assert (probabilities > 0).sum() == left
    assert probabilities.sum().item() == pytest.approx(1)


def test_min_p_keeps_its_own_boundary():
    kept = Sampling(min_p=0.25).probabilities(torch.tensor([[0.0, -1.3862944, -1.3862945, -1.4]]), None)[0] > 0
    assert kept.tolist()[0] and not kept.tolist()[3]
    assert Sampling(min_p=1.0).probabilities(torch.tensor([[2.0, 1.0, 2.0]]), None).tolist() == [[0.5, 0, 0.5]]


def test_repetition_penalty_sees_each_row_and_each_new_token(model):
    prompts = [[3, 1, 4], [7]]
    options = dict(temperature=0, repetition_penalty=1.8, overflow="slide")
    assert generate(model, prompts, 12, **options).tokens == [recomputed(model, p, 12, penalty=1.8) for p in prompts]


def test_the_penalty_shuns_what_was_seen_whatever_its_sign():
    scores, seen = torch.tensor([[2.0, -2.0, 2.0, -2.0]]), torch.tensor([[True, True, False, False]])
    found = Sampling(repetition_penalty=2.0).probabilities(scores, seen)
    torch.testing.assert_close(found, torch.tensor([[1.0, -4.0, 2.0, -2.0]]).softmax(-1))


def test_samples_of_a_prompt_share_its_row(model):
    prompts = [[3, 1, 4], [7]]
    rows = generate(model, prompts, 4, temperature=0, num_samples=3).tokens
    assert rows == [tokens for prompt in prompts for tokens in generate(model, [prompt], 4, temperature=0).tokens * 3]
    assert len(set(map(tuple, generate(model, PROMPT, 5, temperature=3.0, num_samples=8, seed=0).tokens))) > 4


def test_logprobs_are_the_models_own(model):
    found = generate(model, PROMPT, 4, seed=3, top_k=2, temperature=5.0, logprobs=True)
    ids = PROMPT[0].tolist()
    for token, logprob in zip(found.tokens[0], found.logprobs[0], strict=True):
        assert logprob == pytest.approx(logits(model, torch.tensor([ids]))[0].log_softmax(-1)[token].item(), abs=1e-5)
        ids.append(token)


def test_vocab_size_is_never_exceeded(model):
    own = logits(model, PROMPT)[0]
    assert (own[5:] > own[:5].max()).any()
    assert draws(model, 1000, temperature=100.0, vocab_size=5).unique().tolist() == [0, 1, 2, 3, 4]
    assert draws(model, 1, temperature=0, vocab_size=5).item() == own[:5].argmax()


def test_race_is_a_draw_by_weight():
    weights = torch.tensor([0.1, 0.0, 0.4, 1.5])
    seen = race(weights.expand(20_000, 4), torch.Generator().manual_seed(0)).bincount(minlength=4)
    assert_drawn_from(weights / weights.sum(), seen)


# Stops and text.


def test_each_row_stops_by_itself(model):
    prompts = [[3, 1, 4], [7], [2, 2]]
    free = generate(model, prompts, 30, temperature=0, overflow="slide").tokens
    stops = [free[0][4], free[1][9]]
    found = generate(model, prompts, 30, temperature=0, overflow="slide", stop_ids=stops)
    for row, whole, reason in zip(found.tokens, free, found.reasons, strict=True):
        ends = [place for place, token in enumerate(whole) if token in stops]
        assert row == (whole[: ends[0] + 1] if ends else whole)
        assert reason == ("stop_id" if ends else "length")
    assert len({len(row) for row in found.tokens}) > 1, "rows of one length would prove little"


class Scripted(GPT):
    """A GPT of bytes that writes what it is told: each byte leads to the next of the text, by way of its position."""

    def __init__(self, text, context=64):
        super().__init__(GPTConfig(vocab_size=257, block_size=context, n_layer=1, n_head=1, n_embd=257, tie=False))
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.zero_()
            self.ln_f.weight.fill_(1.0)
            self.lm_head.weight.copy_(torch.eye(257))
            for place, byte in enumerate(text.encode() if isinstance(text, str) else text):
                self.wpe.weight[place, byte] = 1.0


BYTES = encoding("byte")


def written(text, count=None, **options):
    data = text.encode() if isinstance(text, str) else bytes(text)
    model = Scripted(data)
    return generate(model, [[32]], count or len(data), temperature=0, encoding=BYTES, **options)


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("one. two. three.", ["two"], "one. "),
        ("one. two. three.", ["zwei", ". t"], "one"),
        ("aab aaab", ["aaab"], "aab "),
        ("no stop here", ["stop!", "xyz"], "no stop here"),
        ("ends with a begi", ["begin"], "ends with a begi"),
        ("é🙂 und é", ["🙂 u"], "é"),
    ],
)
def test_stop_strings(text, stops, expected):
    found = written(text, stop_strings=stops)
    assert found.texts == [expected]
    assert found.reasons == ["length" if expected == text else "stop_string"]
    pieces = list(stream(Scripted(text), [[32]], len(text.encode()), temperature=0, encoding=BYTES, stop_strings=stops))
    assert "".join(step.texts[0] for step in pieces) == expected


def test_characters_are_streamed_whole():
    text = "aé🙂z"
    steps = stream(Scripted(text.encode() + b"\xc3"), [[32]], 9, temperature=0, encoding=BYTES)
    assert [step.texts[0] for step in steps] == ["a", "", "é", "", "", "", "🙂", "z", "\ufffd"]


def test_a_stop_id_is_no_text():
    found = written([*b"end", 10, *b"more"], stop_ids=10)
    assert (found.texts, found.tokens, found.reasons) == (["end"], [[*b"end", 10]], ["stop_id"])


def test_the_vocabulary_is_the_encodings():
    """A head that is padded past its tokenizer never gives a token that can't be read."""
    model = gpt(vocab_size=300)
    tokens = generate(model, PROMPT, 5, num_samples=50, temperature=50.0, seed=0, encoding=BYTES).tokens
    assert 200 < max(map(max, tokens)) < 257


# A draft.


@pytest.mark.parametrize("penalty", [1.0, 1.6])
@pytest.mark.parametrize("count", [1, 4, 15])
def test_a_draft_changes_no_greedy_token(count, penalty):
    model, other = gpt(64), gpt(64, n_layer=1)
    prompts = [[3, 1, 4], [7], list(range(12))]
    options = dict(temperature=0, logprobs=True, stop_ids=[5], repetition_penalty=penalty)
    expected = generate(model, prompts, 52, **options)
    for draft in (other, model):
        found = generate(model, prompts, 52, draft=draft, draft_tokens=count, **options)
        assert found.tokens == expected.tokens and found.reasons == expected.reasons
        for row, wanted in zip(found.logprobs, expected.logprobs, strict=True):
            assert row == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize("options", [{}, dict(top_k=6, top_p=0.9, repetition_penalty=1.4)], ids=["softmax", "filters"])
def test_a_draft_gives_the_models_distribution(options):
    """Of the second and third token together, which the draft proposes: in classes of two by two."""
    model, draft = gpt(16), gpt(16, n_layer=1)
    options = dict(temperature=2.0, **options)
    rows = torch.tensor(
        generate(model, PROMPT, 3, num_samples=20_000, seed=0, draft=draft, draft_tokens=2, **options).tokens
    )
    first = rows[:, 0].mode().values
    rows = rows[rows[:, 0] == first]
    ids = [*PROMPT[0].tolist(), first.item()]
    wanted = torch.zeros(VOCABULARY, 2)
    second = written_out(logits(model, torch.tensor([ids]))[0], ids, **options)
    for token in range(VOCABULARY):
        third = written_out(logits(model, torch.tensor([[*ids, token]]))[0], [*ids, token], **options)
        wanted[token] = second[token] * torch.stack((third[: VOCABULARY // 2].sum(), third[VOCABULARY // 2 :].sum()))
    seen = torch.zeros(VOCABULARY, 2).index_put_(
        (rows[:, 1], (rows[:, 2] >= VOCABULARY // 2).long()), torch.tensor(1.0), accumulate=True
    )
    expected = wanted * len(rows)
    common = expected > 5
    assert common.sum() > 3 and seen[wanted == 0].sum() == 0
    distance = ((seen - expected)[common] ** 2 / expected[common]).sum().item()
    degrees = int(common.sum())
    assert distance < degrees + 3.3 * (2 * degrees) ** 0.5 + 6, (distance, degrees)  # above the 999th thousandth
