"""The naive reference against PyTorch's own functions in float64, and its Philox against published words."""

import itertools
import math

import numpy
import pytest
import torch
import torch.nn.functional as F

from fastgpt import GPT, GPTConfig, ops
from fastgpt.ops import pytorch, reference
from fastgpt.testing import on_reference
from tests.models import randomised

F64 = torch.float64


def leaves(*shapes):
    return [torch.randn(shape, dtype=F64, requires_grad=True) for shape in shapes]


def same(got, expected, operands):
    """Values and gradients, to float64's rounding."""
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)
    upstream = torch.randn_like(expected)
    for a, b in zip(
        *(torch.autograd.grad(out, operands, upstream, retain_graph=True) for out in (got, expected)), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("eps", [1e-5, 0.3])
def test_layer_norm(eps):
    x, weight, bias = operands = leaves((2, 3, 8), 8, 8)
    same(reference.layer_norm(x, weight, bias, eps), F.layer_norm(x, (8,), weight, bias, eps), operands)
    same(reference.layer_norm(x, weight, None, eps), F.layer_norm(x, (8,), weight, None, eps), operands[:2])


def test_add_layer_norm():
    x, residual, weight, bias, x_bias = operands = leaves((2, 3, 8), (2, 3, 8), 8, 8, 8)
    normed, total = reference.add_layer_norm(x, residual, weight, bias, x_bias=x_bias)
    same(normed, F.layer_norm(residual + x + x_bias, (8,), weight, bias), operands)
    assert torch.equal(total, residual + (x + x_bias))
    total = reference.add_layer_norm(x, residual, weight, bias, residual_dtype=torch.bfloat16)[1]
    assert torch.equal(total, (residual + x).bfloat16())
    normed, total = reference.add_layer_norm(x.half(), residual.float(), weight, bias)
    assert (normed.dtype, total.dtype) == (torch.float16, torch.float32)


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_causal_attention(scale, key_heads):
    q, k, v = operands = leaves((2, 4, 7, 5), (2, key_heads, 7, 5), (2, key_heads, 7, 5))
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
    same(reference.causal_attention(q, k, v, scale=scale), expected, operands)


def test_masks_documents_and_fewer_queries():
    q, k, v = operands = leaves((2, 4, 9, 5), (2, 2, 9, 5), (2, 2, 9, 5))
    documents = torch.tensor([[0] * 4 + [1] * 5, [2, 1, 2, 1, 2, 1, 2, 1, 2]])
    key_mask = torch.ones(2, 9, dtype=torch.bool)
    key_mask[1, 5:7] = False
    allowed = torch.ones(2, 1, 9, 9, dtype=torch.bool)
    for row, query, key in itertools.product(range(2), range(9), range(9)):
        allowed[row, 0, query, key] = (
            key <= query and documents[row, key] == documents[row, query] and (row == 0 or key not in (5, 6))
        )
    got = reference.causal_attention(q, k, v, key_mask=key_mask, documents=documents)
    same(got, F.scaled_dot_product_attention(q, k, v, allowed, enable_gqa=True), operands)
    whole = reference.causal_attention(q, k, v)
    torch.testing.assert_close(reference.causal_attention(q[:, :, 6:], k, v), whole[:, :, 6:])


def test_a_query_that_sees_nothing_gives_zeros_and_hidden_keys_may_be_nan():
    q, k, v = leaves((2, 2, 6, 5), (2, 2, 6, 5), (2, 2, 6, 5))
    key_mask = torch.ones(2, 6, dtype=torch.bool)
    key_mask[0], key_mask[1, :2] = False, False
    hidden = [t.detach().masked_fill(~key_mask[:, None, :, None], math.nan).requires_grad_() for t in (k, v)]
    out = reference.causal_attention(q, *hidden, key_mask=key_mask)
    assert not out[0].any() and not out[1, :, :2].any() and out[1, :, 2:].all()
    for grad in torch.autograd.grad(out.square().sum(), (q, *hidden)):
        assert grad.isfinite().all() and not grad[0].any() and grad[1].any()
    expected = reference.causal_attention(*(t[1:, :, 2:] for t in (q, k, v)))
    torch.testing.assert_close(out[1:, :, 2:], expected)


def test_packed_attention():
    (packed,) = operands = leaves((2, 7, 60))
    q, k, v = packed.view(2, 7, 3, 4, 5).permute(2, 0, 3, 1, 4)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(2, 7, 20)
    same(reference.causal_attention_qkv(packed, 4), expected, operands)


def test_decoding():
    q, k, v = leaves((2, 4, 2, 5), (2, 2, 9, 5), (2, 2, 9, 5))
    k, v = (
        t.masked_fill(torch.arange(9)[:, None] >= torch.tensor([9, 4])[:, None, None, None], math.nan) for t in (k, v)
    )
    got = reference.decode_attention(q, k, v, torch.tensor([9, 4]), scale=0.3)
    for row, length in enumerate((9, 4)):
        allowed = torch.ones(2, length, dtype=torch.bool).tril(length - 2)
        one = (t[row : row + 1] for t in (q, k[:, :, :length], v[:, :, :length]))
        expected = F.scaled_dot_product_attention(*one, allowed, scale=0.3, enable_gqa=True)
        torch.testing.assert_close(got[row : row + 1], expected)
    assert not reference.decode_attention(q, k, v, torch.tensor([0, 1]))[[0, 1], :, 0].any()


@pytest.mark.parametrize("approximate", ["tanh", "none"])
def test_gelu_mlp(approximate):
    x, w_in, b_in, w_out, b_out = operands = leaves((2, 3, 5), (7, 5), 7, (5, 7), 5)
    expected = F.linear(F.gelu(F.linear(x, w_in, b_in), approximate=approximate), w_out, b_out)
    same(reference.gelu_mlp(*operands, approximate=approximate), expected, operands)
    expected = F.linear(F.gelu(F.linear(x, w_in), approximate=approximate), w_out)
    same(reference.gelu_mlp(x, w_in, None, w_out, approximate=approximate, recompute=True), expected, (x, w_in, w_out))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
def test_linear_cross_entropy(reduction, label_smoothing):
    x, weight = operands = leaves((2, 3, 5), (9, 5))
    targets = torch.tensor([[8, 0, 4], [4, 3, 3]])
    options = dict(reduction=reduction, label_smoothing=label_smoothing, ignore_index=4)
    logits = F.linear(x, weight)
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), **options)
    expected = expected.view(2, 3) if reduction == "none" else expected
    same(reference.linear_cross_entropy(x, weight, targets, **options), expected, operands)
    with_z_loss = reference.linear_cross_entropy(x, weight, targets.int(), **options, z_loss=0.1)
    squares = 0.1 * (targets != 4).double() * logits.logsumexp(-1) ** 2
    more = {"mean": squares.sum() / 4, "sum": squares.sum(), "none": squares}[reduction]
    same(with_z_loss, expected + more, operands)


