"""GPTConfig(fp8=…): which products of a training pass are of copies, by which scales, and what is left as it was."""

import copy
import math

import pytest
import torch

from bench.gates import feign
from fastgpt import GPT, GPTConfig, ops
from fastgpt.fp8 import Fp8
from fastgpt.training.optimizer import TrainingStep, adamw

SHAPE = dict(vocab_size=50, block_size=12, n_layer=2, n_head=2, n_embd=32)
MODES = pytest.mark.parametrize("mode", ["head", "forward", "all"])


def gpt(mode, **changes):
    torch.manual_seed(1)
    model = GPT(GPTConfig(**{**SHAPE, **changes}, fp8=mode, fp8_simulate=True)).train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def batch(rows=3):
    torch.manual_seed(2)
    return torch.randint(50, (rows, 12)), torch.randint(50, (rows, 12))


def gradients(model, *given):
    loss = model(*given)
    return [loss, *torch.autograd.grad(loss, list(model.parameters()))]


@pytest.fixture
def rounding_off(monkeypatch):
    for name in ("E4M3", "E5M2"):
        monkeypatch.setattr(ops.fp8, name, ops.fp8.Format(torch.float32, math.inf))


@MODES
@pytest.mark.parametrize(
    "changes",
    [dict(), dict(bias=False, tie=False), dict(gelu="none", n_inner=48), dict(activation_checkpointing="mlp"),
     dict(activation_checkpointing="block", residual="float32"), dict(window=4)],
    ids=str,
)  # fmt: skip
def test_with_rounding_off_nothing_is_changed(mode, changes, rounding_off, monkeypatch):
    """Every weight, bias and slot is where it belongs, with scales of the tensors themselves and with delayed ones."""
    monkeypatch.setattr(Fp8, "exact_passes", 1)
    plain, ours = gpt("none", **changes), gpt(mode, **changes)
    for _ in range(2):
        for wanted, found in zip(gradients(plain, *batch()), gradients(ours, *batch()), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


def test_each_mode_adds_products_to_the_one_before():
    """By what differs: the features of a forward, and which gradients, from those with one product of copies less."""
    models = {mode: gpt(mode) for mode in ("none", "head", "forward", "all")}
    features = {mode: model.features(batch()[0]) for mode, model in models.items()}
    assert torch.equal(features["head"], features["none"]) and torch.equal(features["all"], features["forward"])
    error = (features["forward"] - features["none"]).abs().max()
    assert 1e-3 < error < 0.5
    found = {mode: gradients(model, *batch()) for mode, model in models.items()}
    losses = [each[0].item() for each in found.values()]
    assert losses[2] == losses[3] and len(set(losses)) == 3 and max(losses) - min(losses) < 0.1
    last = [name for name, _ in models["none"].named_parameters()].index("h.1.mlp.c_proj.weight") + 1
    assert torch.equal(found["all"][last], found["forward"][last]), "the MLP's last gradient is of no gradient's copy"
    assert not torch.equal(found["all"][last - 2], found["forward"][last - 2])


@MODES
def test_evaluation_and_what_is_saved_are_as_ever(mode):
    ours, plain = gpt(mode), gpt("none").eval()
    ours(*batch())
    ours.eval()
    assert torch.equal(ours(*batch()), plain(*batch())) and torch.equal(ours(batch()[0]), plain(batch()[0]))
    assert ours.state_dict().keys() == plain.state_dict().keys()


def test_scales_are_of_the_tensors_first_and_then_of_the_passes_before(monkeypatch):
    model, idx, seen = gpt("all"), batch()[0], []
    made = ops.fp8.OnPyTorch.copy

    def noted(self, x, slot):
        found = made(self, x, slot)
        if slot is model.fp8.slots["ln_f"]:
            seen.append((float(x.abs().max()), float(found.scale)))
        return found

    monkeypatch.setattr(ops.fp8.OnPyTorch, "copy", noted)
    for number in range(40):
        with torch.no_grad():  # grows at first, then goes down
            model.ln_f.weight.mul_(1.5 if number < 12 else 0.7)
            model(idx, idx)
    for number, (amax, scale) in enumerate(seen):
        of = amax if number < 16 else max(amax for amax, _ in seen[number - 16 : number])
        assert 0.249 < of / scale / ops.fp8.E4M3.largest <= 0.5, number


def test_what_grows_past_its_scale_is_cut_off_and_training_goes_on(monkeypatch):
    monkeypatch.setattr(Fp8, "exact_passes", 1)
    model = gpt("all")
    model(*batch()).backward()
    with torch.no_grad():
        model.ln_f.weight.mul_(1000.0)
    losses = [model(*batch()) for _ in range(2)]
    assert all(loss.isfinite() for loss in losses)
    with torch.no_grad():
        truth = gpt("none")
        truth.load_state_dict(model.state_dict())
        assert abs(losses[1] - truth(*batch())) < 0.1 * truth(*batch()) and losses[0] < 0.1 * losses[1]


@MODES
def test_nan_in_an_activation_reaches_the_loss_and_no_later_one(mode, monkeypatch):
    monkeypatch.setattr(Fp8, "exact_passes", 1)
    model = gpt(mode)
    model(*batch()).backward()
    weight = model.h[0].ln_2.bias if mode != "head" else model.ln_f.bias
    for bad in (math.nan, math.inf):
        kept = weight.detach().clone()
        with torch.no_grad():
            weight[3] = bad
        assert model(*batch()).isnan()
        with torch.no_grad():
            weight.copy_(kept)
        assert model(*batch()).isfinite()


def test_nan_in_a_weight_reaches_the_loss():
    model = gpt("forward")
    with torch.no_grad():
        model.h[1].mlp.c_fc.weight[0, 0] = math.nan
    assert model(*batch()).isnan()


def test_a_model_of_zeros():
    """Magnitudes of 0 have a scale."""
    model = gpt("all")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    for _ in range(18):
        loss, *found = gradients(model, *batch())
    assert loss.item() == pytest.approx(math.log(50)) and all(each.isfinite().all() for each in found)


def test_a_part_with_a_hook_is_called():
    model, calls = gpt("all"), []
    handle = model.h[0].mlp.c_fc.register_forward_hook(lambda *_: calls.append("fc"))
    model(*batch()).backward()
    handle.remove()
    model(*batch()).backward()
    assert calls == ["fc"]


def test_autocast_and_float32_weights_or_halves():
    """Under autocast, and after .bfloat16(), whose magnitudes stay float32."""
    losses = {}
    for name in ("autocast", "halves"):
        model = gpt("all")
        model = model.bfloat16() if name == "halves" else model
        with torch.autocast("cpu", torch.bfloat16, enabled=name == "autocast"):
            for _ in range(18):
                loss = model(*batch())
                loss.backward()
        losses[name] = loss.item()
        assert {buffer.dtype for buffer in model.fp8.buffers()} == {torch.float32}
        assert all(p.grad.dtype == p.dtype and p.grad.isfinite().all() for p in model.parameters())
    assert losses["autocast"] == pytest.approx(losses["halves"], rel=0.02)


def test_a_copy_of_a_model_goes_on_as_it_does(monkeypatch):
    monkeypatch.setattr(Fp8, "exact_passes", 1)
    model = gpt("all")
    TrainingStep(model, adamw(model, 1e-2))(*batch())
    twin = copy.deepcopy(model)
    for _ in range(3):
        assert all(map(torch.equal, gradients(model, *batch()), gradients(twin, *batch())))


def test_made_on_meta_it_trains_once_it_has_weights():
    with torch.device("meta"):
        model = GPT(GPTConfig(**SHAPE, fp8="all", fp8_simulate=True))
    model.load_state_dict(gpt("none").state_dict(), assign=True)
    assert torch.equal(model.train()(*batch()), gpt("all")(*batch()))


@MODES
def test_without_the_hardware_it_says_what_is_missing(mode):
    model = GPT(GPTConfig(**SHAPE, fp8=mode)).train()
    with pytest.raises(ValueError, match=f"fp8='{mode}' can't be had: the weights are on cpu.*fp8_simulate=True"):
        model(*batch())
    model.eval()(*batch())


def test_cards_and_dtypes_that_have_no_such_matmuls():
    for capability, dtype, said in (
        (86, torch.bfloat16, "compute capability 8.6, matmuls of 8-bit floats need 8.9"),
        (89, torch.float32, r"is for training in bfloat16, these matmuls are in torch.float32"),
    ):
        with feign.card(capability), torch.device("cuda"):
            model = GPT(GPTConfig(**SHAPE, fp8="all")).to(dtype).train()
            with pytest.raises(ValueError, match=said):
                model(torch.zeros(1, 4, dtype=torch.int64))


def test_weights_that_are_no_ordinary_tensors():
    model = gpt("head", tie=False)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().as_subclass(Subclass))
    with pytest.raises(ValueError, match="fp8='head' needs ordinary weights, not "):
        model(*batch())


class Subclass(torch.Tensor):
    pass


@pytest.mark.parametrize(("field", "value"), [("n_embd", 24), ("n_inner", 40)])
def test_sizes_that_are_no_multiple_of_16(field, value):
    with pytest.raises(ValueError, match=f"fp8 needs a multiple of 16, {field} is {value}"):
        GPTConfig(**{**SHAPE, field: value}, fp8="forward")
    GPTConfig(**{**SHAPE, field: value})


def test_what_it_does_not_go_together_with(monkeypatch):
    model, function = gpt("all"), torch.func.functional_call
    with pytest.raises(RuntimeError, match=r"fp8='all' can't be had: a transform of torch\.func"):
        torch.func.grad(lambda p: function(model, p, batch()))(dict(model.named_parameters()))
    with pytest.raises(Exception, match=r"does not run under torch\.compile yet"):
        torch.compile(model, backend="eager", fullgraph=True)(*batch())
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with pytest.raises(RuntimeError, match=r"fp8='all' does not run under torch\.compile yet"):
        model(*batch())
