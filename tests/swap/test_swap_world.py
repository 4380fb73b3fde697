"""accelerate leaves the world as it was, whatever its defaults are; copies and changed classes do what they say."""

import contextlib
import copy
import gc
import pickle
import random
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastgpt import accelerate, accelerated, generate, restore
from tests.models import CONTEXT, FAMILIES, hugging_face, logits_and_loss, nanogpt
from tests.swap.swapped import batch

# Generators


def test_no_generator_moves(family, monkeypatch):
    """Those of other devices, too: what torch.manual_seed hands on to them is caught, as there may be none here."""
    model, seeds = family(), []
    for backend in (torch.cuda, torch.mps, torch.xpu):
        monkeypatch.setattr(
            backend, "manual_seed_all" if hasattr(backend, "manual_seed_all") else "manual_seed", seeds.append
        )
    torch.manual_seed(5)
    assert 5 in seeds, "the test would see it"
    seeds.clear()
    before = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
    accelerate(model, loss=True)
    assert not seeds and torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), str(np.random.get_state())) == before[1:]


@pytest.mark.gpu
def test_a_gpus_generator_stays(family):
    model = family().to("cuda")
    torch.manual_seed(5)
    before = torch.cuda.get_rng_state()
    accelerate(model, loss=True)
    assert torch.equal(torch.cuda.get_rng_state(), before)


# Memory


def swapped(model):
    accelerate(model)


def swapped_with_loss(model):
    accelerate(model, loss=True)


def swapped_and_restored(model):
    accelerate(model)
    restore(model)


def swapped_for_a_while(model):
    with accelerated(model):
        logits_and_loss(model, *batch(5))


def trained(model):
    model.train()
    idx, _ = batch(7)
    if hasattr(model, "generate"):
        loss = model(idx, labels=idx).loss
    elif hasattr(model, "transformer"):
        loss = model(idx, idx)[1]
    else:
        loss = logits_and_loss(model, idx, idx)[1]
    loss.backward()


def generated(model):
    generate(model, [[1, 2, 3]], 4)


def decoded_by_itself(model):
    if hasattr(model, "generate"):
        model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4, do_sample=False)


@pytest.mark.parametrize("use", [trained, generated, decoded_by_itself])
@pytest.mark.parametrize("how", [swapped, swapped_with_loss, swapped_and_restored, swapped_for_a_while])
def test_a_model_is_freed_with_its_last_name(family, how, use):
    """At once, without the garbage collector: a GPU's memory is full long before that one runs."""
    gc.collect()
    gc.disable()
    try:
        model = family()
        how(model)
        use(model)
        held = [weakref.ref(each) for each in (*model.modules(), *model.parameters())]
        del model
        left = [type(each()).__name__ for each in held if each() is not None]
    finally:
        gc.enable()
    assert left == []


# Copies


def shallow(module):
    """copy.copy of each module, with weights of its own."""
    twin = copy.copy(module)
    for kind in ("_parameters", "_buffers", "_modules"):
        twin.__dict__[kind] = dict(twin.__dict__[kind])
    for name, parameter in module._parameters.items():
        twin._parameters[name] = None if parameter is None else nn.Parameter(parameter.detach().clone())
    for name, child in module._modules.items():
        twin._modules[name] = None if child is None else shallow(child)
    return twin


def replica(module):
    """As nn.DataParallel makes them: plain tensors in place of the parameters."""
    twin = module._replicate_for_data_parallel()
    for name, child in module._modules.items():
        twin._modules[name] = None if child is None else replica(child)
    for name, parameter in module._parameters.items():
        setattr(twin, name, None if parameter is None else parameter.detach().clone())
    return twin


def updated(module):
    """Another module of the class, told of the attributes."""
    twin = type(module).__new__(type(module))
    twin.__dict__.update(shallow(module).__dict__)
    return twin


def old_pickle(module):
    return pickle.loads(pickle.dumps(module, protocol=1))


