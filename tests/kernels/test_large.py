"""What is larger than the other tests' tensors: long contexts, and offsets that 32 bits do not hold.

The tensors that reach past 2^31 elements are mostly holes: on a CPU their untouched pages are never there.
"""

import pytest
import torch

from fastgpt import ops
from tests.ops.test_loss import peak_bytes

pytest.importorskip("triton", reason="Triton is not to be had on this platform")

from fastgpt.kernels import attention_tiles, decode
from tests.kernels.attention_checks import check, operands, run

APART = 2**30  # elements: the third of them begins where a signed offset of 32 bits would wrap


@pytest.fixture
def spread(device):
    """A function that copies a tensor to where the slices of one of its dimensions lie APART."""
    filling = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = False  # with NaN, which would make all pages real

    def copy(tensor, dim):
        assert tensor.shape[dim] == 3 and tensor.dtype == torch.float16
        tensor = tensor.to(device)
        sparse = torch.empty(2 * APART + tensor.numel(), dtype=tensor.dtype, device=device)
        strides = list(tensor.contiguous().stride())
        strides[dim] = APART
        return sparse.as_strided(tensor.shape, strides).copy_(tensor)

    yield copy
    torch.utils.deterministic.fill_uninitialized_memory = filling


def leaf(tensor):
    return tensor.detach().requires_grad_()


@pytest.mark.parametrize(("which", "dim"), [(0, 0), (0, 1), (1, 1), (2, 0), (3, 1)])
def test_attention(which, dim, spread, device):
    tensors = operands(3, 3, 20, 20, 16, torch.float16, device)
    expected = run(*tensors, backend="triton")
    tensors[which] = spread(tensors[which], dim)
    assert all(torch.equal(a, b) for a, b in zip(run(*tensors, backend="triton"), expected, strict=True))


@pytest.mark.parametrize("dim", [0, 1], ids=["batch", "heads"])
def test_decode(dim, spread, device):
    q, k, v, _ = operands(3, 3, 1, 40, 16, torch.float16, device)
    lengths = torch.tensor([40, 17, 33], device=device)
    expected = ops.decode_attention(q, k, v, lengths, backend="triton")
    for far in ([spread(k, dim), v], [k, spread(v, dim)]):
        assert torch.equal(ops.decode_attention(q, *far, lengths, backend="triton"), expected)


def test_layer_norm(spread, device):
    x, dy, weight = (torch.randn(n, 40, device=device, dtype=torch.float16) for n in (3, 3, 1))

    def results(x, dy):
        leaves = leaf(x), leaf(weight[0])
        y = ops.layer_norm(*leaves, backend="triton")
        return y, *torch.autograd.grad(y, leaves, dy)

    expected = results(x, dy)
    for far in ((spread(x, 0), dy), (x, spread(dy, 0))):
        assert all(torch.equal(a, b) for a, b in zip(results(*far), expected, strict=True))


def test_embedding(spread, device):
    ids = torch.tensor([[2, 0, 2, 1]], device=device)
    tokens, positions = (torch.randn(n, 40, device=device, dtype=torch.float16) for n in (3, 4))
    expected = ops.embedding(ids, tokens, positions, backend="triton")
    assert torch.equal(ops.embedding(ids, spread(tokens, 0), positions, backend="triton"), expected)


@pytest.mark.slow
@pytest.mark.parametrize("extras", [False, True], ids=["plain", "masked"])
def test_the_longest_context(extras, device, monkeypatch):
    """The last of 131072 tokens, and every gradient."""
    keys = 131072
    if device.type == "cpu":  # tiles that the interpreter can walk over
        monkeypatch.setattr(attention_tiles, "_tiles", lambda *args: attention_tiles.Tiles(16, 4096, 4, 1))
    options = dict(key_mask=torch.rand(1, keys, device=device) < 0.9, dropout_p=0.1, seed=3) if extras else {}
    check(operands(1, 1, 16, keys, 16, torch.float32, device), **options)


def test_decoding_at_the_end_of_the_longest_context(device, monkeypatch):
    if device.type == "cpu":
        monkeypatch.setattr(decode, "_tiles", lambda *args: decode.Tiles(16, 4096, 4096, 4, 1))
    q, k, v, _ = operands(1, 1, 1, 131072, 16, torch.float32, device)
    lengths = torch.tensor([131071], device=device)
    k[:, :, 131071:] = v[:, :, 131071:] = torch.nan
    expected = ops.decode_attention(q.double(), k.double(), v.double(), lengths, backend="torch")
    torch.testing.assert_close(
        ops.decode_attention(q, k, v, lengths, backend="triton").double(), expected, rtol=1e-5, atol=1e-7
    )


def test_memory_grows_with_the_length_and_not_its_square(device, tmp_path, monkeypatch):
    """What PyTorch gives out for a step, masks and dropout on; scores of all pairs would make it four times as much."""
    if device.type == "cpu":
        monkeypatch.setattr(attention_tiles, "_tiles", lambda *args: attention_tiles.Tiles(256, 256, 4, 1))

    def peak(time):
        tensors = operands(1, 1, time, time, 16, torch.float32, device)
        options = dict(key_mask=torch.ones(1, time, dtype=torch.bool, device=device), dropout_p=0.1, seed=1)
        if device.type == "cpu":
            return peak_bytes(lambda: run(*tensors, backend="triton", **options), tmp_path)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(*tensors, backend="triton", **options)
        return torch.cuda.max_memory_allocated() - before

    peak(512)  # compiled, and what is allocated once
    assert peak(2048) < 2.2 * peak(1024)
