"""Which decoders' tokens come from one launch, on a feigned card of capability 9.0: why not, and what is launched."""

import functools

import pytest
import torch
from torch import nn

pytest.importorskip("triton", reason="Triton is not to be had on this platform")

from bench.gates import feign, record
from fastgpt import GPT, GPTConfig, generate
from fastgpt.generation.decoder import Decoder
from fastgpt.kernels import token as kernels
from fastgpt.ops import token
from tests import models

BF16 = torch.bfloat16
if token.triton.__version__ not in token.TRITONS:
    pytest.skip("this Triton has not compiled the kernel", allow_module_level=True)


@pytest.fixture(autouse=True)
def has_run(monkeypatch):
    """As it will be once the kernel has run on a card."""
    monkeypatch.setattr(token, "RAN", token.TRITONS)


def gpt(dtype=BF16, change=None, **changes):
    shape = dict(vocab_size=50257, n_layer=2, n_head=12, n_embd=768)
    with torch.device("cuda"):
        model = GPT(GPTConfig(**{**shape, **changes})).to(dtype)
    if change is not None:
        change(model)
    return model


def decoder_of(model, **options):
    return Decoder(model(), **options)


SERVED = {
    "GPT-2's width": gpt,
    "a head of its own, no biases, the exact GELU": lambda: gpt(tie=False, bias=False, gelu="none"),
    "a padded vocabulary": lambda: gpt(vocab_size=50304),
    "a short context": lambda: gpt(block_size=100),
}


@pytest.mark.parametrize("name", SERVED)
@pytest.mark.parametrize("dtype", [None, BF16])
def test_what_fits_is_served(name, dtype):
    with feign.card(90):
        assert decoder_of(SERVED[name], dtype=dtype).one_launch == ""


def test_a_model_in_float32_is_served_once_it_is_cast():
    with feign.card(90):
        assert decoder_of(lambda: gpt(torch.float32), dtype=BF16).one_launch == ""


def linear(model, place, bias):
    setattr(model, place, nn.Linear(768, 50257, bias=bias, device="cuda", dtype=BF16))


def other_eps(model):
    model.h[1].ln_2.eps = 1e-3


def other_scale(model):
    model.h[1].attn.scale = 0.7


def narrow(model):
    for block in model.h:
        block.attn.c_proj.weight.data = block.attn.c_proj.weight.data.t()


def off_by_two(model):
    weight = model.h[0].mlp.c_fc.weight
    weight.data = torch.zeros(weight.numel() + 1, dtype=BF16, device="cuda")[1:].view(weight.shape)


def hooked(model):
    model.h[0].mlp.register_forward_hook(lambda *_: None)


KEPT = {
    "a linear layer is torch.float32": lambda: gpt(torch.float32),
    "a linear layer is torch.float16": lambda: gpt(torch.float16),
    "the residual stream is torch.float32": lambda: gpt(residual="float32"),
    "not measured for 1024 channels on this device": lambda: gpt(n_embd=1024, n_head=16),
    "a context of 2048 is longer than the 1024": lambda: gpt(block_size=2048),
    "not measured for 24 heads and 3072 hidden units": lambda: gpt(n_head=24),
    "not measured for 12 heads and 2048 hidden units": lambda: gpt(n_inner=2048),
    "100 outputs do not give each of 132 programs some": lambda: gpt(vocab_size=100),
    "the head has a bias": lambda: gpt(change=functools.partial(linear, place="lm_head", bias=True), tie=False),
    "the norms differ in eps": lambda: gpt(change=other_eps),
    "the layers differ in shape, in their GELU or in the scale": lambda: gpt(change=other_scale),
    "from a multiple of 16 bytes on": lambda: gpt(change=narrow),
    "in rows from a multiple of 16": lambda: gpt(change=off_by_two),
    "models of which no part must be called": lambda: gpt(change=hooked),
    "it runs on PyTorch": lambda: gpt(backend="torch"),
}


@pytest.mark.parametrize("why", KEPT)
def test_others_keep_their_many_launches(why):
    with feign.card(90):
        assert why in decoder_of(KEPT[why]).one_launch


