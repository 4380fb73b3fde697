"""Attention's dropout, key masks, documents and grouped heads, on the kernels and (where unmarked) on PyTorch."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgpt import ops
from fastgpt.ops import reference
from fastgpt.testing import assert_accurate
from tests.kernels.attention_checks import check, operands, run

F32 = torch.float32


@pytest.fixture(
    params=[
        pytest.param(("torch", "cpu"), id="fallback"),
        pytest.param(("triton", "cpu"), marks=pytest.mark.interpreter, id="interpreter"),
        pytest.param(("triton", "cuda"), marks=pytest.mark.gpu, id="gpu"),
    ]
)
def place(request):
    """Backend and device: what both backends promise is tested on both."""
    return request.param


def padding(batch, time, device="cpu"):
    """Left in the first row, right in the second, and nothing to see at all in the third."""
    mask = torch.ones(batch, time, dtype=torch.bool, device=device)
    mask[0, : time // 3], mask[1, time // 2 :], mask[2:3] = False, False, False
    return mask


def packed_ids(*lengths, device="cpu"):
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None].to(device)


def scattered_ids(batch, time, device="cpu"):
    """Documents whose tokens lie between one another's."""
    return torch.randint(-1, 2, (batch, time)).to(device)


# Grouped heads


@pytest.mark.parametrize(("heads", "key_heads"), [(4, 2), (3, 1), (6, 2)])
def test_grouped_heads(heads, key_heads, device):
    check(operands(2, heads, 37, 37, 16, F32, device, key_heads=key_heads))


def test_grouped_heads_with_everything(device):
    tensors = operands(3, 4, 40, 40, 16, F32, device, key_heads=2)
    documents = scattered_ids(3, 40, device)
    check(tensors, key_mask=padding(3, 40, device), documents=documents, dropout_p=0.3, seed=3)


# Dropout


@pytest.mark.parametrize("p", [0.1, 0.5, 0.99])
def test_dropout_drops_what_the_reference_drops(p, device):
    for dtype in (F32, torch.float16):
        check(operands(2, 3, 37, 37, 16, dtype, device), dropout_p=p, seed=-7)


def test_dropout_of_fewer_queries_than_keys(device):
    check(operands(1, 2, 19, 50, 16, F32, device), dropout_p=0.5, seed=torch.tensor([2**40 + 1], device=device))


def test_all_dropped_is_zero(place):
    backend, device = place
    results = run(*operands(1, 2, 20, 20, 16, F32, device), dropout_p=1.0, seed=1, backend=backend)
    assert all(torch.equal(t, torch.zeros_like(t)) for t in results)


def kept(seed, p, device, backend="triton"):
    """Which probabilities dropout kept, (2, 4, 64, 64); those above the diagonal are False."""
    zeros = torch.zeros(2, 4, 64, 64, device=device)
    one_hot = torch.eye(64, device=device).expand_as(zeros)
    return ops.causal_attention(zeros, zeros, one_hot, dropout_p=p, seed=seed, backend=backend) != 0


def test_the_same_seed_keeps_the_same_on_both_backends(device):
    below = torch.ones(64, 64, dtype=torch.bool, device=device).tril()
    for seed in (0, 12345, -(2**63)):
        got = kept(seed, 0.3, device)
        assert torch.equal(got, kept(seed, 0.3, device, backend="torch"))
        assert torch.equal(got, reference.keep_mask(seed, 0.3, (2, 4, 64, 64), 0).to(device) & below)


def test_dropout_keeps_as_many_as_it_should_and_independently(device):
    """Of n draws the kept share is within 5 standard deviations; so is the correlation of two heads, rows or seeds."""
    below = torch.ones(64, 64, dtype=torch.bool).tril()
    p = 0.3
    one, other = ((kept(seed, p, device).cpu().double() - (1 - p)) / math.sqrt(p * (1 - p)) for seed in (1, 2))
    flat = one[..., below]  # (2, 4, 2080)
    assert abs(flat.sum()) / flat.numel() ** 0.5 < 5
    inside = below[1:] & below[:-1]
    pairs = {
        "seeds": flat * other[..., below],
        "heads": flat[:, 1:] * flat[:, :-1],
        "batch": flat[:1] * flat[1:],
        "rows": (one[..., 1:, :] * one[..., :-1, :])[..., inside],
    }
    for name, products in pairs.items():
        assert abs(products.sum()) / products.numel() ** 0.5 < 5, name


def test_no_dropout_draws_no_seed(place):
    backend, device = place
    q, k, v, do = operands(1, 1, 9, 9, 16, F32, device)
    generator = torch.default_generator if device == "cpu" else torch.cuda.default_generators[0]
    state = generator.get_state()
    plain = run(q, k, v, do, backend=backend)
    assert torch.equal(generator.get_state(), state)
    dropped = [ops.causal_attention(q, k, v, dropout_p=0.5, backend=backend) for _ in range(2)]
    assert not torch.equal(*dropped)
    generator.set_state(state)
    assert torch.equal(ops.causal_attention(q, k, v, dropout_p=0.5, backend=backend), dropped[0])
    assert all(torch.equal(a, b) for a, b in zip(run(q, k, v, do, dropout_p=0.0, backend=backend), plain, strict=True))