@pytest.mark.parametrize("copied", [shallow, replica, updated, copy.deepcopy, old_pickle])
def test_a_copy_runs_on_its_own_weights(family, copied):
    model, (idx, targets) = family().eval(), batch(7)
    before = logits_and_loss(model, idx, targets)[0]
    accelerate(model, backend="torch")
    twin = copied(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    if copied is not replica:  # whose weights are no parameters
        assert {type(a) for a in twin.modules()} == {type(a) for a in model.modules()}
    torch.testing.assert_close(logits_and_loss(twin, idx, targets)[0], before, rtol=1e-4, atol=1e-5)


def test_a_layer_repeated_by_copy_decodes_over_a_cache():
    """With a layer_idx of its own, as depth is grown."""

    def grown(accelerates):
        model = hugging_face(n_layer=1).double().eval()
        if accelerates:
            accelerate(model)
        layers = model.transformer.h
        twin = copy.copy(layers[0])
        twin._modules = dict(twin._modules, attn=copy.copy(layers[0].attn))
        twin.attn.layer_idx = 1
        layers.append(twin)
        model.config.n_layer = 2
        return model

    idx = torch.tensor([[3, 1, 4, 1, 5]])
    models = grown(False), grown(True)
    tokens = [m.generate(idx, attention_mask=torch.ones_like(idx), max_new_tokens=12, do_sample=False) for m in models]
    assert torch.equal(*tokens)
    torch.testing.assert_close(models[1](idx).logits, models[0](idx).logits)


# Classes


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


# Children


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


# Defaults of PyTorch


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
        assert torch.get_default_dtype() is dtype
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def default_device(device):
    torch.set_default_device(device)
    try:
        yield
        assert torch.get_default_device() == torch.device(device)
    finally:
        torch.set_default_device(None)


WORLDS = {
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float16": lambda: default_dtype(torch.float16),
    "float64": lambda: default_dtype(torch.float64),
    "default device meta": lambda: default_device("meta"),
    "device meta": lambda: torch.device("meta"),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


@pytest.mark.parametrize("world", WORLDS)
def test_defaults_do_not_change_the_trial(family, world):
    model, other = family(), family()
    expected = accelerate(other, loss=True)
    with WORLDS[world]():
        try:
            report = accelerate(model, loss=True)
        except RuntimeError as error:
            report = error
    assert report == expected
    assert all(row.now for row in expected.rows if row.name), "but for the book's model, which computes no loss"


@pytest.mark.parametrize("name", [*FAMILIES, "nanogpt with a mask"])
def test_a_model_on_the_meta_device_is_served_as_the_real_one(name):
    make = FAMILIES.get(name, lambda: nanogpt(flash=False))
    expected = accelerate(make())
    model = make().to("meta")
    assert accelerate(model) == expected and all(row.now for row in expected.rows)


def test_a_buffer_of_unknown_numbers_that_count_is_left():
    """On the meta device nobody knows what a table will hold."""

    class Scaled(nn.LayerNorm):
        def forward(self, x):
            return super().forward(x) * self.table

    norm = Scaled(8)
    norm.weight, norm.bias, table = norm.weight, norm.bias, torch.ones(8)
    norm.register_buffer("table", table)
    norm.__class__.__name__ = "ScaledLayerNorm"
    assert [row.why for row in accelerate(norm.to("meta")).rows] == ["this ScaledLayerNorm computes something else"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_class_that_accelerates_itself_comes_from_pretrained(dtype, tmp_path):
    """transformers makes the model on the meta device, under a default dtype of its own."""
    kind = type(hugging_face())

    class SelfMade(kind):
        def __init__(self, config):
            super().__init__(config)
            self.report = accelerate(self, loss=True)

    plain = hugging_face().eval()
    plain.save_pretrained(tmp_path / "plain")
    SelfMade.from_pretrained(tmp_path / "plain").save_pretrained(tmp_path / "own")
    model = SelfMade.from_pretrained(tmp_path / "own", dtype=dtype).eval()
    assert type(model).__name__ == "SelfMade" and model.config.architectures == ["SelfMade"]
    assert [row.now for row in model.report.rows] == [row.now for row in accelerate(plain, loss=True).rows]
    assert all(row.now for row in model.report.rows)
    restore(plain)
    idx, _ = batch(CONTEXT)
    tolerance = dict(rtol=1e-4, atol=1e-5) if dtype == torch.float32 else dict(rtol=0.05, atol=0.1)
    torch.testing.assert_close(model(idx).logits.float(), plain(idx).logits, **tolerance)
    assert model.train()(idx, labels=idx).logits is None


def test_the_class_says_what_it_was(family):
    model = family()
    kind = type(model)
    accelerate(model, loss=True)
    assert isinstance(model, kind) and type(model).__name__ == kind.__name__
    restore(model)
    assert all("fastgpt" not in repr(type(module).__mro__) for module in model.modules())
    assert type(model) is kind
