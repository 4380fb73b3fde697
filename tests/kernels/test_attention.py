"""kernels/attention.py against float64: values and every gradient, at odd lengths, head dims and strides."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from fastgpt import ops
from fastgpt.ops import pytorch, reference
from fastgpt.testing import assert_accurate

pytest.importorskip("triton", reason="Triton is not to be had on this platform")

from fastgpt.kernels import attention, attention_tiles, launch
from tests.kernels.alike import alike
from tests.kernels.attention_checks import NAMES, check, operands, run

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("time", [1, 2, 3, 7, 15, 17, 63, 64, 65, 127])
def test_lengths(time, device):
    for dtype in DTYPES:
        check(operands(1, 2, time, time, 16, dtype, device))


@pytest.mark.parametrize("dim", [1, 16, 20, 25, 32, 64, 80, 128, 256])
def test_head_dims(dim, device):
    for dtype in DTYPES:
        check(operands(1, 1, 37, 37, dim, dtype, device))


@pytest.mark.parametrize(("batch", "heads"), [(1, 1), (2, 3), (1, 12), (1, 25)])
def test_heads_and_batches(batch, heads, device):
    check(operands(batch, heads, 20, 20, 16, torch.float32, device))


@pytest.mark.parametrize(("queries", "keys"), [(1, 40), (5, 40), (17, 18), (33, 70), (16, 48), (33, 47)])
def test_fewer_queries_than_keys_sit_at_the_end(queries, keys, device):
    check(operands(1, 2, queries, keys, 16, torch.float32, device))


@pytest.mark.parametrize("amplitude", [1e-3, 6.0])
def test_small_and_large_scores(amplitude, device):
    """At 6 the scores reach some 200, so that a sum without its running maximum overflows."""
    check(operands(1, 2, 50, 50, 32, torch.float32, device, scale=amplitude))


@pytest.mark.parametrize("scale", [0.01, 0.7])
def test_scale_is_heard(scale, device):
    check(operands(1, 2, 50, 50, 16, torch.float32, device), scale=scale)


TILES = [(16, 16), (16, 64), (64, 16), (32, 32)]


@pytest.mark.parametrize(("block_m", "block_n"), TILES)
def test_every_ratio_of_tiles(block_m, block_n, device, monkeypatch):
    """How many tiles are masked, whole and skipped depends on it, in each of the three kernels."""
    tiles = attention_tiles.Tiles(block_m, block_n, 4, 1)
    monkeypatch.setattr(attention_tiles, "_tiles", lambda *args: tiles)
    for queries, keys in ((70, 70), (64, 64), (33, 90)):
        check(operands(1, 1, queries, keys, 16, torch.float32, device))


def test_the_tiles_of_a_hopper_card(device, monkeypatch):
    """As shipped for capability 9.0, where other tests take small ones; with and without dropout and masks."""
    monkeypatch.setattr(attention_tiles, "card_of", lambda tensor: attention_tiles.Card(90, 232_448))
    tensors = operands(1, 1, 200, 200, 64, torch.float16, device)
    check(tensors)
    documents = torch.arange(200, device=device)[None] // 70
    check(tensors, documents=documents, dropout_p=0.1, seed=1)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [64, 80, 128, 256])
def test_the_sizes_that_people_train(dim, dtype):
    """All lengths in one process: it has compiled for the first what serves the others."""
    for time in (200, 257, 1000, 1024, 4096):
        print(f"T = {time}")
        batch, heads = (2, 3) if time <= 1024 else (1, 2)  # many processes have such matrices in float64 at once
        check(operands(batch, heads, time, time, dim, dtype, "cuda"))


def test_what_all_keys_or_values_share_costs_the_gradients_no_more_than_pytorchs(device):
    """Δ comes from o as it was rounded, so the rows of dS do not add up to zero, and what is left of them meets that
    part. A softmax that PyTorch differentiates keeps more; its own scaled_dot_product_attention does not."""
    for dtype in DTYPES[1:]:
        q, k, v, do = operands(1, 2, 48, 48, 32, torch.float64, device)
        shared = 5 * torch.randn(2, 1, 2, 1, 32, dtype=torch.float64).to(device)
        tensors = [t.to(dtype) for t in (q, k + shared[0], v + shared[1], do)]
        got = run(*tensors, backend="triton")
        exact = run(*(t.double() for t in tensors), reference.causal_attention)
        theirs = run(*tensors, F.scaled_dot_product_attention, is_causal=True)
        for name, ours, expected, their in zip(NAMES, got, exact, theirs, strict=True):
            assert_accurate(ours.flatten(), expected.flatten(), their.flatten(), name=name)


def packed(batch, time, heads, dim, dtype, device):
    return [torch.randn(batch, time, n * heads * dim).to(device, dtype) for n in (3, 1)]


def run_packed(qkv, dout, heads, **options):
    leaf = qkv.detach().requires_grad_()
    out = ops.causal_attention_qkv(leaf, heads, **options)
    out.backward(dout)
    return out, leaf.grad


@pytest.mark.parametrize(("heads", "dim"), [(1, 16), (3, 20), (5, 64)])
def test_packed_attention_has_the_bits_of_the_unpacked(heads, dim, device):
    qkv, dout = packed(2, 37, heads, dim, torch.float32, device)
    out, dqkv = run_packed(qkv, dout, heads, backend="triton")
    parts = [t.unflatten(-1, (heads, dim)).transpose(1, 2) for t in (*qkv.chunk(3, -1), dout)]
    expected = [t.transpose(1, 2).flatten(-2) for t in run(*parts, backend="triton")]
    assert torch.equal(out, expected[0])
    assert torch.equal(dqkv, torch.cat(expected[1:], -1))


def test_the_output_lies_ready_for_merging_heads(device):
    q, k, v, _ = operands(2, 3, 20, 20, 16, torch.float32, device)
    o = ops.causal_attention(q, k, v, backend="triton")
    assert o.transpose(1, 2).is_contiguous()


STRIDES = {
    "batch and heads swapped": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "time inside": lambda t: t.mT.contiguous().mT,
    "every other channel": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "every other token": lambda t: t.repeat_interleave(2, 2)[:, :, ::2],
    "one head for all": lambda t: t[:, :1].expand_as(t),
    "one number": lambda t: t[:1, :1, :1, :1].expand_as(t),
}


@pytest.mark.parametrize("strides", STRIDES)
def test_strides_change_no_bit(strides, device):
    for which in ((0, 1, 2), (3,)):
        tensors = operands(2, 3, 21, 21, 16, torch.float32, device)
        for i in which:
            tensors[i] = STRIDES[strides](tensors[i])
        got = run(*tensors, backend="triton")
        expected = run(*(t.contiguous() for t in tensors), backend="triton")
        assert all(alike(a, b) for a, b in zip(got, expected, strict=True))


def test_a_strided_packed_projection(device):
    qkv, dout = packed(2, 21, 3, 16, torch.float32, device)
    expected = run_packed(qkv, dout, 3, backend="triton")
    wide = qkv.repeat_interleave(2, -1)[..., ::2]
    turned = dout.transpose(0, 1).contiguous().transpose(0, 1)
    got = run_packed(wide, turned, 3, backend="triton")
    assert all(alike(a, b) for a, b in zip(got, expected, strict=True))
    got = run_packed(qkv, dout[:1, :1, :1].expand_as(dout), 3, backend="triton")
    expected = run_packed(qkv, dout[:1, :1, :1].expand_as(dout).contiguous(), 3, backend="triton")
    assert all(alike(a, b) for a, b in zip(got, expected, strict=True))


def test_rows_too_far_apart_for_an_offset_are_copied(device, monkeypatch):
    tensors = operands(1, 2, 21, 21, 16, torch.float32, device)
    expected = run(*tensors, backend="triton")
    monkeypatch.setattr(attention_tiles, "MAX_ROW_STRIDE", 16)
    assert attention_tiles.addressable(tensors[0]).data_ptr() == tensors[0].contiguous().data_ptr()
    far = [t.repeat_interleave(2, -1)[..., ::2] for t in tensors]
    assert attention_tiles.addressable(far[0]).stride() == tensors[0].stride()
    assert all(torch.equal(a, b) for a, b in zip(run(*far, backend="triton"), expected, strict=True))


def test_any_subset_of_gradients_equals_the_whole(device):
    tensors = operands(1, 2, 21, 21, 16, torch.float32, device)
    whole = run(*tensors, backend="triton")[1:]
    for wanted in itertools.product([True, False], repeat=3):
        if not any(wanted):
            continue
        leaves = [t.clone().requires_grad_(want) for t, want in zip(tensors[:3], wanted, strict=True)]
        ops.causal_attention(*leaves, backend="triton").backward(tensors[3])
        for leaf, want, expected in zip(leaves, wanted, whole, strict=True):
            assert torch.equal(leaf.grad, expected) if want else leaf.grad is None


@pytest.mark.parametrize("shape", [(0, 3, 5, 5), (2, 3, 0, 0), (2, 3, 0, 5)])
def test_nothing_to_attend(shape, device):
    tensors = operands(*shape, 16, torch.float32, device)
    o, *grads = run(*tensors, backend="triton")
    assert o.shape == tensors[0].shape
    for grad, leaf in zip(grads, tensors[:3], strict=True):
        assert torch.equal(grad, torch.zeros_like(leaf))


def test_later_tokens_change_no_bit(device):
    q, k, v, _ = operands(1, 2, 50, 50, 16, torch.float32, device)
    expected = ops.causal_attention(q, k, v, backend="triton")[:, :, :23]
    k[:, :, 23:], v[:, :, 23:] = 1e4, -1e4
    assert torch.equal(ops.causal_attention(q, k, v, backend="triton")[:, :, :23], expected)


def test_a_row_of_the_batch_does_not_depend_on_the_others(device):
    tensors = operands(3, 2, 40, 40, 16, torch.float32, device)
    whole = run(*tensors, backend="triton")
    alone = run(*(t[1:2] for t in tensors), backend="triton")
    assert all(torch.equal(a[1:2], b) for a, b in zip(whole, alone, strict=True))


def test_heads_rows_and_values_change_places_with_their_results(device):
    """To the bit: whatever is permuted or doubled going in is permuted or doubled coming out."""
    tensors = operands(3, 4, 40, 40, 16, torch.float32, device)
    o, dq, dk, dv = run(*tensors, backend="triton")
    heads, rows = torch.tensor([2, 0, 3, 1], device=device), torch.tensor([1, 2, 0], device=device)
    for axis, order in ((1, heads), (0, rows)):
        moved = run(*(t.index_select(axis, order) for t in tensors), backend="triton")
        assert all(torch.equal(a, b.index_select(axis, order)) for a, b in zip(moved, (o, dq, dk, dv), strict=True))
    q, k, v, do = tensors
    doubled = run(q, k, 2 * v, do, backend="triton")
    assert all(torch.equal(a, b) for a, b in zip(doubled, (2 * o, 2 * dq, 2 * dk, dv), strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sums_are_kept_in_float32(dtype, device):
    """600 equal keys: a sum of ones in bfloat16 ends at 256, and each query's share would show it."""
    time = 600
    q, k, v = torch.zeros(3, 1, 1, time, 16, dtype=dtype, device=device)
    _, lse = attention.attention_fwd(q, k, v + 1, None, None, None, 0.25, 0.0)
    expected = torch.arange(1, time + 1, device=device).log2()
    assert (lse[0, 0] - expected).abs().max() < 1e-5
    v.requires_grad_()
    ops.causal_attention(q, k, v, backend="triton").backward(torch.ones_like(v))
    shares = 1 / torch.arange(1, time + 1, dtype=torch.float64)
    assert_accurate(v.grad[0, 0, :, :1], shares.flip(0).cumsum(0).flip(0)[:, None], magnitude=torch.ones(time, 1) * 7)


