"""What the tests of the swap hold a model to: its own logits, loss and gradients of before."""

import copy

import torch

import fastgpt
from fastgpt import ops
from fastgpt.testing import assert_accurate
from tests.models import CONTEXT, VOCAB, logits_and_loss


def _ours(options):
    """The options of accelerate by which fastgpt's functions run where no kernel can, too: by itself it leaves each
    forward to its class there."""
    no_kernel = not ops.interpreted() and not torch.cuda.is_available()
    return {"backend": "torch", **options} if no_kernel else options


def accelerate(model, *args, **options):
    return fastgpt.accelerate(model, *args, **_ours(options))


def accelerated(model, **options):
    return fastgpt.accelerated(model, **_ours(options))


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

    A gradient is judged as one row: rounding upstream reaches all of it, and rows that nearly cancel show it most. The
    model's own error is the larger one of two orders of the batch: a sum of few rows can be right by luck in one.
    """
    judge = copy.deepcopy(model).double()
    terms: dict = {}  # what a bias' gradient is the sum of, as absolute values

    def keep(name):
        return lambda module, _, upstream: terms.update({name: upstream[0].abs().flatten(0, -2).sum(0)})

    hooks = [
        module.register_full_backward_hook(keep(f"{name}.bias"))
        for name, module in judge.named_modules()
        if name.endswith("W_key")
    ]
    exact = results(judge, idx, targets)
    for hook in hooks:
        hook.remove()
    before, turned = results(model, idx, targets), results(model, idx.flip(0), targets.flip(0))
    turned["logits"] = turned["logits"].flip(0)
    for name, expected in exact.items():
        before[name] = max(before[name], turned[name], key=lambda found: (found - expected).norm().item())
    report = accelerate(model, **options)
    after = results(model, idx, targets)
    doubt = 38 if idx.is_cuda else 8  # a GPU's exponentials and quotients are good to two units, not to half of one
    for name, expected in exact.items():
        size = None
        if name.endswith("W_key.bias"):  # zero but for rounding: softmax does not see it
            size = 2 * terms[name].flatten()  # each term is itself the difference of two
        rows = (tensor.flatten() for tensor in (after[name], expected, before[name]))
        assert_accurate(*rows, size, logit_max=doubt, name=name)
    return report
