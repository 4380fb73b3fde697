"""What the tests of Hugging Face's GPT-2 share: padded prompts, its numbers of before, the functions it asks for."""

import torch

from fastgpt.swap import gpt2
from tests.models import VOCAB
from tests.swap.swapped import accelerate

IDX = torch.randint(1, VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))


def padded(side):
    """Token ids (3, 7) with padding on one side, the third row without any, and their mask."""
    idx, mask = torch.randint(1, VOCAB, (3, 7)), torch.ones(3, 7, dtype=torch.long)
    for row, length in ((0, 3), (1, 6)):
        mask[row, : 7 - length] = 0
    mask = mask if side == "left" else mask.flip(1)
    return idx * mask, mask


def results(model, *args, **kwargs):
    model.zero_grad()
    output = model(*args, **kwargs)
    kept = kwargs.get("attention_mask", torch.ones(()))
    kept = kept[..., None] if kept.dim() == 2 else torch.ones(())
    (output.logits * kept).square().mean().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": (output.logits * kept).detach(), **grads}


def assert_as_before(model, *args, calls=None, **kwargs):
    """In float64, where nothing but a rounding differs. `calls` forgets those of the trials."""
    model = model.double()
    before = results(model, *args, **kwargs)
    report = accelerate(model)
    if calls:
        calls.clear()
    torch.testing.assert_close(results(model, *args, **kwargs), before, rtol=1e-9, atol=1e-10)
    return {row.name: row.why for row in report.rows if row.why}


def attention_calls(monkeypatch):
    """The names of the functions of ops that attention asks for, as it does."""
    calls = []

    def counted(name, function):
        def call(*args, **kwargs):
            calls.append(name)
            return function(*args, **kwargs)

        monkeypatch.setattr(gpt2.ops, name, call)

    for name in ("causal_attention", "causal_attention_qkv"):
        counted(name, getattr(gpt2.ops, name))
    return calls
