"""The copies in 8 bits that kernels write beside a tensor: to the bit what the fallback makes of that tensor."""

import dataclasses
import math

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not to be had on this platform")

from fastgpt import GPT, GPTConfig, ops
from fastgpt.fp8 import Fp8
from fastgpt.ops import fp8
from fastgpt.ops.fp8 import E4M3, E5M2, OnPyTorch, Slot
from fastgpt.ops.fp8_kernels import OnKernels

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
KERNELS, PLAIN = OnKernels(), OnPyTorch()


@pytest.fixture(autouse=True)
def _has_8_bits():
    if not ops.interpreted() and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs a card of compute capability 8.9")


def slot(device, format, amax):
    """Of tensors of that magnitude."""
    places = torch.zeros(fp8.PLACES, device=device)
    return Slot(format, places, *fp8.scales(torch.tensor(amax, device=device), format.largest))


def check(copy, x, own):
    """`copy` is x's, and its magnitude was noted."""
    expected = fp8.rounded(x.detach(), own.inverse, own.format)
    assert copy.values.dtype == own.format.dtype and copy.scale is own.scale
    found, wanted = copy.values.float().view(x.shape), expected.float()
    assert torch.equal(found.isnan(), wanted.isnan())
    assert torch.equal(found.nan_to_num(0).view(torch.int32), wanted.nan_to_num(0).view(torch.int32)), "signs too"
    assert own.amax.max() == fp8.magnitude(x)


@DTYPES
@pytest.mark.parametrize("format", [E4M3, E5M2], ids=["e4m3", "e5m2"])
def test_a_cast(device, dtype, format):
    """Every number of the format, halfway between them, around the least exponents, past the largest, not finite."""
    exact = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(format.dtype).float()
    exact = exact[exact.isfinite()].sort().values
    spread = torch.randn(2000) * torch.exp2(torch.randint(-20, 12, (2000,)).float())
    x = torch.cat([exact, (exact[1:] + exact[:-1]) / 2, spread, torch.tensor([math.nan, math.inf, -math.inf, 0.0])])
    x = x.to(device, dtype)[None]
    for amax in (1.0, 4000.0):
        own = slot(device, format, amax)
        check(KERNELS.copy(x, own), x, own)
    first = Slot(format, torch.zeros(fp8.PLACES, device=device))  # by x's own magnitude
    found, wanted = KERNELS.copy(x, first), PLAIN.copy(x, first._replace(amax=first.amax.clone()))
    assert found.scale == wanted.scale and first.amax.max() == fp8.magnitude(x)
    assert torch.equal(found.values.float().nan_to_num(7), wanted.values.float().nan_to_num(7))


@DTYPES
@pytest.mark.parametrize(("rows", "columns"), [(1, 16), (9, 48), (5, 320)])
def test_layer_norm(device, dtype, rows, columns):
    """Rows past the end and a large bias, which is what a norm of nothing gives, are not noted."""
    x, weight, bias = (torch.randn(shape, device=device).to(dtype) for shape in ((1, rows, columns), columns, columns))
    own = slot(device, E4M3, 4.0)
    if rows == 1:  # all of them, past the one
        weight[:], bias = 1.0, (-10 * torch.nn.functional.layer_norm(x.float(), (columns,)))[0, 0].to(dtype)
    y, _, copy = KERNELS.norm(x.requires_grad_(), None, weight, bias, 1e-5, own)
    check(copy, y, own)
    assert torch.equal(y, ops.layer_norm(x, weight, bias, backend="triton"))
    (dx,) = torch.autograd.grad(y.float().square().sum(), x)
    (theirs,) = torch.autograd.grad(ops.layer_norm(x, weight, bias, backend="triton").float().square().sum(), x)
    assert torch.equal(dx, theirs)


@DTYPES
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_add_layer_norm(device, dtype, p):
    shapes = (2, 5, 48), (2, 5, 48), 48, 48, 48
    operands = [torch.randn(shape, device=device).to(dtype).requires_grad_() for shape in shapes]
    x, residual, weight, bias, x_bias = operands
    own, results = slot(device, E4M3, 4.0), []
    for function in (
        lambda: KERNELS.norm(x, residual, weight, bias, 1e-5, own, x_bias=x_bias, dropout_p=p)[:2],
        lambda: ops.add_layer_norm(x, residual, weight, bias, x_bias=x_bias, dropout_p=p, backend="triton"),
    ):
        torch.manual_seed(3)
        y, total = function()
        results.append([y, total, *torch.autograd.grad((y.float() * 3 + total.float()).sum(), operands)])
    assert all(map(torch.equal, *results)), "the same as without a copy"
    own = slot(device, E4M3, 4.0)
    y, _, copy = KERNELS.norm(x, residual, weight, bias, 1e-5, own, x_bias=x_bias, dropout_p=p)
    check(copy, y, own)


