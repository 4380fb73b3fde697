"""Classes and children that change after accelerate are those of now."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastgpt import restore
from tests.models import hugging_face, logits_and_loss, nanogpt
from tests.swap.swapped import accelerate, batch


def test_a_class_of_ones_own_with_its_name(family):
    model = family()
    kinds = [type(module) for module in model.modules()]
    accelerate(model, loss=True)
    for module, kind in zip(model.modules(), kinds, strict=True):
        assert isinstance(module, kind)
        for name in ("__name__", "__qualname__", "__module__", "__doc__"):
            assert getattr(type(module), name) == getattr(kind, name)
    other = family()
    accelerate(other, loss=True)
    assert [type(a) for a in model.modules()] == [type(a) for a in other.modules()], "one a class, not one a module"
    restore(model)
    assert [type(module) for module in model.modules()] == kinds


@pytest.mark.parametrize("call", [dict(), dict(args=(3.0,)), dict(kwargs=dict(scale=3.0))], ids=str)
def test_what_a_subclass_takes_beside_x_is_its_own(call):
    class Scaled(type(nanogpt().transformer.h[0].mlp)):
        def forward(self, x, scale=1.0):
            return super().forward(x) * scale

    model = nanogpt().double().eval()
    mlp = model.transformer.h[0].mlp
    mlp.__class__ = Scaled
    x = torch.randn(2, 3, 48, dtype=torch.float64)
    args, kwargs = call.get("args", ()), call.get("kwargs", {})
    expected = mlp(x, *args, **kwargs)
    assert accelerate(model, backend="torch")
    torch.testing.assert_close(mlp(x, *args, **kwargs), expected, rtol=1e-6, atol=1e-6)


PLACES = ["", "mlp", "attn", "ln_2"]


def doubled(kind):
    return lambda self, *args, **kwargs: kind.forward(self, *args, **kwargs) * 2


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("way", ["class set", "class patched", "base patched", "subclass of the swapped one's"])
def test_a_class_that_changes_later_is_heard(place, way, monkeypatch):
    model, expected = nanogpt().double().eval(), nanogpt().double().eval()
    base = type(expected.transformer.h[0].get_submodule(place))
    kind = type("Mine", (base,), {})  # for the patches to be seen here alone
    for m in (model, expected):
        m.transformer.h[0].get_submodule(place).__class__ = kind
    report = accelerate(model)
    assert all(row.now for row in report.rows)
    idx, targets = batch(7)
    before = logits_and_loss(expected, idx, targets)[0]
    forward = base.forward
    if way.endswith("patched"):
        patched = kind if way == "class patched" else base
        monkeypatch.setattr(patched, "forward", lambda self, x: forward(self, x) * 2)
    else:
        for m in (model, expected):
            module = m.transformer.h[0].get_submodule(place)
            above = type(module) if way.startswith("subclass") else kind
            module.__class__ = type("Doubled", (above,), {"forward": doubled(above)})
    after = logits_and_loss(expected, idx, targets)[0]
    assert (after - before).norm() > 1e-3
    torch.testing.assert_close(logits_and_loss(model, idx, targets)[0], after, rtol=1e-6, atol=1e-6)
    accelerate(model)  # as things are now
    torch.testing.assert_close(logits_and_loss(model, idx, targets)[0], after, rtol=1e-6, atol=1e-6)
    restore(model)
    torch.testing.assert_close(logits_and_loss(model, idx, targets)[0], after, rtol=1e-6, atol=1e-6)


def test_a_class_that_lists_its_subclasses_lists_none_of_ours():
    known = {}

    class Listed(nn.Module):
        def __init_subclass__(cls, name="another"):
            known[name] = cls

        def __init__(self):
            super().__init__()
            self.up, self.act, self.down = nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8)

        def forward(self, x):
            return self.down(self.act(self.up(x)))

    class Model(Listed, name="mlp"):
        pass

    model = Model()
    assert [row.now for row in accelerate(model).rows] == ["gelu_mlp (none)"]
    assert known == {"mlp": Model}


def test_parametrized_and_no_longer():
    """Its removal sets the class back to the one that it found."""
    norm, x = nn.LayerNorm(8), torch.randn(3, 8)
    accelerate(norm)
    kind = type(norm)
    parametrize = torch.nn.utils.parametrize
    parametrize.register_parametrization(norm, "weight", nn.Softplus())
    torch.testing.assert_close(norm(x), F.layer_norm(x, (8,), norm.weight, norm.bias))
    assert accelerate(norm).rows == ()
    parametrize.remove_parametrizations(norm, "weight")
    assert type(norm) is kind
    assert [row.now for row in accelerate(norm).rows] == ["layer_norm"]
    restore(norm)
    assert type(norm) is nn.LayerNorm


def test_the_accelerate_packages_wrapper_comes_off_again():
    """unwrap_model binds to the model what it finds below the wrapper that mixed precision put around its forward."""
    Accelerator = pytest.importorskip("accelerate").Accelerator
    model, (idx, _) = hugging_face().eval(), batch(7)
    expected = model(idx, labels=idx).loss
    accelerate(model, loss=True)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    prepared = accelerator.prepare(model)
    prepared(idx, labels=idx)
    model = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    torch.testing.assert_close(model(idx, labels=idx).loss, expected)
    model.train()
    assert model(idx, labels=idx).logits is None, "the loss is still computed without all logits"
    restore(model)
    assert "forward" not in model.__dict__
    torch.testing.assert_close(model(idx, labels=idx).loss, expected)


def mlp():
    return nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16), nn.Dropout(0.0))


CHANGES = {
    "append": lambda net: net.append(nn.LayerNorm(16)),
    "insert": lambda net: net.insert(1, nn.LayerNorm(64)),
    "delete the dropout": lambda net: net.__delitem__(3),
    "delete the GELU": lambda net: net.__delitem__(1),
    "the GELU last": lambda net: net._modules.update({"1": net._modules.pop("1")}),
    "another in the dropout's place": lambda net: net.__setitem__(3, nn.LayerNorm(16)),
    "delete one and append one": lambda net: (net.__delitem__(1), net.append(nn.Tanh())),
}


@pytest.mark.parametrize("change", CHANGES)
def test_children_of_a_sequential_are_those_of_now(change):
    x = torch.randn(3, 16)
    torch.manual_seed(1)
    net = mlp()
    expected = copy.deepcopy(net)
    (row,) = accelerate(net).rows
    assert row.now == "gelu_mlp (none)"
    for each in (expected, net):
        CHANGES[change](each)
    torch.testing.assert_close(net(x), expected(x))


def test_the_class_says_what_it_was(family):
    model = family()
    kind = type(model)
    accelerate(model, loss=True)
    assert isinstance(model, kind) and type(model).__name__ == kind.__name__
    restore(model)
    assert all("fastgpt" not in repr(type(module).__mro__) for module in model.modules())
    assert type(model) is kind
