"""A live model made ready: layouts and dtypes, parts that must be called, and models that can't be served."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from fastgpt import GPT, generate
from fastgpt.generation import stream
from fastgpt.generation.cache import Prompts, Step
from fastgpt.generation.decoder import Decoder
from fastgpt.ops import autograd
from tests import models
from tests.generation.small_gpt import FAMILIES, PROMPT, gpt, recomputed, varied
from tests.generation.small_gpt import logits as own_logits


@pytest.fixture
def model():
    return gpt()


def test_a_model_that_has_only_some_of_the_books_parts():
    """It is one that nobody knows, not a book's that is broken."""
    model = nn.Module()
    model.trf_blocks = nn.Sequential(nn.Linear(2, 2))
    messages = []
    for each in (nn.Module(), model):
        with pytest.raises(ValueError, match="Module is not known") as error:
            Decoder(each)
        messages.append(str(error.value))
    assert messages[0] == messages[1]


def test_one_decoder_serves_many_calls(model):
    decoder = Decoder(model, tokens=10_000)
    for prompt in (PROMPT, PROMPT[:, :1]):
        assert generate(decoder, prompt, 5, temperature=0) == generate(model, prompt, 5, temperature=0)


def test_bfloat16_weights(model):
    """The model's own bfloat16 copy gives the same tokens; the model stays as it is."""
    expected = generate(gpt_like(model).bfloat16(), PROMPT, 6, temperature=0)
    assert generate(model, PROMPT, 6, temperature=0, dtype=torch.bfloat16).tokens == expected.tokens
    with torch.autocast("cpu", torch.bfloat16):
        assert generate(model, PROMPT, 6, temperature=0).tokens == expected.tokens
    assert model.wte.weight.dtype == torch.float32


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [0, 300, 10_000])
def test_one_row_alone_is_decoded_as_in_a_batch(name, dtype, tokens):
    """As among two equal rows, and without a cache; and these are the model's own logits, as far as its dtype goes."""
    model = FAMILIES[name]() if dtype == torch.float16 else varied(FAMILIES[name]())  # whose numbers it does not hold
    decoder = Decoder(model.to(dtype), tokens=tokens)
    logits = []
    for rows in (1, 2):
        cache, ids = decoder.cache(rows, 9), PROMPT[:1].repeat(rows, 1)
        decoder.prefill(ids, torch.full((rows,), ids.shape[1]), cache)
        for new in range(3):
            length = ids.shape[1] + new + 1
            ids_now = torch.full((rows, 1), 5 + new)
            logits.append(decoder.decode(ids_now, torch.full((rows,), length), cache)[:1])
    whole = torch.cat([PROMPT[:1], torch.tensor([[5, 6, 7]])], dim=1)
    features = decoder.features(whole)[:, -3:]
    logits += [decoder.logits(features[:, i : i + 1]) for i in range(3)]
    expected = [own_logits(model, whole[:, : whole.shape[1] - 2 + i])[:, None] for i in range(3)]
    tolerance = {torch.bfloat16: 0.05, torch.float16: 0.01, torch.float32: 1e-4, torch.float64: 1e-10}[dtype]
    if "float32 stream" in name:
        tolerance = max(tolerance, 1e-6)  # what it rounds to
    coarser = max(4 * tolerance, 1e-6)  # the book's GELU rounds more
    for found, among, own in zip(logits[:3] * 2, logits[3:], expected * 2, strict=True):
        torch.testing.assert_close(found, among, rtol=0, atol=tolerance * among.abs().max().item())
        torch.testing.assert_close(found, own.to(found.dtype), rtol=0, atol=coarser * own.abs().max().item())


def test_a_gpts_own_features_with_a_cache(model):
    """In two passes as in one."""
    model.h[1].attn.scale = 0.7
    decoder = Decoder(model)
    ids = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
    whole, cache = model.features(ids), decoder.cache(2, 5)
    with torch.no_grad():
        first = model.features(ids[:, :3], cache=Prompts(decoder.steps, model.config.n_head, 2, 3, cache))
        step = Step(decoder.steps, cache, torch.tensor([5, 5]), 2)
        second = model.features(ids[:, 3:], positions=step.positions, cache=step)
    torch.testing.assert_close(torch.cat([first, second], dim=1), whole, rtol=1e-4, atol=1e-4)


