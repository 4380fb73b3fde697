"""kernels/embedding.py against float64: values and both gradients, long runs of one token, strides, dropout."""

import pytest
import torch

from fastgpt import ops
from fastgpt.ops import reference
from fastgpt.testing import assert_accurate

pytest.importorskip("triton", reason="Triton is not to be had on this platform")

from fastgpt.kernels import embedding
from fastgpt.ops import autograd

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def weights(vocab, context, columns, dtype, device):
    return [torch.randn(size, columns, device=device).to(dtype) for size in (vocab, context)]


def run(ids, token_weight, position_weight, positions=None, dout=None, function=ops.embedding, **options):
    """The sum and the gradients of both weights, for leaves of these values and strides."""
    leaves = [w.detach().requires_grad_() for w in (token_weight, position_weight)]
    out = function(ids, *leaves, positions, **options)
    out.backward(dout)
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def check(ids, token_weight, position_weight, positions=None, dout=None, backend="triton", **options):
    """The kernels' three results, each within assert_accurate's limits. Returns them."""
    if dout is None:
        dout = torch.randn(*ids.shape, token_weight.shape[1], device=ids.device).to(token_weight.dtype)
    kernel = run(ids, token_weight, position_weight, positions, dout, backend=backend, **options)
    wide = [t.double() for t in (token_weight, position_weight)]
    exact = run(ids, *wide, positions, dout.double(), reference.embedding, **options)
    sizes = run(ids, *(w.abs() for w in wide), positions, dout.double().abs(), reference.embedding, **options)
    theirs = run(ids, token_weight, position_weight, positions, dout, reference.embedding, **options)
    for name, got, expected, their, size in zip(
        ("out", "dtoken", "dposition"), kernel, exact, theirs, sizes, strict=True
    ):
        assert got.dtype == token_weight.dtype
        assert_accurate(got, expected, their, size, name=name)
    return kernel


@pytest.mark.parametrize("columns", [1, 20, 48, 300, 768, 1600])
def test_widths(columns, device):
    for dtype in DTYPES:
        check(torch.randint(7, (2, 9), device=device), *weights(7, 12, columns, dtype, device))


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (3, 1), (2, 4), (5, 17), (0, 3), (3, 0)], ids=str)
def test_row_counts(shape, device):
    """The backward sums chunks of 4 sorted rows: less than one, one, and many with a short last one."""
    check(torch.randint(5, shape, device=device), *weights(5, 17, 20, torch.float32, device))


@pytest.mark.parametrize(
    "ids",
    [
        pytest.param([3] * 23, id="one token"),
        pytest.param([0, *[3] * 15, 4], id="a long run within"),
        pytest.param([0] * 4 + [1] * 4 + [2] * 8, id="runs that fill chunks"),
        pytest.param([1] * 3 + [2] * 5 + [3] + [4] * 4, id="runs that cross"),
        pytest.param([5, 4, 3, 2, 1, 0], id="no run"),
    ],
)
def test_runs_of_one_token(ids, device):
    """What a program writes itself, what it leaves to the next launch, and what neither may touch twice."""
    check(torch.tensor([ids], device=device), *weights(6, 24, 20, torch.float32, device))


def test_a_weight_wider_than_a_block(device):
    check(torch.randint(5, (2, 3), device=device), *weights(5, 3, 1100, torch.float32, device))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_positions(dtype, device):
    ids = torch.randint(5, (3, 6), device=device, dtype=dtype)
    operands = weights(5, 9, 20, torch.float32, device)
    for positions in (torch.randint(9, (3, 6)), torch.tensor([8, 8, 0, 1, 2, 3])):
        check(ids, *operands, positions.to(device, dtype))


def test_the_stream_may_be_narrower_or_wider_than_the_weights(device):
    """Under autocast weights are float32 and the stream is not."""
    ids = torch.randint(5, (2, 9), device=device)
    for weight_dtype, dtype in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)):
        operands = weights(5, 9, 20, weight_dtype, device)
        dout = torch.randn(2, 9, 20, device=device).to(dtype)
        out, dtoken, dposition = run(ids, *operands, None, dout, dtype=dtype, backend="triton")
        assert (out.dtype, dtoken.dtype, dposition.dtype) == (dtype, weight_dtype, weight_dtype)
        exact = run(ids.cpu(), *(w.double().cpu() for w in operands), None, dout.double().cpu(), reference.embedding)
        for got, expected in zip((out, dtoken, dposition), exact, strict=True):
            unit = torch.finfo(got.dtype).eps
            assert (got.cpu().double() - expected).norm() < unit * expected.norm()


