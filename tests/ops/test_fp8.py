"""Copies in 8 bits and their products: rounding against all numbers that the format has, scales, and gradients."""

import math
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F

from bench.gates import feign
from fastgpt.ops import fp8, fp8_producers, reference
from fastgpt.ops.fp8 import E4M3, E5M2, Format, Mlp, OnPyTorch, Slot, Weight

EXACT = Format(torch.float64, math.inf)  # rounds nothing
MAKES = OnPyTorch()
FORMATS = pytest.mark.parametrize("format", [E4M3, E5M2], ids=["e4m3", "e5m2"])


def numbers(format):
    """All that the format has and are finite, in order."""
    found = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(format.dtype).double()
    return found[found.isfinite()].unique()


def nearest(x, format):
    """Of the format's numbers; of two that are as near the one whose last digit is 0."""
    all_of_them = numbers(format)
    x = x.double().clamp(all_of_them[0], all_of_them[-1])
    above = torch.searchsorted(all_of_them, x).clamp(1, len(all_of_them) - 1)
    low, high = all_of_them[above - 1], all_of_them[above]
    even = low.to(format.dtype).view(torch.uint8) % 2 == 0
    return torch.where((x - low < high - x) | ((x - low == high - x) & even), low, high)


def slot(format=EXACT, delayed=None):
    """One whose scale is of the tensor itself, or for tensors of that magnitude."""
    amax = torch.zeros(fp8.PLACES)
    if delayed is None:
        return Slot(format, amax)
    return Slot(format, amax, *fp8.scales(torch.tensor(delayed), format.largest))


def weight(w, format=EXACT):
    scale, inverse = fp8.scales(fp8.magnitude(w), format.largest)
    rows = fp8.padded(len(w))
    values = torch.zeros(rows, w.shape[1], dtype=format.dtype)
    turned = torch.zeros(w.shape[1], rows, dtype=format.dtype)
    MAKES.weight(w.detach(), inverse, format, values, turned)
    return Weight(values, turned, scale)


@FORMATS
def test_a_copy_is_the_nearest_number_of_the_format(format):
    """Normal numbers, those below the least exponent, halfway between two, cut off at the largest."""
    exact = numbers(format).float()
    spread = torch.randn(4000) * torch.exp2(torch.randint(-24, 20, (4000,)).float())
    x = torch.cat([exact, (exact[1:] + exact[:-1]) / 2, spread, torch.tensor([1e30, -1e30, 3e38])])
    for exponent in (-3, 0, 5):
        scale = torch.tensor(2.0**exponent)
        found = fp8.rounded(x, 1 / scale, format)
        assert torch.equal(found.double(), nearest(x / scale, format))


@FORMATS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_what_is_not_finite_is_nan(format, dtype):
    x = torch.tensor([math.nan, math.inf, -math.inf, 2.0, 0.0], dtype=dtype)
    found = fp8.rounded(x, torch.tensor(0.5), format).float()
    assert found[:3].isnan().all() and found[3:].tolist() == [1.0, 0.0]
    assert fp8.magnitude(x) == 2.0, "of what is finite"
    assert fp8.magnitude(x[:0]) == 0.0, "of nothing"


@FORMATS
def test_scales_are_powers_of_two_that_leave_room(format):
    amax = torch.tensor([1.0, 448.0, 57344.0, 0.1, 3e-5, 7e20, 447.99])
    scale, inverse = fp8.scales(amax, format.largest)
    assert torch.equal(torch.frexp(scale).mantissa, torch.full_like(scale, 0.5)) and torch.equal(
        scale * inverse, scale**0
    )
    share = amax / scale / format.largest
    assert ((share > 0.249) & (share <= 0.5)).all()


@FORMATS
@pytest.mark.parametrize("amax", [0.0, 1e-45, 3e38])
def test_no_magnitude_is_beyond_a_scale(format, amax):
    """All zeros, the least and the largest numbers there are."""
    scale, inverse = fp8.scales(torch.tensor(amax), format.largest)
    assert scale > 0 and scale.isfinite() and inverse.isfinite()
    x = torch.tensor([amax, 0.0])
    copy = MAKES.copy(x, Slot(format, torch.zeros(fp8.PLACES)))
    assert (copy.values.float() * copy.scale).isfinite().all() and copy.values.float()[1] == 0


def test_a_maximum_is_noted_and_kept():
    own = slot(E4M3, 1.0)
    for largest in (3.0, 2.0):
        MAKES.copy(torch.tensor([[1.0, -largest, math.inf]]), own)
    assert own.amax.max() == 3.0


@pytest.mark.parametrize("delayed", [None, 3.0])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_with_rounding_off(delayed, bias):
    x, w, b = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 3, 16), (32, 16), (32,)))

    def linear(x, w, *b):
        copy = MAKES.copy(x.detach().flatten(0, 1), slot(delayed=delayed))
        return fp8.linear(x, w, b[0] if b else None, copy, weight(w), True)

    operands = (x, w, b) if bias else (x, w)
    torch.testing.assert_close(linear(*operands), F.linear(*operands))
    assert torch.autograd.gradcheck(linear, operands, fast_mode=True)


