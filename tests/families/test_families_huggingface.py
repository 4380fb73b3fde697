"""fastgpt/families/huggingface.py: transformers' own door for attention, attn_implementation="fastgpt"."""

import copy
import importlib
import json
import sys
import types

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers", reason="the extra `test` brings transformers")

import fastgpt.families.huggingface  # noqa: E402 (registers its attention)
from fastgpt import restore  # noqa: E402
from fastgpt.testing import assert_accurate  # noqa: E402
from tests.families.huggingface import IDX, attention_calls, padded, results  # noqa: E402
from tests.models import VOCAB, hugging_face  # noqa: E402
from tests.swap.swapped import accelerate  # noqa: E402


def door(model):
    twin = copy.deepcopy(model)
    twin.set_attn_implementation("fastgpt")
    return twin


@pytest.mark.parametrize("side", [None, "left", "right"])
def test_the_door_gives_sdpas_numbers(side, monkeypatch):
    calls = attention_calls(monkeypatch)
    idx, mask = padded(side) if side else (IDX, torch.ones_like(IDX))
    model = hugging_face(scale_attn_by_inverse_layer_idx=True).double()
    twin = door(model)
    assert "fastgpt_swap" not in twin.__dict__
    expected = results(model, idx, attention_mask=mask)
    torch.testing.assert_close(results(twin, idx, attention_mask=mask), expected, rtol=1e-9, atol=1e-10)
    assert calls == ["causal_attention"] * 2
    accelerate(twin)
    torch.testing.assert_close(results(twin, idx, attention_mask=mask), expected, rtol=1e-9, atol=1e-10)
    restore(twin)
    torch.testing.assert_close(results(twin, idx, attention_mask=mask), expected, rtol=1e-9, atol=1e-10)


def test_the_door_honours_every_other_mask():
    model = hugging_face().double()
    twin = door(model)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4], [0, 1, 0, 1, 2, 0, 1, 2, 3]])
    steps = torch.arange(9)
    band = ((steps <= steps[:, None]) & (steps > steps[:, None] - 3)).expand(2, 1, 9, 9)
    for more in (dict(position_ids=positions, use_cache=False), dict(attention_mask=band)):
        torch.testing.assert_close(twin(IDX, **more).logits, model(IDX, **more).logits, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("cache", [True, False, "static"])
@pytest.mark.parametrize("how", [dict(), dict(num_beams=3)], ids=["greedy", "beam"])
def test_generate_through_the_door(how, cache):
    model = hugging_face().double().eval()
    twin = door(model)
    idx, mask = padded("left")
    options = dict(max_new_tokens=6, pad_token_id=0, eos_token_id=None, use_cache=bool(cache), **how)
    if cache == "static":
        options.update(cache_implementation="static", disable_compile=True)
    assert torch.equal(
        twin.generate(idx, attention_mask=mask, **options), model.generate(idx, attention_mask=mask, **options)
    )


def test_a_second_prompt_through_the_door():
    model = hugging_face().double().eval()
    idx, mask = padded("left")
    found = []
    for each in (model, door(model)):
        for seen in (mask, None):
            first = each(idx[:, :4], attention_mask=None if seen is None else seen[:, :4], use_cache=True)
            found.append(each(idx[:, 4:], attention_mask=seen, past_key_values=first.past_key_values).logits)
    torch.testing.assert_close(found[2:], found[:2], rtol=1e-9, atol=1e-10)


def test_a_token_after_a_cache_without_a_mask():
    """One query sees all keys; only of several, where there are more keys, are those past them a cache's empty ones."""
    model = hugging_face().double().eval()
    found = []
    for each in (model, door(model)):
        cache, logits = None, []
        for begin, end in ((0, 4), (4, 5), (5, 6), (6, 9)):
            out = each(IDX[:, begin:end], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            logits.append(out.logits)
        found.append(torch.cat(logits, dim=1))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(found[0], model(IDX).logits, rtol=1e-9, atol=1e-10)


def test_the_door_serves_grouped_heads():
    shape = dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    config = transformers.LlamaConfig(**shape, num_key_value_heads=2, max_position_embeddings=32)
    model = transformers.LlamaForCausalLM(config).double().eval()
    idx, mask = padded("left")
    twin = door(model)
    torch.testing.assert_close(
        twin(idx, attention_mask=mask).logits[mask == 1], model(idx, attention_mask=mask).logits[mask == 1]
    )


def test_the_door_in_half_precision():
    model = hugging_face()
    exact, before = copy.deepcopy(model).double()(IDX).logits, model.bfloat16()(IDX).logits
    assert_accurate(door(model)(IDX).logits, exact, before)


def test_from_config_and_the_saved_config_know_the_door(tmp_path):
    model = door(hugging_face())
    model.save_pretrained(tmp_path)
    assert "fastgpt" not in json.loads((tmp_path / "config.json").read_text()).values()
    loaded = transformers.GPT2LMHeadModel.from_pretrained(tmp_path, attn_implementation="fastgpt")
    assert loaded.config._attn_implementation == "fastgpt"
    assert torch.equal(loaded(IDX).logits, model.eval()(IDX).logits)


def test_the_door_honours_a_call_that_asks_for_more():
    """A padding mask of (B, Tk) is spelled out for transformers' own function."""
    q, k, v = torch.randn(3, 2, 4, 7, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    seen = torch.ones(2, 7, dtype=torch.bool)
    seen[0, 5:] = False
    attention = fastgpt.families.huggingface.attention_function
    expected, _ = attention(nn.Module(), q, k, v, seen)
    found, _ = attention(nn.Module(), q, k, v, seen, head_mask=torch.ones(4))
    torch.testing.assert_close(found[0, :5], expected[0, :5])
    torch.testing.assert_close(found[1], expected[1])


def test_the_door_reads_a_static_cache_as_far_as_it_is_filled():
    q, k, v = torch.randn(3, 2, 4, 7, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    attention = fastgpt.families.huggingface.attention_function
    expected, _ = attention(nn.Module(), q[:, :, :5], k[:, :, :5], v[:, :, :5], None)
    assert torch.equal(attention(nn.Module(), q[:, :, :5], k, v, None)[0], expected)


def test_an_old_transformers_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers.masking_utils", types.ModuleType("transformers.masking_utils"))
    monkeypatch.delitem(sys.modules, "fastgpt.families.huggingface")
    with pytest.raises(ImportError, match=r"needs transformers 4\.53 or newer"):
        importlib.import_module("fastgpt.families.huggingface")


def test_attention_sinks_are_refused():
    q = torch.randn(2, 4, 7, 8)
    with pytest.raises(ValueError, match="no attention sinks"):
        fastgpt.families.huggingface.attention_function(nn.Module(), q, q, q, None, s_aux=torch.ones(4))
