"""The fallback against formulas written out in float64, and what it promises beyond them."""

import math

import pytest
import torch
import torch.nn.functional as F

from fastgpt import ops
from fastgpt.ops import pytorch
from fastgpt.testing import assert_accurate

F64 = torch.float64


# Philox and dropout


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
    """The known answers of Random123, by the authors of Philox."""
    seed = (key[1] << 32 | key[0]) - (2**64 if key[1] >> 31 else 0)  # as a signed 64-bit integer
    assert tuple(w.item() for w in pytorch._philox(*map(torch.tensor, counter), torch.tensor(seed))) == words


def test_a_mask_element_depends_on_its_place_alone():
    small = pytorch.dropout_mask(7, 0.5, (2, 3, 5, 6), 0, "cpu")
    large = pytorch.dropout_mask(7, 0.5, (2, 3, 8, 11), 0, "cpu")
    assert torch.equal(small, large[:, :, :5, :6])
    assert torch.equal(small, pytorch.dropout_mask(torch.tensor([7]), 0.5, (2, 3, 5, 6), 0, "cpu"))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_the_mask_keeps_its_share(p):
    """Five standard deviations of a binomial count, over everything, each row, each column and each plane."""
    keep = pytorch.dropout_mask(12345, p, (2, 4, 256, 256), 0, "cpu").double()
    for axes in ((0, 1, 2, 3), (0, 1, 2), (0, 1, 3), (2, 3)):
        draws = math.prod(keep.shape[a] for a in axes)
        z = (keep.mean(axes) - (1 - p)) / math.sqrt(p * (1 - p) / draws)
        assert z.abs().max() < 5


def test_masks_of_other_seeds_sites_and_heads_are_independent():
    def mask(seed, site):
        return pytorch.dropout_mask(seed, 0.5, (1, 2, 256, 256), site, "cpu").double() - 0.5

    first = mask(1, 0)
    for other in (mask(2, 0), mask(1, 1), mask(1 + 2**32, 0), first.flip(1), first.roll(1, -1), first.roll(1, -2)):
        z = 4 * (first * other).sum() / math.sqrt(first.numel())
        assert z.abs() < 5


@pytest.mark.parametrize("p", [0.1, 0.5])
@pytest.mark.parametrize("what", ["attention", "add_layer_norm", "embedding"])
def test_dropout_is_unbiased(p, what):
    """The mean over 200 seeds is what there is without dropout, within what the masks' spread allows."""
    q, k, v = torch.randn(3, 1, 2, 12, 8, dtype=F64)
    ids, rows = torch.arange(12)[None], torch.randn(3, 12, 8, dtype=F64)
    calls = {
        "attention": lambda **options: pytorch.causal_attention(q, k, v, **options),
        "add_layer_norm": lambda **options: pytorch.add_layer_norm(rows[0], rows[1], rows[2, 0], **options)[1],
        "embedding": lambda **options: pytorch.embedding(ids, rows[0], rows[1], **options),
    }
    call = calls[what]
    draws = torch.stack([call(dropout_p=p, seed=seed) for seed in range(200)])
    z = (draws.mean(0) - call()) / (draws.std(0) / math.sqrt(200)).clamp(min=1e-12)
    assert z.abs().max() < 5 and 0.5 < z.square().mean() < 2


def test_each_place_is_dropped_as_often_as_any_other():
    """Over a thousand seeds, by each place's own binomial count: no place has a smaller share than chance gives it."""
    kept = sum(pytorch.dropout_mask(seed, 0.3, (1, 1, 24, 24), 0, "cpu").double() for seed in range(1000))
    z = (kept - 700) / math.sqrt(1000 * 0.3 * 0.7)
    assert z.abs().max() < 5 and 0.8 < z.square().mean() < 1.2


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_the_ends_of_dropout(p):
    x, residual, weight = torch.randn(3, 8), torch.randn(3, 8), torch.ones(8)
    for seed in (None, 3):
        _, s = ops.add_layer_norm(x, residual, weight, dropout_p=p, seed=seed)
        assert torch.equal(s, residual + (x if p == 0 else 0))


def test_manual_seed_repeats_dropout_without_a_seed():
    q = torch.randn(1, 2, 16, 8)
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(ops.causal_attention(q, q, q, dropout_p=0.5))
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


# LayerNorm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_layer_norm_is_torchs(dtype):
    x, weight, bias = torch.randn(7, 48).to(dtype), torch.rand(48).to(dtype), torch.randn(48).to(dtype)
    oracle = F.layer_norm(x.double(), (48,), weight.double(), bias.double())
    assert_accurate(ops.layer_norm(x, weight, bias), oracle, F.layer_norm(x, (48,), weight, bias))


