"""accelerate and restore: the same numbers, the same object, and nobody else's forward touched."""

import copy
import inspect
import io
import pickle

import pytest
import torch
from torch import nn

import fastgpt
from bench.gates import feign
from fastgpt import restore
from fastgpt.testing import assert_accurate
from tests.models import book, hugging_face, logits_and_loss, nanogpt, randomised
from tests.swap.swapped import accelerate, accelerated, assert_as_before, batch, results

PLACES = [
    pytest.param("cpu", id="fallback"),
    pytest.param("cpu", marks=pytest.mark.interpreter, id="interpreter"),
    pytest.param("cuda", marks=pytest.mark.gpu, id="gpu"),
]


@pytest.mark.parametrize("device", PLACES)
def test_logits_loss_and_gradients_are_those_of_before(family, device):
    model = family()
    report = assert_as_before(model.to(device), *batch(7, device))
    assert all(row.now for row in report.rows)


def test_fifty_steps_give_the_same_losses(family):
    """With an optimizer that was made before, in float64, where only rounding differs."""

    def losses(accelerates):
        torch.manual_seed(3)
        model = family(n_layer=1, n_layers=1) if family is None else family()
        model = model.double().train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        if accelerates:
            accelerate(model)
        found = []
        for _ in range(50):
            loss = logits_and_loss(model, *batch(8))[1]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.detach())
        return torch.stack(found)

    before, after = losses(False), losses(True)
    assert before[-10:].mean() < before[:10].mean()
    torch.testing.assert_close(after, before, rtol=1e-5, atol=0)


def test_where_no_kernel_runs_each_forward_is_its_class(family):
    model, (idx, targets) = family(), batch(9)
    before = results(model, idx, targets)
    report = fastgpt.accelerate(model)
    after = results(model, idx, targets)
    assert all(row.now for row in report.rows)
    assert all(torch.equal(after[name], before[name]) for name in before)
    told = "while the model is on cpu, where no kernel runs, each module does what its class says"
    assert str(report).splitlines()[-1] == told
    assert str(fastgpt.accelerate(model, loss=True)).endswith((told, f"{told}, but for the loss"))
    assert told not in str(fastgpt.accelerate(model, backend="torch"))
    assert not torch.equal(results(model, idx, targets)["logits"], before["logits"])


@pytest.mark.skipif(fastgpt.ops.no_triton() is not None, reason="then that is what the report tells")
def test_the_report_tells_that_a_card_is_too_old(monkeypatch):
    """A Tesla T4, which free notebooks have."""
    monkeypatch.setitem(feign.CARDS, 75, feign.Card(75, 65_536, 40))
    with feign.card(75):
        model = nn.Sequential(nn.LayerNorm(8, device="cuda"))
        told = str(fastgpt.accelerate(model)).splitlines()[-1]
    old = "the GPU has compute capability 7.5, the kernels need 8.0 or newer"
    assert told == f"while the model is on cuda:0, where no kernel runs ({old}), each module does what its class says"


@pytest.mark.parametrize("loss", [False, True])
@pytest.mark.parametrize("dropout", ["attn_pdrop", "resid_pdrop", "embd_pdrop"])
def test_hugging_faces_dropouts_stay_where_they_are(dropout, loss):
    assert_the_same_draws(hugging_face(**{dropout: 0.4}), loss)


@pytest.mark.parametrize("loss", [False, True])
@pytest.mark.parametrize("flash", [True, False])
def test_nanogpts_dropout_stays_where_it_is(flash, loss):
    assert_the_same_draws(nanogpt(dropout=0.4, flash=flash), loss)


@pytest.mark.parametrize("kind", ["GPTModel", "GPTModelFast"])
def test_the_books_dropout_stays_where_it_is(kind):
    assert_the_same_draws(book(kind, drop_rate=0.4))


def assert_the_same_draws(model, loss=False):
    """On the fallback dropout asks torch's generator for the same numbers in the same order."""
    model.double().train()
    idx, targets = batch(9)

    def losses():
        torch.manual_seed(5)
        return torch.stack([logits_and_loss(model, idx, targets)[1] for _ in range(3)])

    before = losses()
    assert before.std() > 0
    assert all(row.now for row in accelerate(model, loss=loss, backend="torch").rows), (
        "none was left for drawing otherwise"
    )
    torch.testing.assert_close(losses(), before, rtol=1e-6, atol=0)
    model.eval()
    assert torch.equal(losses(), losses()[[1, 2, 0]])