# Key masks


@pytest.mark.parametrize(("queries", "keys"), [(37, 37), (21, 50)])
def test_key_mask(queries, keys, device):
    mask = padding(3, keys, device)
    tensors = operands(3, 2, queries, keys, 16, F32, device)
    o, dq, dk, dv = check(tensors, key_mask=mask)
    blind = ~(mask[:, None].expand(-1, queries, -1).tril(keys - queries)).any(-1)
    assert (o.transpose(1, 2)[blind] == 0).all() and (dq.transpose(1, 2)[blind] == 0).all()
    assert (dk.transpose(1, 2)[~mask] == 0).all() and (dv.transpose(1, 2)[~mask] == 0).all()
    check(tensors, key_mask=torch.rand(3, keys, device=device) < 0.3, dropout_p=0.2, seed=4)


@pytest.mark.parametrize("filler", [math.nan, math.inf, 1e4])
def test_what_a_key_mask_hides_changes_no_bit(place, filler):
    backend, device = place
    mask = padding(3, 40, device)
    q, k, v, do = operands(3, 2, 40, 40, 16, F32, device)
    expected = run(q, k, v, do, key_mask=mask, backend=backend)
    for t in (k, v):
        t.transpose(1, 2)[~mask] = filler
    got = run(q, k, v, do, key_mask=mask, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_a_strided_key_mask_and_documents(device):
    tensors = operands(3, 2, 20, 20, 16, F32, device)
    masks = dict(key_mask=padding(3, 20, device), documents=scattered_ids(3, 20, device).int())
    strided = {name: t.t().contiguous().t() for name, t in masks.items()}
    got, expected = run(*tensors, **strided, backend="triton"), run(*tensors, **masks, backend="triton")
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


# Documents


def test_documents(device):
    tensors = operands(1, 2, 70, 70, 16, F32, device)
    for lengths in ((70,), (1, 33, 3, 33), (16, 16, 38)):
        check(tensors, documents=packed_ids(*lengths, device=device))
    check(operands(2, 2, 50, 50, 16, F32, device), documents=scattered_ids(2, 50, device), dropout_p=0.2, seed=4)


@pytest.mark.parametrize("filler", [math.nan, -math.inf, 1e4])
def test_another_document_changes_no_bit(place, filler):
    """Keys and values of others, in the same tile and elsewhere; where they are finite, their gradients too."""
    backend, device = place
    ids = packed_ids(9, 21, 20, device=device)
    q, k, v, do = operands(1, 2, 50, 50, 16, F32, device)
    expected = run(q, k, v, do, documents=ids, backend=backend)
    for other in (0, 2):
        for t in (q, k, v) if math.isfinite(filler) else (k, v):
            t[:, :, ids[0] == other] = filler
    got = run(q, k, v, do, documents=ids, backend=backend)
    assert all(torch.equal(a[:, :, 9:30], b[:, :, 9:30]) for a, b in zip(got, expected, strict=True))
    q[:, :, :9] = filler
    o = ops.causal_attention(q, k, v, documents=ids, backend=backend)
    assert torch.equal(o[:, :, 9:30], expected[0][:, :, 9:30])


def test_nan_in_the_own_document_is_heard(place):
    backend, device = place
    ids = packed_ids(20, 20, device=device)
    for which in (1, 2):
        tensors = operands(1, 2, 40, 40, 16, F32, device)
        tensors[which][0, 1, 25, 3] = math.nan
        o = ops.causal_attention(*tensors[:3], documents=ids, backend=backend)
        assert o[0, 1, 25:].isnan().all() and o[0, 1, :25].isfinite().all() and o[0, 0].isfinite().all()


@pytest.mark.interpreter
def test_foreign_tiles_are_not_walked_over(monkeypatch):
    """Counted in products; a tile of 32 queries by 16 keys has 2 in the forward, 3 for dq, and 16 by 32 has 4."""
    from fastgpt import sanitizer  # needs Triton

    products, create_dot = [], sanitizer._Builder.create_dot
    monkeypatch.setattr(sanitizer._Builder, "create_dot", lambda *args: products.append(1) or create_dot(*args))

    def count(**masks):
        products.clear()
        run(*operands(1, 1, 128, 128, 16, F32, "cpu"), **masks, backend="triton")
        return len(products)

    tiles = 2 + 4 + 6 + 8
    assert count() == (2 + 3 + 4) * tiles
    assert count(documents=packed_ids(32, 32, 32, 32)) == (2 + 3 + 4) * 4 * 2
    mask = torch.ones(1, 128, dtype=torch.bool)
    mask[:, :64] = False
    assert count(key_mask=mask) == (2 + 3) * (2 + 4) + 4 * tiles  # dk and dv of hidden keys are walked for


# Each in the company of others as alone


def alone(q, k, v, do):
    return run(*(t.double().cpu() for t in (q, k, v, do)), reference.causal_attention)


def same_as_alone(got, tensors, where):
    """The slices `where` of results are what full attention of those tokens alone gives, to float32's rounding."""
    for a, b in zip(got, alone(*(t[where] for t in tensors)), strict=True):
        assert_accurate(a[where], b, magnitude=b.abs() + b.abs().mean(), logit_max=8.0)


def test_left_padded_rows_are_the_rows_alone(place):
    backend, device = place
    tensors = operands(3, 2, 40, 40, 16, F32, device)
    mask = torch.ones(3, 40, dtype=torch.bool, device=device)
    for row, length in enumerate((7, 40, 23)):
        mask[row, : 40 - length] = False
        tensors[3][row, :, : 40 - length] = 0  # no loss on padding
    got = run(*tensors, key_mask=mask, backend=backend)
    for row, length in enumerate((7, 40, 23)):
        same_as_alone(got, tensors, (slice(row, row + 1), slice(None), slice(40 - length, None)))


def test_packed_documents_are_the_documents_alone(place):
    backend, device = place
    tensors = operands(1, 2, 60, 60, 16, F32, device)
    bounds = (0, 5, 21, 54, 60)
    got = run(*tensors, documents=ops.document_ids(torch.tensor(bounds, device=device), 60), backend=backend)
    for i, j in itertools.pairwise(bounds):
        same_as_alone(got, tensors, (slice(None), slice(None), slice(i, j)))


def test_prefill_in_chunks_is_one_full_pass(place):
    backend, device = place
    q, k, v, do = operands(2, 2, 50, 50, 16, F32, device)
    chunks = [
        ops.causal_attention(q[:, :, i:j], k[:, :, :j], v[:, :, :j], backend=backend)
        for i, j in ((0, 17), (17, 18), (18, 50))
    ]
    expected = alone(q, k, v, do)[0]
    assert_accurate(torch.cat(chunks, 2), expected, magnitude=expected.abs() + expected.abs().mean(), logit_max=8.0)


def test_document_ids():
    assert ops.document_ids(torch.tensor([0, 2, 2, 5]), 7).tolist() == [[1, 1, 3, 3, 3, 4, 4]]
    assert ops.document_ids(torch.tensor([1, 3], dtype=torch.int32), 3).tolist() == [[0, 1, 1]]
    assert ops.document_ids(torch.tensor([0]), 0).shape == (1, 0)


@pytest.mark.parametrize(
    ("cu_seqlens", "kind", "words"),
    [
        (torch.tensor([0, 3, 2]), ValueError, r"cu_seqlens \[0, 3, 2\] do not rise from 0 to at most 5"),
        (torch.tensor([0, 6]), ValueError, "at most 5"),
        (torch.tensor([-1, 2]), ValueError, "do not rise from 0"),
        (torch.arange(20).flip(0), ValueError, r"\[19, 18, 17, 16, 15, 14, 13, 12\]…"),
        (torch.tensor([[0, 2]]), ValueError, r"cu_seqlens has shape \(1, 2\), not \(N \+ 1,\)"),
        (torch.tensor([0.0, 2.0]), TypeError, "cu_seqlens is torch.float32"),
        ([0, 2], TypeError, "cu_seqlens is a list"),
    ],
)
def test_bad_cumulative_lengths(cu_seqlens, kind, words):
    with pytest.raises(kind, match=words):
        ops.document_ids(cu_seqlens, 5)


# Whatever the arguments


@st.composite
def calls(draw):
    """Operands in any layout, and options."""
    batch, group, key_heads = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(1, 2))
    keys, dim = draw(st.integers(1, 40)), draw(st.sampled_from([1, 7, 16, 24]))
    documents = draw(st.sampled_from([None, "packed", "scattered"]))
    queries = keys if documents else draw(st.integers(1, keys))
    torch.manual_seed(draw(st.integers(0, 99)))
    tensors = operands(batch, group * key_heads, queries, keys, dim, F32, "cpu", key_heads=key_heads)
    order = draw(st.permutations(range(4)))
    tensors = [t.permute(order).contiguous().permute([order.index(i) for i in range(4)]) for t in tensors]
    options = {}
    if documents == "packed":
        options["documents"] = torch.randint(0, 2, (batch, keys)).cumsum(1)
    elif documents == "scattered":
        options["documents"] = scattered_ids(batch, keys)
    if draw(st.booleans()):
        options["key_mask"] = torch.rand(batch, keys) < draw(st.sampled_from([0.1, 0.5, 0.9]))
    if draw(st.booleans()):
        options.update(dropout_p=draw(st.sampled_from([0.2, 0.7])), seed=draw(st.integers(-(2**63), 2**63 - 1)))
    return tensors, options


@pytest.mark.interpreter
@settings(max_examples=6, deadline=None, derandomize=True, database=None)
@given(calls())
def test_any_call_is_accurate(call):
    tensors, options = call
    check(tensors, **options)


@settings(max_examples=10, deadline=None, derandomize=True, database=None)
@given(calls())
def test_any_call_of_the_fallback_is_accurate(call):
    tensors, options = call
    check(tensors, **options, backend="torch")