def test_the_mean_of_no_loss_is_nan_with_no_gradient():
    x, weight = operands = leaves((3, 5), (9, 5))
    loss = reference.linear_cross_entropy(x, weight, torch.full((3,), -100))
    assert loss.isnan() and not any(grad.any() for grad in torch.autograd.grad(loss, operands))


def test_embedding():
    token, position = operands = leaves((9, 5), (7, 5))
    ids, positions = torch.tensor([[8, 1, 1], [0, 2, 8]]), torch.tensor([[6, 0, 0], [3, 2, 1]])
    same(reference.embedding(ids, *operands), F.embedding(ids, token) + position[:3], operands)
    expected = F.embedding(ids, token) + F.embedding(positions, position)
    same(reference.embedding(ids.int(), *operands, positions), expected, operands)
    same(reference.embedding(ids, *operands, positions[0]), F.embedding(ids, token) + position[positions[0]], operands)
    assert reference.embedding(ids, *operands, dtype=torch.float16).dtype == torch.float16


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_words(counter, key, words):
    """The known answers of Random123, by the authors of Philox; a seed is a signed integer of 64 bits."""
    seed = key[1] << 32 | key[0]
    for as_given in (seed, seed - 2**64):
        got = reference.philox([numpy.array([word], dtype=numpy.uint64) for word in counter], as_given)
        assert tuple(word.item() for word in got) == words