@DTYPES
@pytest.mark.parametrize("tanh", [True, False])
@pytest.mark.parametrize("keeps", [True, False])
def test_gelu(device, dtype, tanh, keeps):
    pre = 3 * torch.randn(11, 144, device=device).to(dtype)
    pre[3, 3] = math.nan
    own = slot(device, E4M3, 2.0)
    act, copy = KERNELS.gelu(pre, tanh, own, keeps)
    assert (act is not None) == keeps
    whole, _ = KERNELS.gelu(pre, tanh, own._replace(scale=None, inverse=None), True)
    check(copy, whole, own)
    torch.testing.assert_close(whole, PLAIN.gelu(pre, tanh, own, True)[0], equal_nan=True)


@DTYPES
@pytest.mark.parametrize("again", [True, False])
def test_gelu_backward(device, dtype, again):
    pre, dact = 2 * torch.randn(21, 144, device=device).to(dtype), 1e-3 * torch.randn(21, 144, device=device).to(dtype)
    dact[2, 143] = 0.5  # the largest, in a program's first rows of several
    own = slot(device, E5M2, 1e-2)  # which it passes by far
    theirs = PLAIN.gelu_backward(dact, pre, True, slot(device, E5M2, 1e-2), again)
    dpre, sums, copy, act = KERNELS.gelu_backward(dact, pre, True, own, again)
    check(copy, dpre, own)
    torch.testing.assert_close(dpre, theirs[0])
    torch.testing.assert_close(sums.to(dtype), theirs[1].to(dtype), rtol=1e-2, atol=1e-4)
    assert (act is None) == (not again) and (act is None or torch.equal(act.isfinite(), theirs[3].isfinite()))


@DTYPES
@pytest.mark.parametrize("vocab", [50, 4200])
def test_cross_entropy(device, dtype, vocab):
    """An ignored row, one out of range, whose gradient is NaN, and the padding."""
    width = -(-vocab // 64) * 64
    logits = torch.randn(6, width, device=device).to(dtype)
    targets = torch.tensor([0, vocab - 1, -100, 7, vocab, 3], device=device)
    grads, losses = torch.full((6,), 0.25, device=device), torch.zeros(6, device=device)
    _, inverse = fp8.scales(torch.tensor(0.25, device=device), E5M2.largest)
    values = KERNELS.over_logits(logits, vocab, targets, grads, losses, E5M2, inverse)
    expected = fp8.rounded(logits, inverse, E5M2).float()
    assert torch.equal(values.float().isnan(), expected.isnan()) and expected[4, :vocab].isnan().all()
    assert torch.equal(values.float().nan_to_num(9), expected.nan_to_num(9)) and not values.float()[:4, vocab:].any()
    assert values.float()[0, 0] < 0 and not values.float()[2].any()
    assert KERNELS.over_logits(logits.nan_to_num(), vocab, targets, None, losses, E5M2, None) is None


@DTYPES
def test_a_weight(device, dtype):
    """Both orders; rows that only padding has stay zeros, and a transposed weight is read as it lies."""
    for w in (torch.randn(70, 48, device=device).to(dtype), torch.randn(48, 70, device=device).to(dtype).t()):
        _, inverse = fp8.scales(fp8.magnitude(w), E4M3.largest)
        values, turned = (
            torch.zeros(128, 48, dtype=E4M3.dtype, device=device),
            torch.zeros(48, 128, dtype=E4M3.dtype, device=device),
        )
        KERNELS.weight(w, inverse, E4M3, values, turned)
        assert torch.equal(values[:70].float(), fp8.rounded(w, inverse, E4M3).float())
        assert not values[70:].float().any() and torch.equal(turned.float(), values.float().t())
        KERNELS.weight(-w, inverse, E4M3, values, None)
        assert torch.equal(values.float(), -turned.float().t())


@pytest.mark.parametrize("mode", ["forward", "all"])
def test_a_pass_on_both_backends(device, mode, monkeypatch):
    """The first, by scales of its own, and the next, by that one's: losses and gradients; simulated products."""
    monkeypatch.setattr(Fp8, "exact_passes", 1)
    idx, found = torch.randint(30, (1, 6), device=device), {}
    for backend in ("torch", "triton"):
        torch.manual_seed(1)
        shape = GPTConfig(vocab_size=30, block_size=8, n_layer=1, n_head=2, n_embd=16, fp8=mode, fp8_simulate=True)
        model = GPT(dataclasses.replace(shape, backend=backend)).to(device).train()
        for _ in range(2):
            model.zero_grad()
            loss = model(idx, idx.roll(-1))
            loss.backward()
            found.setdefault(backend, []).append([loss.detach(), *(p.grad for p in model.parameters())])
    for ours, theirs in zip(found["triton"], found["torch"], strict=True):
        for mine, other in zip(ours, theirs, strict=True):
            assert (mine - other).abs().max() <= 0.02 * other.abs().max() + 1e-6