def test_strides_change_no_bit(device):
    ids = torch.randint(5, (6, 3), device=device)
    token, position = weights(5, 9, 20, torch.float32, device)
    positions = torch.randint(9, (6, 3), device=device)
    dout = torch.randn(6, 3, 20, device=device)
    plain = run(ids, token, position, positions, dout, backend="triton")
    spread = [t.t().contiguous().t() for t in (ids, token, position, positions)]
    strided_dout = dout.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    for a, b in zip(plain, run(*spread, strided_dout, backend="triton"), strict=True):
        assert torch.equal(a, b)
    expanded = torch.randn(20, device=device).expand(6, 3, 20)
    for a, b in zip(
        run(ids, token, position, positions, expanded, backend="triton"),
        run(ids, token, position, positions, expanded.contiguous(), backend="triton"),
        strict=True,
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("p", [0.1, 0.5, 1.0])
def test_dropout_drops_what_the_reference_drops(p, device):
    ids = torch.randint(5, (3, 7), device=device)
    operands = weights(5, 7, 24, torch.float32, device)
    out, dtoken, _ = check(ids, *operands, dropout_p=p, seed=77)
    if p == 1:
        assert not out.any() and not dtoken.any()
        return
    keep = reference.keep_mask(77, p, (1, 1, 21, 24), reference.EMBEDDING_SITE).view(3, 7, 24)
    assert torch.equal((out != 0).cpu(), keep)


def test_dropout_beyond_the_first_block_of_columns(device):
    check(torch.randint(5, (2, 3), device=device), *weights(5, 3, 1100, torch.float32, device), dropout_p=0.3, seed=4)


def test_only_the_gradients_that_are_asked_for(device, monkeypatch):
    ids = torch.randint(5, (2, 3), device=device)
    token, position = weights(5, 3, 20, torch.float32, device)
    dout = torch.randn(2, 3, 20, device=device)
    both = run(ids, token, position, None, dout, backend="triton")
    sizes = []
    op = autograd.embedding_bwd
    monkeypatch.setattr(autograd, "embedding_bwd", lambda *args: sizes.append(args[3]) or op(*args))
    for trained, frozen, first in ((token, position, True), (position, token, False)):
        leaf = trained.detach().requires_grad_()
        operands = (leaf, frozen) if first else (frozen, leaf)
        ops.embedding(ids, *operands, backend="triton").backward(dout)
        assert torch.equal(leaf.grad, both[1 if first else 2])
    assert sizes == [5, 3]


def test_an_id_out_of_range_is_nan_and_reads_nothing(device):
    """As on a GPU, where ops does not look: the sanitizer would see a read out of bounds."""
    token, position = weights(5, 4, 20, torch.float32, device)
    ids = torch.tensor([[0, 5, -1, 2]], device=device)
    out = autograd.embedding_fwd(token, position, ids, None, None, 0.0, torch.float32)
    assert out[0, [1, 2]].isnan().all() and torch.equal(out[0, [0, 3]], token[[0, 2]] + position[[0, 3]])
    out = autograd.embedding_fwd(token, position, ids.clamp(0, 4), ids, None, 0.0, torch.float32)
    assert out[0, [1, 2]].isnan().all() and not out[0, [0, 3]].isnan().any()
    dout = torch.randn(1, 4, 20, device=device)
    dtoken = autograd.embedding_bwd(dout, ids, None, 5, 0.0, torch.float32)
    assert torch.equal(dtoken[[0, 2]], dout[0, [0, 3]]) and not dtoken[[1, 3, 4]].any()


def test_long_runs_of_ids_out_of_range(device):
    ids = torch.tensor([[-1] * 9 + [7] * 9 + [1]], device=device)
    dout = torch.randn(1, 19, 20, device=device)
    dtoken = autograd.embedding_bwd(dout, ids, None, 5, 0.0, torch.float32)
    assert torch.equal(dtoken[1], dout[0, 18]) and not dtoken[[0, 2, 3, 4]].any()


@pytest.mark.gpu
@pytest.mark.parametrize(("vocab", "columns"), [(50257, 768), (50257, 1600)])
def test_the_sizes_that_people_train(vocab, columns):
    ids = (torch.rand(2, 1024, device="cuda") ** 8 * vocab).long()  # a few tokens are most of the text
    for dtype in DTYPES:
        operands = [0.02 * w for w in weights(vocab, 1024, columns, dtype, "cuda")]
        first = check(ids, *operands, dropout_p=0.1, seed=3)
        dout = torch.randn(2, 1024, columns, device="cuda").to(dtype)
        again = [run(ids, *operands, None, dout, backend="triton") for _ in range(2)]
        assert first[0].shape == (2, 1024, columns) and all(torch.equal(*pair) for pair in zip(*again, strict=True))


def test_the_chunks_of_a_gpu_too(device, monkeypatch):
    monkeypatch.setattr(embedding, "_chunk", lambda tensor: 32)
    check(torch.randint(3, (2, 50), device=device), *weights(5, 50, 20, torch.float32, device))