def test_the_same_input_gives_the_same_bits(device):
    tensors = operands(2, 2, 70, 70, 32, torch.float32, device)
    first, second = run(*tensors, backend="triton"), run(*tensors, backend="triton")
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_nan_in_a_query_stays_in_its_row(device):
    q, k, v, _ = operands(1, 1, 40, 40, 16, torch.float32, device)
    q[0, 0, 7, 3] = math.nan
    o = ops.causal_attention(q, k, v, backend="triton")[0, 0]
    assert o[7].isnan().all() and o[torch.arange(40) != 7].isfinite().all()


def test_lse_is_the_log_of_the_row_sum_in_base_2(device):
    q, k, v, _ = operands(1, 2, 37, 37, 16, torch.float32, device)
    _, lse = attention.attention_fwd(q, k, v, None, None, None, 0.25, 0.0)
    hidden = ~torch.ones(37, 37, dtype=torch.bool, device=device).tril()
    expected = (q.double() @ k.double().mT * 0.25).masked_fill(hidden, -math.inf).logsumexp(-1) / math.log(2)
    assert_accurate(lse, expected, magnitude=expected.abs() + 4)


@pytest.mark.gpu
def test_tf32_only_where_the_user_allowed_it():
    tensors = operands(1, 2, 256, 256, 64, torch.float32, "cuda")
    exact, wide = run(*tensors, backend="triton"), run(*(t.double() for t in tensors), backend="torch")
    torch.set_float32_matmul_precision("high")
    try:
        loose = run(*tensors, backend="triton")
    finally:
        torch.set_float32_matmul_precision("highest")
    for a, b, right in zip(exact, loose, wide, strict=True):
        assert (a - right).norm() < 1e-6 * right.norm() < 1e-2 * (b - right).norm()


