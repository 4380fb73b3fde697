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


# Sliding windows


def sliding(kind):
    """A tiny model of random weights whose layers see 7 tokens, all of them or some."""
    shape = dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4)
    shape |= dict(num_key_value_heads=2, max_position_embeddings=64, sliding_window=7, head_dim=8)
    more = {
        "Mistral": dict(),
        "Gemma2": dict(attn_logit_softcapping=None),
        "Gemma3": dict(layer_types=["sliding_attention", "sliding_attention", "full_attention"]),
        "Qwen2": dict(use_sliding_window=True, max_window_layers=1),
    }[kind]
    config = {"Gemma3": "Gemma3Text"}.get(kind, kind) + "Config"
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, config)(**shape, **more))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    model.set_attn_implementation("eager")
    return model.eval()  # in float64 eager attention's lowest number is float32's -inf, and padding becomes NaN


KINDS = ["Mistral", "Gemma2", "Gemma3", "Qwen2"]


@pytest.mark.parametrize("kind", KINDS)
def test_sliding_windows_through_the_door(kind, monkeypatch):
    """Longer than the window, padded and not: logits and gradients are eager attention's, and the window counts."""
    seen, attention = [], fastgpt.families.huggingface.ops.causal_attention
    record = lambda *args, **options: seen.append(options["window"]) or attention(*args, **options)  # noqa: E731
    monkeypatch.setattr(fastgpt.families.huggingface.ops, "causal_attention", record)
    model = sliding(kind)
    twin = door(model)
    idx, mask = torch.randint(1, VOCAB, (2, 20)), torch.ones(2, 20, dtype=torch.long)
    mask[0, :5] = 0
    for padding in (None, mask):
        seen.clear()
        got, expected = (results(each, idx, attention_mask=mask, use_cache=False) if padding is not None
                         else results(each, idx, use_cache=False) for each in (twin, model))  # fmt: skip
        assert len(seen) == 3 and 7 in seen
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cache", [True, False, "static"])
def test_generate_in_a_sliding_window(kind, cache):
    model = sliding(kind)
    idx, mask = torch.randint(1, VOCAB, (2, 12)), torch.ones(2, 12, dtype=torch.long)
    mask[0, :3] = 0
    options = dict(max_new_tokens=12, pad_token_id=0, eos_token_id=None, use_cache=bool(cache), attention_mask=mask)
    options |= dict(do_sample=False)
    if cache == "static":
        options.update(cache_implementation="static", disable_compile=True)
    assert torch.equal(door(model).generate(idx, **options), model.generate(idx, **options))


def test_a_second_prompt_in_a_sliding_window():
    model = sliding("Mistral")
    idx = torch.randint(1, VOCAB, (2, 20))
    found = []
    for each in (door(model), model):
        first = each(idx[:, :9], use_cache=True)
        found.append(each(idx[:, 9:], past_key_values=first.past_key_values).logits)
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4)


def test_a_window_of_a_call_that_asks_for_more_is_spelled_out():
    q, k, v = torch.randn(3, 2, 4, 9, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    seen = torch.ones(2, 9, dtype=torch.bool)
    seen[0, :2] = False
    attention = fastgpt.families.huggingface.attention_function
    for mask in (seen[:, None].expand(2, 3, 9), torch.ones(1, 3, 0, dtype=torch.bool)):
        expected, _ = attention(nn.Module(), q, k, v, mask)
        found, _ = attention(nn.Module(), q, k, v, mask, head_mask=torch.ones(4))
        torch.testing.assert_close(found[:, 2:], expected[:, 2:])


def test_a_soft_cap_is_refused_by_transformers_itself():
    """Gemma 2's own setting; no mask is at fault."""
    model = door(sliding("Gemma2"))
    for layer in model.model.layers:
        layer.self_attn.attn_logit_softcapping = 50.0
    with pytest.raises(ValueError, match="does not support `softcap`"):
        model(IDX)
