"""Accelerated models under torch.func's transforms, forward-mode differentiation, a backward for several gradients at
once and torch.jit.trace: the values are the model's of before the swap, by ordinary autograd in float64."""

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import nn
from torch.func import functional_call, grad, jvp, vmap

from tests.models import FAMILIES, VOCAB, book, logits_and_loss
from tests.swap.swapped import accelerate, batch

TIME = 9
CLOSE = dict(rtol=1e-6, atol=1e-7)  # the book's GELU keeps a constant in float32


class Loss(nn.Module):
    """A family's model as one function of its parameters: of tokens and targets its loss, of tokens its logits."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, idx, targets=None):
        logits, loss = logits_and_loss(self.model, idx, idx if targets is None else targets)
        return logits if targets is None else loss


def made(family):
    """The model as it was and accelerated, in float64, and its parameters."""
    before, after = (Loss(family().double().eval()) for _ in range(2))
    accelerate(after.model)
    return before, after, {name: parameter.detach() for name, parameter in after.named_parameters()}


def ordinary(model, *inputs):
    parameters = dict(model.named_parameters())
    return dict(zip(parameters, torch.autograd.grad(model(*inputs), list(parameters.values())), strict=True))


def same(got, expected):
    assert got.keys() == expected.keys()
    for name, g in got.items():
        torch.testing.assert_close(g, expected[name], **CLOSE, msg=lambda said, name=name: name + said)


def test_gradients_by_torch_func(family):
    before, after, parameters = made(family)
    idx, targets = batch(TIME)
    same(grad(lambda p: functional_call(after, p, (idx, targets)))(parameters), ordinary(before, idx, targets))


@pytest.mark.parametrize("kind", ["hugging face", "nanogpt"])
def test_gradients_of_a_loss_without_logits(kind):
    """With loss=True, in training."""
    before, after, parameters = made(FAMILIES[kind])
    idx, targets = batch(TIME)
    expected = ordinary(before, idx, targets)
    accelerate(after.model, loss=True)

    def loss(parameters):
        if kind == "nanogpt":
            return functional_call(after.model, parameters, (idx, targets.where(targets != -100, -1)))[1]
        return functional_call(after.model, parameters, (idx,), dict(labels=targets)).loss

    after.train()
    if kind == "hugging face":  # which shifts labels itself
        targets = nn.functional.pad(targets, (1, 0), value=-100)[:, :-1]
        x = before.model(idx).logits[:, :-1].flatten(0, 1)
        loss_of_before = nn.functional.cross_entropy(x, targets[:, 1:].flatten())
        names = dict(before.named_parameters())
        expected = dict(zip(names, torch.autograd.grad(loss_of_before, list(names.values())), strict=True))
    got = grad(loss)({name.removeprefix("model."): p for name, p in parameters.items()})
    same({f"model.{name}": g for name, g in got.items()}, expected)


def test_gradients_of_each_row(family):
    before, after, parameters = made(family)
    idx, targets = batch(TIME)

    def loss(parameters, *row):
        return functional_call(after, parameters, tuple(each[None] for each in row))

    got = vmap(grad(loss), (None, 0, 0))(parameters, idx, targets)
    for i in range(len(idx)):
        expected = ordinary(before, idx[i : i + 1], targets[i : i + 1])
        same({name: g[i] for name, g in got.items()}, expected)


def test_forward_mode(family):
    before, after, parameters = made(family)
    idx, targets = batch(TIME)
    directions = {name: torch.randn_like(parameter) for name, parameter in parameters.items()}
    expected = sum((g * directions[name]).sum() for name, g in ordinary(before, idx, targets).items())
    _, tangent = jvp(lambda p: functional_call(after, p, (idx, targets)), (parameters,), (directions,))
    torch.testing.assert_close(tangent, expected, **CLOSE)
    with forward_ad.dual_level():
        duals = {name: forward_ad.make_dual(p, directions[name]) for name, p in parameters.items()}
        torch.testing.assert_close(
            forward_ad.unpack_dual(functional_call(after, duals, (idx, targets))).tangent, expected, **CLOSE
        )


def test_several_gradients_at_once(family):
    before, after, _ = made(family)
    idx, _ = batch(TIME)
    y, theirs = (model(idx).square().sum((1, 2)) for model in (after, before))
    parameters, upstream = dict(after.named_parameters()), torch.randn(3, 2, dtype=torch.float64)
    got = torch.autograd.grad(y, list(parameters.values()), upstream, is_grads_batched=True)
    for i, each in enumerate(upstream):
        expected = torch.autograd.grad(theirs, list(before.parameters()), each, retain_graph=True)
        same(dict(zip(parameters, (g[i] for g in got), strict=True)), dict(zip(parameters, expected, strict=True)))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("check", [True, False])
def test_traced_and_saved(family, check, tmp_path):
    """With gradients enabled, and loaded again: the same numbers at the sizes of the trace and at others."""
    before, after, _ = made(family)
    idx, path = batch(TIME)[0], str(tmp_path / "traced.pt")
    torch.jit.trace(after, (idx,), check_trace=check).save(path)
    traced = torch.jit.load(path)
    for shape in ((2, TIME), (1, 3), (3, 14)):
        other = torch.randint(0, VOCAB, shape)
        torch.testing.assert_close(traced(other), before(other), **CLOSE)
    got, expected = (
        dict(zip(names, torch.autograd.grad(model(idx).square().mean(), list(names.values())), strict=True))
        for model, names in ((each, dict(each.named_parameters())) for each in (traced, before))
    )
    same(got, {name: expected[name] for name in got})


@pytest.mark.parametrize("kind", ["GPTModel", "GPTModelFast"])
def test_any_norm_and_mlp_of_a_stranger(kind):
    """In a model that is no GPT-2's, mapped over its members: an ensemble."""
    members = [book(kind).double().eval() for _ in range(2)]
    for i, member in enumerate(members):
        with torch.no_grad():
            for parameter in member.parameters():
                parameter += 0.1 * i
    idx = batch(TIME)[0]
    expected = torch.stack([member(idx) for member in members])
    parameters, buffers = torch.func.stack_module_state(members)
    accelerate(members[0])
    got = vmap(lambda p, b: functional_call(members[0], (p, b), (idx,)))(parameters, buffers)
    torch.testing.assert_close(got, expected, **CLOSE)
