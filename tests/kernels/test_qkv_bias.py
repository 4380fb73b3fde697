"""The gradient of the bias in a packed projection, which attention's backward sums while it makes qkv's."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="Triton is not to be had on this platform")

from bench.gates import record
from fastgpt import ops
from fastgpt.kernels import attention_tiles
from fastgpt.ops import reference
from fastgpt.testing import assert_accurate
from tests.kernels.alike import alike
from tests.kernels.attention_checks import magnitudes


def operands(batch, time, heads, dim, dtype, device):
    """qkv, its bias, and the gradient of the result."""
    packed = heads * dim
    shapes = ((batch, time, 3 * packed), (3 * packed,), (batch, time, packed))
    return [torch.randn(shape, dtype=torch.float64).to(device, dtype) for shape in shapes]


def run(qkv, bias, dout, heads, function=ops.causal_attention_qkv, **options):
    """The result, and the gradients of qkv and, if there is one, of the bias."""
    leaves = [t.detach().requires_grad_() for t in (qkv, bias) if t is not None]
    out = function(leaves[0], heads, qkv_bias=leaves[1] if bias is not None else None, **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def check(qkv, bias, dout, heads, **options):
    """Against float64; and nothing else has other bits than without a bias."""
    got = run(qkv, bias, dout, heads, backend="triton", **options)
    without = run(qkv, None, dout, heads, backend="triton", **options)
    assert all(torch.equal(a, b) for a, b in zip(got, without, strict=False))
    wide = [t.double() for t in (qkv, bias, dout)]
    (_, dqkv, _), (_, theirs, _) = (
        run(*given, heads, reference.causal_attention_qkv, **options) for given in (wide, (qkv, bias, dout))
    )
    heads_of = lambda t: t.unflatten(-1, (heads, -1)).transpose(1, 2)  # noqa: E731
    parts = [heads_of(t) for t in (*wide[0].chunk(3, -1), wide[2])]
    (_, *sizes), largest = magnitudes(*parts, qkv.dtype, **options)
    size = torch.cat([t.transpose(1, 2).flatten(-2).sum((0, 1)) for t in sizes])
    # what rounding to qkv's dtype does to each row is no part of the sum, for it is of what was not rounded yet
    assert_accurate(got[2], dqkv.sum((0, 1)), theirs.double().sum((0, 1)), size, logit_max=largest, name="dbias")


@pytest.mark.parametrize("time", [1, 32, 45])
def test_lengths(time, device):
    """Tiles that are full, and last ones that are not; in the interpreter a tile has 32 tokens of each kind."""
    check(*operands(2, time, 2, 20, torch.float32, device), 2)
    check(*operands(1, time, 1, 64, torch.float16, device), 1)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("dim", [64, 80, 128, 256])
def test_the_sizes_that_people_train(dim, dtype):
    """All lengths in one process: it has compiled for the first what serves the others."""
    for time in (1, 63, 257, 1024):
        print(f"T = {time}")
        check(*operands(2, time, 3, dim, dtype, "cuda"), 3)


def test_options(device):
    tensors = operands(2, 37, 1, 16, torch.float32, device)
    documents = (torch.arange(37, device=device) // 20).expand(2, -1)
    key_mask = torch.arange(37, device=device) >= torch.tensor([[0], [7]], device=device)
    for options in (dict(scale=0.3), dict(dropout_p=0.2, seed=5), dict(documents=documents), dict(key_mask=key_mask)):
        check(*tensors, 1, **options)


@pytest.mark.interpreter
@pytest.mark.parametrize(("of_dq", "of_dkdv"), [(16, 32), (64, 16)])
def test_tiles_of_other_numbers_of_queries_than_of_keys(of_dq, of_dkdv, monkeypatch):
    sizes = {"fwd": (32, 32), "dq": (of_dq, 16), "dkdv": (16, of_dkdv)}
    monkeypatch.setattr(attention_tiles, "_tiles", lambda kernel, *_: attention_tiles.Tiles(*sizes[kernel], 4, 1))
    check(*operands(2, 45, 1, 16, torch.float32, "cpu"), 1)


def test_what_lies_past_the_end_changes_no_bit(device):
    """Strides, and rows of NaN behind each sequence and beside each row."""
    qkv, bias, dout = operands(2, 37, 2, 20, torch.float32, device)
    expected = run(qkv, bias, dout, 2, backend="triton")
    wide = torch.full((2, 60, 3 * 40 + 8), torch.nan, device=device)
    wide[:, :37, :120] = qkv
    turned = dout.transpose(0, 1).contiguous().transpose(0, 1)
    got = run(wide[:, :37, :120], bias.repeat_interleave(2)[::2], turned, 2, backend="triton")
    assert all(alike(a, b) for a, b in zip(got, expected, strict=True))


def test_no_tokens(device):
    for shape in ((0, 5), (3, 0)):
        qkv, bias, dout = operands(*shape, 2, 16, torch.float32, device)
        assert torch.equal(run(qkv, bias, dout, 2, backend="triton")[2], torch.zeros_like(bias))


def test_the_gradient_is_not_rounded_on_its_way(device):
    """Of a float32 bias under autocast: PyTorch would sum to a half first."""
    x, weight, bias = (torch.randn(shape, device=device) for shape in ((2, 64, 32), (96, 32), (96,)))
    leaf = bias.requires_grad_()
    kind = torch.device(device).type
    with torch.autocast(kind, torch.float16 if kind == "cpu" else torch.bfloat16):
        qkv = F.linear(x, weight, leaf.detach())
        ops.causal_attention_qkv(qkv, 2, qkv_bias=leaf, backend="triton").float().square().sum().backward()
    assert leaf.grad.dtype == torch.float32
    assert not torch.equal(leaf.grad, leaf.grad.to(qkv.dtype).float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_bias_that_needs_no_gradient_costs_nothing(dtype):
    def step(qkv_bias, trained):
        qkv = torch.empty(2, 64, 3 * 64, dtype=dtype, device="cuda", requires_grad=True)
        bias = torch.empty(3 * 64, dtype=dtype, device="cuda", requires_grad=trained) if qkv_bias else None
        out = ops.causal_attention_qkv(qkv, 1, qkv_bias=bias)
        out.backward(torch.ones_like(out))

    for qkv_bias, trained in ((True, True), (True, False), (False, False)):
        found = record.launches(lambda a=qkv_bias, b=trained: step(a, b), 80)
        sums = [launch.name for launch in found if "sums_ptr" in launch.pointers]
        assert sums == (["attention_dq_kernel", "attention_dkdv_kernel"] if trained else [])