def test_layer_norm_far_from_zero():
    """A mean a million deviations away: F.layer_norm alone is off by some 3e-2 here. The oracle centres first."""
    x = (torch.randn(5, 768, dtype=F64) * 1e-2 + 1e4).float().requires_grad_()
    weight, dy = torch.rand(768), torch.randn(5, 768)
    y = ops.layer_norm(x, weight)
    y.backward(dy)
    wide = x.detach().double().requires_grad_()
    centred = wide - wide.mean(-1, keepdim=True)
    oracle = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    oracle.backward(dy.double())
    assert_accurate(y, oracle)
    assert (x.grad.double() - wide.grad).norm() < 8 * 2**-24 * wide.grad.norm()


def test_layer_norm_mixes_dtypes_as_autocast_needs():
    x, weight, bias = torch.randn(7, 48).bfloat16(), torch.rand(48), torch.randn(48)
    y = ops.layer_norm(x, weight, bias)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, F.layer_norm(x.float(), (48,), weight, bias).bfloat16())


def test_add_layer_norm_spelled_out():
    x, residual, x_bias, weight, bias = torch.randn(3, 5, 8), torch.randn(3, 5, 8), *torch.randn(3, 8)
    normed, s = ops.add_layer_norm(x, residual, weight, bias, x_bias=x_bias)
    assert torch.equal(s, residual + (x + x_bias))
    torch.testing.assert_close(normed, F.layer_norm(s, (8,), weight, bias))
    normed, s = ops.add_layer_norm(x.bfloat16(), residual, weight, bias)
    assert normed.dtype == torch.bfloat16 and s.dtype == torch.float32
    _, s = ops.add_layer_norm(x, residual, weight, bias, residual_dtype=torch.bfloat16)
    assert torch.equal(s, (residual + x).bfloat16())


# Attention


def plain_attention(q, k, v, allowed, scale=None, keep=None, p=0.0):
    """softmax over allowed (B, 1 or H, Tq, Tk), rows that see nothing zero."""
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    weights = scores.masked_fill(~allowed, -math.inf).softmax(-1).nan_to_num(0.0)
    if keep is not None:
        weights = weights * keep / (1 - p)
    return weights @ v


def causal(queries, keys):
    return torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)[None, None]


