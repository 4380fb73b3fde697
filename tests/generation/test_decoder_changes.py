"""A Decoder of a model that has changed since: other weights, other parts."""

import pytest
import torch
from torch import nn

from fastgpt import GPT, generate
from fastgpt.generation.decoder import Decoder
from fastgpt.generation.evaluation import evaluate
from tests import models
from tests.generation.small_gpt import FAMILIES, PROMPT, gpt, varied


def fused(parameters, lr):  # it counts nothing in the parameters' versions
    return torch.optim.AdamW(parameters, lr, fused=True)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW, fused])
@pytest.mark.parametrize("family", ["fastgpt", "hugging face", "book"])
def test_a_decoder_is_no_longer_that_of_a_model_that_was_trained(family, optimizer):
    model = FAMILIES[family]()
    for options in (dict(tokens=10_000), dict(dtype=torch.bfloat16)):
        decoder = Decoder(model, **options)
        generate(decoder, PROMPT, 2)
        loss = model(PROMPT).sum() if isinstance(model, GPT) else models.logits_and_loss(model, PROMPT, PROMPT)[1]
        loss.backward()
        optimizer(model.parameters(), lr=0.1).step()
        with pytest.raises(ValueError, match="has changed since"):
            generate(decoder, PROMPT, 2)
        with pytest.raises(ValueError, match="has changed since"):
            evaluate(decoder, PROMPT[0].numpy())
    decoder = Decoder(gpt())
    with torch.no_grad():
        decoder.anatomy.head.weight.zero_()
    assert generate(decoder, PROMPT, 2, temperature=0).tokens == [[0, 0]]  # the model's own, as it is now


def assign(model, other):
    model.load_state_dict(other, assign=True)


def copy_through_data(model, other):
    for name, parameter in model.named_parameters():
        parameter.data.copy_(other[name])


def halve(model, other):
    model.half()


def replace_a_norms_weight(model, other):
    model.h[0].ln_1.weight = nn.Parameter(other["h.0.ln_1.weight"])


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("change", [assign, copy_through_data, halve, replace_a_norms_weight])
def test_a_decoder_of_weights_that_were_replaced(dtype, change):
    model = gpt(128)
    decoder = Decoder(model, dtype=dtype)
    generate(decoder, PROMPT, 2)
    change(model, gpt(128).state_dict())
    if dtype is None and change is copy_through_data:  # the tensors are the same, and so are the tokens
        assert generate(decoder, PROMPT, 4, temperature=0) == generate(model, PROMPT, 4, temperature=0)
        return
    with pytest.raises(ValueError, match="has changed since"):
        generate(decoder, PROMPT, 2)


@pytest.mark.parametrize("family", ["fastgpt", "hugging face", "nanogpt"])
def test_a_bias_alone_that_was_written_to(family):
    model = varied(FAMILIES[family]() if family != "nanogpt" else models.nanogpt(block_size=128))
    decoder = Decoder(model, dtype=torch.bfloat16)
    bias = next(p for name, p in model.named_parameters() if name.endswith("c_proj.bias"))
    torch.nn.init.zeros_(bias)
    with pytest.raises(ValueError, match="has changed since"):
        generate(decoder, PROMPT, 2)


def drop_a_bias(model):
    model.h[0].attn.c_proj.bias = None


def write_its_last_rows(model):
    model.lm_head.weight.data[-2:] = 9


def put_another_head(model):
    model.lm_head = nn.Linear(16, 13, bias=False)


def hook_a_layer(model):
    model.h[1].mlp.c_fc.register_forward_hook(lambda module, args, output: 2 * output)


def adapt(model):
    peft = pytest.importorskip("peft", reason="the extra `test` brings peft")
    peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["c_attn"], init_lora_weights=False))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("change", [drop_a_bias, write_its_last_rows, put_another_head, hook_a_layer, adapt])
def test_a_decoder_of_a_model_whose_parts_have_changed(change, dtype):
    model = gpt(128, tie=False)
    decoder = Decoder(model, dtype=dtype)
    generate(decoder, PROMPT, 2)
    change(model)
    if change is write_its_last_rows and dtype is None:  # they are shared
        assert generate(decoder, PROMPT, 4, temperature=0) == generate(model, PROMPT, 4, temperature=0)
        return
    with pytest.raises(ValueError, match="has changed since"):
        generate(decoder, PROMPT, 2)
