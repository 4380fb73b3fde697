"""What is told is true: the step and the tensor that a failing run names, the byte, the token, the memory, and why a
row ended; each held to what is known by another way."""

import json

import numpy as np
import pytest
import torch

from fastgpt import GPT, GPTConfig, generate, memory, stream, training
from fastgpt.data import load_corpus, texts, tokenize
from fastgpt.data.tokenizer import encoding
from fastgpt.generation.evaluation import evaluate
from fastgpt.training import fit, monitor
from fastgpt.training.settings import TrainConfig
from tests.generation.small_gpt import VOCABULARY, gpt

BYTE = encoding("byte")
SHAPE = GPTConfig(vocab_size=257, block_size=16, n_layer=2, n_head=2, n_embd=16)


@pytest.fixture
def marked(tmp_path, monkeypatch):
    """Trains on a text with one # among the tokens to train on; any window that holds it spoils the output of a part.
    Told are the numbers of the batches that did, and of all."""
    monkeypatch.setattr(monitor, "plot_losses", lambda rows, path: None)
    text, seen = tmp_path / "text.txt", []
    text.write_text("the quick brown fox. " * 20 + "#" + " jumps over the lazy dog" * 30)

    class Marked(GPT):
        def __init__(self, config):
            super().__init__(config)
            self.h[1].attn.register_forward_hook(self.spoil)

        def forward(self, idx, targets=None, documents=None):
            self.marked = bool((idx == ord("#")).any()) and self.training
            seen.append(self.marked)
            return super().forward(idx, targets, documents)

        def spoil(self, module, inputs, output):
            return output * torch.nan if self.marked else None

    monkeypatch.setattr(training.fitting, "GPT", Marked)

    def run(**changes):
        few = dict(max_iters=40, batch_size=2, order="epoch", eval_interval=100, eval_iters=1, sample_tokens=0)
        return fit(SHAPE, TrainConfig(**{**few, "device": "cpu", **changes}), BYTE, text, tmp_path / "out")

    return run, seen


@pytest.mark.parametrize("batches", [1, 3])
@pytest.mark.parametrize("log_interval", [1, 7, 40])
def test_the_batch_that_a_failing_run_names(marked, batches, log_interval):
    """However many steps, which change nothing, ran between the bad one and the look at it."""
    run, seen = marked
    with pytest.raises(FloatingPointError) as error:
        run(gradient_accumulation_steps=batches, log_interval=log_interval, max_iters=40 if batches == 1 else 14)
    step = seen.index(True) // batches + 1
    assert f"the loss of step {step} is nan on rank 0; the first bad tensor is the output of h.1.attn;" in str(
        error.value
    )


def test_the_val_loss_is_of_these_weights(tmp_path, monkeypatch):
    """A model that is saved between two evaluations has none; neither has its checkpoint."""
    monkeypatch.setattr(monitor, "plot_losses", lambda rows, path: None)
    (tmp_path / "text.txt").write_text("the quick brown fox. " * 30)
    told = {}
    save_model = training.saving.save_model

    def noted(model, folder, name, **facts):
        save_model(model, folder, name, **facts)
        told[facts["step"]] = json.loads((folder / "config.json").read_text())["val_loss"]

    monkeypatch.setattr(training.saving, "save_model", noted)
    few = TrainConfig(max_iters=5, batch_size=2, eval_interval=2, checkpoint_interval=1, eval_iters=1, device="cpu")
    fit(SHAPE, few, "byte", tmp_path / "text.txt", tmp_path / "out")
    assert {step for step, loss in told.items() if loss is not None} == {2, 4, 5} and len(told) == 5
    for path in (tmp_path / "out/checkpoints").glob("step-*/manifest.json"):
        manifest = json.loads(path.read_text())
        assert manifest["val_loss"] == told[manifest["step"]]


# Bytes and tokens


@pytest.mark.parametrize("piece", [1, 2, 3, 7, 64])
@pytest.mark.parametrize("before", [b"", b"\xef\xbb\xbf", b"caf\xc3\xa9 ", "🙂🙂".encode()])
def test_the_byte_that_is_no_text(tmp_path, monkeypatch, piece, before):
    """By its place in the file, in whatever pieces it is read: a byte that begins nothing, one that is not the next of
    a character, and a character that the file's end cuts."""
    monkeypatch.setattr(texts, "PIECE", piece)
    path = tmp_path / "a.txt"
    for bad, told in ((b"\xff tail", 0xFF), (b"\xe2\x82 tail", 0xE2), (b"\xf0\x9f\x99", 0xF0)):
        path.write_bytes(before + bad)
        said = f"a.txt is not UTF-8 text: byte {len(before)} is {told:#x}"
        for read in (
            lambda: load_corpus(path, BYTE, 4),
            lambda: tokenize([path], BYTE, tmp_path / "out"),
        ):
            with pytest.raises(ValueError, match=said):
                read()


def test_the_line_that_is_no_document(tmp_path):
    path = tmp_path / "a.jsonl"
    for bad, said in (
        (b'{"text": "\xff"}', "byte {byte} is 0xff"),
        (b"{", "line {line} is not JSON"),
        (b"[1]", "line {line} has no text in 'text'"),
        (b'{"text": "\\ud800"}', "line {line} has half of a surrogate pair"),
    ):
        lines = ['{"text": "é"}'.encode(), b"", bad]
        path.write_bytes(b"\n".join(lines))
        byte = len(b"\n".join(lines[:2])) + 1 + bad.find(b"\xff")
        with pytest.raises(ValueError, match=f"a.jsonl.*{said.format(line=3, byte=byte)}"):
            tokenize([path], BYTE, tmp_path / "out")


