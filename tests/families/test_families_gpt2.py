"""Hugging Face's GPT-2: its flags, activations, masks, caches and trainer."""

import copy

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="the extra `test` brings transformers")

from transformers.activations import ACT2FN  # noqa: E402

import fastgpt  # noqa: E402
from fastgpt import restore  # noqa: E402
from fastgpt.swap import gpt2  # noqa: E402
from fastgpt.swap.layers import gelu_kind  # noqa: E402
from tests.families.huggingface import IDX, assert_as_before, attention_calls, padded  # noqa: E402
from tests.models import VOCAB, hugging_face  # noqa: E402
from tests.swap.swapped import accelerate  # noqa: E402


@pytest.mark.parametrize("name", sorted(ACT2FN))
def test_every_activation_it_offers(name):
    left = assert_as_before(hugging_face(activation_function=name, n_layer=1), IDX)
    gelus = {"gelu", "gelu_accurate", "gelu_fast", "gelu_new", "gelu_python", "gelu_python_tanh", "gelu_pytorch_tanh"}
    assert bool(left) == (name not in gelus)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("gelu_new", "tanh"), ("gelu_fast", "tanh"), ("gelu", "none"), ("gelu_10", None), ("quick_gelu", None)],
)
def test_the_gelu_is_read_from_its_values(name, kind):
    assert gelu_kind(ACT2FN[name]) == kind


@pytest.mark.parametrize("scale_attn_weights", [True, False])
@pytest.mark.parametrize("by_layer", [True, False])
def test_scale_flags(scale_attn_weights, by_layer, monkeypatch):
    calls = attention_calls(monkeypatch)
    flags = dict(scale_attn_weights=scale_attn_weights, scale_attn_by_inverse_layer_idx=by_layer)
    assert not assert_as_before(hugging_face(**flags), IDX, calls=calls)
    assert calls == ["causal_attention_qkv"] * 2


@pytest.mark.parametrize("upcast", [False, True])
def test_eager_attention_is_left_to_itself(upcast, monkeypatch):
    """It was asked for because it returns the attention's weights, or upcasts and reorders."""
    calls = attention_calls(monkeypatch)
    model = hugging_face(attn_implementation="eager", reorder_and_upcast_attn=upcast)
    if upcast:  # it insists on float32
        before = model(IDX).logits
        accelerate(model)
        calls.clear()
        torch.testing.assert_close(model(IDX).logits, before, rtol=1e-4, atol=1e-5)
    else:
        assert_as_before(model, IDX, calls=calls)
    weights = model(IDX, output_attentions=True).attentions
    assert len(weights) == 2 and weights[0].shape == (2, 4, 9, 9) and not calls
    model.set_attn_implementation("sdpa")
    model(IDX)
    assert calls, "decided at each forward"


def test_reorder_and_upcast_changes_nothing_under_sdpa():
    assert not assert_as_before(hugging_face(reorder_and_upcast_attn=True), IDX)


@pytest.mark.parametrize("option", [dict(n_inner=100), dict(layer_norm_epsilon=1e-2), dict(n_embd=36, n_head=3)])
def test_shapes_and_eps(option):
    assert not assert_as_before(hugging_face(**option), IDX)


def test_conv1d_weights_are_not_copied():
    model = hugging_face()
    accelerate(model)
    seen = []
    real = gpt2.ops.gelu_mlp
    try:
        gpt2.ops.gelu_mlp = lambda x, *weights, **kwargs: (seen.append(weights), real(x, *weights, **kwargs))[1]
        model(IDX)
    finally:
        gpt2.ops.gelu_mlp = real
    mlp = model.transformer.h[0].mlp
    assert seen[0][0].data_ptr() == mlp.c_fc.weight.data_ptr() and seen[0][0].stride() == (1, mlp.c_fc.nf)
    assert seen[0][2].data_ptr() == mlp.c_proj.weight.data_ptr()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("positions", [False, True])
def test_padding(side, positions, monkeypatch):
    calls = attention_calls(monkeypatch)
    idx, mask = padded(side)
    more = dict(position_ids=(mask.cumsum(-1) - 1).clamp(min=0)) if positions else {}
    assert not assert_as_before(hugging_face(), idx, attention_mask=mask, calls=calls, **more)
    assert calls == ["causal_attention_qkv"] * 2, "no (B, 1, T, T) mask was needed"


def test_packed_documents_and_masks_of_four_axes(monkeypatch):
    """What is more than causal and padding goes transformers' own way."""
    calls = attention_calls(monkeypatch)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4], [0, 1, 0, 1, 2, 0, 1, 2, 3]])
    assert not assert_as_before(hugging_face(), IDX, position_ids=positions, use_cache=False, calls=calls)
    assert not calls
    steps = torch.arange(9)
    band = ((steps <= steps[:, None]) & (steps > steps[:, None] - 3)).expand(2, 1, 9, 9)
    assert not assert_as_before(hugging_face(), IDX, attention_mask=band, calls=calls)
    assert not calls


