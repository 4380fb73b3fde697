"""torch.compile makes one graph of a swapped model: of its forward, and of the forward of a training step, whose
backward is compiled with it."""

import pytest
import torch
import torch.nn.functional as F

from fastgpt import accelerate
from fastgpt.training.optimizer import TrainingStep, adamw
from tests.models import FAMILIES, VOCAB

IDX = torch.randint(0, VOCAB, (2, 7), generator=torch.Generator().manual_seed(0))
LAYERS = {"hugging face": "n_layer", "nanogpt": "n_layer", "book": "n_layers", "book, fast": "n_layers"}


class Asked(torch.nn.Module):
    """A model of a family that is asked for its loss as the family's users ask for it."""

    def __init__(self, name, model, loss):
        super().__init__()
        self.name, self.model, self.own = name, model, loss

    def forward(self, idx, targets):
        if self.name == "hugging face" and self.own:
            return self.model(idx, labels=targets).loss
        if self.name == "nanogpt":
            return self.model(idx, targets)[1]
        logits = self.model(idx)
        logits = logits.logits if self.name == "hugging face" else logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def step_of(name, loss, autocast, compiles, device="cpu", backend="torch"):
    """The loss and the gradients' norm of two steps, from the same weights."""
    model, idx = Asked(name, FAMILIES[name](**{LAYERS[name]: 2}), loss).train().to(device), IDX.to(device)
    accelerate(model, loss=loss, backend=backend)
    called = torch.compile(model, backend="aot_eager", fullgraph=True) if compiles else model
    step = TrainingStep(called, adamw(model, 1e-2), 1.0, autocast)
    return torch.stack([torch.stack(step(idx, idx)) for _ in range(2)])


def assert_one_graph(*args):
    torch._dynamo.reset()
    name, loss, autocast, *where = args
    expected = step_of(name, loss, autocast, False, *where)
    torch.testing.assert_close(step_of(name, loss, autocast, True, *where), expected, rtol=0.02, atol=1e-3)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "loss"),
    [
        ("hugging face", False),
        ("hugging face", True),
        ("nanogpt", False),
        ("nanogpt", True),
        ("book", False),
        ("book, fast", False),
    ],
)
def test_a_training_step_is_one_graph(name, loss, autocast):
    assert_one_graph(name, loss, autocast)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "loss"), [("hugging face", False), ("nanogpt", True), ("book", False)])
def test_a_training_step_with_kernels_is_one_graph(name, loss, device):
    assert_one_graph(name, loss, None, device, "triton")


@pytest.mark.parametrize(("name", "loss"), [("hugging face", True), ("nanogpt", True), ("book", False)])
def test_a_forward_is_one_graph(name, loss):
    torch._dynamo.reset()
    model = FAMILIES[name](**{LAYERS[name]: 2}).eval()
    accelerate(model, loss=loss, backend="torch")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        for found, expected in zip(logits(compiled(IDX)), logits(model(IDX)), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def logits(found):
    found = getattr(found, "logits", found)
    return found[0] if isinstance(found, tuple) else found
