"""Exactly at the edge, and one past it: prompts, drafts and stops."""

import pytest
import torch

from fastgpt import generate
from tests.generation.small_gpt import CONTEXT, PROMPT, VOCABULARY, gpt, recomputed


@pytest.fixture
def model():
    return gpt()


def greedy(model, prompts, new, **options):
    return generate(model, prompts, new, temperature=0, **options)


def refused(*arguments, **options):
    """What a call says that can't be served, by whichever error."""
    with pytest.raises(Exception) as error:
        greedy(*arguments, **options)
    return f"{error.type.__name__}: {error.value}"


def test_a_draft_whose_context_just_fits(model):
    """The last token is never read: 3 + 5 tokens take 7 places."""
    expected = greedy(model, PROMPT, 5).tokens
    assert greedy(model, PROMPT, 5, draft=gpt(context=7)).tokens == expected
    words = "ValueError: generate: the draft's context is {}, the model's 8"
    assert refused(model, PROMPT, 5, draft=gpt(context=6)) == words.format(6)
    assert refused(model, PROMPT, 6, draft=gpt(context=7)) == words.format(7)


def test_a_prompt_that_just_fits(model):
    full = [list(range(CONTEXT))]
    assert greedy(model, full, 1).tokens == [recomputed(model, full[0], 1)]
    with pytest.raises(ValueError, match="8 \\+ 2 tokens pass the context of 8"):
        greedy(model, full, 2)
    with pytest.raises(ValueError, match="9 \\+ 1 tokens pass the context of 8"):
        greedy(model, [list(range(CONTEXT + 1))], 1)


@pytest.mark.parametrize("draft", [False, True])
@pytest.mark.parametrize("at", [0, 2, 3])
def test_a_stop_id_at_the_last_token_asked_for(model, at, draft):
    """At the fourth of four tokens it is still the stop that ended the row."""
    with torch.no_grad():
        model.ln_f.weight.fill_(1.0)
    tokens = next(
        written
        for first in range(VOCABULARY)
        if len(set(written := greedy(model, [[first]], 4).tokens[0])) == 4 and (prompt := [[first]])
    )
    more = dict(draft=gpt(context=CONTEXT), draft_tokens=3) if draft else {}
    result = greedy(model, prompt, 4, stop_ids=[tokens[at]], **more)
    assert result.tokens == [tokens[: at + 1]] and list(result.reasons) == ["stop_id"]
    result = greedy(model, prompt, 4, stop_ids=[next(t for t in range(VOCABULARY) if t not in tokens)], **more)
    assert result.tokens == [tokens] and list(result.reasons) == ["length"]
    if at == 3:  # the same stop, one token past what is asked for
        assert list(greedy(model, prompt, 3, stop_ids=[tokens[3]], **more).reasons) == ["length"]


def test_one_row_of_one_token(model):
    assert greedy(model, [[5]], 1).tokens == [recomputed(model, [5], 1)]
    for size in (1, 2):
        narrow = gpt(context=size)
        assert greedy(narrow, [[5]], size).tokens == [recomputed(narrow, [5], size)]
