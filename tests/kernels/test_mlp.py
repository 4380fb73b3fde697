"""kernels/mlp.py against float64: values and every gradient, both GELUs, odd shapes and strides."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from fastgpt import ops
from fastgpt.ops import reference
from fastgpt.testing import assert_accurate

pytest.importorskip("triton", reason="Triton is not to be had on this platform")

from fastgpt.kernels import mlp
from fastgpt.ops import autograd

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NAMES = ("y", "dx", "dw_in", "db_in", "dw_out", "db_out")


def operands(rows, channels, hidden, dtype, device):
    """x, w_in, b_in, w_out, b_out and the gradient of y, so scaled that pre is of size 1."""
    shapes = ((*rows, channels), (hidden, channels), (hidden,), (channels, hidden), (channels,), (*rows, channels))
    scales = (1.0, channels**-0.5, 1.0, hidden**-0.5, 1.0, 1.0)
    return [(torch.randn(shape) * s).to(device, dtype) for shape, s in zip(shapes, scales, strict=True)]


def run(function, inputs, dy, **options):
    leaves = [None if t is None else t.detach().requires_grad_() for t in inputs]
    y = function(*leaves, **options)
    y.backward(dy)
    return [y, *(None if leaf is None else leaf.grad for leaf in leaves)]


def magnitudes(inputs, dy):
    """The formulas on absolute values; |gelu'| is below 1.13."""
    x, w_in, b_in, w_out, b_out = (None if t is None else t.abs() for t in inputs)
    x, dy = x.flatten(0, -2), dy.abs().flatten(0, -2)
    act = x @ w_in.T + (0 if b_in is None else b_in)
    dpre = 1.13 * dy @ w_out
    y = act @ w_out.T + (0 if b_out is None else b_out)
    return [y, dpre @ w_in, dpre.T @ x, dpre.sum(0), dy.T @ act, dy.sum(0)]


def check(tensors, backend="triton", **options):
    inputs, dy = tensors[:5], tensors[5]
    wide = [None if t is None else t.double() for t in tensors]
    kernel = run(ops.gelu_mlp, inputs, dy, backend=backend, **options)
    exact = run(reference.gelu_mlp, wide[:5], wide[5], **options)
    theirs = run(reference.gelu_mlp, inputs, dy, **options)
    sizes = magnitudes(wide[:5], wide[5])
    for name, got, expected, their, size in zip(NAMES, kernel, exact, theirs, sizes, strict=True):
        if expected is not None:
            assert_accurate(got, expected, their, size.view(expected.shape), name=name)
    return kernel


@pytest.mark.parametrize(("channels", "hidden"), [(1, 1), (20, 80), (48, 192), (20, 50), (16, 300)])
def test_widths(channels, hidden, device):
    for dtype in DTYPES:
        check(operands((3, 5), channels, hidden, dtype, device))


@pytest.mark.parametrize("rows", [(1,), (2, 1), (50,), (3, 7, 2)], ids=str)
def test_row_counts(rows, device):
    """50 rows are seven blocks of 8, of which each of two programs of the backward walks over several."""
    check(operands(rows, 16, 40, torch.float32, device))


@pytest.mark.parametrize(("channels", "hidden"), [(768, 3072), (20, 4096), (20, 5120), (20, 6400)])
def test_a_few_rows_of_each_gpt2(channels, hidden, device):
    """The kernels see the hidden units alone: channels are the matmuls'."""
    check(operands((3,), channels, hidden, torch.bfloat16, device))


@pytest.mark.gpu
@pytest.mark.parametrize(("channels", "hidden"), [(768, 3072), (1600, 6400)])
def test_the_sizes_that_people_train(channels, hidden):
    for dtype in DTYPES:
        check(operands((4, 512), channels, hidden, dtype, "cuda"))


@pytest.mark.parametrize("approximate", ["tanh", "none"])
@pytest.mark.parametrize("recompute", [False, True])
def test_both_gelus_recomputed_or_not(approximate, recompute, device):
    for dtype in DTYPES:
        check(operands((20,), 16, 40, dtype, device), approximate=approximate, recompute=recompute)


def test_recompute_changes_no_bit(device):
    tensors = operands((20,), 16, 40, torch.float32, device)
    kept, made = (run(ops.gelu_mlp, tensors[:5], tensors[5], backend="triton", recompute=r) for r in (False, True))
    assert all(torch.equal(a, b) for a, b in zip(kept, made, strict=True))


@pytest.mark.parametrize(("b_in", "b_out"), [(True, False), (False, True), (False, False)])
def test_without_biases(b_in, b_out, device):
    tensors = operands((20,), 16, 40, torch.float32, device)
    tensors[2], tensors[4] = tensors[2] if b_in else None, tensors[4] if b_out else None
    check(tensors)


POINTS = [0.0, *(s * z for z in (1e-4, 0.5, 1, 2, 3, 5, 8, 12, 16, 20, 29, 31, 50, 300, 1e4, 1e20) for s in (1, -1))]


@pytest.mark.parametrize("approximate", ["tanh", "none"])
def test_gelu_point_by_point(approximate, device):
    """Value and derivative through one hidden unit of weight 1, also where naive forms overflow."""
    x = torch.tensor(POINTS, device=device)[:, None].requires_grad_()
    one = torch.ones(1, 1, device=device)
    y = ops.gelu_mlp(x, one, None, one, approximate=approximate, backend="triton")
    y.sum().backward()
    wide = torch.tensor(POINTS, dtype=torch.float32).double()[:, None].requires_grad_()
    exact = F.gelu(wide, approximate=approximate)
    exact.sum().backward()
    for got, expected, unit in ((y.detach(), exact.detach(), 4e-7), (x.grad, wide.grad.nan_to_num(0.0), 1e-6)):
        error = (got.cpu().double() - expected).abs() / (1 + expected.abs())
        assert error.max() <= unit


