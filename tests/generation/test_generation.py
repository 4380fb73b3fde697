"""generate and stream: the tokens of a model without a cache, streams, and what is refused."""

import itertools

import numpy as np
import pytest
import torch

from fastgpt import GPT, GPTConfig, generate
from fastgpt.data.tokenizer import encoding
from fastgpt.generation import _check_memory, stream
from fastgpt.generation.batch import plan
from fastgpt.generation.decoder import Decoder
from fastgpt.generation.sampling import Sampling
from tests import models
from tests.generation.small_gpt import FAMILIES, PROMPT, VOCABULARY, gpt, recomputed, varied
from tests.swap.swapped import accelerate


@pytest.fixture
def model():
    return gpt()


# The same tokens as without a cache.


def likeliest(model, ids):
    """The likeliest token after each of ids, by one pass of the model's own forward, which has no cache."""
    model.eval()
    ids = torch.tensor([ids])
    with torch.no_grad():
        scores = model(ids) if isinstance(model, GPT) else models.logits_and_loss(model, ids, ids)[0]
    return scores[0].argmax(-1).tolist()


@pytest.mark.parametrize("accelerated", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_with_the_cache_is_greedy_without_it(family, accelerated):
    model = varied(FAMILIES[family]())
    if accelerated and not isinstance(model, GPT):
        accelerate(model)
    prompts = [torch.arange(n).mul(7).add(n).remainder(VOCABULARY).tolist() for n in (3, 17, 1, 9, 18, 5, 12)]
    together = generate(model, prompts, 110, temperature=0).tokens
    for prompt, tokens in zip(prompts, together, strict=True):
        assert likeliest(model, (prompt + tokens)[:-1])[len(prompt) - 1 :] == tokens
        assert len(tokens) == 110 and len(set(tokens)) > 3
    assert generate(model, prompts[1:2], 110, temperature=0).tokens == together[1:2]


def test_slide_forgets_the_oldest(model):
    prompts = [[3, 1, 4], [1], list(range(8))]
    assert generate(model, prompts, 30, temperature=0, overflow="slide").tokens == [
        recomputed(model, prompt, 30) for prompt in prompts
    ]


def test_slide_takes_a_prompt_longer_than_the_context(model):
    long = (torch.arange(20) % VOCABULARY).tolist()
    assert generate(model, [long], 3, temperature=0, overflow="slide").tokens == [recomputed(model, long, 3)]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_passed_over(model, side):
    ids, mask = torch.tensor([[5, 6, 7], [9, 9, 2]]), torch.tensor([[1, 1, 1], [0, 0, 1]])
    if side == "right":
        ids, mask = ids.flip(1), mask.flip(1)
    expected = generate(model, [ids[0].tolist(), [2]], 5, temperature=0).tokens
    assert generate(model, ids, 5, attention_mask=mask, temperature=0).tokens == expected


def test_streamed_is_whole(model):
    options = dict(num_samples=3, seed=5, logprobs=True, stop_ids=[2, 11], overflow="slide")
    whole, steps = generate(model, PROMPT, 20, **options), list(stream(model, PROMPT, 20, **options))
    assert whole.tokens == [list(itertools.chain(*(step.tokens[row] for step in steps))) for row in range(3)]
    assert whole.logprobs == [list(itertools.chain(*(step.logprobs[row] for step in steps))) for row in range(3)]
    assert list(whole.reasons) == steps[-1].reasons
    assert None in steps[0].reasons and all(len(tokens) == 1 for tokens in steps[0].tokens)
    assert len(set(map(len, whole.tokens))) > 1


# Errors.

BYTES = encoding("byte")


@pytest.mark.parametrize(
    ("ids", "count", "options", "message"),
    [
        (PROMPT[0], 1, {}, r"ids has shape \(3,\), not \(B, T\)"),
        (PROMPT[:, :0], 1, {}, r"ids has shape \(1, 0\), not \(B, T\) with B and T at least 1"),
        ([], 1, {}, "there is no prompt"),
        ([[1], []], 1, {}, "prompt 1 is empty; begin with the end-of-text token"),
        (PROMPT, 1, {"attention_mask": torch.zeros(1, 3)}, "prompt 0 is empty"),
        (PROMPT, 1, {"attention_mask": torch.ones(1, 4)}, r"attention_mask has shape \(1, 4\), and the prompts have"),
        (PROMPT, 1, {"attention_mask": [[1, 1]]}, r"attention_mask has rows of \[2\] tokens, and the prompts"),
        (PROMPT, 1, {"attention_mask": [1, 1, 1]}, r"attention_mask has rows of \[None, None, None\] tokens"),
        (PROMPT, 1, {"attention_mask": 1}, "attention_mask has rows of None tokens"),
        (PROMPT, 1, {"attention_mask": torch.tensor([[0.0, 0.0, -1e9]])}, "attention_mask holds -1000000000.0, not 0"),
        ([3, 1, 4], 1, {}, r"prompt 0 is 3, not a list of tokens; one prompt alone is \[\[3, …\]\]"),
        ([[1], [2, 13]], 1, {}, "token 13 at 1 of prompt 1 is outside a vocabulary of 13"),
        ([[-1]], 1, {}, "token -1 at 0 of prompt 0 is outside a vocabulary of 13"),
        (PROMPT, 0, {}, "max_new_tokens is 0, not at least 1"),
        (PROMPT, -2, {}, "max_new_tokens is -2, not at least 1"),
        (PROMPT, 1, {"num_samples": 0}, "num_samples is 0, not at least 1"),
        (PROMPT, 1, {"num_samples": 10**12}, r"1000000000000 rows of 3 tokens need about [\d,.]+ GiB, cpu has [\d,.]+"),
        (PROMPT, 1, {"temperature": -0.5}, "temperature is -0.5, not a finite number of at least 0"),
        (PROMPT, 1, {"temperature": float("nan")}, "temperature is nan, not a finite number"),
        (PROMPT, 1, {"temperature": float("inf")}, "temperature is inf, not a finite number"),
        (PROMPT, 1, {"temperature": "hot"}, "temperature is 'hot', not a number"),
        (PROMPT, 1, {"top_p": True}, "top_p is True, not a number"),
        (PROMPT, 1, {"top_k": 0}, "top_k is 0, not at least 1"),
        (PROMPT, 1, {"top_k": 2.0}, "top_k is 2.0, not a whole number"),
        (PROMPT, 2.0, {}, "max_new_tokens is 2.0, not a whole number"),
        (PROMPT, None, {}, "max_new_tokens is None, not a whole number"),
        (PROMPT, 1, {"num_samples": True}, "num_samples is True, not a whole number"),
        (PROMPT, 1, {"vocab_size": "13"}, "vocab_size is '13', not a whole number"),
        (PROMPT, 1, {"seed": 1.5}, "seed is 1.5, not a whole number"),
        (PROMPT, 1, {"draft": "same", "draft_tokens": 2.5}, "draft_tokens is 2.5, not a whole number"),
        (PROMPT, 1, {"top_p": 0.0}, r"top_p is 0.0, not in \(0, 1\]"),
        (PROMPT, 1, {"top_p": 1.5}, r"top_p is 1.5, not in \(0, 1\]"),
        (PROMPT, 1, {"min_p": float("nan")}, r"min_p is nan, not in \[0, 1\]"),
        (PROMPT, 1, {"repetition_penalty": 0.0}, "repetition_penalty is 0.0, not a positive number"),
        (PROMPT, 1, {"vocab_size": 0}, "vocab_size is 0, not from 1 to the model's 13"),
        (PROMPT, 1, {"vocab_size": 14}, "vocab_size is 14, not from 1 to the model's 13"),
        (PROMPT, 1, {"encoding": BYTES}, "the encoding 'byte' has 257 ids, the model 13"),
        (PROMPT, 1, {"stop_strings": "x"}, "stop_strings need an encoding"),
        (PROMPT, 1, {"stop_strings": "", "encoding": BYTES}, "stop_strings holds '', not a string of at least one"),
        (PROMPT, 1, {"seed": 2**70}, "seed is 1180591620717411303424, not a 64-bit integer"),
        (PROMPT, 1, {"overflow": "wrap"}, "overflow is 'wrap', not 'error' or 'slide'"),
        (PROMPT, 7, {}, r"3 \+ 7 tokens pass the context of 8; overflow='slide' forgets the oldest"),
        ([[1] * 9], 1, {}, r"9 \+ 1 tokens pass the context of 8"),
        (PROMPT, 1, {"draft": "same", "draft_tokens": 16}, "draft_tokens is 16, not from 1 to 15"),
        (PROMPT, 1, {"draft": "same", "overflow": "slide"}, "overflow='slide' does not go with a draft"),
        (PROMPT, 1, {"draft": gpt(vocab_size=14)}, "the draft's vocabulary is 14, the model's 13"),
        (PROMPT, 5, {"draft": gpt(context=4)}, "the draft's context is 4, the model's 8"),
    ],
    ids=str,
)  # fmt: skip
def test_bad_argument_is_refused_by_the_call_itself(model, ids, count, options, message):
    if options.get("draft") == "same":
        options = {**options, "draft": model}
    with pytest.raises(ValueError, match=f"generate: {message}"):
        stream(model, ids, count, **options)


@pytest.mark.parametrize(
    ("ids", "options", "message"),
    [
        (PROMPT.float(), {}, "ids is torch.float32, not of integers"),
        ([["a"]], {}, "prompt 0 holds 'a', not a token id"),
        ([[1.0]], {}, "prompt 0 holds 1.0, not a token id"),
        ("some text", {}, "ids is a str; encode it first"),
        (["some text"], {}, "prompt 0 is text, 'some text'; encode it first"),
        ({"input_ids": PROMPT}, {}, "ids is a dict; give a list of prompts, such as its input_ids"),
        (None, {}, "ids is a NoneType; give a list of prompts"),
        (PROMPT, {"stop_ids": ["a"]}, "stop_ids holds 'a', not an int"),
        (PROMPT, {"stop_ids": [[1]]}, r"stop_ids holds \[1\], not an int"),
        (PROMPT, {"stop_ids": 1.5}, "stop_ids holds 1.5, not an int"),
        (PROMPT, {"stop_strings": 5, "encoding": BYTES}, "stop_strings is 5, not a string or several"),
        (PROMPT, {"encoding": "gpt2"}, "encoding is a str, not a tiktoken.Encoding"),
        (PROMPT, {"dtype": torch.int8}, "dtype is torch.int8, not a floating-point one"),
    ],
)
def test_a_wrong_type_is_refused(model, ids, options, message):
    with pytest.raises(TypeError, match=f"generate: {message}"):
        stream(model, ids, 1, **options)


def test_none_is_an_options_default(model):
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "num_samples", "stop_ids", "stop_strings",
             "encoding", "attention_mask", "vocab_size", "logprobs", "dtype", "draft", "draft_tokens")  # fmt: skip
    assert generate(model, PROMPT, 4, seed=1, **dict.fromkeys(names)) == generate(model, PROMPT, 4, seed=1)


