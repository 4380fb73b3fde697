"""A training step of each family under autocast, before the swap and after it; on a GPU at GPT-2's width."""

import copy

import pytest
import torch
import torch.nn.functional as F

from fastgpt import accelerate
from fastgpt.testing import assert_accurate
from tests import models

DEVICES = [pytest.param("cpu", id="fallback"), pytest.param("cuda", marks=pytest.mark.gpu, id="gpu")]


def hugging_face_loss(model, idx, targets):
    return model(idx, labels=idx).loss


def nanogpt_loss(model, idx, targets):
    return model(idx, targets)[1]


def book_loss(model, idx, targets):
    return F.cross_entropy(model(idx).flatten(0, 1), targets.flatten())


# How a model is made, its loss as its users write it, and its sizes on a GPU.
FAMILIES = {
    "hugging face": (models.hugging_face, hugging_face_loss, dict(n_positions=256, n_embd=768, n_head=12)),
    "nanogpt": (models.nanogpt, nanogpt_loss, dict(block_size=256, n_embd=768, n_head=12)),
    "book": (
        lambda **changes: models.book(qkv_bias=False, **changes),
        book_loss,
        dict(context_length=256, emb_dim=768, n_heads=12),
    ),
}
STEPS_OF_FAMILIES = [(name, loss) for name in FAMILIES for loss in (False, True) if not (name == "book" and loss)]


def as_gpt2_begins(model):
    """Its weights are what training begins with; the biases and the norms lie a little off their defaults.

    What small models have here would leave all tokens of a wide one nearly alike, and half precision would see nothing
    else than its own noise in the gradients of queries and keys.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.02)
            if parameter.dim() == 1 and name.endswith(("weight", "scale")):
                parameter.add_(1)
    return model


SCALE = 2.0**10  # of the loss, without which float16 would lose small gradients


def training_step(model, loss_of, idx, targets, dtype=None):
    """The loss and every gradient, by name; autocast to `dtype`, None for the weights' own."""
    model.zero_grad()
    with torch.autocast(idx.device.type, dtype, enabled=dtype is not None):
        loss = loss_of(model, idx, targets)
    (loss * SCALE).backward()
    return {"loss": loss.detach(), **{name: p.grad / SCALE for name, p in model.named_parameters()}}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize(("name", "loss"), STEPS_OF_FAMILIES, ids=lambda value: str(value))
@pytest.mark.parametrize("device", DEVICES)
def test_a_familys_step_under_autocast(device, name, loss, dtype):
    """Accelerated, with and without loss=True, it is as near to float64 as before."""
    build, loss_of, large = FAMILIES[name]
    vocabulary, time = (1009, 256) if device == "cuda" else (models.VOCAB, 24)
    model = as_gpt2_begins(build(vocab_size=vocabulary, **large)) if device == "cuda" else build(vocab_size=vocabulary)
    model = model.to(device).train()
    idx = torch.randint(vocabulary, (2, time), device=device)
    targets = idx.roll(-1, dims=1)
    exact = training_step(copy.deepcopy(model).double(), loss_of, idx, targets)
    before = training_step(model, loss_of, idx, targets, dtype)
    turned = training_step(model, loss_of, idx.flip(0), targets.flip(0), dtype)
    report = accelerate(model, loss=loss)
    assert all(row.now for row in report.rows)
    after = training_step(model, loss_of, idx, targets, dtype)
    # one number's error before may be small by luck: what its operands can tell is enough
    assert after["loss"].item() == pytest.approx(exact["loss"].item(), rel=torch.finfo(dtype).eps / 2)
    exact.pop("loss")
    for parameter, expected in exact.items():
        theirs = max(before[parameter], turned[parameter], key=lambda found: (found - expected).norm().item())
        assert after[parameter].dtype == torch.float32
        assert_accurate(*(t.flatten() for t in (after[parameter], expected, theirs)), name=parameter)
