import pytest
import torch

from fastgpt import GPT, GPTConfig
from fastgpt.generation import generate

VOCABULARY, CONTEXT = 13, 8
PROMPT = torch.tensor([[3, 1, 4]])
CHI_SQUARE_999 = {2: 13.82, 12: 32.91}  # the value that a thousandth of the draws pass, by degrees of freedom


@pytest.fixture
def model():
    """Matrices so large that every token counts for the next one; a last norm that keeps all of them likely."""
    model = GPT(GPTConfig(vocab_size=VOCABULARY, block_size=CONTEXT, n_layer=2, n_head=2, n_embd=16, dropout=0.5))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=2.0)
        model.ln_f.weight.fill_(0.2)
    return model.eval()


def tokens(model, ids, count, **options):
    """(B, count)."""
    return torch.stack(list(generate(model, ids, count, **options)), dim=1)


def draws(model, count, **options):
    """(count,): as many first tokens after PROMPT."""
    return tokens(model, PROMPT.expand(count, -1), 1, **options)[:, 0]


def logits(model):
    """(V,): of the token after PROMPT."""
    with torch.no_grad():
        return model(PROMPT)[0, -1]


def recomputed(model, ids, count):
    """The likeliest tokens, each from the whole of what one pass may see."""
    start = ids.shape[1]
    for _ in range(count):
        with torch.no_grad():
            ids = torch.cat((ids, model(ids[:, -CONTEXT:])[:, -1:].argmax(-1)), dim=1)
    return ids[:, start:]


def test_greedy_takes_the_likeliest_token_each_time(model):
    count = CONTEXT + 1 - PROMPT.shape[1]
    expected = recomputed(model, PROMPT, count)
    assert len(expected.unique()) > 2
    assert torch.equal(tokens(model, PROMPT, count, temperature=0), expected)


def test_slide_forgets_the_oldest(model):
    expected = recomputed(model, PROMPT, 30)
    assert len(expected[0, CONTEXT:].unique()) > 2
    assert torch.equal(tokens(model, PROMPT, 30, temperature=0, overflow="slide"), expected)


def test_slide_takes_a_prompt_longer_than_the_context(model):
    long = torch.arange(20)[None] % VOCABULARY
    expected = recomputed(model, long, 3)
    assert torch.equal(tokens(model, long, 3, temperature=0, overflow="slide"), expected)


def test_batch_of_three_equals_one_by_one(model):
    prompts = torch.tensor([[3, 1, 4], [1, 5, 9], [2, 6, 5]])
    together = tokens(model, prompts, 6, temperature=0)
    assert len(together.unique(dim=0)) == 3
    assert torch.equal(together, torch.cat([tokens(model, prompt[None], 6, temperature=0) for prompt in prompts]))


def test_top_k_of_one_is_greedy(model):
    assert torch.equal(tokens(model, PROMPT, 6, top_k=1), tokens(model, PROMPT, 6, temperature=0))


@pytest.mark.parametrize("temperature", [2e-38, 1e-40, 1e-300])
def test_a_small_temperature_is_greedy(model, temperature):
    model.ln_f.weight.data.mul_(100)  # the logits are in the hundreds, and divided they pass float32
    assert torch.equal(tokens(model, PROMPT, 6, temperature=temperature), tokens(model, PROMPT, 6, temperature=0))


def test_seed_repeats(model):
    first, again, other = (tokens(model, PROMPT, 6, seed=seed, temperature=3.0) for seed in (7, 7, 8))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_seed_leaves_the_global_generator_alone(model):
    before = torch.get_rng_state()
    tokens(model, PROMPT, 6, seed=7)
    assert torch.equal(torch.get_rng_state(), before)


def test_without_seed_torch_manual_seed_repeats(model):
    torch.manual_seed(7)
    first = tokens(model, PROMPT, 6, temperature=3.0)
    assert not torch.equal(tokens(model, PROMPT, 6, temperature=3.0), first)
    torch.manual_seed(7)
    assert torch.equal(tokens(model, PROMPT, 6, temperature=3.0), first)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("top_k", [None, 3, VOCABULARY + 1])
