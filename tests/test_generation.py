import contextlib
import itertools

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastgpt import GPT, GPTConfig, accelerate, batch, generate, reference
from fastgpt.batch import Batch, Readback
from fastgpt.decoder import Decoder
from fastgpt.generation import _check_room, stream
from fastgpt.sampling import Sampling
from fastgpt.tokenizer import encoding
from tests import models
from tests.small_gpt import PROMPT, VOCABULARY, gpt, recomputed


@pytest.fixture
def model():
    return gpt()


# The same tokens as without a cache.

FAMILIES = {
    "fastgpt": lambda: gpt(128),
    "fastgpt, float32 stream, untied, no bias": lambda: gpt(128, residual="float32", tie=False, bias=False),
    "hugging face": lambda: models.hugging_face(n_positions=128, scale_attn_by_inverse_layer_idx=True),
    "nanogpt": lambda: models.nanogpt(block_size=128, bias=False),
    "book": lambda: models.book(context_length=128, drop_rate=0.1, qkv_bias=False),
    "book, fast": lambda: models.book("GPTModelFast", context_length=128),
    "book, cache": lambda: models.book(module="kv_cache.gpt2", context_length=128),
}


def varied(model):
    """The model with weights under which greedy tokens vary, so that a wrong one shows."""
    last = next(parameter for name, parameter in model.named_parameters() if "ln_f." in name or "final_norm." in name)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=2.0)
            else:
                norm_weight = name.endswith(("ln_1.weight", "ln_2.weight", "scale", "norm1.weight", "norm2.weight"))
                parameter.normal_(mean=float(norm_weight), std=0.1)
        last.fill_(0.2)
    return model


def likeliest(model, ids):
    """The likeliest token after each of ids, by one pass of the model's own forward, which has no cache."""
    model.eval()
    ids = torch.tensor([ids])
    with torch.no_grad():
        scores = model(ids) if isinstance(model, GPT) else models.logits_and_loss(model, ids, ids)[0]
    return scores[0].argmax(-1).tolist()