@pytest.mark.parametrize("place", [0, 1, 17, 19])
@pytest.mark.parametrize("token", [-100, -1, VOCABULARY, VOCABULARY + 5])
def test_the_token_that_is_none(place, token):
    """Of those that a loss ignores too."""
    ids = np.arange(20) % VOCABULARY
    ids[place] = token
    with pytest.raises(ValueError, match=f"token {token} at offset {place} is outside a vocabulary of {VOCABULARY}"):
        evaluate(gpt(), ids)


@pytest.mark.parametrize("batch_size", [1, 8])
@pytest.mark.parametrize("stride", [1, 3, 8])
@pytest.mark.parametrize("place", [1, 5, 40, 59])
def test_the_token_whose_loss_is_not_finite(place, stride, batch_size):
    """One that the model gives no probability at all."""
    model, ids = gpt(tie=False), np.arange(60) % (VOCABULARY - 1)
    ids[place] = VOCABULARY - 1
    with torch.no_grad():
        model.ln_f.weight[0], model.ln_f.bias[0] = 0.0, 2.0
        model.lm_head.weight[-1] = 0.0
        model.lm_head.weight[-1, 0] = -3e38
    with pytest.raises(ValueError, match=f"the loss of the token at offset {place} is inf"):
        evaluate(model, ids, stride=stride, batch_size=batch_size)


# Memory


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("draft", [None, 1, 3])
def test_the_memory_that_is_refused(monkeypatch, draft, dtype):
    """A byte less than the caches, the tokens, the logits and their clocks take is too little, and no byte more is
    asked for."""
    rows, prompt, new, context = 6, 3, 4, 64
    model = gpt(context)
    more = {} if draft is None else dict(draft=gpt(context, n_layer=draft))
    slots = prompt + new - 1 + (0 if draft is None else 16)
    layers = 2 + (draft or 0)
    tokens = prompt + new + (0 if draft is None else 16)
    needed = rows * (2 * layers * 16 * slots * dtype.itemsize + tokens * 8 + 2 * VOCABULARY * 4)
    ids = torch.tensor([[3, 1, 4]])

    def ask(there, rows=rows):
        monkeypatch.setattr(memory, "available_bytes", lambda device: there)
        return stream(model, ids, new, num_samples=rows, dtype=dtype, **more)

    steps = ask(needed)
    held = [batch.cache.whole.nbytes for batch in caches_of(steps)]
    assert sum(held) == rows * 2 * layers * 16 * slots * dtype.itemsize, "what is really taken"
    with pytest.raises(ValueError, match=f"{rows} rows of {slots} tokens need about 0.0 GiB, cpu has 0.0"):
        ask(needed - 1)
    many = 2**20 * rows
    with pytest.raises(ValueError, match=f"need about {needed / 2**10:.1f} GiB, cpu has 1.5"):
        ask(1.5 * 2**30, rows=many)


def caches_of(steps):
    """What of a stream that has not begun holds a cache."""
    held = steps.gi_frame.f_locals
    return [each for each in (held["batch"], held["speculation"]) if each is not None]


# Why a row ended


def expected_of(tokens, stop_ids, stop_strings, most):
    """(tokens kept, reason, text) of what is written where nothing stops it, by looking at all of it anew."""
    for count in range(1, most + 1):
        whole = bytes(tokens[:count])
        text = whole.decode(errors="replace")
        ended = count == most
        if tokens[count - 1] in stop_ids:
            text = bytes(tokens[: count - 1]).decode(errors="replace")
            return tokens[:count], "stop_id", text
        found = [text.find(string) for string in stop_strings if string in text]
        if found:
            return tokens[:count], "stop_string", text[: min(found)]
        if ended:
            return tokens[:count], "length", text
    raise AssertionError


@pytest.mark.parametrize("draft", [False, True])
def test_why_a_row_ended(draft):
    """Every stop that could be drawn from what is written, at every length, against looking at the whole text anew."""
    model = gpt(64, vocab_size=257)
    with torch.no_grad():
        model.ln_f.weight.fill_(1.0)
        ascii_only = torch.tensor([32 <= token < 127 for token in range(257)])
        model.wte.weight[~ascii_only] *= 0.01
    more = dict(draft=gpt(64, vocab_size=257), draft_tokens=3) if draft else {}
    prompts, most = [[65], [66, 67], [68]], 9
    whole = generate(model, prompts, most, temperature=0, encoding=BYTE).tokens
    assert all(token < 128 for row in whole for token in row) and len(set(map(tuple, whole))) == 3
    draw = np.random.default_rng(3)
    reasons = set()
    for _ in range(12):
        row = whole[draw.integers(3)]
        begin, size, length = draw.integers(0, most - 2), draw.integers(1, 4), int(draw.integers(1, most + 1))
        strings = [bytes(row[begin : begin + size]).decode(), "no such text"][: draw.integers(0, 3)]
        ids = [row[draw.integers(most)]] if draw.integers(2) else []
        result = generate(
            model, prompts, length, temperature=0, encoding=BYTE, stop_ids=ids, stop_strings=strings, **more
        )
        for number, tokens in enumerate(whole):
            kept, reason, text = expected_of(tokens, ids, strings, length)
            assert (result.tokens[number], result.reasons[number], result.texts[number]) == (kept, reason, text)
            reasons.add(reason)
    assert reasons == {"length", "stop_id", "stop_string"}
