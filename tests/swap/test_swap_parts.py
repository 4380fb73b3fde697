"""accelerate of a model with parts that must be called: hooks, adapters, parametrizations, forwards of their own."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastgpt import modules, restore
from fastgpt.swap import layers
from tests.models import book, logits_and_loss, nanogpt
from tests.swap.swapped import accelerate, accelerated, batch, results

# Children that must be called


class Lora(nn.Module):
    """A stranger's adapter around a linear layer."""

    def __init__(self, base):
        super().__init__()
        self.base, (wide, deep) = base, base.weight.shape
        self.a = nn.Parameter(torch.ones(4, deep, dtype=base.weight.dtype) / deep)
        self.b = nn.Parameter(torch.linspace(-1, 1, 4 * wide, dtype=base.weight.dtype).view(wide, 4))

    def forward(self, x):
        return self.base(x) + F.linear(F.linear(x, self.a), self.b)


class Halved(nn.Linear):
    """A stranger's subclass, as quantised layers are."""

    def forward(self, x):
        return super().forward(x) / 2


class Scaled(torch.nn.Module):
    def forward(self, weight):
        return 3 * weight


def lora(model, path):
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, Lora(model.get_submodule(path)))


def halved(model, path):
    model.get_submodule(path).__class__ = Halved


def hooked(model, path):
    model.get_submodule(path).register_forward_hook(lambda module, args, output: output * 2)


def hooked_before(model, path):
    model.get_submodule(path).register_forward_pre_hook(lambda module, args: (args[0] * 2, *args[1:]))


def parametrized(model, path):
    torch.nn.utils.parametrize.register_parametrization(model.get_submodule(path), "weight", Scaled())


def own_forward(model, path):
    module = model.get_submodule(path)
    module.forward = lambda x: type(module).forward(module, x) * 2


LINEARS = {
    "nanogpt": (nanogpt, ["c_attn", "c_proj"], "transformer.h.0.attn.", ["c_fc", "c_proj"], "transformer.h.0.mlp."),
    "book": (book, ["W_query", "out_proj"], "trf_blocks.0.att.", ["0", "2"], "trf_blocks.0.ff.layers."),
}
PATHS = [
    pytest.param(make, prefix + name, id=f"{family}-{prefix}{name}")
    for family, (make, heads, attention, layers, mlp) in LINEARS.items()
    for prefix, names in ((attention, heads), (mlp, layers))
    for name in names
]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("change", [lora, halved, hooked, hooked_before, parametrized, own_forward])
@pytest.mark.parametrize(("make", "path"), PATHS)
def test_a_changed_child_is_called(make, path, change, when):
    assert_called(make, path, change, when)


def assert_called(make, path, change, when):
    """A part changed before accelerate or after does in the accelerated model what it does in the other."""
    model, expected, (idx, targets) = make().double(), make().double(), batch(6)
    change(expected, path)
    if when == "before":
        change(model, path)
    accelerate(model)
    if when == "after":
        change(model, path)
    before, after = results(expected, idx, targets), results(model, idx, targets)
    torch.testing.assert_close(after, before, rtol=1e-6, atol=1e-6)
    assert (logits_and_loss(make().double(), idx, targets)[0] - after["logits"]).abs().max() > 1e-3


NORMS_AND_MORE = [
    ("transformer.h.0.ln_2", [hooked, own_forward]),
    ("transformer.h.0.attn", [hooked, hooked_before, own_forward]),
    ("transformer.h.0.attn.resid_dropout", [hooked, own_forward]),
    ("transformer.h.0.mlp", [hooked, own_forward]),
    ("transformer.h.0.mlp.gelu", [hooked, hooked_before, own_forward]),
    ("transformer.h.0.mlp.dropout", [hooked]),
    ("transformer.h.0", [hooked, hooked_before, own_forward]),
]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(("path", "change"), [(path, change) for path, changes in NORMS_AND_MORE for change in changes])
def test_a_changed_part_is_called(path, change, when):
    assert_called(nanogpt, path, change, when)


