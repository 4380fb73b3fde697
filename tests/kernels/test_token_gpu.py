"""kernels/token.py on a card of compute capability 9.0, at GPT-2 124M's shape, whatever ops.token chooses there."""

import copy
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not to be had on this platform")

from fastgpt import GPT, GPTConfig, generate
from fastgpt.generation.decoder import Decoder
from fastgpt.ops import token
from fastgpt.testing import assert_accurate
from tests.kernels.test_token import naive, varied

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).parents[2]
ROUNDING = 2.0**-7  # of bfloat16, relative: a logit and its rival may be off by half of it each


@pytest.fixture(autouse=True)
def _on_hopper():
    if torch.cuda.get_device_capability() != (9, 0) or token.triton.__version__ not in token.TRITONS:
        pytest.skip("needs a card of compute capability 9.0, and a Triton that the kernel was compiled with")
    if torch.cuda.get_device_properties(0).multi_processor_count != token.TABLE[0].programs:
        pytest.skip(f"needs {token.TABLE[0].programs} multiprocessors")


def made(model, **options):
    """A Decoder whose tokens come from one launch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token, "RAN", token.TRITONS)
        decoder = Decoder(model, **options)
    assert decoder.one_launch == ""
    return decoder


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    with torch.device("cuda"):
        return varied(GPT(GPTConfig.preset("gpt2-124M")))


@pytest.fixture(scope="module")
def decoder(model):
    return made(model)


def ids_of(count, vocabulary=50257):
    return torch.arange(count, device="cuda")[None] * 7919 % vocabulary


def prefilled(decoder, count, slots=1024):
    """A cache of so many tokens."""
    cache = decoder.cache(1, slots)
    if count:
        decoder.prefill(ids_of(count), torch.tensor([count], device="cuda"), cache)
    return cache


def step(decoder, cache, length):
    """(V,): the logits after the token that makes the cache's so many."""
    return decoder.decode(ids_of(length)[:, -1:], torch.tensor([length], device="cuda"), cache)[0, 0]


def check(decoder, model, lengths):
    ids = ids_of(max(lengths))
    exact, exact_cache = naive(model, ids, torch.float64)
    same, same_cache = naive(model, ids, torch.bfloat16)
    for length in lengths:
        cache = prefilled(decoder, length - 1)
        logits, new = step(decoder, cache, length), slice(length - 1, length)
        assert_accurate(logits.bfloat16()[None], exact[new], same[new], logit_max=4.0, name=f"logits of {length}")
        kept = cache.whole[:, :, 0, :, new]
        assert_accurate(kept, exact_cache[..., new, :], same_cache[..., new, :], name=f"cache of {length}")
        assert not cache.whole[..., length:, :].any()


def test_logits_and_cache(decoder, model):
    check(decoder, model, [1, 2, 32, 127, 128, 129, 130, 257, 900, 1023, 1024])


def test_a_head_of_its_own_no_biases_the_exact_gelu_and_float32_norms():
    shape = dict(vocab_size=50304, n_layer=3, tie=False, bias=False, gelu="none")
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = varied(GPT(GPTConfig(**shape)))
    check(made(copy.deepcopy(model).float(), dtype=torch.bfloat16), model, [1, 300, 1024])


def clear(logits):
    """(T,): where the two best of (T, V) differ by more than rounding can; and (T,) the best."""
    best, places = logits.topk(2)
    return best[:, 0] - best[:, 1] > 4 * ROUNDING * best.abs().amax(-1), places[:, 0]


@pytest.mark.parametrize("prompt", [32, 120, 900])
def test_greedy_tokens_are_those_of_the_float32_model_where_rounding_decides_nothing(prompt, decoder, model):
    found = torch.tensor([generate(decoder, ids_of(prompt), 100, temperature=0).tokens[0]], device="cuda")
    row = torch.cat([ids_of(prompt), found[:, :-1]], dim=1)
    decided, expected = clear(naive(model, row, torch.float32)[0][prompt - 1 :])
    assert decided.sum() > 10 and torch.equal(found[0][decided], expected[decided])


def test_the_likeliest_after_given_tokens(decoder, model):
    """Which vary more than those that a random model writes."""
    decided, expected = clear(naive(model, ids_of(160), torch.float32)[0])
    cache = prefilled(decoder, 0)
    found = torch.stack([step(decoder, cache, length).argmax() for length in range(1, 161)])
    assert decided.sum() > 50 and len(set(expected[decided].tolist())) > 2
    assert torch.equal(found[decided], expected[decided])