@pytest.mark.parametrize("accelerated", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_with_the_cache_is_greedy_without_it(family, accelerated):
    model = varied(FAMILIES[family]())
    if accelerated and not isinstance(model, GPT):
        accelerate(model)
    prompts = [torch.arange(n).mul(7).add(n).remainder(VOCABULARY).tolist() for n in (3, 17, 1, 9, 18, 5, 12)]
    together = generate(model, prompts, 110, temperature=0).tokens
    for prompt, tokens in zip(prompts, together, strict=True):
        assert likeliest(model, (prompt + tokens)[:-1])[len(prompt) - 1 :] == tokens
        assert len(tokens) == 110 and len(set(tokens)) > 3
    assert generate(model, prompts[1:2], 110, temperature=0).tokens == together[1:2]


def test_slide_forgets_the_oldest(model):
    prompts = [[3, 1, 4], [1], list(range(8))]
    assert generate(model, prompts, 30, temperature=0, overflow="slide").tokens == [
        recomputed(model, prompt, 30) for prompt in prompts
    ]


def test_slide_takes_a_prompt_longer_than_the_context(model):
    long = (torch.arange(20) % VOCABULARY).tolist()
    assert generate(model, [long], 3, temperature=0, overflow="slide").tokens == [recomputed(model, long, 3)]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_passed_over(model, side):
    ids, mask = torch.tensor([[5, 6, 7], [9, 9, 2]]), torch.tensor([[1, 1, 1], [0, 0, 1]])
    if side == "right":
        ids, mask = ids.flip(1), mask.flip(1)
    expected = generate(model, [ids[0].tolist(), [2]], 5, temperature=0).tokens
    assert generate(model, ids, 5, attention_mask=mask, temperature=0).tokens == expected


def test_streamed_is_whole(model):
    options = dict(num_samples=3, seed=5, logprobs=True, stop_ids=[2, 11], overflow="slide")
    whole, steps = generate(model, PROMPT, 20, **options), list(stream(model, PROMPT, 20, **options))
    assert whole.tokens == [list(itertools.chain(*(step.tokens[row] for step in steps))) for row in range(3)]
    assert whole.logprobs == [list(itertools.chain(*(step.logprobs[row] for step in steps))) for row in range(3)]
    assert list(whole.reasons) == steps[-1].reasons
    assert None in steps[0].reasons and all(len(tokens) == 1 for tokens in steps[0].tokens)
    assert len(set(map(len, whole.tokens))) > 1


def test_one_decoder_serves_many_calls(model):
    decoder = Decoder(model, many_tokens=True)
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
def test_bfloat16_weights_laid_out_for_rows(name):
    """Also where they lie transposed, as Hugging Face's."""
    model = FAMILIES[name]()
    ids = torch.tensor(PROMPT[:1])
    kept, laid_out = (Decoder(model, dtype=torch.bfloat16, many_tokens=many) for many in (False, True))
    assert all(layer.out.weight.is_contiguous() for layer in laid_out.layers)
    logits, expected = (decoder.logits(decoder.features(ids)) for decoder in (laid_out, kept))
    torch.testing.assert_close(logits, expected, rtol=0.05, atol=0.05)


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
    model, calls = models.hugging_face(), []
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


# Errors.

BYTES = encoding("byte")


@pytest.mark.parametrize(
    ("ids", "count", "options", "message"),
    [
        (PROMPT[0], 1, {}, r"ids has shape \(3,\), not \(B, T\)"),
        (PROMPT[:, :0], 1, {}, r"ids has shape \(1, 0\), not \(B, T\) with B and T at least 1"),
        ([], 1, {}, "there is no prompt"),
        ([[1], []], 1, {}, "prompt 1 is empty; begin with the end-of-text token"),
        (PROMPT, 1, {"attention_mask": torch.zeros(1, 3)}, "prompt 0 is empty"),
        (PROMPT, 1, {"attention_mask": torch.ones(1, 4)}, r"attention_mask has shape \(1, 4\)"),
        ([[1], [2, 13]], 1, {}, "token 13 at 1 of prompt 1 is outside a vocabulary of 13"),
        ([[-1]], 1, {}, "token -1 at 0 of prompt 0 is outside a vocabulary of 13"),
        (PROMPT, 0, {}, "max_new_tokens is 0, not at least 1"),
        (PROMPT, -2, {}, "max_new_tokens is -2, not at least 1"),
        (PROMPT, 1, {"num_samples": 0}, "num_samples is 0, not at least 1"),
        (PROMPT, 1, {"num_samples": 10**12}, r"1000000000000 rows of 3 tokens need about [\d,.]+ GiB, cpu has [\d,.]+"),
        (PROMPT, 1, {"temperature": -0.5}, "temperature is -0.5, not a finite number of at least 0"),
        (PROMPT, 1, {"temperature": float("nan")}, "temperature is nan, not a finite number"),
        (PROMPT, 1, {"temperature": float("inf")}, "temperature is inf, not a finite number"),
        (PROMPT, 1, {"top_k": 0}, "top_k is 0, not at least 1"),
        (PROMPT, 1, {"top_p": 0.0}, r"top_p is 0.0, not in \(0, 1\]"),
        (PROMPT, 1, {"top_p": 1.5}, r"top_p is 1.5, not in \(0, 1\]"),
        (PROMPT, 1, {"min_p": float("nan")}, r"min_p is nan, not in \[0, 1\]"),
        (PROMPT, 1, {"repetition_penalty": 0.0}, "repetition_penalty is 0.0, not a positive number"),
        (PROMPT, 1, {"vocab_size": 0}, "vocab_size is 0, not from 1 to the model's 13"),
        (PROMPT, 1, {"vocab_size": 14}, "vocab_size is 14, not from 1 to the model's 13"),
        (PROMPT, 1, {"encoding": BYTES}, "the encoding 'byte' has 257 ids, the model 13"),
        (PROMPT, 1, {"stop_strings": "x"}, "stop_strings need an encoding"),
        (PROMPT, 1, {"stop_strings": "", "encoding": BYTES}, "stop_strings holds '', not a string of at least one"),
        (PROMPT, 1, {"seed": 2**70}, "seed is 1180591620717411303424, not a 64-bit integer"),
        (PROMPT, 1, {"overflow": "wrap"}, "overflow is 'wrap', not 'error' or 'slide'"),
        (PROMPT, 7, {}, r"3 \+ 7 tokens pass the context of 8; overflow='slide' forgets the oldest"),
        ([[1] * 9], 1, {}, r"9 \+ 1 tokens pass the context of 8"),
        (PROMPT, 1, {"draft": "same", "draft_tokens": 16}, "draft_tokens is 16, not from 1 to 15"),
        (PROMPT, 1, {"draft": "same", "overflow": "slide"}, "overflow='slide' has no road with a draft"),
        (PROMPT, 1, {"draft": gpt(vocab_size=14)}, "the draft's vocabulary is 14, the model's 13"),
        (PROMPT, 5, {"draft": gpt(context=4)}, "the draft's context is 4, the model's 8"),
    ],
    ids=str,
)  # fmt: skip
def test_bad_argument_is_refused_by_the_call_itself(model, ids, count, options, message):
    if options.get("draft") == "same":
        options = {**options, "draft": model}
    with pytest.raises(ValueError, match=f"generate: {message}"):
        stream(model, ids, count, **options)


@pytest.mark.parametrize(
    ("ids", "options", "message"),
    [
        (PROMPT.float(), {}, "ids is torch.float32, not of integers"),
        ([["a"]], {}, "prompt 0 holds 'a'"),
        (PROMPT, {"stop_ids": ["a"]}, "stop_ids holds 'a', not an int"),
        (PROMPT, {"encoding": "gpt2"}, "encoding is a str, not a tiktoken.Encoding"),
        (PROMPT, {"dtype": torch.int8}, "dtype is torch.int8, not a floating-point one"),
    ],
)
def test_a_wrong_type_is_refused(model, ids, options, message):
    with pytest.raises(TypeError, match=f"generate: {message}"):
        stream(model, ids, 1, **options)


PLACES = {
    "wpe": lambda model: model.wpe.weight.data[5],
    "h.1.attn": lambda model: model.h[1].attn.c_attn.bias.data,
    "h.0.mlp": lambda model: model.h[0].mlp.c_fc.weight.data,
    "ln_f": lambda model: model.ln_f.weight.data,
}


@pytest.mark.parametrize("draft", [False, True])
@pytest.mark.parametrize("part", PLACES)
def test_logits_that_are_not_finite(model, part, draft):
    helper = gpt() if draft else None
    PLACES[part](model).fill_(float("inf") if part == "ln_f" else float("nan"))
    steps = stream(model, [[3, 1, 4], [2]], 5, draft=helper)
    with pytest.raises(
        ValueError, match=rf"logits at position {5 if part == 'wpe' else 2} are not finite, first in {part}$"
    ):
        list(steps)


def test_a_drafts_logits_that_are_not_finite(model):
    helper = gpt()
    helper.ln_f.weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="the draft's logits are not finite"):
        generate(model, [[3, 1, 4]], 4, draft=helper)