class Quantised(torch.Tensor):
    """A weight of another kind, as quantised and distributed ones are."""


def test_what_must_be_called():
    """By the reason that is found, for a call may give the same numbers as its bypass."""
    model = nanogpt()
    fc = model.transformer.h[0].mlp.c_fc
    assert modules.free_linear(fc) and modules.occupied(fc) is None
    parametrized(model, "transformer.h.0.mlp.c_fc")
    assert modules.occupied(fc) == "it is parametrized" and not modules.free_linear(fc)
    for change, why in ((hooked, "it has hooks"), (own_forward, "it has a forward of its own")):
        change(model, "transformer.h.0.mlp.c_proj")
        assert modules.occupied(model.transformer.h[0].mlp.c_proj) == why
        model = nanogpt()
    fc = model.transformer.h[0].mlp.c_fc
    fc.compile(backend="eager")
    assert modules.occupied(fc) == "it is compiled by itself"
    fc = model.transformer.h[1].mlp.c_fc
    fc.weight = nn.Parameter(fc.weight.detach().as_subclass(Quantised))
    assert not modules.free_linear(fc)
    assert not modules.free_linear(Halved(2, 2)) and not modules.free_linear(Lora(nn.Linear(2, 2)))


def test_a_backward_hook_on_a_child_fires():
    model, seen = nanogpt(), []
    accelerate(model)
    model.transformer.h[0].mlp.c_fc.register_full_backward_hook(lambda *_: seen.append("c_fc"))
    model.transformer.h[1].attn.c_proj.register_full_backward_hook(lambda *_: seen.append("c_proj"))
    results(model, *batch(5))
    assert sorted(seen) == ["c_fc", "c_proj"]


def test_a_hook_on_every_module_is_called_as_before():
    def calls(model):
        seen = []
        handle = torch.nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module)))
        model(batch(5)[0])
        handle.remove()
        return seen

    model = nanogpt()
    before = calls(model)
    accelerate(model)
    assert sorted(map(str, calls(model))) == sorted(map(str, before))


def test_a_replaced_activation_is_called():
    model, expected, (idx, targets) = nanogpt().double(), nanogpt().double(), batch(6)
    accelerate(model)
    for m in (model, expected):
        m.transformer.h[0].mlp.gelu = nn.Tanh()
    before, after = results(expected, idx, targets), results(model, idx, targets)
    torch.testing.assert_close(after, before, rtol=1e-6, atol=1e-6)


def test_replaced_children_are_called():
    model, expected, (idx, targets) = nanogpt().double(), nanogpt().double(), batch(6)
    accelerate(model)
    for m in (model, expected):
        m.transformer.h[0].ln_2 = nn.Identity()
        m.transformer.h[1].attn = nn.Identity()
    before, after = results(expected, idx, targets), results(model, idx, targets)
    torch.testing.assert_close(after, before, rtol=1e-6, atol=1e-6)


def test_a_wrapper_around_our_forward_outlives_restore():
    """As the accelerate package wraps the forward of what it prepares."""
    model, (idx, targets) = nanogpt(), batch(5)
    before = results(model, idx, targets)
    accelerate(model)
    block = model.transformer.h[0]
    inner, calls = block.forward, []
    block.forward = lambda *args: (calls.append(1), inner(*args))[1]
    restore(model)
    after = results(model, idx, targets)
    assert calls and all(torch.equal(after[name], before[name]) for name in before)


def test_what_fails_leaves_an_earlier_swap(monkeypatch):
    model = nanogpt()
    accelerate(model, attention=False)
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    monkeypatch.setattr(layers, "gelu_kind", lambda act: 1 / 0)
    for swap in (accelerate, lambda model: accelerated(model).__enter__()):
        with pytest.raises(ZeroDivisionError):
            swap(model)
        assert {name: dict(module.__dict__) for name, module in model.named_modules()} == before
