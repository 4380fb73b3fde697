"""accelerate leaves the world as it was: generators, memory, default dtypes and devices, and copies of a model."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn

from fastgpt import accelerate, accelerated, generate, restore
from tests.models import hugging_face, logits_and_loss
from tests.swapped import batch


def test_no_generator_of_any_device_moves(family, monkeypatch):
    """torch.manual_seed reseeds the generators of all devices: what it hands to each is what a GPU would see."""
    model, seeds = family(), []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
    monkeypatch.setattr(torch.mps, "manual_seed", seeds.append)
    before = torch.get_rng_state()
    accelerate(model, loss=True)
    assert torch.equal(torch.get_rng_state(), before) and seeds == []


@pytest.mark.gpu
def test_no_generator_of_a_gpu_moves(family):
    model = family().cuda()
    before = torch.cuda.get_rng_state()
    accelerate(model, loss=True)
    assert torch.equal(torch.cuda.get_rng_state(), before)


USES = {
    "accelerated": lambda model, idx: accelerate(model),
    "with its loss": lambda model, idx: accelerate(model, loss=True),
    "restored": lambda model, idx: (accelerate(model), restore(model)),
    "in a with block": lambda model, idx: accelerated(model).__enter__(),
    "trained": lambda model, idx: (accelerate(model), logits_and_loss(model.train(), idx, idx)[1].backward()),
    "generated from": lambda model, idx: (accelerate(model.eval()), generate(model, idx[:, :4], 3, temperature=0)),
}


@pytest.mark.parametrize("use", USES)
def test_del_frees_a_model_at_once(family, use):
    """By counting references alone: a GPU's memory must not wait for the collector."""
    idx, _ = batch(7)
    warm = family()  # what libraries make once
    USES[use](warm, idx)
    gc.collect()
    gc.disable()
    try:
        model = family()
        USES[use](model, idx)
        gone = [weakref.ref(parameter) for parameter in model.parameters()]
        del model
        left = sum(reference() is not None for reference in gone)
    finally:
        gc.enable()
    assert left == 0, f"{left} of {len(gone)} parameters are still there"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_default_dtype_changes_nothing(family, dtype):
    model, plain = family(), family()
    plain.load_state_dict(model.state_dict())
    expected = str(accelerate(plain, loss=True))
    torch.set_default_dtype(dtype)
    try:
        assert str(accelerate(model, loss=True)) == expected
        assert torch.get_default_dtype() == dtype
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("way", ["context", "default"])
def test_on_the_meta_device(family, way):
    """As transformers and others make a model before they load its weights."""
    expected = str(accelerate(family()))
    try:
        if way == "default":
            torch.set_default_device("meta")
            model = family()
            report = accelerate(model)
        else:
            with torch.device("meta"):
                model = family()
                report = accelerate(model)
    except RuntimeError as error:
        raise AssertionError(f"accelerate can't do without numbers: {error}") from error
    finally:
        torch.set_default_device(None)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert str(report) == expected


def test_a_class_that_accelerates_itself_is_loaded(tmp_path):
    """from_pretrained makes it on the meta device."""
    transformers = pytest.importorskip("transformers")

    class Accelerating(transformers.GPT2LMHeadModel):
        def __init__(self, config):
            super().__init__(config)
            self.report = accelerate(self)

    plain = hugging_face().eval()
    plain.save_pretrained(tmp_path)
    model = Accelerating.from_pretrained(tmp_path).eval()
    assert "causal_attention_qkv" in str(model.report) and "left" not in str(model.report)
    idx, _ = batch(7)
    with torch.no_grad():
        torch.testing.assert_close(logits_and_loss(model, idx, idx)[0], logits_and_loss(plain, idx, idx)[0])


COPIES = {
    "copy.copy": copy.copy,
    "copy.deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "__dict__": lambda module: _of_its_dict(module),
}


def _of_its_dict(module):
    twin = type(module).__new__(type(module))
    twin.__dict__.update(module.__dict__)
    return twin


@pytest.mark.parametrize("way", COPIES)
def test_a_copy_runs_on_its_own_weights(way):
    norm, x = nn.LayerNorm(8), torch.randn(3, 8)
    accelerate(norm)
    twin = COPIES[way](norm)
    twin._parameters = {name: nn.Parameter(tensor.detach() + 1) for name, tensor in norm._parameters.items()}
    expected = nn.functional.layer_norm(x, (8,), twin.weight, twin.bias)
    torch.testing.assert_close(twin(x), expected)
    torch.testing.assert_close(norm(x), nn.functional.layer_norm(x, (8,)))
    assert twin.__dict__["fastgpt_swap"] == norm.__dict__["fastgpt_swap"]


def test_a_forward_patched_later_is_heard():
    class Norm(nn.LayerNorm):
        pass

    norm, x = Norm(8), torch.randn(3, 8)
    accelerate(norm)
    Norm.forward = lambda self, x: x + 1
    assert torch.equal(norm(x), x + 1)


def test_a_class_set_later_is_heard():
    class Plus(nn.LayerNorm):
        def forward(self, x):
            return super().forward(x) + 1

    norm, x = nn.LayerNorm(8), torch.randn(3, 8)
    accelerate(norm)
    norm.__class__ = Plus
    torch.testing.assert_close(norm(x), nn.functional.layer_norm(x, (8,)) + 1)


def test_children_added_later_are_called_and_taken_ones_are_missed():
    layers, x = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8)), torch.randn(3, 8)
    accelerate(layers)
    before = layers(x)
    layers.append(nn.Tanh())
    torch.testing.assert_close(layers(x), before.tanh())
    del layers[3], layers[2]
    assert layers(x).shape == (3, 32)


def test_the_class_says_what_it_was(family):
    model = family()
    kind = type(model)
    accelerate(model, loss=True)
    assert isinstance(model, kind) and type(model).__name__ == kind.__name__
    restore(model)
    assert all("fastgpt" not in repr(type(module).__mro__) for module in model.modules())
    assert type(model) is kind