def test_what_dropout_keeps_is_the_word_of_its_place():
    """As the contract counts: key = seed, counter = (col // 4, row, b · H + h, site), word col % 4."""
    keep = reference.keep_mask(-3, 0.3, (2, 3, 4, 6), 2)
    for b, h, row, col in itertools.product(range(2), range(3), range(4), range(6)):
        counter = [numpy.array([n], dtype=numpy.uint64) for n in (col // 4, row, b * 3 + h, 2)]
        word = reference.philox(counter, -3)[col % 4].item()
        assert keep[b, h, row, col] == (word >= math.floor(0.3 * 2**32))


def test_dropout_divides_what_it_keeps():
    x, residual, weight = leaves((3, 8), (3, 8), 8)
    keep = reference.keep_mask(5, 0.25, (1, 1, 3, 8), reference.RESIDUAL_SITE)[0, 0]
    _, total = reference.add_layer_norm(x, residual, weight, dropout_p=0.25, seed=torch.tensor(5))
    same(total, residual + x * keep / 0.75, (x, residual))
    ids, positions = torch.arange(3)[None], torch.arange(3)
    keep = reference.keep_mask(5, 0.25, (1, 1, 3, 8), reference.EMBEDDING_SITE)[0]
    dropped = reference.embedding(ids, x, residual, dropout_p=0.25, seed=5)
    same(dropped, (x + residual)[positions][None] * keep / 0.75, (x, residual))
    heads = x[None, None]
    keep = reference.keep_mask(5, 0.25, (1, 1, 3, 3), reference.ATTENTION_SITE)
    values = torch.eye(3, 8, dtype=F64)[None, None]  # so that the output is the probabilities
    plain = F.scaled_dot_product_attention(heads, heads, values, is_causal=True)[..., :3]
    dropped = reference.causal_attention(heads, heads, values, dropout_p=0.25, seed=5)[..., :3]
    same(dropped, plain * keep / 0.75, (x,))
    everything = reference.causal_attention(heads, heads, values, dropout_p=1.0, seed=5)
    assert not everything.any() and not torch.autograd.grad(everything.sum(), x)[0].any()


def test_gradcheck():
    q, k, v = leaves((1, 2, 3, 4), (1, 1, 3, 4), (1, 1, 3, 4))
    options = dict(key_mask=torch.tensor([[False, True, True]]), dropout_p=0.3, seed=1)
    assert torch.autograd.gradcheck(lambda *t: reference.causal_attention(*t, **options), (q, k, v))
    assert torch.autograd.gradcheck(reference.layer_norm, leaves((2, 5), 5, 5))
    assert torch.autograd.gradcheck(reference.add_layer_norm, leaves((2, 5), (2, 5), 5, 5))
    assert torch.autograd.gradcheck(reference.gelu_mlp, leaves((2, 3), (4, 3), 4, (3, 4), 3))
    targets = torch.tensor([1, -100])
    loss = lambda x, w: reference.linear_cross_entropy(x, w, targets, label_smoothing=0.1, z_loss=0.1)  # noqa: E731
    assert torch.autograd.gradcheck(loss, leaves((2, 3), (4, 3)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_narrower_dtypes_come_out_as_they_went_in(dtype):
    """And the loss in float32."""
    with torch.no_grad():
        x, weight, bias, w_in, w_out = (t.to(dtype) for t in leaves((2, 3, 8), 8, 8, (16, 8), (8, 16)))
        outs = [
            reference.layer_norm(x, weight, bias),
            *reference.add_layer_norm(x, x, weight, bias, x_bias=bias, dropout_p=0.1, seed=1),
            reference.causal_attention(*[x[:, None]] * 3, dropout_p=0.1, seed=1),
            reference.gelu_mlp(x, w_in, None, w_out, weight),
            reference.embedding(torch.tensor([[1]]), w_in, w_in),
        ]
        assert {out.dtype for out in outs} == {dtype}
        assert reference.linear_cross_entropy(x[0], w_in, torch.arange(3)).dtype == torch.float32


def test_a_model_on_the_reference(monkeypatch):
    """Its weights are copies, and nothing of the fallback is called."""
    model = randomised(GPT(GPTConfig(vocab_size=17, block_size=8, n_layer=2, n_head=2, n_embd=8))).double()
    idx = torch.randint(17, (2, 8))
    expected, twin = model(idx, idx), on_reference(model)

    def called(*args, **kwargs):
        raise AssertionError("the fallback is called")

    for name in (function.__name__ for function in ops.FUNCTIONS):
        monkeypatch.setattr(pytorch, name, called)
    torch.testing.assert_close(twin(idx, idx), expected, rtol=1e-10, atol=1e-10)
    twin.wte.weight.data.zero_()
    assert model.wte.weight.any() and model.config.backend == model.h[0].mlp.backend == "auto"