@pytest.mark.parametrize(
    "mask", [[[0, 1, 1], [1, 1, 0]], np.array([[0, 1, 1], [1, 1, 0]]), [torch.tensor([0, 1, 1]), (True, True, False)]]
)
def test_prompts_and_masks_of_any_library(model, mask):
    expected = generate(model, [[1, 4], [2, 7]], np.int64(3), temperature=np.float32(0), stop_ids=np.array([5]))
    ids = [[9, 1, 4], [2, 7, 9]]
    for given in (ids, torch.tensor(ids), np.array(ids, dtype=np.uint16), [np.array(row) for row in ids]):
        assert generate(model, given, 3, temperature=0, stop_ids=5, attention_mask=mask) == expected
    assert ids == [[9, 1, 4], [2, 7, 9]]


PLACES = {
    "wpe": lambda model: model.wpe.weight.data[5],
    "h.1.attn": lambda model: model.h[1].attn.c_attn.bias.data,
    "h.0.mlp": lambda model: model.h[0].mlp.c_fc.weight.data,
    "ln_f": lambda model: model.ln_f.weight.data,
}


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("draft", [False, True])
@pytest.mark.parametrize("part", PLACES)
def test_logits_that_are_not_finite(model, part, draft, dtype):
    helper = gpt() if draft else None
    PLACES[part](model).fill_(float("inf") if part == "ln_f" else float("nan"))
    steps = stream(model, [[3, 1, 4], [2]], 5, draft=helper, dtype=dtype)
    with pytest.raises(
        ValueError, match=rf"logits at position {5 if part == 'wpe' else 2} are not finite, first in {part}$"
    ):
        list(steps)