def test_a_row_that_has_ended_may_overflow_its_numbers(model):
    """A NaN past a row's stop is nobody's, while another row goes on."""
    prompts = [[3, 1, 4], [7]]
    expected = generate(model, prompts, 5, temperature=0, stop_ids=11)
    assert [len(tokens) for tokens in expected.tokens] == [1, 5]
    model.wpe.weight.data[5] = float("nan")  # which the second row does not reach
    assert generate(model, prompts, 5, temperature=0, stop_ids=11) == expected


def test_no_step_waits_for_the_device(model, monkeypatch):
    """On a GPU nothing between the prompt and the readback may ask a tensor for its value."""
    rows = Batch(
        Decoder(model), [[3, 1, 4], [7]], 2, 5, Sampling(top_k=5, top_p=0.9, repetition_penalty=1.2), None, 13, True
    )
    monkeypatch.setattr(reference, "_full", lambda *_: False)  # it asks on a CPU alone
    for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "nonzero"):
        monkeypatch.setattr(torch.Tensor, name, lambda *_, name=name: pytest.fail(f"{name} waits for the device"))
    rows.advance()
    rows._step(None)
    rows._step(None)


def test_every_token_costs_the_same_and_the_cache_stays_where_it_is():
    """Operators are counted, not timed."""

    class Counter(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.count += 1
            return function(*args, **(kwargs or {}))

    rows = Batch(Decoder(gpt(128)), [[3, 1, 4]], 1, 100, Sampling(), None, 13, True)
    rows.advance()
    counts, places = set(), set()
    for _ in range(99):
        with Counter() as counter:
            counter.count = 0
            rows.advance()
        counts.add(counter.count)
        places.add((rows.cache.k[0].data_ptr(), rows.cache.v[-1].data_ptr(), rows.history.data_ptr()))
    assert len(counts) == 1 and len(places) == 1


def test_a_step_is_captured_once_and_replayed(model, monkeypatch):
    """The order of things on a GPU, with a graph that is none: what is captured runs at each replay, and not before."""
    told = dict(temperature=2.0, seed=3, repetition_penalty=1.2, logprobs=True)
    model = gpt(64)
    expected = generate(model, [[3, 1, 4], [7]], 40, **told)
    log, made = [], []

    class Graph:
        def register_generator_state(self, generator):
            log.append(type(generator).__name__)

        def replay(self):
            log.append("replay")
            made[0]._step(None)

    @contextlib.contextmanager
    def graph(captured):
        held = [t for t in (*vars(made[0]).values(), *vars(made[0].cache).values()) if isinstance(t, torch.Tensor)]
        kept, state = [tensor.clone() for tensor in held], made[0].generator.get_state()
        yield log.append("capture")
        for tensor, before in zip(held, kept, strict=True):
            tensor.copy_(before)
        made[0].generator.set_state(state)

    class Captured(Batch):
        def __init__(self, *args):
            super().__init__(*args)
            self._graphs = True
            made.append(self)

    class Stream:
        def __init__(self, device=None):
            self.wait_stream = lambda other: log.append("waits")

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr("fastgpt.generation.Batch", Captured)
    assert generate(model, [[3, 1, 4], [7]], 40, **told).tokens == expected.tokens
    assert log == ["waits", "waits", "Generator", "capture", *["replay"] * 38]


def test_what_a_gpu_tells_is_waited_for_some_steps_later(model, monkeypatch):
    """With events that are none: the host reads a step's ids while the next ones run, and none is lost at the end."""
    log = []

    class Event:
        made = 0

        def __init__(self):
            Event.made += 1
            self.number = Event.made

        def record(self, stream):
            assert stream == "of the ids' device"
            log.append(f"record {self.number}")

        def synchronize(self):
            log.append(f"wait {self.number}")

    class Late(Readback):
        def __init__(self, device):
            super().__init__(device)
            self._asynchronous, self.ahead = True, 2

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "of the ids' device")
    monkeypatch.setattr(Late, "_copy", lambda self, tensor: tensor.clone())
    expected = generate(model, [[3, 1, 4], [7]], 4, seed=1)
    monkeypatch.setattr("fastgpt.generation.Readback", Late)
    assert generate(model, [[3, 1, 4], [7]], 4, seed=1) == expected
    assert log == ["record 1", "record 2", "record 3", "wait 1", "record 4", "wait 2", "wait 3", "wait 4"]