def qkv(batch=2, heads=4, queries=17, keys=17, dim=16, kv_heads=None, dtype=F64):
    kv_heads = heads if kv_heads is None else kv_heads
    shapes = ((batch, heads, queries, dim), *[(batch, kv_heads, keys, dim)] * 2)
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def same_values_and_gradients(got, expected, leaves):
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
    upstream = torch.randn_like(expected)
    for a, b in zip(*(torch.autograd.grad(out, leaves, upstream) for out in (got, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("time", [1, 2, 3, 7, 65, 200])
@pytest.mark.parametrize("dim", [1, 20, 64])
def test_causal_attention(time, dim):
    q, k, v = qkv(queries=time, keys=time, dim=dim)
    same_values_and_gradients(ops.causal_attention(q, k, v), plain_attention(q, k, v, causal(time, time)), (q, k, v))


@pytest.mark.parametrize(
    "options", [dict(kv_heads=1), dict(kv_heads=2), dict(queries=5), dict(queries=1), dict(dim=300)]
)
def test_shapes_of_attention(options):
    """Grouped heads; fewer queries than keys, causal aligned at the end; wide heads."""
    q, k, v = qkv(**options)
    expected = plain_attention(q, k, v, causal(q.shape[2], k.shape[2]), scale=0.3)
    same_values_and_gradients(ops.causal_attention(q, k, v, scale=0.3), expected, (q, k, v))


@pytest.mark.parametrize("side", ["left", "right", "holes"])
def test_key_mask(side):
    q, k, v = qkv(kv_heads=2)
    key_mask = torch.ones(2, 17, dtype=torch.bool)
    key_mask[1, {"left": slice(0, 6), "right": slice(9, 17), "holes": slice(1, 17, 2)}[side]] = False
    allowed = causal(17, 17) & key_mask[:, None, None]
    same_values_and_gradients(
        ops.causal_attention(q, k, v, key_mask=key_mask), plain_attention(q, k, v, allowed), (q, k, v)
    )


def test_documents():
    q, k, v = qkv()
    documents = torch.tensor([[0] * 5 + [1] * 9 + [7] * 3, [3] * 16 + [0]])
    allowed = causal(17, 17) & (documents[:, None, :, None] == documents[:, None, None, :])
    got = ops.causal_attention(q, k, v, documents=documents)
    same_values_and_gradients(got, plain_attention(q, k, v, allowed), (q, k, v))
    alone = ops.causal_attention(*(t[:1, :, 5:14] for t in (q, k, v)))
    torch.testing.assert_close(got[:1, :, 5:14], alone)


def test_a_query_that_sees_nothing_gives_zeros_and_no_gradient():
    q, k, v = qkv(dtype=torch.float32)
    key_mask = torch.ones(2, 17, dtype=torch.bool)
    key_mask[0] = False
    key_mask[1, :3] = False
    for options in ({}, dict(dropout_p=0.5, seed=1)):
        out = ops.causal_attention(q, k, v, key_mask=key_mask, **options)
        assert torch.equal(out[0], torch.zeros_like(out[0])) and torch.equal(
            out[1, :, :3], torch.zeros_like(out[1, :, :3])
        )
        grads = torch.autograd.grad(out.sum(), (q, k, v))
        assert all(g.isfinite().all() and torch.equal(g[0], torch.zeros_like(g[0])) for g in grads)
        assert grads[2][1].any()


def test_nothing_leaks_from_masked_keys_nan_included():
    q, k, v = qkv(dtype=torch.float32)
    key_mask = torch.ones(2, 17, dtype=torch.bool)
    key_mask[:, 10:] = False
    expected = ops.causal_attention(q, k, v, key_mask=key_mask)
    poisoned = [t.detach().masked_fill(~key_mask[:, None, :, None], math.nan) for t in (k, v)]
    assert torch.equal(ops.causal_attention(q, *poisoned, key_mask=key_mask), expected)


def test_attention_dropout_by_seed():
    q, k, v = qkv(kv_heads=2)
    keep = pytorch.dropout_mask(5, 0.4, (2, 4, 17, 17), pytorch.ATTENTION_SITE, "cpu")
    got = ops.causal_attention(q, k, v, dropout_p=0.4, seed=5)
    same_values_and_gradients(got, plain_attention(q, k, v, causal(17, 17), keep=keep, p=0.4), (q, k, v))
    assert torch.equal(ops.causal_attention(q, k, v, dropout_p=0.4, seed=torch.tensor(5)), got)


@pytest.mark.parametrize("options", [{}, dict(dropout_p=0.5, seed=3), dict(scale=0.7)], ids=str)
def test_packed_attention_is_attention(options):
    packed = torch.randn(2, 9, 3 * 20, dtype=F64, requires_grad=True)
    q, k, v = (t.unflatten(-1, (5, 4)).transpose(1, 2) for t in packed.chunk(3, -1))
    expected = ops.causal_attention(q, k, v, **options).transpose(1, 2).flatten(-2)
    same_values_and_gradients(ops.causal_attention_qkv(packed, 5, **options), expected, (packed,))


def test_packed_attention_of_a_strided_projection():
    packed = torch.randn(9, 2, 60).transpose(0, 1)
    assert torch.equal(ops.causal_attention_qkv(packed, 5), ops.causal_attention_qkv(packed.contiguous(), 5))


@pytest.mark.parametrize("steps", [1, 2, 16])
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_decode_is_the_last_rows_of_attention(steps, kv_heads):
    """Rows of other lengths in one batch; slots past a row's length hold NaN."""
    lengths = torch.tensor([16, 23, 30])
    q, k, v = (t.detach() for t in qkv(batch=3, queries=steps, keys=30, kv_heads=kv_heads))
    caches = [t.masked_fill((torch.arange(30) >= lengths[:, None])[:, None, :, None], math.nan) for t in (k, v)]
    got = ops.decode_attention(q, *caches, lengths)
    for row, length in enumerate(lengths):
        one = slice(row, row + 1)
        expected = plain_attention(q[one], k[one, :, :length], v[one, :, :length], causal(steps, length))
        torch.testing.assert_close(got[one], expected, rtol=1e-10, atol=1e-12)


def test_decode_of_an_empty_row_gives_zeros():
    q, k, v = (t.detach() for t in qkv(queries=2, dtype=torch.float32))
    got = ops.decode_attention(q, k, v, torch.tensor([0, 1]))
    assert torch.equal(got[0], torch.zeros_like(got[0])) and torch.equal(got[1, :, 0], torch.zeros_like(got[1, :, 0]))
    torch.testing.assert_close(got[1, :, 1], v[1, :, 0])


@pytest.mark.parametrize("batch", [0, 1])
def test_attention_of_small_batches(batch):
    q, k, v = qkv(batch=batch, dtype=torch.float32)
    out = ops.causal_attention(q, k, v)
    out.sum().backward()
    assert out.shape == q.shape == q.grad.shape


# Embedding


def test_embedding():
    tokens, places = torch.randn(10, 8, requires_grad=True), torch.randn(6, 8, requires_grad=True)
    ids = torch.randint(0, 10, (3, 6))
    assert torch.equal(ops.embedding(ids, tokens, places), tokens[ids] + places)
    assert torch.equal(ops.embedding(ids[:, :4], tokens, places), tokens[ids[:, :4]] + places[:4])
    positions = torch.randint(0, 6, (3, 6))
    assert torch.equal(ops.embedding(ids, tokens, places, positions), tokens[ids] + places[positions])
    assert torch.equal(ops.embedding(ids, tokens, places, positions[0]), tokens[ids] + places[positions[0]])
    assert torch.equal(ops.embedding(ids.int(), tokens, places), tokens[ids] + places)
    keep = pytorch.dropout_mask(3, 0.25, (1, 1, 18, 8), pytorch.EMBEDDING_SITE, "cpu").view(3, 6, 8)
    dropped = ops.embedding(ids, tokens, places, dropout_p=0.25, seed=3)
    torch.testing.assert_close(dropped, (tokens[ids] + places) * keep / 0.75)