def test_norms_of_two_dtypes_go_the_long_way(model):
    norm = model.bfloat16().ln_f
    norm.weight.data = norm.weight.data.float()
    assert len(generate(model, PROMPT, 4, temperature=0).tokens[0]) == 4


def test_queries_with_a_bias_and_keys_without():
    model = models.book(context_length=128, qkv_bias=True)
    for block in model.trf_blocks:
        block.att.W_key.bias = None
    model = varied(model)
    assert generate(model, PROMPT, 6, temperature=0).tokens == [recomputed(model, PROMPT[0].tolist(), 6, 128)]


@pytest.mark.parametrize("places", [("lm_head",), ("wte",), ("wpe",), ("lm_head", "wte")])
def test_what_is_called_is_called_in_eval_mode(places):
    model, modes = models.hugging_face().train(), []
    for place in places:
        module = model.lm_head if place == "lm_head" else getattr(model.transformer, place)
        module.register_forward_hook(lambda module, inputs, output: modes.append(module.training))
    generate(model, PROMPT, 5, temperature=0)
    assert len(modes) >= 6 and not any(modes) and model.training


@pytest.mark.parametrize(
    ("prompts", "options", "rows"), [(1, {}, [1]), (2, dict(num_samples=3), [6]), (1, dict(draft=1), [5, 1])]
)
def test_a_call_says_how_many_tokens_and_rows_it_writes(prompts, options, rows, model, monkeypatch):
    told = []
    plain = Decoder.__init__
    monkeypatch.setattr(
        Decoder, "__init__", lambda self, *a, **k: told.append((k["tokens"], k["rows"])) or plain(self, *a, **k)
    )
    if options.get("draft"):
        options = dict(draft=model)
    generate(model, PROMPT.repeat(prompts, 1), 5, **options)
    assert told == [(5, number) for number in rows]


def test_covers_are_taken_off(model):
    """torch.compile's, DistributedDataParallel's, and PEFT's, which hands its model on."""

    class Adapter(nn.Module):
        def get_base_model(self):
            return model

    expected = generate(model, PROMPT, 4, temperature=0)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for covered in (torch.compile(model), nn.parallel.DistributedDataParallel(model), Adapter()):
            assert generate(covered, PROMPT, 4, temperature=0) == expected
    finally:
        dist.destroy_process_group()


def test_a_part_that_must_be_called_keeps_its_dtype():
    model = FAMILIES["nanogpt"]()
    model.transformer.h[0].mlp.c_fc.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"dtype is torch\.bfloat16, but .*mlp.* must be called as it is"):
        generate(model, PROMPT, 4, dtype=torch.bfloat16)


def gpt_like(model):
    twin = GPT(model.config)
    twin.load_state_dict(model.state_dict())
    return twin


@pytest.mark.parametrize("family", ["fastgpt", "hugging face", "nanogpt", "book"])
def test_the_model_is_left_as_it_was(family):
    model = FAMILIES[family]().train()
    part = next(module for name, module in model.named_modules() if name.endswith("1.attn") or name.endswith("1.att"))
    part.eval()
    modes = [module.training for module in model.modules()]
    states = [(set(module.__dict__), set(module._buffers)) for module in model.modules()]
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    steps = stream(model, PROMPT, 6, seed=1)
    next(steps)
    assert [module.training for module in model.modules()] == modes, "while it runs, too"
    del steps
    assert generate(model, PROMPT, 6, seed=1).tokens == generate(model.eval(), PROMPT, 6, seed=1).tokens, "no dropout"
    assert [(set(module.__dict__), set(module._buffers)) for module in model.modules()] == states
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


# Parts that must be called, and models that can't be served.


def test_a_part_with_a_hook_is_called():
    model, calls = models.hugging_face(scale_attn_by_inverse_layer_idx=True), []
    plain = generate(model, PROMPT, 4, temperature=0).tokens

    def louder(module, inputs, output):
        calls.append(module)
        return output * 1.5

    parts = [model.transformer.h[0].attn.c_attn, model.transformer.h[0].mlp, model.transformer.h[1].ln_1]
    parts += [model.transformer.h[1].attn.c_proj, model.lm_head, model.transformer.wte]
    for part in parts:
        part.register_forward_hook(louder)
    assert generate(model, PROMPT, 4, temperature=0).tokens == [recomputed(model, PROMPT[0].tolist(), 4, 32)] != plain
    assert set(calls) == set(parts)