def test_embeddings_token_types_and_hidden_states():
    model = hugging_face().double()
    embeds = torch.randn(2, 9, 48, dtype=torch.float64)
    before = [model(inputs_embeds=embeds), model(IDX, token_type_ids=IDX), model(IDX, output_hidden_states=True)]
    accelerate(model)
    after = [model(inputs_embeds=embeds), model(IDX, token_type_ids=IDX), model(IDX, output_hidden_states=True)]
    for a, b in zip(after, before, strict=True):
        torch.testing.assert_close(a.logits, b.logits, rtol=1e-9, atol=1e-10)
    for a, b in zip(after[2].hidden_states, before[2].hidden_states, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(model(IDX, return_dict=False)[0], before[2].logits, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("asked", [{"output_hidden_states": True}, {}], ids=["in the call", "in the config"])
def test_hidden_states_are_the_sums(asked):
    """Asked for the first time after accelerate: transformers hooks the blocks then."""
    before = hugging_face().double()(IDX, output_hidden_states=True).hidden_states
    model = hugging_face(output_hidden_states=not asked).double()
    accelerate(model)
    for ours, theirs in zip(model(IDX, **asked).hidden_states, before, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


def test_cross_attention_is_left_alone():
    model = hugging_face(add_cross_attention=True, n_layer=1).double()
    memory = torch.randn(2, 4, 48, dtype=torch.float64)
    left = assert_as_before(model, IDX, encoder_hidden_states=memory)
    assert left == {"transformer.h.0.crossattention": "it is cross-attention"}
    restore(model)
    assert_as_before(model, IDX)  # and without a memory


@pytest.mark.parametrize(
    "kind", ["GPT2ForSequenceClassification", "GPT2ForTokenClassification", "GPT2DoubleHeadsModel"]
)
def test_its_other_models(kind):
    config = hugging_face(pad_token_id=0).config
    torch.manual_seed(0)
    model = getattr(transformers, kind)(config).double().eval()
    idx, mask = padded("right")
    before = model(idx, attention_mask=mask).logits
    assert all(row.now for row in accelerate(model).rows)
    torch.testing.assert_close(model(idx, attention_mask=mask).logits, before, rtol=1e-9, atol=1e-10)


# generate()


@pytest.fixture(scope="module")
def generators():
    """The same model before and after, in float64, so that no tie decides."""
    before = hugging_face(n_layer=2).double().eval()
    after = copy.deepcopy(before)
    accelerate(after, loss=True)
    return before, after


@pytest.mark.parametrize("cache", [True, False, "static"])
@pytest.mark.parametrize(
    "how",
    [dict(), dict(num_beams=3), dict(do_sample=True, top_k=20, temperature=1.5), dict(num_beams=2, do_sample=True)],
    ids=["greedy", "beam", "sampled", "sampled beams"],
)
@pytest.mark.parametrize("side", [None, "left"])
def test_generate_gives_the_same_tokens(generators, how, cache, side):
    if cache == "static" and how:
        how = {**how, "max_new_tokens": 4}
    idx, mask = padded("left") if side else (IDX, torch.ones_like(IDX))
    options = dict(max_new_tokens=8, pad_token_id=0, eos_token_id=None, use_cache=bool(cache), **{})
    options.update(how)
    if cache == "static":
        options.update(cache_implementation="static", disable_compile=True)
    tokens = []
    for model in generators:
        torch.manual_seed(4)
        tokens.append(model.generate(idx, attention_mask=mask, **options))
    assert tokens[0].shape[1] > idx.shape[1] and torch.equal(*tokens)


def test_a_left_padded_batch_generates_what_each_prompt_alone_does(generators):
    _, model = generators
    idx, mask = padded("left")
    together = model.generate(idx, attention_mask=mask, max_new_tokens=6, pad_token_id=0, eos_token_id=None)
    for row in range(3):
        alone = idx[row : row + 1, mask[row] == 1]
        tokens = model.generate(alone, max_new_tokens=6, pad_token_id=0, eos_token_id=None)
        assert torch.equal(tokens[0, alone.shape[1] :], together[row, 7:])


def test_a_second_prompt_over_a_cache(generators):
    """Several tokens after several cached ones, padded: causal is aligned at the end."""
    idx, mask = padded("left")
    found = []
    for model in generators:
        first = model(idx[:, :4], attention_mask=mask[:, :4], use_cache=True)
        second = model(idx[:, 4:], attention_mask=mask, past_key_values=first.past_key_values, use_cache=True)
        found.append(second.logits)
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-10)


# The rest of its world


@pytest.mark.parametrize("loss", [False, True])
def test_its_trainer_runs_an_epoch(tmp_path, loss):
    pytest.importorskip("accelerate", reason="the extra `test` brings accelerate, which the Trainer asks for")
    data = [dict(input_ids=row, labels=row) for row in torch.randint(1, VOCAB, (12, 8))]
    losses = []
    for accelerates in (False, True):
        model = hugging_face(n_layer=1)
        if accelerates:
            accelerate(model, loss=loss)
        arguments = transformers.TrainingArguments(
            str(tmp_path), per_device_train_batch_size=4, num_train_epochs=1, logging_steps=1, save_strategy="no",
            report_to=[], use_cpu=True, disable_tqdm=True, seed=1, gradient_accumulation_steps=1,
        )  # fmt: skip
        trainer = transformers.Trainer(model=model, args=arguments, train_dataset=data, eval_dataset=data)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        losses[-1].append(trainer.evaluate()["eval_loss"])
    assert len(losses[0]) == 4
    torch.testing.assert_close(torch.tensor(losses[1]), torch.tensor(losses[0]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("order", ["adapter first", "accelerate first"])
def test_a_peft_adapter_still_gets_its_gradients(order):
    peft = pytest.importorskip("peft", reason="the extra `test` brings peft")
    config = peft.LoraConfig(
        r=4, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True, init_lora_weights=False
    )

    def adapted(model):
        torch.manual_seed(2)
        return peft.get_peft_model(model, config).double()

    expected = results_of_adapters(adapted(hugging_face()))
    model = hugging_face()
    if order == "accelerate first":
        accelerate(model)
    model = adapted(model)
    if order == "adapter first":
        assert not [
            row.why for row in accelerate(model).rows if row.name.endswith(("ln_1", "ln_2", "ln_f")) and row.why
        ]
    actual = results_of_adapters(model)
    assert len(expected) == 1 + 2 * 2 * 4
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)


def results_of_adapters(model):
    logits = model(IDX).logits
    logits.square().mean().backward()
    return {"logits": logits.detach(), **{n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}}


def test_save_pretrained_writes_the_same_files(tmp_path):
    model = hugging_face()
    model.save_pretrained(tmp_path / "before")
    accelerate(model)
    model.save_pretrained(tmp_path / "after")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "after" / name).read_bytes() == (tmp_path / "before" / name).read_bytes()


@pytest.mark.parametrize("where", ["config", "module"])
def test_attention_that_looks_ahead_is_left_to_itself(where, monkeypatch):
    calls = attention_calls(monkeypatch)
    model = hugging_face().double()
    for holder in [model.config] if where == "config" else [block.attn for block in model.transformer.h]:
        holder.is_causal = False
    assert_as_before(model, IDX, calls=calls)
    assert calls == []


@pytest.mark.parametrize("where", ["config", "module"])
def test_attention_that_looks_ahead_only_later(where):
    model = hugging_face().double()
    twin = copy.deepcopy(model)
    accelerate(twin)
    for each in (model, twin):
        for holder in [each.config] if where == "config" else [block.attn for block in each.transformer.h]:
            holder.is_causal = False
    torch.testing.assert_close(twin(IDX).logits, model(IDX).logits, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("asked", [dict(is_causal=False), dict(output_attentions=True)], ids=str)
def test_a_call_of_attention_that_asks_for_more_is_left_to_itself(asked, monkeypatch):
    model = hugging_face().double()
    x = torch.randn(2, 7, 48, dtype=torch.float64)
    attn = model.transformer.h[0].attn
    expected = attn(x, **asked)
    accelerate(model)
    calls = attention_calls(monkeypatch)
    torch.testing.assert_close(attn(x, **asked)[0], expected[0])
    assert calls == []
    attn(x, is_causal=True)
    assert calls == ["causal_attention_qkv"]


@pytest.mark.interpreter
def test_what_the_cache_keeps_has_its_gradient_too():
    """qkv's bias gets that of attention alone from its kernels: not where the keys go elsewhere as well."""
    pytest.importorskip("triton", reason="Triton is not to be had on this platform")
    model = hugging_face(n_layer=1).double().train()
    found = []
    for swapped in (False, True):
        if swapped:
            accelerate(model)
        model.zero_grad()
        out = model(IDX, use_cache=True)
        (out.logits.square().mean() + out.past_key_values.layers[0].keys.square().mean()).backward()
        found.append(model.transformer.h[0].attn.c_attn.bias.grad.clone())
    torch.testing.assert_close(found[1], found[0], rtol=1e-8, atol=1e-10)


def test_generation_needs_no_encoder():
    with pytest.raises(ValueError, match="this GPT2LMHeadModel has cross-attention, and no encoder is given"):
        fastgpt.generate(hugging_face(add_cross_attention=True), IDX, 3)


# A subclass that asks for more


def test_a_mask_for_all_rows_alike(generators):
    idx = IDX[:, :5]
    found = []
    for model in generators:
        past = model(idx[:, :4], use_cache=True).past_key_values
        seen = torch.tensor([True, False, True, True, True])[None, None, None]
        found.append(model(idx[:, 4:], attention_mask=seen, past_key_values=past).logits)
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-10)


def test_a_mask_that_is_not_as_wide_as_the_cache(generators):
    for model in generators:
        past = model(IDX[:, :4], use_cache=True).past_key_values
        with pytest.raises((ValueError, RuntimeError)):
            model(IDX[:, 4:5], attention_mask=torch.ones(2, 1, 1, 3, dtype=torch.bool), past_key_values=past)
