"""kernels/token.py in the interpreter, its programs by turns in random orders: logits and cache against float64."""

import contextlib
import copy
from typing import NamedTuple

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not to be had on this platform")

from fastgpt import GPT, GPTConfig
from fastgpt.generation.decoder import Decoder
from fastgpt.ops import token
from fastgpt.sanitizer import SanitizerError, sanitized
from fastgpt.testing import assert_accurate, on_reference
from tests.kernels import ptx

pytestmark = pytest.mark.interpreter


class Case(NamedTuple):
    """A model, and how many programs write its tokens."""

    programs: int
    prompt: int  # tokens in the cache
    new: int
    n_layer: int = 2
    n_embd: int = 128
    n_head: int = 2
    changes: dict = {}  # noqa: RUF012
    tiles: dict = {}  # noqa: RUF012
    slots: int = 64


SMALL = dict(warps=16, keys=16)  # 16 keys a split, of a context of 64
CASES = {
    "one head, from the first token on": Case(3, 0, 3, n_embd=64, n_head=1, tiles=SMALL),
    "rows that do not divide": Case(5, 9, 2, tiles=SMALL),
    "from one split of keys to two": Case(8, 16, 2, tiles=SMALL),
    "from three splits to four, and to the last slot": Case(8, 48, 2, tiles=SMALL, slots=50),
    "three heads, a head of its own": Case(13, 21, 1, 2, 192, 3, dict(tie=False, bias=False), dict(keys=16)),
    "GPT-2 124M's sizes, as on a card": Case(
        132, 900, 1, 1, 768, 12, dict(vocab_size=401, block_size=1024), slots=1024
    ),
    "exact GELU, narrow MLP": Case(6, 20, 2, 1, changes=dict(gelu="none", n_inner=384), tiles=SMALL),
}


def gpt(case):
    shape = dict(n_layer=case.n_layer, n_embd=case.n_embd, n_head=case.n_head)
    return varied(GPT(GPTConfig(**{**dict(vocab_size=97, block_size=64, **shape), **case.changes})))