def test_the_tail_keeps_its_digits(device):
    """gelu(-5) is -2.3e-7 (tanh): PyTorch's float32 form has two digits of it, z sigmoid(2u) has six."""
    z = torch.linspace(-8, -4, 50, device=device)[:, None]
    one = torch.ones(1, 1, device=device)
    y = ops.gelu_mlp(z, one, None, one, backend="triton").cpu().double()
    u = math.sqrt(2 / math.pi) * (z.cpu().double() + 0.044715 * z.cpu().double() ** 3)
    expected = z.cpu().double() * torch.sigmoid(2 * u)
    assert ((y - expected).abs() <= 1e-5 * expected.abs()).all()


def test_nan_stays_in_its_row(device):
    tensors = operands((20,), 16, 40, torch.float32, device)
    tensors[0][7, 3] = math.nan
    y = ops.gelu_mlp(*tensors[:5], backend="triton")
    assert y[7].isnan().all() and y[torch.arange(20) != 7].isfinite().all()


def test_any_strides_give_the_same_values(device):
    """Conv1D's transposed weights, a strided x, an expanded and a transposed gradient."""
    x, w_in, b_in, w_out, b_out, dy = operands((4, 6), 16, 40, torch.float32, device)
    strided = [
        x.transpose(0, 1).contiguous().transpose(0, 1),
        w_in.t().contiguous().t(),
        b_in.repeat_interleave(2)[::2],
        w_out.t().contiguous().t(),
        b_out,
    ]
    for grad in (dy.transpose(0, 1).contiguous().transpose(0, 1), dy[:1, :1, :1].expand_as(dy)):
        got = run(ops.gelu_mlp, strided, grad, backend="triton")
        expected = run(ops.gelu_mlp, [x, w_in, b_in, w_out, b_out], grad.contiguous(), backend="triton")
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [(0,), (0, 3)])
def test_an_empty_batch(rows, device):
    tensors = operands(rows, 16, 40, torch.float32, device)
    y, dx, *grads = run(ops.gelu_mlp, tensors[:5], tensors[5], backend="triton")
    assert y.shape == dx.shape == (*rows, 16)
    assert not any(grad.any() or grad.isnan().any() for grad in grads)


@pytest.mark.parametrize("recompute", [False, True])
def test_any_subset_of_gradients_equals_the_whole(recompute, device):
    tensors = operands((20,), 16, 40, torch.float32, device)
    whole = run(ops.gelu_mlp, tensors[:5], tensors[5], backend="triton")[1:]
    for wanted in itertools.product([True, False], repeat=5):
        if not any(wanted):
            continue
        leaves = [t.clone().requires_grad_(want) for t, want in zip(tensors[:5], wanted, strict=True)]
        ops.gelu_mlp(*leaves, recompute=recompute, backend="triton").backward(tensors[5])
        for leaf, want, expected in zip(leaves, wanted, whole, strict=True):
            assert torch.equal(leaf.grad, expected) if want else leaf.grad is None


def test_recompute_saves_no_activation(device):
    x, w_in, b_in, w_out, b_out, _ = operands((20,), 16, 40, torch.float32, device)
    _, pre, act = autograd.gelu_mlp_fwd(x, w_in, b_in, w_out, b_out, True, True)
    assert pre.shape == (20, 40) and act.numel() == 0


def test_opcheck(device):
    x, w_in, b_in, w_out, b_out, dy = operands((20,), 16, 40, torch.float32, device)
    for recompute in (False, True):
        forward = (x, w_in, b_in, w_out, b_out, True, recompute)
        torch.library.opcheck(autograd.gelu_mlp_fwd.op, forward)
        _, pre, act = autograd.gelu_mlp_fwd(*forward)
        for needs in ([True] * 5, [False, True, False, False, True]):
            torch.library.opcheck(autograd.gelu_mlp_bwd.op, (dy, x, w_in, w_out, pre, act, True, needs))


@pytest.mark.interpreter
def test_gradcheck_in_float64():
    tensors = [t.double().requires_grad_() for t in operands((5,), 4, 6, torch.float32, "cpu")[:5]]
    for options in itertools.product(("tanh", "none"), (False, True)):
        call = lambda *t, o=options: ops.gelu_mlp(*t, approximate=o[0], recompute=o[1], backend="triton")  # noqa: E731
        assert torch.autograd.gradcheck(call, tensors, fast_mode=True)


def test_a_second_derivative_is_refused(device):
    x, *others, _ = operands((5,), 4, 6, torch.float32, device)
    y = ops.gelu_mlp(x.requires_grad_(), *others, backend="triton")
    with pytest.raises(RuntimeError, match=r"^gelu_mlp: .*backend='torch'"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


def test_under_autocast_it_is_what_autocast_does(device):
    tensors = operands((20,), 16, 40, torch.float32, device)
    with torch.autocast(device.type, torch.bfloat16):
        got, theirs = (run(ops.gelu_mlp, tensors[:5], tensors[5].bfloat16(), backend=b) for b in ("triton", "torch"))
    assert [t.dtype for t in got] == [t.dtype for t in theirs] == [torch.bfloat16, *[torch.float32] * 5]
    for a, b in zip(got, theirs, strict=True):
        assert (a - b).norm() < 1e-2 * b.norm()


def test_the_same_input_gives_the_same_bits(device):
    tensors = operands((50,), 16, 40, torch.float32, device)
    first, second = (run(ops.gelu_mlp, tensors[:5], tensors[5], backend="triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert mlp._tiles(50, 40, None, backward=True).programs > 1
