"""Attention in a window of the last keys, on the kernels and on PyTorch, against the naive reference; and over a cache
that may be a ring."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastgpt import ops
from fastgpt.ops import reference
from fastgpt.testing import assert_accurate
from tests.kernels.attention_checks import check, operands, run
from tests.kernels.test_attention_masks import packed_ids, padding, scattered_ids

F32 = torch.float32


@pytest.fixture(
    params=[
        pytest.param(("torch", "cpu"), id="fallback"),
        pytest.param(("triton", "cpu"), marks=pytest.mark.interpreter, id="interpreter"),
        pytest.param(("triton", "cuda"), marks=pytest.mark.gpu, id="gpu"),
    ]
)
def place(request):
    """Backend and device."""
    return request.param


@pytest.mark.parametrize("window", [1, 2, 15, 16, 17, 31, 32, 33, 44])
def test_windows_around_the_tiles(place, window):
    """Of 32 by 16 and 16 by 32 in the interpreter; of 64 in the fallback."""
    backend, device = place
    check(operands(1, 1, 45, 45, 16, F32, device), backend, window=window)


@pytest.mark.parametrize(("queries", "keys", "window"), [(21, 70, 1), (33, 70, 20), (1, 40, 7), (130, 130, 66)])
def test_fewer_queries_than_keys_and_more_than_a_block(place, queries, keys, window):
    """Each in another dtype and order of axes."""
    backend, device = place
    dtype = torch.float16 if backend == "triton" and queries == 33 else F32
    tensors = operands(1, 2, queries, keys, 16, dtype, device)
    tensors = [t.transpose(1, 2).contiguous().transpose(1, 2) if queries == 21 else t for t in tensors]
    check(tensors, backend, window=window)


@pytest.mark.parametrize("window", [3, 30])
def test_with_dropout_masks_documents_and_grouped_heads(place, window):
    backend, device = place
    tensors = operands(3, 4, 43, 43, 16, F32, device, key_heads=2)
    options = dict(key_mask=padding(3, 43, device), dropout_p=0.3, seed=3, window=window)
    check(tensors, backend, documents=scattered_ids(3, 43, device), **options)
    check(operands(3, 2, 21, 43, 16, F32, device), backend, **options)
    one = operands(1, 1, 70, 70, 16, F32, device)
    check(one, backend, documents=packed_ids(1, 33, 3, 33, device=device), window=window)


@pytest.mark.parametrize(("block_m", "block_n"), [(16, 16), (16, 64), (64, 16)])
def test_every_ratio_of_tiles(block_m, block_n, device, monkeypatch):
    attention_tiles = pytest.importorskip("fastgpt.kernels.attention_tiles")
    tiles = attention_tiles.Tiles(block_m, block_n, 4, 1)
    monkeypatch.setattr(attention_tiles, "_tiles", lambda *args: tiles)
    for queries, keys, window in ((70, 70, 16), (150, 150, 81), (33, 90, 40)):
        check(operands(1, 1, queries, keys, 16, F32, device), window=window)


def test_a_window_of_all_keys_is_no_window(place):
    backend, device = place
    tensors = operands(1, 2, 40, 40, 16, F32, device)
    expected = run(*tensors, backend=backend)
    for window in (40, 41, 2**40):
        assert all(map(torch.equal, run(*tensors, backend=backend, window=window), expected))


@pytest.mark.parametrize("filler", [math.nan, 1e4])
def test_keys_before_the_window_change_no_bit(place, filler):
    """A NaN in their values may reach a tile's other queries, as that of a later key."""
    backend, device = place
    q, k, v, _ = operands(1, 2, 60, 60, 16, F32, device)
    expected = ops.causal_attention(q, k, v, window=9, backend=backend)
    k[:, :, :20] = filler
    v[:, :, :20] = 1e4
    got = ops.causal_attention(q, k, v, window=9, backend=backend)
    assert torch.equal(got[:, :, 28:], expected[:, :, 28:]) and not torch.equal(got[:, :, 27], expected[:, :, 27])


def test_the_packed_projection_sees_the_same_window(place):
    backend, device = place
    qkv, dout = torch.randn(2, 37, 3 * 32, device=device).requires_grad_(), torch.randn(2, 37, 32, device=device)
    out = ops.causal_attention_qkv(qkv, 2, window=5, backend=backend)
    parts = [t.detach().unflatten(-1, (2, 16)).transpose(1, 2) for t in (*qkv.chunk(3, -1), dout)]
    expected = [t.transpose(1, 2).flatten(-2) for t in run(*parts, window=5, backend=backend)]
    assert torch.equal(out, expected[0])
    assert torch.equal(torch.autograd.grad(out, qkv, dout)[0], torch.cat(expected[1:], -1))