def test_a_cards_free_memory_is_what_counts(model, monkeypatch):
    decoder = Decoder(model)
    monkeypatch.setattr(decoder, "device", torch.device("cuda:0"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**20, 2**40))
    _check_room(decoder, [[1, 2]], 4, 1, "error")
    with pytest.raises(ValueError, match=r"10000 rows of 5 tokens need about [\d.]+ GiB, cuda:0 has 0.0"):
        _check_room(decoder, [[1, 2]], 4, 10000, "error")


def test_the_kernels_give_the_fallbacks_tokens(device):
    config = dict(n_layer=1, n_embd=32, vocab_size=32)
    fallback = gpt(32, backend="torch", **config).to(device)
    kernels = GPT(GPTConfig(**{**vars(fallback.config), "backend": "triton"})).to(device)
    kernels.load_state_dict(fallback.state_dict())
    options = dict(temperature=0, num_samples=2, logprobs=True)
    expected = generate(fallback, [[3, 1, 4], [7]], 5, **options)
    found = generate(kernels, [[3, 1, 4], [7]], 5, **options)
    assert found.tokens == expected.tokens
    torch.testing.assert_close(torch.tensor(found.logprobs), torch.tensor(expected.logprobs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("residual", ["compute", "float32"])
def test_few_rows_take_the_kernels_made_for_them(rows, residual, device, monkeypatch):
    """And give the steps' tokens all the same; more rows take the others."""
    pytest.importorskip("triton", reason="Triton is not to be had on this platform")
    from fastgpt import autograd

    calls = []
    few = autograd.few_norm_linear
    monkeypatch.setattr(autograd, "few_norm_linear", lambda *args: calls.append(1) or few(*args))
    model = gpt(32, backend="triton", residual=residual).to(device)
    fallback = gpt(32, backend="torch", residual=residual)
    fallback.load_state_dict({name: tensor.cpu() for name, tensor in model.state_dict().items()})
    prompts = [[3, 1, 4], [7], [1, 2], [5, 6, 7, 8], [9]][:rows]
    assert generate(model, prompts, 6, temperature=0).tokens == generate(fallback, prompts, 6, temperature=0).tokens
    assert len(calls) == (2 * 2 * 5 if rows == 1 else 0)  # of two layers, each token but the prompt's


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_graph_gives_the_steps_tokens(dtype, monkeypatch):
    """On a GPU: a captured step against the same steps one launch at a time, greedy and drawn."""
    model = gpt(128, n_embd=64).to("cuda", dtype)
    for options in (dict(temperature=0), dict(seed=3, top_p=0.9, repetition_penalty=1.1), dict(stop_ids=[2, 5])):
        captured = generate(model, [[3, 1, 4], [7]], 100, **{"temperature": 0, **options})
        monkeypatch.setattr(batch, "GRAPH_FROM", 10**9)
        assert generate(model, [[3, 1, 4], [7]], 100, **{"temperature": 0, **options}).tokens == captured.tokens
        monkeypatch.undo()