def test_parts_of_ones_own_are_called():
    """A norm and an MLP of classes that nothing knows."""

    class Scaled(nn.Module):
        def forward(self, x):
            return x / x.norm(dim=-1, keepdim=True)

    class Squared(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.proj = nn.Linear(48, 8), nn.Linear(8, 48)

        def forward(self, x):
            return self.proj(self.fc(x).relu().square())

    model = models.nanogpt()
    model.transformer.h[0].ln_1, model.transformer.h[1].mlp = Scaled(), models.randomised(Squared())
    assert generate(model, PROMPT, 6, temperature=0).tokens == [recomputed(model, PROMPT[0].tolist(), 6, 32)]


def test_a_dropout_of_ones_own_would_be_passed_by():
    model = models.nanogpt()
    model.transformer.h[1].mlp.dropout = nn.ReLU()
    model.transformer.h[1].attn.resid_dropout = nn.ReLU()
    with pytest.raises(ValueError, match=r"h\.1\.attn\.resid_dropout would be passed by, and it is no dropout"):
        generate(model, PROMPT, 4)


def test_a_hook_that_would_be_passed_by():
    model = models.nanogpt()
    model.transformer.h[1].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"transformer\.h\.1 would be passed by, and it has hooks"):
        generate(model, PROMPT, 4)


def test_a_model_of_another_form_is_refused():
    model = models.nanogpt()

    class Parallel(type(model.transformer.h[0])):
        def forward(self, x):
            return x + self.attn(self.ln_1(x)) + self.mlp(self.ln_2(x))

    model.transformer.h[1].__class__ = Parallel
    with pytest.raises(ValueError, match="this NanoGPT computes something else than its parts say: its logits are off"):
        generate(model, PROMPT, 4)


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (nn.Linear(3, 3), ValueError, "Linear is not known"),
        ("gpt2", TypeError, "model is a str, not an nn.Module"),
    ],
)
def test_no_model(model, error, message):
    with pytest.raises(error, match=message):
        generate(model, PROMPT, 4)


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("residual", ["compute", "float32"])
def test_few_rows_take_the_kernels_made_for_them(rows, residual, device, monkeypatch):
    """And give the steps' tokens all the same; more rows take the others."""
    pytest.importorskip("triton", reason="Triton is not to be had on this platform")

    calls = []
    few = autograd.few_norm_linear
    monkeypatch.setattr(autograd, "few_norm_linear", lambda *args: calls.append(1) or few(*args))
    model = gpt(32, backend="triton", residual=residual).to(device)
    fallback = gpt(32, backend="torch", residual=residual)
    fallback.load_state_dict({name: tensor.cpu() for name, tensor in model.state_dict().items()})
    prompts = [[3, 1, 4], [7], [1, 2], [5, 6, 7, 8], [9]][:rows]
    assert generate(model, prompts, 6, temperature=0).tokens == generate(fallback, prompts, 6, temperature=0).tokens
    assert len(calls) == (2 * 2 * 5 if rows == 1 else 0)  # of two layers, each token but the prompt's


def test_a_model_that_was_asked_for_its_hidden_states():
    """transformers leaves hooks on its blocks then, that do nothing."""
    model = FAMILIES["hugging face"]()
    expected = generate(model, PROMPT, 4, temperature=0)
    model(PROMPT, output_hidden_states=True)
    assert generate(model, PROMPT, 4, temperature=0) == expected
    model.transformer.h[0].register_forward_hook(lambda module, args, output: output)
    with pytest.raises(ValueError, match=r"transformer\.h\.0 would be passed by, and it has hooks"):
        generate(model, PROMPT, 4)


@pytest.mark.parametrize("without", ["lm_head", "transformer.wpe", "transformer.h.1.attn.c_attn"])
def test_a_model_that_lacks_a_part_is_not_known(without):
    model = models.nanogpt()
    parent, _, name = without.rpartition(".")
    delattr(model.get_submodule(parent), name)
    with pytest.raises(ValueError, match="NanoGPT is not known"):
        generate(model, PROMPT, 2)