@pytest.mark.interpreter
def test_tiles_outside_of_the_window_are_not_walked_over(monkeypatch):
    """Counted in products, as documents' are: 2 a tile in the forward, 3 for dq, 4 for dk and dv."""
    from fastgpt import sanitizer  # needs Triton

    products, create_dot = [], sanitizer._Builder.create_dot
    monkeypatch.setattr(sanitizer._Builder, "create_dot", lambda *args: products.append(1) or create_dot(*args))

    def count(time, **options):
        products.clear()
        run(*operands(1, 1, time, time, 16, F32, "cpu"), **options, backend="triton")
        return len(products)

    # 32 queries by 16 keys: 2 tiles of their own keys, and one more for every 16 keys before them, or a part of 16
    assert count(128, window=1) == (2 + 3) * 4 * 2 + 4 * 4 * 2
    assert count(128, window=17) == (2 + 3) * (2 + 3 * 3) + 4 * (3 * 3 + 2)
    assert count(128, window=18) == (2 + 3) * (2 + 3 * 4) + 4 * (3 * 4 + 2)
    # of documents of 64 tokens too, the fewer tiles
    ids = packed_ids(64, 64)
    assert count(128, window=17, documents=ids) == (2 + 3) * 2 * (2 + 3) + 4 * 2 * (3 + 2)


def test_the_fallbacks_memory_grows_with_the_tokens():
    """Twice the tokens make the largest tensor of a forward and backward twice as large, by either way of dropout."""

    class Largest(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            results = function(*args, **(kwargs or {}))
            tensors = [t for t in tree_leaves(results) if isinstance(t, torch.Tensor)]
            self.seen = max([self.seen, *(t.untyped_storage().nbytes() for t in tensors)])
            return results

    def largest(time, **options):
        with Largest() as mode:
            run(*operands(1, 1, time, time, 16, F32, "cpu"), backend="torch", window=64, **options)
        return mode.seen

    assert largest(4096) <= 2.1 * largest(2048)
    small, large = (dict(dropout_p=0.5, seed=1, documents=packed_ids(time, time)) for time in (1024, 2048))
    assert largest(4096, **large) <= 2.1 * largest(2048, **small)


def test_opcheck_and_compile(device):
    pytest.importorskip("triton", reason="Triton is not to be had on this platform")
    from fastgpt.ops import autograd

    q, k, v, _ = operands(1, 2, 20, 20, 16, F32, device)
    torch.library.opcheck(autograd.attention_fwd.op, (q, k, v, None, None, None, 0.25, 0.0, 5))
    call = lambda q: ops.causal_attention(q, k, v, window=5, backend="triton").square().sum()  # noqa: E731
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    q.requires_grad_()
    grads = [torch.autograd.grad(function(q), q)[0] for function in (compiled, call)]
    assert torch.equal(*grads)


# Over a cache


def cached(lengths, heads, key_heads, steps, slots, dim, device, ring=False):
    """q, the caches and lengths. What no token lies in holds NaN."""
    q = torch.randn(len(lengths), heads, steps, dim, device=device)
    caches = [torch.randn(len(lengths), key_heads, slots, dim, device=device) for _ in range(2)]
    for row, length in enumerate(lengths):
        for cache in caches:
            cache[row, :, length:] = math.nan
    return q, *caches, torch.tensor(lengths, dtype=torch.int64, device=device)


def check_decoding(tensors, window, backend):
    q, k, v, lengths = tensors
    got = ops.decode_attention(*tensors, window=window, backend=backend)
    wide = [t.double() for t in (q, k, v)]
    exact = reference.decode_attention(*wide, lengths, window=window)
    size = reference.decode_attention(*wide[:2], wide[2].abs(), lengths, window=window)
    assert_accurate(got, exact, reference.decode_attention(*tensors, window=window), size, logit_max=8.0)
    return got


@pytest.mark.parametrize(("window", "steps"), [(1, 1), (2, 3), (16, 1), (33, 2), (50, 16), (200, 1)])
def test_decoding_in_a_window(place, window, steps):
    """Of rows that it covers, that it does not, and of none; splits are of 32 keys in the interpreter."""
    backend, device = place
    check_decoding(cached([0, steps, 40, 100], 4, 2, steps, 100, 16, device), window, backend)


@pytest.mark.parametrize(("window", "steps", "slots"), [(7, 1, 7), (7, 4, 10), (40, 16, 55), (40, 2, 60)])
def test_a_ring_is_the_end_of_a_long_cache(place, window, steps, slots):
    """To the bit where it begins as the long one does, and against the reference at every place in its round."""
    backend, device = place
    lengths = [slots - 1, slots, slots + 1, 2 * slots + steps // 2, 3 * slots - 1]
    q, k, v, lengths = cached(lengths, 2, 2, steps, 3 * slots, 16, device)
    ring_k, ring_v = (torch.full((5, 2, slots, 16), math.nan, device=device) for _ in range(2))
    for row, length in enumerate(lengths.tolist()):
        for at in range(max(0, length - slots), length):
            ring_k[row, :, at % slots], ring_v[row, :, at % slots] = k[row, :, at], v[row, :, at]
    got = check_decoding((q, ring_k, ring_v, lengths), window, backend)
    expected = ops.decode_attention(q, k, v, lengths, window=window, backend=backend)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_a_length_past_a_cache_that_is_no_ring_is_refused():
    q, k, v, lengths = cached([20], 2, 2, 2, 19, 16, "cpu")
    with pytest.raises(ValueError, match=r"length 20 at \(0,\) is outside a cache of 19 slots"):
        ops.decode_attention(q, k, v, lengths, window=19)
    assert ops.decode_attention(q, k, v, lengths, window=18).isfinite().all()
