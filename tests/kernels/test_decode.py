"""kernels/decode.py: the newest tokens over a cache, against float64 and against full attention."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgpt import ops
from fastgpt.ops import autograd, reference
from fastgpt.testing import assert_accurate

pytest.importorskip("triton", reason="Triton is not to be had on this platform")

from fastgpt.kernels import decode

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def operands(lengths, heads, key_heads, steps, slots, dim, dtype, device):
    """q, the caches, whose empty slots hold NaN, and lengths."""
    q = torch.randn(len(lengths), heads, steps, dim)
    caches = [torch.randn(len(lengths), key_heads, slots, dim) for _ in range(2)]
    for row, length in enumerate(lengths):
        for cache in caches:
            cache[row, :, length:] = math.nan
    return [*(t.to(device, dtype) for t in (q, *caches)), torch.tensor(lengths, dtype=torch.int64, device=device)]


def check(tensors, scale=None, backend="triton"):
    q, k, v, lengths = tensors
    got = ops.decode_attention(*tensors, scale=scale, backend=backend)
    wide = [t.double() for t in (q, k, v)]
    exact = reference.decode_attention(*wide, lengths, scale=scale)
    theirs = reference.decode_attention(*tensors, scale=scale)
    size = reference.decode_attention(*wide[:2], wide[2].abs(), lengths, scale=scale)
    assert_accurate(got, exact, theirs, size, logit_max=8.0)
    return got


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 31, 32, 33, 64, 100])
def test_lengths(length, device):
    """Splits are of 32 slots under the interpreter, tiles of 16."""
    check(operands([length, 100, 1], 2, 2, 1, 100, 16, torch.float32, device))


def test_more_splits_than_are_merged_at_once(device):
    """The last of them weigh most, so that what was merged before has to be made smaller."""
    q, k, v, lengths = operands([600, 540, 512, 1], 1, 1, 1, 600, 16, torch.float32, device)
    k[:, :, 512:] *= 3
    check((q, k, v, lengths))


def test_one_split_gives_its_result_itself(device):
    """Nothing is merged: rows, heads and new tokens go where they belong, and a row of no length gives zeros."""
    check(operands([30, 7, 0], 4, 2, 3, 32, 16, torch.float32, device))


@pytest.mark.parametrize("dim", [1, 16, 25, 64, 80, 128, 256])
def test_head_dims_and_dtypes(dim, device):
    for dtype in DTYPES:
        check(operands([37, 70], 2, 1, 3, 70, dim, dtype, device))


@pytest.mark.parametrize(("heads", "key_heads", "steps"), [(12, 12, 1), (8, 2, 2), (3, 1, 16), (71, 1, 1), (6, 1, 13)])
def test_groups_and_steps(heads, key_heads, steps, device):
    """Up to 78 rows a key head, which are several tiles."""
    check(operands([16, 50], heads, key_heads, steps, 50, 16, torch.float32, device))


@pytest.mark.parametrize(
    ("lengths", "slots", "window", "dim"),
    [
        ([1, 16, 17, 30, 33], 32, None, 16),  # the last one's place is past the cache
        ([1, 32, 33, 64, 65, 100], 100, None, 24),
        ([3, 20, 21, 55, 70, 200], 20, 7, 16),
        ([90, 40, 1], 80, 70, 16),
    ],
)
def test_a_token_is_appended_and_attends_in_one_launch(lengths, slots, window, dim, device):
    """To the bit what two launches do, wherever its split and tile begin, and whatever lay in its slot."""
    heads, rows = 2, len(lengths)
    for dtype in DTYPES[: 1 if device.type == "cpu" else 3]:
        qkv = torch.randn(rows, 1, 3 * heads * dim, device=device).to(dtype)
        caches = [torch.randn(2, rows, heads, slots, dim, device=device).to(dtype) for _ in range(2)]
        places = torch.tensor(lengths, device=device)
        for row, length in enumerate(lengths):
            at = (length - 1) % slots
            caches[0][:, row, :, at] = torch.nan if length <= slots or window else caches[0][:, row, :, at]
        caches[1].copy_(caches[0])
        autograd.append_to_cache(qkv, *caches[0], places, window is not None)
        q = qkv.view(rows, 1, 3, heads, dim)[:, :, 0].transpose(1, 2)
        expected = autograd.decode_attention(q, *caches[0], places, scale=0.3, window=window)
        found = decode.append_and_attend(qkv, *caches[1], places, 0.3, window)
        assert torch.equal(found, expected) and torch.equal(caches[1], caches[0]) and not found.isnan().any()


def test_scale_is_heard(device):
    check(operands([37], 2, 2, 2, 40, 16, torch.float32, device), scale=0.7)


def test_it_is_the_end_of_full_attention(device):
    q, k, v, lengths = operands([5, 64, 70], 4, 2, 4, 70, 16, torch.float32, device)
    got = ops.decode_attention(q, k, v, lengths, backend="triton")
    for row, length in enumerate(lengths.tolist()):
        one = [t[row : row + 1].double().cpu() for t in (q, k[:, :, :length], v[:, :, :length])]
        expected = reference.causal_attention(*one)
        assert_accurate(got[row : row + 1], expected, magnitude=expected.abs() + expected.abs().mean(), logit_max=8.0)


def test_rows_without_a_key_are_zero(device):
    """A length of 0, and queries before the first slot."""
    q, k, v, lengths = operands([0, 1, 50], 2, 2, 3, 50, 16, torch.float32, device)
    got = check([q, k, v, lengths])
    assert (got[0] == 0).all() and (got[1, :, :2] == 0).all() and (got[1, :, 2] != 0).all()


def test_a_length_past_the_cache_reads_nothing_past_it(device):
    """The launcher alone: where lengths are on the device, nothing checks them."""
    q, k, v, _ = operands([40], 2, 2, 2, 40, 16, torch.float32, device)
    got, expected = (decode.decode_attention_fwd(q, k, v, torch.tensor([n], device=device), 0.25) for n in (2**40, 40))
    assert torch.equal(got, expected)


def test_a_row_depends_on_neither_its_company_nor_other_lengths(device):
    q, k, v, lengths = operands([70, 33, 5], 2, 2, 1, 70, 16, torch.float32, device)
    whole = ops.decode_attention(q, k, v, lengths, backend="triton")
    alone = ops.decode_attention(*(t[1:2] for t in (q, k, v, lengths)), backend="triton")
    assert torch.equal(whole[1:2], alone)
    longer = ops.decode_attention(q, k.nan_to_num(3.0), v.nan_to_num(3.0), lengths, backend="triton")
    assert torch.equal(whole, longer)


def test_the_split_depends_on_the_cache_alone():
    for slots in (1, 1024, 8192, 131072):
        splits = {decode._tiles(rows, 64, torch.bfloat16, slots, True).split for rows in (1, 16, 71)}
        assert len(splits) == 1 and slots <= 64 * splits.pop()


def test_strides_change_no_bit(device):
    tensors = operands([40, 23], 4, 2, 2, 40, 16, torch.float32, device)
    expected = ops.decode_attention(*tensors, backend="triton")
    strided = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in tensors[:3]]
    got = ops.decode_attention(*strided, tensors[3].int(), backend="triton")
    assert torch.equal(got, expected) and got.transpose(1, 2).is_contiguous()
    spread = [t.repeat_interleave(2, -1)[..., ::2] for t in tensors]
    assert torch.equal(ops.decode_attention(*spread, backend="triton"), expected)


@pytest.mark.parametrize("shape", [(0, 2, 5), (2, 2, 0)])
def test_nothing_to_attend(shape, device):
    batch, heads, slots = shape
    tensors = operands([0] * batch, heads, heads, 1, slots, 16, torch.float32, device)
    assert torch.equal(ops.decode_attention(*tensors, backend="triton"), torch.zeros_like(tensors[0]))


def test_the_shipped_tiles(device, monkeypatch):
    monkeypatch.setattr(decode, "card_of", lambda tensor: "any")
    for dtype in (torch.float32, torch.float16):
        check(operands([1, 300], 4, 2, 1, 300, 64, dtype, device))


def test_opcheck_and_compile(device):
    tensors = operands([40, 23], 4, 2, 2, 40, 16, torch.float32, device)
    torch.library.opcheck(autograd.decode_attention_fwd.op, (*tensors, 0.25))
    call = lambda *t: ops.decode_attention(*t, backend="triton")  # noqa: E731
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*tensors), call(*tensors))


def test_where_a_derivative_is_required_pytorch_serves(device):
    q, k, v, lengths = operands([9], 2, 2, 1, 9, 16, torch.float32, device)
    q.requires_grad_()
    assert "PyTorch: the decode kernel has no derivative" in ops.explain(ops.decode_attention, q, k, v, lengths)
    ops.decode_attention(q, k, v, lengths).sum().backward()
    assert q.grad.isfinite().all()
    with torch.no_grad():
        assert "interpreter" in ops.explain(ops.decode_attention, q, k, v, lengths) or q.is_cuda


@pytest.mark.interpreter
@settings(max_examples=8, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_any_call_is_accurate(data):
    draw, integers = data.draw, st.integers
    slots, key_heads = draw(integers(1, 90)), draw(integers(1, 3))
    lengths = draw(st.lists(integers(0, slots), min_size=1, max_size=3))
    torch.manual_seed(draw(integers(0, 99)))
    heads, steps, dim = key_heads * draw(integers(1, 4)), draw(integers(1, 16)), draw(integers(1, 33))
    check(operands(lengths, heads, key_heads, steps, slots, dim, torch.float32, "cpu"))


@pytest.mark.gpu
def test_a_graph_serves_any_lengths():
    q, k, v, lengths = operands([1, 1], 12, 12, 1, 1024, 64, torch.bfloat16, "cuda")
    k, v = k.nan_to_num(1.0), v.nan_to_num(-1.0)
    ops.decode_attention(q, k, v, lengths, backend="triton")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ops.decode_attention(q, k, v, lengths, backend="triton")
    for pair in ((1, 1024), (700, 129)):
        lengths.copy_(torch.tensor(pair))
        graph.replay()
        assert torch.equal(out, ops.decode_attention(q, k, v, lengths, backend="triton"))
