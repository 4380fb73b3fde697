"""nanoGPT's quirks: its return values, its loss, its GELU, and attention on a PyTorch that has no fused one."""

import copy

import pytest
import torch
from torch import nn

from tests.models import CONTEXT, VOCAB, nanogpt
from tests.swap.swapped import accelerate

IDX = torch.randint(0, VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("bias", [True, False])
def test_without_targets_it_returns_the_last_position_alone(bias):
    model = nanogpt(bias=bias).double()
    before = model(IDX)
    accelerate(model)
    logits, loss = model(IDX)
    assert logits.shape == (2, 1, VOCAB) and loss is None
    torch.testing.assert_close(logits, before[0], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("bias", [True, False])
def test_its_norms_are_replaced_whether_they_have_a_bias(bias):
    report = accelerate(nanogpt(bias=bias))
    norms = {row.name.rpartition(".")[2] for row in report.rows if row.now == "layer_norm"}
    assert norms == {"ln_1", "ln_2", "ln_f"}


@pytest.mark.parametrize("ignored", [0, 4, 18])
@pytest.mark.parametrize("flag", [False, True])
def test_the_loss_ignores_minus_one(flag, ignored):
    model, targets = nanogpt().double().train(), IDX.clone()
    targets.view(-1)[:ignored] = -1

    def found():
        model.zero_grad()
        logits, loss = model(IDX, targets)
        loss.backward()
        return logits, loss.detach(), [parameter.grad.clone() for parameter in model.parameters()]

    before = found()
    accelerate(model, loss=flag)
    after = found()
    assert (after[0] is None) == flag
    torch.testing.assert_close(after[1].double(), before[1], rtol=1e-6, atol=0, equal_nan=True)
    if ignored < 18:
        torch.testing.assert_close(after[2], before[2], rtol=1e-5, atol=1e-8)
    assert model.eval()(IDX, targets)[0] is not None, "evaluation may want them"


def test_a_whole_model_of_another_form_keeps_its_loss():
    model = nanogpt()
    kind = type(model)

    def doubled(self, idx, targets=None):
        return tuple(2 * x for x in kind.forward(self, idx, targets))

    model.__class__ = type("GPT", (kind,), {"forward": doubled})
    report = accelerate(model.train(), loss=True)
    assert next(row.why for row in report.rows if row.why) == "this GPT computes something else"
    assert model(IDX, IDX)[0] is not None


def test_a_head_of_another_kind_keeps_its_logits():
    model = nanogpt()
    expected = model(IDX, IDX)
    model.lm_head = nn.Sequential(model.lm_head, nn.Identity())
    report = accelerate(model.train(), loss=True)
    assert report.rows[0].why == "loss=True was asked for, and it holds no model that computes its own loss"
    torch.testing.assert_close(model(IDX, IDX), expected)


def test_a_loss_that_is_not_there_is_reported():
    report = accelerate(nn.Sequential(nn.LayerNorm(4)), loss=True)
    assert report.rows[0].why == "loss=True was asked for, and it holds no model that computes its own loss"


@pytest.mark.parametrize("gelu", [nn.GELU(), nn.GELU("tanh"), nn.ReLU()])
def test_the_gelu_is_read_from_the_module(gelu):
    model = nanogpt().double()
    for block in model.transformer.h:
        block.mlp.gelu = gelu
    before = model(IDX, IDX)
    report = accelerate(model)
    torch.testing.assert_close(model(IDX, IDX), before, rtol=1e-9, atol=1e-10)
    kinds = {row.now or row.why for row in report.rows if row.name.endswith("mlp")}
    expected = "its activation, ReLU, is no GELU" if isinstance(gelu, nn.ReLU) else f"gelu_mlp ({gelu.approximate})"
    assert kinds == {expected}


@pytest.mark.parametrize("flash", [True, False])
@pytest.mark.parametrize("time", [1, 2, CONTEXT])
def test_either_attention_at_every_length(flash, time):
    model = nanogpt(flash=flash).double()
    idx = torch.randint(0, VOCAB, (3, time))
    before = model(idx, idx)
    report = accelerate(model)
    assert all(row.now for row in report.rows) and len(report.rows) == 11
    torch.testing.assert_close(model(idx, idx), before, rtol=1e-9, atol=1e-10)


def test_a_hook_that_watches_the_attentions_weights_sees_them():
    model, seen = nanogpt(flash=False), []
    accelerate(model)
    model.transformer.h[0].attn.attn_dropout.register_forward_hook(
        lambda module, args, output: seen.append(output.shape)
    )
    model(IDX)
    assert seen == [(2, 4, 9, 9)]


def test_what_the_model_refuses_it_still_refuses():
    for flag in (False, True):
        model = copy.deepcopy(nanogpt()).train()
        accelerate(model, loss=flag)
        with pytest.raises(AssertionError):
            model(torch.zeros(1, CONTEXT + 1, dtype=torch.long), torch.zeros(1, CONTEXT + 1, dtype=torch.long))


def test_crop_and_retie_after_accelerate():
    """nanoGPT's crop_block_size and a resized head work on parameters; the forward reads them at each call."""
    model, expected = nanogpt(flash=False).double(), nanogpt(flash=False).double()
    accelerate(model)
    for m in (model, expected):
        m.config.block_size = 12
        m.transformer.wpe.weight = nn.Parameter(m.transformer.wpe.weight[:12])
        for block in m.transformer.h:
            block.attn.bias = block.attn.bias[:, :, :12, :12]
            block.ln_1.weight = nn.Parameter(block.ln_1.weight.detach() * 2)
    torch.testing.assert_close(model(IDX, IDX), expected(IDX, IDX), rtol=1e-9, atol=1e-10)