def test_samples_follow_the_softmax(model, temperature, top_k):
    probabilities = (logits(model) / temperature).softmax(-1)
    if top_k == 3:
        likeliest = probabilities.topk(3).indices
        probabilities = torch.zeros(VOCABULARY).index_put((likeliest,), probabilities[likeliest])
    expected = 20_000 * probabilities / probabilities.sum()
    assert (expected[expected > 0] > 5).all(), "too few for a chi-square"

    seen = draws(model, 20_000, seed=0, temperature=temperature, top_k=top_k).bincount(minlength=VOCABULARY)
    possible = expected > 0
    assert seen[~possible].sum() == 0
    distance = ((seen - expected)[possible] ** 2 / expected[possible]).sum().item()
    assert distance < CHI_SQUARE_999[int(possible.sum()) - 1]


def test_vocab_size_is_never_exceeded(model):
    assert (logits(model)[5:] > logits(model)[:5].max()).any()
    assert draws(model, 1000, seed=0, temperature=100.0, vocab_size=5).unique().tolist() == [0, 1, 2, 3, 4]
    assert draws(model, 1, temperature=0, vocab_size=5).item() == logits(model)[:5].argmax()


@pytest.mark.parametrize(
    ("ids", "count", "options", "message"),
    [
        (PROMPT[0], 1, {}, r"ids has shape \(3,\), not \(B, T\)"),
        (PROMPT[:, :0], 1, {}, r"ids has shape \(1, 0\), not \(B, T\) with T at least 1"),
        (PROMPT, 0, {}, "max_new_tokens is 0, not at least 1"),
        (PROMPT, -2, {}, "max_new_tokens is -2, not at least 1"),
        (PROMPT, 1, {"temperature": -0.5}, "temperature is -0.5, not a finite number of at least 0"),
        (PROMPT, 1, {"temperature": float("nan")}, "temperature is nan, not a finite number"),
        (PROMPT, 1, {"temperature": float("inf")}, "temperature is inf, not a finite number"),
        (PROMPT, 1, {"top_k": 0}, "top_k is 0, not at least 1"),
        (PROMPT, 1, {"vocab_size": 0}, "vocab_size is 0, not from 1 to the model's 13"),
        (PROMPT, 1, {"vocab_size": 14}, "vocab_size is 14, not from 1 to the model's 13"),
        (PROMPT, 1, {"seed": 2**70}, "seed is 1180591620717411303424, not a 64-bit integer"),
        (PROMPT, 1, {"overflow": "wrap"}, "overflow is 'wrap', not 'error' or 'slide'"),
        (PROMPT, 7, {}, r"3 \+ 7 tokens pass the context of 8"),
    ],
    ids=[
        "rank",
        "empty",
        "none",
        "negative",
        "cold",
        "nan",
        "hot",
        "top_k",
        "vocab-0",
        "vocab-14",
        "seed",
        "overflow",
        "context",
    ],
)
def test_bad_argument_is_refused_by_the_call_itself(model, ids, count, options, message):
    with pytest.raises(ValueError, match=f"generate: {message}"):
        generate(model, ids, count, **options)


def test_logits_that_are_not_finite(model):
    model.wpe.weight.data[5] = float("nan")
    stream = generate(model.train(), PROMPT, 6)
    for _ in range(3):
        next(stream)
    with pytest.raises(ValueError, match="logits at position 5 are not finite"):
        next(stream)
    assert model.training


def test_dropout_is_off(model):
    expected = tokens(model, PROMPT, 6, temperature=0)
    assert torch.equal(tokens(model.train(), PROMPT, 6, temperature=0), expected)


@pytest.mark.parametrize("training", [True, False])
def test_mode_is_restored_at_the_end(model, training):
    tokens(model.train(training), PROMPT, 6)
    assert model.training == model.h[0].attn.training == training


@pytest.mark.parametrize("training", [True, False])
def test_mode_is_restored_when_the_iterator_is_abandoned(model, training):
    stream = generate(model.train(training), PROMPT, 6)
    next(stream)
    assert not model.training
    del stream
    assert model.training == training