def test_restore_undoes_all_of_it(family):
    model, (idx, targets) = family(), batch(9)
    attributes = {name: dict(module.__dict__) for name, module in model.named_modules()}
    before = results(model, idx, targets)
    accelerate(model)
    restore(model)
    assert {name: dict(module.__dict__) for name, module in model.named_modules()} == attributes
    after = results(model, idx, targets)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_the_object_stays_what_it_was(family):
    model = family().eval()
    model.register_forward_hook(lambda *_: None)
    parameters, keys, modules = list(model.parameters()), list(model.state_dict()), list(model.modules())
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    generator = torch.get_rng_state()
    accelerate(model)
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert list(model.state_dict()) == keys and not model.training and model._forward_hooks
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert not any(parameter.grad is not None for parameter in parameters)


def test_each_forward_says_what_it_takes(family):
    """transformers' Trainer and generate() look at it."""
    model, other = family(), family()
    accelerate(model, loss=True)
    for (name, module), theirs in zip(model.named_modules(), other.modules(), strict=True):
        ours, before = inspect.signature(module.forward).parameters, inspect.signature(theirs.forward).parameters
        assert list(ours) == list(before), name
        assert [p.kind for p in ours.values()] == [p.kind for p in before.values()]
        assert [p.default for p in ours.values()] == [p.default for p in before.values()]


def test_no_class_and_no_other_model_is_touched(family):
    model, other = family(), family()
    classes = {type(module) for module in model.modules()} | {nn.LayerNorm, nn.Linear, nn.Module}
    forwards = {kind: (kind.forward, kind.__call__, dict(vars(kind))) for kind in classes}
    accelerate(model)
    assert {kind: (kind.forward, kind.__call__, dict(vars(kind))) for kind in classes} == forwards
    assert not any("forward" in module.__dict__ for module in other.modules())


def test_twice_is_once(family):
    model = family()
    first = accelerate(model)
    forwards = {name: module.__dict__.get("fastgpt_swap") for name, module in model.named_modules()}
    assert accelerate(model) == first
    assert {name: module.__dict__.get("fastgpt_swap") for name, module in model.named_modules()} == forwards
    accelerate(model, attention=False, layer_norm=False)
    assert {module.fastgpt_swap.flag for module in model.modules() if hasattr(module, "fastgpt_swap")} == {"mlp"}


def pickled(model):
    return pickle.loads(pickle.dumps(model))


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, saved])
def test_copies_are_models_of_their_own(family, copied):
    model, (idx, targets) = family(), batch(9)
    report = accelerate(model)
    twin = copied(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()  # a copy that still ran on the old one's weights would show it
    expected = results(family(), idx, targets)
    actual = results(twin, idx, targets)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    assert accelerate(twin) == report
    restore(twin)
    assert all(torch.equal(a, b) for a, b in zip(results(twin, idx, targets).values(), expected.values(), strict=True))
    assert any("fastgpt_swap" in module.__dict__ for module in model.modules())


def test_the_report(family):
    model = family()
    report = accelerate(model)
    text = str(report)
    assert "x2" in text and "gelu_mlp" in text and "causal_attention" in text and "left" not in text
    assert len(text.splitlines()) < 10, "layers share a line"
    assert {row.name for row in report.rows if row.now} == {
        name for name, module in model.named_modules() if "fastgpt_swap" in module.__dict__
    }
    assert str(accelerate(nn.Linear(2, 2))) == "fastgpt recognised nothing in this model"


def test_accelerated_gives_back_what_it_found(family):
    model = family()
    with accelerated(model, mlp=False) as same:
        assert same is model and any("fastgpt_swap" in module.__dict__ for module in model.modules())
    assert not any("fastgpt_swap" in module.__dict__ or "forward" in module.__dict__ for module in model.modules())
    accelerate(model, attention=False)
    before = {name: module.__dict__.get("fastgpt_swap") for name, module in model.named_modules()}
    with pytest.raises(ZeroDivisionError), accelerated(model, mlp=False, backend="torch"):
        raise ZeroDivisionError
    assert {name: module.__dict__.get("fastgpt_swap") for name, module in model.named_modules()} == before


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        (dict(model=nn.Linear), TypeError, "model is a type, not an nn.Module"),
        (dict(backend="cuda"), ValueError, "backend is 'cuda', not 'auto', 'triton' or 'torch'"),
        (dict(attention="yes"), TypeError, "attention is 'yes', not True or False"),
        (dict(loss=None), TypeError, "loss is None, not True or False"),
    ],
)
def test_bad_arguments(arguments, kind, message):
    model = nanogpt()
    with pytest.raises(kind, match=message):
        accelerate(**{"model": model, **arguments})
    assert not any("fastgpt_swap" in module.__dict__ for module in model.modules())


