"""Sizes exactly at an edge: tokens that fill the windows, one token, one row, the last partial batch, 50304 ids."""

import itertools

import numpy as np
import pytest
import torch

from fastgpt import GPT, GPTConfig, generate, ops
from fastgpt.data import Order, load_corpus
from fastgpt.data.tokenizer import encoding
from fastgpt.generation.evaluation import evaluate
from fastgpt.ops import reference
from tests.generation.small_gpt import CONTEXT, VOCABULARY, gpt
from tests.generation.small_gpt import logits as logits_of


@pytest.mark.parametrize("block", [1, 4, 16])
@pytest.mark.parametrize("over", [-1, 0, 1, 2])
def test_an_epoch_of_tokens_that_fill_the_windows(block, over):
    """The last target is a token too: k windows need k * block + 1 tokens, and one fewer leaves a window out."""
    count = 5 * block + over
    if count < block + 1:
        return
    order = Order(np.arange(count), block, "epoch", 3)
    windows = order.windows
    assert windows * block + 1 <= count < (windows + 1) * block + 1
    first, second = (order.starts(epoch * windows, windows).tolist() for epoch in (0, 1))
    assert sorted(first) == sorted(second) == [i * block for i in range(windows)]
    across = order.starts(windows - 1, 2).tolist()
    assert across == [first[-1], second[0]], "the last of an epoch and the first of the next, in one step"


@pytest.mark.parametrize("over", [1, 2, 3])
def test_windows_anywhere_reach_both_ends(over):
    order = Order(np.arange(8 + over), 8, "random", 5)
    assert set(order.starts(0, 200).tolist()) == set(range(over))


def test_a_text_just_long_enough(tmp_path):
    """A window and the token after it, of validation, which is the shorter part."""
    path = tmp_path / "text.txt"
    path.write_text("x" * 89)  # 90 tokens with the end; 9 are for validation
    assert len(load_corpus(path, encoding("byte"), 8).val) == 9
    with pytest.raises(ValueError, match="9 validation tokens are too few for a window of 9 \\+ 1"):
        load_corpus(path, encoding("byte"), 9)


# Evaluation: each token's loss, however the passes are cut


@pytest.mark.parametrize("count", [2, CONTEXT, CONTEXT + 1, CONTEXT + 2, 3 * CONTEXT + 1, 31])
def test_the_last_pass_and_the_last_batch_may_be_partial(count):
    """By windows that do not overlap, each token after those of its own window, against the model's own logits."""
    model, ids = gpt(), torch.randint(VOCABULARY, (count,), generator=torch.Generator().manual_seed(count))
    for batch_size, (window, stride) in itertools.product((1, 2, 8), ((CONTEXT, CONTEXT), (CONTEXT, 3), (1, 1))):
        found = evaluate(model, ids.numpy(), window=window, stride=stride, batch_size=batch_size, each=True)
        expected, counted = [], 1
        while counted < count:
            end = min(count, counted + (window if counted == 1 else stride))
            begin = max(0, end - window - 1)
            for place in range(counted, end):
                row = logits_of(model, ids[None, begin:place])[0].log_softmax(-1)
                expected.append(-row[ids[place]].item())
            counted = end
        assert found.tokens == len(found.losses) == count - 1
        np.testing.assert_allclose(found.losses, expected, rtol=1e-4, atol=1e-4)


# One row, one token, one channel of a head; and a vocabulary of 50304, which needs no padding


@pytest.mark.parametrize(("batch", "time"), [(1, 1), (1, 2), (2, 1)])
def test_the_smallest_operands(batch, time):
    x, heads = torch.randn(batch, time, 4), torch.randn(3, batch, 2, time, 1)
    w, b = torch.randn(4), torch.randn(4)
    ids, targets = torch.randint(3, (2, batch, time))
    for name, arguments in (
        ("layer_norm", (x, w, b)),
        ("add_layer_norm", (x, x.flip(-1), w, b)),
        ("causal_attention", tuple(heads)),
        ("causal_attention_qkv", (torch.randn(batch, time, 12), 2)),
        ("decode_attention", (heads[0][:, :, -1:], *heads[1:], torch.full((batch,), time))),
        ("gelu_mlp", (x, torch.randn(1, 4), torch.randn(1), torch.randn(4, 1), b)),
        ("linear_cross_entropy", (x, torch.randn(3, 4), targets)),
        ("embedding", (ids, torch.randn(3, 4), torch.randn(time, 4))),
    ):
        found, expected = (getattr(module, name)(*arguments) for module in (ops, reference))
        found, expected = (each if isinstance(each, tuple) else (each,) for each in (found, expected))
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("vocab", [50257, 50304, 50305])
def test_the_last_id_of_a_vocabulary_as_large_as_gpt2s(vocab):
    """With and without room behind it, as target, as token and as what is written."""
    x = torch.randn(3, 4, requires_grad=True)
    weight = torch.randn(vocab, 4, requires_grad=True)
    targets = torch.tensor([vocab - 1, 0, vocab - 2])
    loss = ops.linear_cross_entropy(x, weight, targets)
    expected = reference.linear_cross_entropy(x.double(), weight.double(), targets)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(*(torch.autograd.grad(each, (x, weight)) for each in (loss, expected)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match=f"target {vocab} .* is outside a vocabulary of {vocab}"):
        ops.linear_cross_entropy(x, weight, targets + 1)
    model = GPT(GPTConfig(vocab_size=vocab, block_size=4, n_layer=1, n_head=1, n_embd=4, tie=False)).eval()
    with torch.no_grad():
        model.ln_f.weight.fill_(0.0)
        model.ln_f.bias.fill_(1.0)
        model.lm_head.weight[-1] = 9.0
    assert generate(model, [[vocab - 1]], 2, temperature=0).tokens == [[vocab - 1] * 2]
    below = generate(model, [[vocab - 1]], 2, temperature=0, vocab_size=vocab - 1).tokens[0]
    assert max(below) < vocab - 1