def test_a_drafts_logits_that_are_not_finite(model):
    helper = gpt()
    helper.ln_f.weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="the draft's logits are not finite"):
        generate(model, [[3, 1, 4]], 4, draft=helper)


def test_a_row_that_has_ended_may_overflow_its_numbers(model):
    """A NaN past a row's stop is nobody's, while another row goes on."""
    prompts = [[3, 1, 4], [7]]
    expected = generate(model, prompts, 5, temperature=0, stop_ids=11)
    assert [len(tokens) for tokens in expected.tokens] == [1, 5]
    model.wpe.weight.data[5] = float("nan")  # which the second row does not reach
    assert generate(model, prompts, 5, temperature=0, stop_ids=11) == expected


def test_a_cards_free_memory_is_what_counts(model, monkeypatch):
    decoder = Decoder(model)
    one, many = (plan(decoder, 2, rows, 4, Sampling()) for rows in (1, 10000))
    monkeypatch.setattr(decoder, "device", torch.device("cuda:0"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**20, 2**40))
    _check_memory(decoder, one, None)
    with pytest.raises(ValueError, match=r"10000 rows of 5 tokens need about [\d.]+ GiB, cuda:0 has 0.0"):
        _check_memory(decoder, many, None)


def test_the_kernels_give_the_fallbacks_tokens(device):
    config = dict(n_layer=1, n_embd=32, vocab_size=32)
    fallback = gpt(32, backend="torch", **config).to(device)
    kernels = GPT(GPTConfig(**{**vars(fallback.config), "backend": "triton"})).to(device)
    kernels.load_state_dict(fallback.state_dict())
    options = dict(temperature=0, num_samples=2, logprobs=True)
    expected = generate(fallback, [[3, 1, 4], [7]], 5, **options)
    found = generate(kernels, [[3, 1, 4], [7]], 5, **options)
    assert found.tokens == expected.tokens
    torch.testing.assert_close(torch.tensor(found.logprobs), torch.tensor(expected.logprobs), rtol=1e-4, atol=1e-4)
