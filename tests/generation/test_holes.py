"""Encodings with holes in their ids, as cl100k_base and o200k_base have: an id that stands for nothing is not drawn."""

import numpy as np
import pytest
import tiktoken
import torch

from fastgpt import GPT, GPTConfig, generate
from fastgpt.cli import text
from fastgpt.data import load_corpus, read_tokens
from fastgpt.data.tokenizer import END_OF_TEXT, encoding, undecodable
from fastgpt.training import fit, monitor
from fastgpt.training.settings import TrainConfig
from tests.generation.small_gpt import VOCABULARY, gpt

HOLES = (3, 7, 8)  # of a vocabulary of 13, and its head is padded to 16
LETTERS = {bytes([97 + n]): n for n in range(12) if n not in HOLES}
SMALL = tiktoken.Encoding("holes", pat_str=r"(?s:.)", mergeable_ranks=LETTERS, special_tokens={END_OF_TEXT: 12})
BYTES = tiktoken.Encoding(
    "bytes with holes",
    pat_str=r"(?s:.{1,64})",
    mergeable_ranks={bytes([v]): v for v in range(256)},
    special_tokens={END_OF_TEXT: 256, "<|endofprompt|>": 300},
)
PROMPT = [[0, 1, 4]]
WAYS = {
    "greedy": dict(temperature=0),
    "sampled": dict(),
    "filtered": dict(top_k=4, top_p=0.95, min_p=0.01),
    "penalised": dict(temperature=0, repetition_penalty=1.3),
    "penalised by a hole": dict(repetition_penalty=1.3),
    "hot": dict(temperature=1e6),
}


@pytest.fixture
def model():
    """Holes, and what lies past the encoding, are what it would write first of all."""
    model = gpt(128, vocab_size=16, tie=False)
    with torch.no_grad():
        model.lm_head.weight[[*HOLES, 13, 14, 15]] *= 5
    return model


def written(model, prompt, count, **options):
    """What generate makes with SMALL; an AssertionError where that fails."""
    try:
        return generate(model, prompt, count, encoding=SMALL, **options)
    except (KeyError, ValueError) as error:
        raise AssertionError(f"nothing was written: {error!r}") from error


def test_the_holes_are_found():
    assert undecodable(SMALL) == HOLES and SMALL.n_vocab == VOCABULARY
    assert undecodable(BYTES) == tuple(range(257, 300))
    assert undecodable(encoding("byte")) == ()


@pytest.mark.parametrize("drafted", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_an_id_that_stands_for_nothing_is_not_drawn(model, way, drafted):
    options = dict(WAYS[way], seed=1, **(dict(draft=model) if drafted else {}))
    prompt = [[0, HOLES[0], 4]] if way == "penalised by a hole" else PROMPT
    freely = generate(model, prompt, 60, **options).tokens[0]
    assert set(freely) & {*HOLES, 13, 14, 15}, "without an encoding all ids are as good"
    found = written(model, prompt, 60, **options)
    assert not set(found.tokens[0]) & {*HOLES, 13, 14, 15}
    assert found.texts == ["".join(SMALL.decode([token]) for token in found.tokens[0])]


def test_a_vocabulary_asked_for_is_cut_to_the_encoding(model):
    found = written(model, PROMPT, 60, vocab_size=16, temperature=0)
    assert max(found.tokens[0]) < SMALL.n_vocab


def test_greedy_takes_the_likeliest_of_the_others(model):
    ids = torch.tensor(PROMPT)
    logits = model(ids)[0, -1, : SMALL.n_vocab].detach()
    allowed = [token for token in range(SMALL.n_vocab) if token not in HOLES]
    expected = max(allowed, key=lambda token: logits[token].item())
    found = generate(model, ids, 1, temperature=0, encoding=SMALL, logprobs=True)
    assert found.tokens == [[expected]]
    likelihood = logits[allowed].log_softmax(-1)[allowed.index(expected)].item()
    assert found.logprobs[0][0] == pytest.approx(likelihood, abs=1e-4)  # among those that may be drawn


def test_the_kernels_do_not_draw_them_either(model, device):
    kernels = GPT(GPTConfig(**{**vars(model.config), "backend": "triton"}))
    kernels.load_state_dict(model.state_dict())
    found = generate(kernels.to(device), PROMPT, 6, temperature=0, encoding=SMALL).tokens
    assert found == generate(model, PROMPT, 6, temperature=0, encoding=SMALL).tokens


def test_a_model_that_is_not_finite_is_told_all_the_same(model):
    model.wpe.weight.data[4] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        generate(model, PROMPT, 9, encoding=SMALL)


def test_a_run_writes_its_samples(tmp_path, capsys):
    """A fresh model of 301 ids, 44 of them holes, draws one within a few tokens."""
    (tmp_path / "x.txt").write_text("hello world " * 300)
    config = TrainConfig(max_iters=4, eval_interval=2, eval_iters=1, batch_size=2, device="cpu")
    shape = GPTConfig(vocab_size=301, block_size=16, n_layer=1, n_head=2, n_embd=32)
    model = fit(shape, config, BYTES, tmp_path / "x.txt", tmp_path / "out")
    assert "failed" not in capsys.readouterr().out
    assert (tmp_path / "out" / monitor.SAMPLES).read_text("utf-8").count("--- step") == 2
    text.write(model, BYTES, "hello", 60, speed=False, seed=1, overflow="slide")
    assert capsys.readouterr().out.startswith("hello")


@pytest.mark.parametrize("read", [lambda path: read_tokens(path, BYTES), lambda path: load_corpus(path, BYTES, 4)])
def test_tokens_that_hold_one_are_refused_by_number(tmp_path, read):
    np.array([*range(90), 299, *range(90)], dtype=np.uint16).tofile(tmp_path / "ids.bin")
    with pytest.raises(
        ValueError, match=r"ids\.bin: token 299 at offset 90 is none of the encoding 'bytes with holes'"
    ):
        read(tmp_path / "ids.bin")
