"""accelerate leaves the world as it was, whatever its defaults are; copies and changed classes do what they say."""

import copy
import gc
import pickle
import random
import weakref

import numpy as np
import pytest
import torch
from torch import nn

from fastgpt import generate, restore
from tests.models import CONTEXT, FAMILIES, hugging_face, logits_and_loss, nanogpt
from tests.swap.swapped import accelerate, accelerated, batch
from tests.torch_defaults import default_device, default_dtype

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


# Defaults of PyTorch


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


@pytest.mark.parametrize("doubled", ["while it is empty", "once it is filled"])
def test_a_buffer_that_is_empty_counts_as_it_is_and_as_it_may_be(doubled):
    class ScaledLayerNorm(nn.LayerNorm):
        def forward(self, x):
            return super().forward(x) * (2 if bool(self.table.any()) == (doubled == "once it is filled") else 1)

    norm = ScaledLayerNorm(8)
    norm.register_buffer("table", torch.zeros(8))
    assert [row.why for row in accelerate(norm).rows] == ["this ScaledLayerNorm computes something else"]


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
