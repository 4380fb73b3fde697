"""GPTs some of whose layers see a window of tokens: which layers, what they see, and where a window is kept."""

import dataclasses

import pytest
import torch

from fastgpt import GPT, GPTConfig
from fastgpt.ops import reference
from fastgpt.training import fit
from fastgpt.weights import convert, from_pretrained
from fastgpt.weights.saving import save_model

SHAPE = dict(vocab_size=17, block_size=32, n_layer=6, n_head=2, n_embd=16)


def model_of(**changes):
    return GPT(GPTConfig(**{**SHAPE, **changes}))


@pytest.mark.parametrize(
    ("changes", "windows"),
    [
        (dict(window=5), [5, 5, 5, None, 5, None]),
        (dict(window=5, window_pattern="SL"), [5, None, 5, None, 5, None]),
        (dict(window=5, window_pattern="LS"), [None, 5, None, 5, None, None]),
        (dict(window=5, window_pattern="S"), [5] * 5 + [None]),
        (dict(window=5, window_pattern="L"), [None] * 6),
        (dict(window=31, window_pattern="S", n_layer=2), [31, None]),
        (dict(window=32), [None] * 6),
        (dict(window_pattern="S"), [None] * 6),
    ],
)
def test_the_pattern_goes_over_the_layers_and_the_last_sees_all(changes, windows):
    config = GPTConfig(**{**SHAPE, **changes})
    assert list(config.windows) == windows


def naive(model, ids, windows):
    """GPT-2's formula, with these windows in its layers."""
    x = reference.embedding(ids, model.wte.weight, model.wpe.weight)
    for block, window in zip(model.h, windows, strict=True):
        normed = reference.layer_norm(x, block.ln_1.weight, block.ln_1.bias)
        attn = block.attn
        y = reference.causal_attention_qkv(attn.c_attn(normed), attn.n_head, window=window)
        x = x + attn.c_proj(y)
        normed = reference.layer_norm(x, block.ln_2.weight, block.ln_2.bias)
        mlp = block.mlp
        x = x + reference.gelu_mlp(normed, mlp.c_fc.weight, mlp.c_fc.bias, mlp.c_proj.weight, mlp.c_proj.bias)
    return reference.layer_norm(x, model.ln_f.weight, model.ln_f.bias) @ model.wte.weight.mT


@pytest.mark.parametrize("checkpointing", ["off", "block"])
def test_logits_and_gradients(checkpointing):
    model = model_of(window=5, activation_checkpointing=checkpointing).double()
    ids = torch.randint(17, (2, 30))
    found = []
    for logits in (model(ids), naive(model, ids, [5, 5, 5, None, 5, None])):
        grads = torch.autograd.grad(logits.square().sum(), list(model.parameters()))
        found.append([logits, *grads])
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-10)


def test_documents_end_a_window_too():
    """Of layers with a window alone but for the last: the first document as if it were the only one."""
    model = model_of(window=5)
    ids = torch.randint(17, (1, 30))
    documents = torch.arange(30)[None] // 10
    torch.testing.assert_close(model(ids, documents=documents)[:, :10], model(ids[:, :10]))
    other = ids.clone()
    other[:, :10] = 3
    assert torch.equal(*(model(each, documents=documents)[:, 10:] for each in (ids, other)))


def test_compiled_equals_eager():
    model = model_of(window=5, n_layer=2)
    ids = torch.randint(17, (2, 20))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(ids, ids), model(ids, ids))


def test_a_window_survives_fastgpts_own_folder(tmp_path):
    model = model_of(window=5, window_pattern="SL")
    save_model(model, tmp_path, "byte")
    again = from_pretrained(tmp_path)
    assert again.config == model.config and [block.attn.window for block in again.h] == [5, None, 5, None, 5, None]
    ids = torch.randint(17, (1, 30))
    assert torch.equal(again(ids), model.eval()(ids))
    assert from_pretrained(tmp_path, window=None).h[0].attn.window is None


@pytest.mark.parametrize("to", ["huggingface", "nanogpt", "book"])
def test_a_family_that_has_no_windows_is_refused(tmp_path, to):
    (tmp_path / "here").mkdir()
    save_model(model_of(window=5), tmp_path / "here", "byte")
    with pytest.raises(ValueError, match=f"{to} has no windows, and layer 0 has one of 5 tokens"):
        convert(tmp_path / "here", tmp_path / "there", to)
    assert not (tmp_path / "there").exists()
    save_model(model_of(window=5, window_pattern="L"), tmp_path / "here", "byte")
    convert(tmp_path / "here", tmp_path / "there", to)  # of layers that see all


def test_save_pretrained_refuses_before_it_writes(tmp_path):
    with pytest.raises(ValueError, match="huggingface has no windows, and layer 0 has one of 7 tokens"):
        model_of(window=7).save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(window=0), "window is 0, not a whole number of at least 1"),
        (dict(window=True), "window is True, not a whole number or None"),
        (dict(window=2.5), "window is 2.5, not a whole number or None"),
        (dict(window_pattern=""), "window_pattern is '', not a word of S and L"),
        (dict(window_pattern="SSl"), "window_pattern is 'SSl', not a word of S and L"),
    ],
)
def test_a_window_that_cannot_be_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        GPTConfig(**fields)


def test_a_run_with_windows_is_resumed_with_its_own(tmp_path):
    shape = dict(SHAPE, vocab_size=257, n_layer=2, window=5)
    how = dict(max_iters=2, warmup_iters=1, batch_size=2, eval_iters=1, eval_interval=1, sample_tokens=0, device="cpu")
    text = tmp_path / "fox.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 50)
    fit(GPTConfig(**shape), how, "byte", text, tmp_path / "out")
    with pytest.raises(ValueError, match="window = 5 there, 6 now"):
        fit(GPTConfig(**{**shape, "window": 6}), dict(how, max_iters=3), "byte", text, tmp_path / "out", resume=True)
    assert "window = 5\n" in (tmp_path / "out" / "train.toml").read_text()
    fit(GPTConfig(**shape), dict(how, max_iters=3), "byte", text, tmp_path / "out", resume=True)
    assert dataclasses.asdict(from_pretrained(tmp_path / "out").config)["window"] == 5