def test_the_backend_is_handed_on():
    model, (idx, targets) = nanogpt(), batch(5)
    accelerate(model, backend="triton")
    with pytest.raises(ValueError, match="backend='triton' can't be had"):
        model(idx, targets)


# Single modules


@pytest.mark.parametrize("approximate", ["tanh", "none"])
@pytest.mark.parametrize("bias", [True, False])
def test_any_layer_norm_and_linear_gelu_linear(approximate, bias):
    class Vision(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(24, eps=1e-3, bias=bias)
            gelu = nn.GELU(approximate)
            self.mlp = nn.Sequential(nn.Linear(24, 40, bias=bias), gelu, nn.Linear(40, 24, bias=bias), nn.Dropout(0.0))

        def forward(self, x):
            return self.mlp(self.norm(x))

    model = randomised(Vision())
    x = torch.randn(2, 3, 5, 24) * 0.03
    exact, before = copy.deepcopy(model).double()(x.double()), model(x)
    report = accelerate(model)
    assert [row.now for row in report.rows] == ["layer_norm", f"gelu_mlp ({approximate})"]
    assert_accurate(model(x), exact, before)


@pytest.mark.parametrize(
    ("module", "why"),
    [
        (nn.LayerNorm((3, 4)), "it normalises 2 axes"),
        (nn.LayerNorm(4, elementwise_affine=False), "it has no weight"),
        (nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)), "its activation, ReLU, is no GELU"),
        (nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 5)), "its output is 5 wide, its input 4"),
        (nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4), nn.GELU()), "this Sequential computes something else"),
    ],
)
def test_what_is_left_and_why(module, why):
    (row,) = accelerate(module).rows
    assert row.now is None and row.why == why
    assert f"left: {why}" in str(accelerate(module))
    assert "forward" not in module.__dict__


def test_modules_of_other_kinds_are_not_mentioned():
    model = nn.Sequential(nn.Conv2d(1, 1, 3), nn.BatchNorm2d(1), nn.MultiheadAttention(8, 2), nn.ReLU())
    assert accelerate(model).rows == ()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models(family, dtype):
    model = family()
    assert_as_before(model.to(dtype).float(), *batch(7))  # weights that both precisions hold
    restore(model)
    idx, _ = batch(7)
    with torch.no_grad():
        exact = logits_and_loss(copy.deepcopy(model).double(), idx, idx)[0]
        before = logits_and_loss(model.to(dtype), idx, idx)[0]
        accelerate(model)
        assert_accurate(logits_and_loss(model, idx, idx)[0], exact, before)


def test_autocast(family):
    model, (idx, targets) = family(), batch(7)
    exact = results(copy.deepcopy(model).double(), idx, targets)
    with torch.autocast("cpu", torch.bfloat16):
        before = results(model, idx, targets)
        accelerate(model)
        after = results(model, idx, targets)
    assert all(after[name].dtype == before[name].dtype for name in before)
    for names in (["logits"], ["loss"], [name for name, _ in model.named_parameters()]):
        theirs, ours = (
            torch.cat([(side[name].double() - exact[name]).flatten() for name in names]).norm()
            for side in (before, after)
        )
        assert ours <= 1.5 * theirs + 1e-3, names
