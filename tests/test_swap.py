"""accelerate and restore: the same numbers, the same object, and nobody else's forward touched."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastgpt import accelerate, accelerated, restore
from fastgpt.testing import assert_accurate
from tests.models import CONTEXT, FAMILIES, VOCAB, book, hugging_face, logits_and_loss, nanogpt, randomised

ROADS = [
    pytest.param("cpu", id="fallback"),
    pytest.param("cpu", marks=pytest.mark.interpreter, id="interpreter"),
    pytest.param("cuda", marks=pytest.mark.gpu, id="gpu"),
]


@pytest.fixture(params=FAMILIES)
def family(request):
    return FAMILIES[request.param]


def batch(time=CONTEXT, device="cpu"):
    idx = torch.randint(0, VOCAB, (2, time), device=device)
    targets = torch.randint(0, VOCAB, (2, time), device=device)
    targets[0, 1] = -100
    return idx, targets


def results(model, idx, targets):
    """Logits, loss and every gradient, by name."""
    model.zero_grad()
    logits, loss = logits_and_loss(model, idx, targets)
    loss.backward()
    grads = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    return {"logits": logits.detach(), "loss": loss.detach(), **grads}


def assert_as_before(model, idx, targets, **options):
    """Accelerate `model` and hold all that comes out to float64, by its own error before.

    A gradient is judged as one row: rounding upstream reaches all of it, and rows that nearly cancel show it most.
    """
    oracle = results(copy.deepcopy(model).double(), idx, targets)
    before = results(model, idx, targets)
    report = accelerate(model, **options)
    after = results(model, idx, targets)
    for name, expected in oracle.items():
        size = None
        if name.endswith("W_key.bias"):  # zero but for rounding: softmax does not see it
            size = torch.full_like(expected, oracle[name.replace("key", "query")].abs().max()).flatten()
        assert_accurate(after[name].flatten(), expected.flatten(), before[name].flatten(), size, logit_max=8, name=name)
    return report


@pytest.mark.parametrize("device", ROADS)
def test_logits_loss_and_gradients_are_those_of_before(family, device):
    model = family()
    report = assert_as_before(model.to(device), *batch(7, device))
    assert all(row.now for row in report.rows)