def varied(model):
    """Of the model with weights for which every one counts, in bfloat16."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
            else:
                parameter.normal_(mean=float(name.endswith(("ln_1.weight", "ln_2.weight", "ln_f.weight"))), std=0.3)
    return model.bfloat16().eval()


def ids_of(count):
    return torch.tensor([[(7 * i * i + 3) % 97 for i in range(count)]])


def naive(model, ids, dtype):
    """The naive reference on ids (1, T): logits (T, V), and keys and values (2, L, H, T, D)."""
    model = on_reference(copy.deepcopy(model).to(dtype))
    packed = []
    for block in model.h:
        block.attn.c_attn.register_forward_hook(lambda module, args, qkv: packed.append(qkv[0]))
    with torch.no_grad():
        logits = model(ids)[0]
    qkv = torch.stack(packed).view(len(packed), ids.shape[1], 3, model.config.n_head, -1)
    return logits[0] if logits.dim() == 3 else logits, qkv[:, :, 1:].permute(2, 0, 3, 1, 4)


@pytest.fixture
def one_launch(monkeypatch):
    """A decoder whose tokens come from one launch, and a cache with the prompt in it."""

    def make(case, model):
        hidden = model.h[0].mlp.c_fc.weight.shape[0]
        sizes = case.n_embd, case.n_head, hidden, case.programs
        row = token.Measured(*sizes, None, model.config.block_size, case.tiles)
        monkeypatch.setattr(token, "TABLE", (row,))
        decoder = Decoder(model)
        assert decoder.one_launch == ""
        cache = decoder.cache(1, case.slots)
        cache.whole.fill_(float("nan"))
        if case.prompt:
            cache.whole[:, :, 0, :, : case.prompt] = naive(model, ids_of(case.prompt), torch.bfloat16)[1]
        return decoder, cache

    return make


def decoded(decoder, cache, case, seed=0):
    """(new, V): the logits of each new token."""
    ids, logits = ids_of(case.prompt + case.new), []
    for length in range(case.prompt + 1, case.prompt + case.new + 1):
        with sanitized(order=seed, in_turns=True, behind=decoder._whole_token._model.tensors):
            logits.append(decoder.decode(ids[:, length - 1 : length], torch.tensor([length]), cache)[0, 0])
    return torch.stack(logits)


SLOW = ("GPT-2 124M's sizes, as on a card", "from one split of keys to two", "rows that do not divide")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in CASES])
def test_logits_and_cache(name, one_launch):
    case = CASES[name]
    model = gpt(case)
    decoder, cache = one_launch(case, model)
    logits, count = decoded(decoder, cache, case), case.prompt + case.new
    same, same_cache = naive(model, ids_of(count), torch.bfloat16)
    exact, exact_cache = naive(model, ids_of(count), torch.float64)
    new = slice(case.prompt, count)
    assert logits.dtype == torch.float32 and torch.equal(logits, logits.bfloat16().float())
    assert_accurate(logits.bfloat16(), exact[new], same[new], logit_max=4.0, name="logits")
    kept = cache.whole[:, :, 0]
    assert_accurate(kept[..., new, :], exact_cache[..., new, :], same_cache[..., new, :], name="cache")
    assert kept[..., count:, :].isnan().all()


ONE = CASES["one head, from the first token on"]


def test_the_order_of_programs_changes_no_bit(one_launch):
    model, case = gpt(ONE), ONE._replace(prompt=20, new=2)  # two splits of keys, two programs that have them
    found = []
    for seed in range(3):
        decoder, cache = one_launch(case, model)
        found.append((decoded(decoder, cache, case, seed), cache.whole[..., :22, :]))
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_the_ptx_of_a_card_gives_the_plain_forms_bits(one_launch):
    model, case = gpt(ONE), ONE._replace(prompt=20, new=2)
    found = []
    for asm in (False, True):
        decoder, cache = one_launch(case, model)
        decoder._whole_token._model._constants["ASM"] = asm
        with ptx.interpreted() if asm else contextlib.nullcontext():
            found.append((decoded(decoder, cache, case), cache.whole[..., :22, :]))
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("number", [5, *(pytest.param(n, marks=pytest.mark.slow) for n in (0, 2**30 - 1, 2**31 - 1))])
def test_words_of_other_tokens_are_not_taken_for_this_ones(number, one_launch):
    """In a cache that has had so many tokens, of other numbers; their tags are 32 bits of 2 number + layer + 1."""
    model = gpt(ONE)
    decoder, cache = one_launch(ONE, model)
    expected = decoded(decoder, cache, ONE)
    cache.words[-1] = number
    decoded(decoder, cache, ONE._replace(prompt=30))
    cache.whole.zero_()
    assert torch.equal(decoded(decoder, cache, ONE), expected)
    assert cache.words[-1] == number + 6


def test_caches_that_take_turns_do_not_hear_each_other(one_launch):
    decoder, cache = one_launch(ONE, gpt(ONE))
    other = decoder.cache(1, ONE.slots)
    expected, again = (decoded(decoder, decoder.cache(1, ONE.slots), ONE._replace(prompt=p, new=2 - p)) for p in (0, 1))
    for first in range(2):
        one = ONE._replace(new=1, prompt=first)
        assert torch.equal(decoded(decoder, cache, one)[0], expected[first])
        if first:
            assert torch.equal(decoded(decoder, other, one)[0], again[0])


def test_a_program_that_is_not_there_is_missed(one_launch):
    """All others wait for its words: on a card they would trap."""
    decoder, cache = one_launch(ONE, gpt(ONE))
    model = decoder._whole_token._model
    model.shape = model.shape._replace(programs=ONE.programs - 1)  # of the grid alone
    with pytest.raises(SanitizerError, match="wait for what none of them writes"):
        decoded(decoder, cache, ONE._replace(new=1))


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_what_is_not_finite_is_in_the_logits(number, one_launch):
    model, case = gpt(ONE), ONE._replace(new=1)
    with torch.no_grad():
        model.h[0].mlp.c_fc.bias[3] = number
    logits = decoded(*one_launch(case, model), case)
    assert not logits.isfinite().any()


def test_a_weight_that_changes_is_followed(one_launch):
    model, case = gpt(ONE), ONE._replace(new=1)
    decoder, cache = one_launch(case, model)
    before = decoded(decoder, cache, case)
    with torch.no_grad():
        model.h[1].attn.c_proj.weight.mul_(0.5)
    after = decoded(decoder, cache, case)
    assert not torch.equal(before, after) and torch.equal(after, decoded(*one_launch(case, model), case))


def test_a_token_past_the_slots_is_dropped_as_elsewhere(one_launch):
    """Its key and value, that is: it sees those that are there."""
    case = ONE._replace(prompt=6, new=1, slots=6)
    decoder, cache = one_launch(case, gpt(case))
    before = cache.whole.clone()
    assert decoded(decoder, cache, case).isfinite().all() and torch.equal(cache.whole, before)