def test_tf32_follows_torchs_setting(device):
    q = torch.zeros(1, 1, 2, 16, device=device)
    assert attention_tiles.settings("fwd", q)["PRECISION"] == "ieee"
    torch.set_float32_matmul_precision("high")
    try:
        assert attention_tiles.settings("fwd", q)["PRECISION"] == "tf32"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_heads_too_wide_go_to_pytorch(device):
    q = torch.randn(1, 1, 2, 300, device=device)
    assert "heads of 300 channels" in ops.explain(ops.causal_attention, q, q, q)
    with pytest.raises(ValueError, match="heads of 300 channels"):
        ops.causal_attention(q, q, q, backend="triton")
    assert torch.equal(ops.causal_attention(q, q, q), pytorch.causal_attention(q, q, q))


CARDS = {(8, 0): 166_912, (8, 6): 101_376, (9, 0): 232_448, (12, 0): 101_376}  # and the shared memory of a block


@pytest.mark.parametrize("capability", CARDS)
@pytest.mark.parametrize("kernel", ["fwd", "dkdv", "dq"])
def test_every_card_can_hold_its_tiles(kernel, capability):
    """What the tile's own operands take of shared memory, counted: a bound from below of what is compiled."""
    major, minor = capability
    card = attention_tiles.Card(10 * major + minor, CARDS[capability])
    for dim, dtype, extras in itertools.product((16, 64, 128, 256), DTYPES, (False, True)):
        tiles = attention_tiles._tiles(kernel, dim, dtype, card, extras)
        rows = (tiles.block_m, tiles.block_n)
        assert all(n in (16, 32, 64, 128) for n in rows) and tiles.num_warps in (4, 8)
        held, read = rows if kernel != "dkdv" else rows[::-1]
        assert (held + 2 * (tiles.num_stages - 1) * read) * dim * dtype.itemsize <= card.shared


def test_what_a_card_says_of_itself(monkeypatch):
    """An older PyTorch does not tell what a block may have, then every card has 99 KiB."""
    there = SimpleNamespace(is_cuda=True, device=torch.device("cuda"))
    told = dict(major=9, minor=0, shared_memory_per_block_optin=232_448)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(**told))
    assert attention_tiles.card_of(there) == attention_tiles.Card(90, 232_448)
    del told["shared_memory_per_block_optin"]
    assert attention_tiles.card_of(there) == attention_tiles.Card(90, 99 * 1024)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (12, 0))
    assert launch.capability(there) == 120 and launch.capability(torch.zeros(1)) is None