@pytest.mark.parametrize("gelu", ["tanh", "none"])
@pytest.mark.parametrize("backward", [True, False])
@pytest.mark.parametrize("recompute", [True, False])
def test_gelu_mlp_with_rounding_off(gelu, backward, recompute):
    shapes = (5, 16), (32, 16), (32,), (16, 32), (16,)
    operands = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]

    def mlp(x, w_in, b_in, w_out, b_out):
        of_gradients = (slot(), slot(delayed=1.0)) if backward else None
        how = Mlp(weight(w_in), weight(w_out), slot(delayed=2.0), of_gradients, gelu == "tanh", recompute)
        return fp8.gelu_mlp(x, w_in, b_in, w_out, b_out, MAKES.copy(x.detach(), slot()), how, MAKES, True)

    torch.testing.assert_close(mlp(*operands), reference.gelu_mlp(*operands, approximate=gelu))
    assert torch.autograd.gradcheck(mlp, operands, fast_mode=True)


def test_linear_cross_entropy_with_rounding_off():
    """A vocabulary that is padded, and a target that is ignored."""
    x, w = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((7, 16), (21, 16)))
    targets = torch.tensor([0, 20, 3, -100, 5, 5, 7])

    def loss(x, w):
        return fp8.linear_cross_entropy(x, w, targets, MAKES.copy(x.detach(), slot()), weight(w), EXACT, MAKES, True)

    torch.testing.assert_close(loss(x, w), reference.linear_cross_entropy(x, w, targets))
    assert torch.autograd.gradcheck(loss, (x, w), fast_mode=True)


def test_the_gradients_are_made_of_copies():
    """Of the logits' gradient in e5m2 and the weight in e4m3: to the bit what a few lines make of them."""
    x, w = torch.randn(9, 16), torch.randn(32, 16)
    targets, leaf = torch.arange(9), x.clone().requires_grad_()
    x8, w8 = MAKES.copy(x, slot(E4M3)), weight(w, E4M3)
    fp8.linear_cross_entropy(leaf, w, targets, x8, w8, E5M2, MAKES, True).backward()

    def plain(copy):
        return copy.values.float() * copy.scale

    logits = plain(x8) @ plain(w8.forward).t()
    dlogits = (logits.softmax(1) - F.one_hot(targets, 32)) / 9
    rounded = nearest(dlogits / 2**-17, E5M2).float() * 2**-17  # 1 / 9 is a quarter to half of 57344 of these
    torch.testing.assert_close(leaf.grad, rounded @ plain(w8.forward), rtol=1e-5, atol=1e-8)
    assert (leaf.grad - dlogits @ plain(w8.forward)).abs().max() > 1e-4, "rounding is seen"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("public", [True, False], ids=["public", "private"])
def test_the_library_multiplies_what_is_simulated(dtype, public, monkeypatch):
    """Both names that PyTorch has for it, as a CPU takes their operands: e4m3 and e5m2, the second in columns."""
    if not public:
        monkeypatch.delattr(F, "scaled_mm", raising=False)
    x, w, dy, bias = torch.randn(5, 32), torch.randn(48, 32), torch.randn(5, 48), torch.randn(48)
    w8 = weight(w, E4M3)
    for operands in (
        (MAKES.copy(x, slot(E4M3)), w8.forward, dtype, bias),
        (MAKES.copy(dy, slot(E5M2)), w8.backward, dtype),
    ):
        theirs, ours = (fp8.product(*operands, simulate=simulate) for simulate in (False, True))
        assert theirs.dtype == dtype
        torch.testing.assert_close(theirs, ours)


def test_no_second_derivative():
    x, w = torch.randn(4, 16, requires_grad=True), torch.randn(16, 16)
    y = fp8.linear(x, w, None, MAKES.copy(x.detach(), slot(E4M3)), weight(w, E4M3), True)
    with pytest.raises(RuntimeError, match="fp8='none' has one"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


def test_kernels_run_on_the_device_of_their_tensor(monkeypatch):
    jit = pytest.importorskip("triton.runtime.jit", reason="Triton is not to be had on this platform")
    monkeypatch.setattr(jit.JITFunction, "run", lambda *args, **kwargs: None)
    entered = []
    with feign.card(90), torch.device("cuda"):
        x = torch.zeros(4, 16)
        makes, own = fp8_producers("auto", x), Slot(E4M3, torch.zeros(fp8.PLACES), torch.ones(()), torch.ones(()))
        monkeypatch.setattr(torch.cuda, "device", lambda device: (entered.append(device), nullcontext())[1])
        makes.copy(x, own)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
        makes.copy(x, own)
    assert [device.type for device in entered] == ["cuda"], "where another one is current, and only there"