def test_on_other_cards_and_tritons_none_is_served(monkeypatch):
    for capability in (80, 89, 100, 120):
        with feign.card(capability):
            assert "not measured for 768 channels on this device" in decoder_of(gpt).one_launch
    with feign.card(90):
        with monkeypatch.context() as patch:
            patch.setattr(token, "TABLE", (token.Measured(768, 12, 3072, programs=114),))
            assert "not measured on 132 multiprocessors" in decoder_of(gpt).one_launch
        with monkeypatch.context() as patch:
            patch.setattr(token, "INTERPRETED", True)
            assert "runs programs one after another" in decoder_of(gpt).one_launch
        with monkeypatch.context() as patch:
            patch.setattr(token, "RAN", ())
            assert f"has not yet run on a card with Triton {token.triton.__version__}" in decoder_of(gpt).one_launch
        monkeypatch.setattr(token.triton, "__version__", "3.8.0")
        assert "Triton is 3.8.0, it was compiled with 3.6.0 and 3.7.1 alone" in decoder_of(gpt).one_launch


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        (dict(heads=7), "768 channels in 7 heads"),
        (dict(heads=96), "768 channels in 96 heads: a head's are no power of two from 16 on"),
        (dict(channels=128, heads=2), "128 channels, 3072 hidden units and 50257 outputs do not give each of 132"),
        (dict(hidden=260), "do not give each of 132 programs some"),
        (dict(hidden=3000), "no pieces fit 768 channels in 12 heads, and 3000 hidden units"),
        (dict(channels=2048, heads=128, programs=127), "no pieces fit 2048 channels in 128 heads"),
        (dict(context=4096, channels=1536, heads=48, programs=100), ""),
    ],
)
def test_shapes_that_have_no_tiles(changes, why):
    """As the table has none of them, no decoder asks."""
    shape = dict(layers=1, channels=768, heads=12, hidden=3072, vocabulary=50257, context=1024, programs=132)
    found = kernels.tiles(kernels.Shape(**{**shape, **changes}))
    if not why:
        assert found.KEYS * found.SMAX >= 4096 and found.SMAX * 48 <= 100
    else:
        assert why in found


def launched(model, rows=1, **how):
    """Names of the kernels that write the second token and those after."""

    def write(new):
        return {each.name for each in record.launches(lambda: generate(model(), [[1] * 16] * rows, new, **how), 90)}

    return write(4) - write(1)


def test_what_is_launched():
    """A greedy token takes two launches, the first of a prompt's kernels too; two sequences and float32 the many."""
    assert launched(gpt, temperature=0) == {"token_kernel"}
    assert launched(gpt, top_k=50) == {"token_kernel"}
    for others in (dict(rows=2), dict(dtype=torch.float32)):
        assert "decode_kernel" in launched(gpt, temperature=0, **others)


def test_other_families_models_are_served():
    """Hugging Face's weights lie transposed: from 32 tokens on they are laid out."""
    with record.noted(90), feign.card(90):
        for make in (models.hugging_face, models.nanogpt):
            sizes = dict(n_embd=768, n_head=12, vocab_size=300)
            model = make(**sizes).to("cuda")
            assert decoder_of(lambda model=model: model, dtype=BF16, tokens=32).one_launch == ""
            aligned = decoder_of(lambda model=model: model, dtype=BF16).one_launch
            assert ("does not lie in rows" in aligned) == (make is models.hugging_face)


def test_a_longer_cache_than_the_context_and_several_rows_take_many_launches():
    with feign.card(90):
        decoder = decoder_of(lambda: gpt(block_size=64))
        assert decoder.cache(1, 64).words is not None
        assert decoder.cache(1, 65).words is None and decoder.cache(2, 64).words is None


def test_no_prompt_or_cache_compiles_it_anew():
    """Whatever its slots are, and wherever ids and lengths lie in memory: they may be views."""
    keys = set()
    for slots in (1, 17, 48, 1024):
        for offset in (0, 1):

            def decode(slots=slots, offset=offset):
                decoder = decoder_of(gpt)
                numbers = torch.ones(3, dtype=torch.int64, device="cuda")
                ids, lengths = numbers[offset : offset + 1][None], numbers[offset : offset + 1]
                decoder.decode(ids, lengths, decoder.cache(1, slots))

            (launch,) = record.launches(decode, 90)
            keys.add(launch.key)
    assert len(keys) == 1


def test_the_gate_compiles_each_row_of_the_table():
    from bench.gates import ways

    for row in token.TABLE:
        sizes = [
            name for name, (channels, heads) in ways.SIZES.items() if (channels, heads) == (row.channels, row.heads)
        ]
        assert f"a token in one launch, {sizes[0]}" in ways.ways()