def test_hundreds_of_runs_give_the_same_bits(decoder):
    for length in (40, 1000):
        cache = prefilled(decoder, length - 1)
        first, kept = step(decoder, cache, length), cache.whole.clone()
        differs = torch.zeros((), dtype=torch.int64, device="cuda")
        for _ in range(300):
            logits = step(decoder, cache, length)
            differs += (logits != first).any() | logits.isnan().any() | (cache.whole != kept).any()
        assert differs.item() == 0


def test_in_a_cuda_graph_the_tokens_are_the_same(decoder):
    """generate captures a step; here each is launched."""
    found = generate(decoder, ids_of(100), 60, temperature=0).tokens[0]
    cache, length = decoder.cache(1, 200), torch.tensor([100], device="cuda")
    logits = decoder.prefill(ids_of(100), length, cache)[0]
    for expected in found:
        assert logits.argmax().item() == expected
        length += 1
        logits = decoder.decode(torch.tensor([[expected]], device="cuda"), length, cache)[0, 0]


def test_sampling(decoder):
    greedy = generate(decoder, ids_of(50), 60, temperature=0).tokens
    assert generate(decoder, ids_of(50), 60, top_k=1).tokens == greedy
    drawn = [generate(decoder, ids_of(50), 60, top_k=50, seed=seed, logprobs=True) for seed in (1, 1, 2)]
    assert drawn[0].tokens == drawn[1].tokens != drawn[2].tokens
    assert all(-20 < p <= 0 for p in drawn[0].logprobs[0])


def test_on_another_stream(decoder):
    expected, cache = step(decoder, prefilled(decoder, 99), 100), prefilled(decoder, 99)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        got = step(decoder, cache, 100)
    torch.cuda.current_stream().wait_stream(side)
    assert torch.equal(got, expected)


def test_two_sequences_that_take_turns(decoder, model):
    """Of one Decoder and of two."""
    for other in (decoder, made(model)):
        caches = prefilled(decoder, 30), prefilled(other, 200)
        alone = [[step(d, prefilled(d, n), n + 1) for d, n in ((decoder, 30), (other, 200))] for _ in range(3)]
        for expected in alone:
            got = step(decoder, caches[0], 31), step(other, caches[1], 201)
            assert all(map(torch.equal, got, expected))


def test_a_weight_that_changes_is_followed(decoder, model):
    cache = prefilled(decoder, 9)
    before = step(decoder, cache, 10)
    with torch.no_grad():
        model.h[1].mlp.c_fc.weight.mul_(0.5)
        changed = step(decoder, cache, 10)
        model.h[1].mlp.c_fc.weight.mul_(2)
    assert not torch.equal(changed, before) and torch.equal(step(decoder, cache, 10), before)


def test_two_streams_at_once(decoder):
    """The card has room for one launch: the other waits."""
    expected = step(decoder, prefilled(decoder, 499), 500)
    streams, caches = [torch.cuda.Stream() for _ in range(2)], [prefilled(decoder, 499) for _ in range(2)]
    torch.cuda.synchronize()
    got = []
    for _ in range(100):
        for stream, cache in zip(streams, caches, strict=True):
            with torch.cuda.stream(stream):
                got.append(step(decoder, cache, 500))
    torch.cuda.synchronize()
    assert all(torch.equal(logits, expected) for logits in got)


@pytest.mark.slow
def test_a_wait_for_what_nobody_writes_ends_as_an_error(tmp_path):
    script = """
        import torch, triton, triton.language as tl
        from fastgpt.kernels.words import await_words

        @triton.jit
        def _kernel(words_ptr, out_ptr):
            got = await_words(words_ptr + tl.arange(0, 32), 1, 1, 1, 32, True, 1)
            tl.store(out_ptr + tl.arange(0, 32), got[0])

        words = torch.zeros(32, dtype=torch.int64, device="cuda")
        out = torch.zeros(32, dtype=torch.int32, device="cuda")
        words.fill_((1 << 32) + 7)
        _kernel[(1,)](words, out, num_warps=1)
        assert out.tolist() == [7] * 32
        words.fill_(7)
        _kernel[(1,)](words, out, num_warps=1)
        torch.cuda.synchronize()
    """
    path = tmp_path / "waits.py"
    path.write_text(textwrap.dedent(script))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(path)]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert process.returncode != 0 and "CUDA error" in process.stderr and "AssertionError" not in process.stderr
