"""kernels/layernorm.py against float64: values and every gradient, at odd shapes, strides and means."""

import itertools

import numpy
import pytest
import torch

from fastgpt import ops
from fastgpt.ops import reference
from fastgpt.testing import assert_accurate
from tests.kernels.alike import alike

EPS = 1e-5
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NAMES = ("y", "s", "dx", "dresidual", "dweight", "dbias", "dx_bias")


def operands(rows, columns, dtype, device, mean=0.0, sigma=1.0):
    """x, residual, weight, bias, x_bias and the gradients of y and s; weights away from 1 and 0, as no default is."""
    shape = (*rows, columns)
    x, residual, dy, ds = (torch.randn(shape, dtype=torch.float64) for _ in range(4))
    weight, bias, x_bias = torch.rand(columns) + 0.5, torch.randn(columns), torch.randn(columns)
    tensors = (x * sigma, residual * sigma + mean, weight, bias, x_bias, dy, ds)
    return [t.to(device, dtype) for t in tensors]


def run(function, inputs, dy, ds, **options):
    """Outputs and gradients of add_layer_norm (or of what `function` is) for leaves of these values and strides."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in inputs]
    x, residual, weight, bias, x_bias = leaves
    y, s = function(x, residual, weight, bias, EPS, x_bias=x_bias, **options)
    torch.autograd.backward((y, s), (dy.to(y.dtype), ds.to(s.dtype)))
    return [y, s, *(None if leaf is None else leaf.grad for leaf in leaves)]


def widen(tensors):
    return [None if t is None else t.double() for t in tensors]


def magnitudes(results, inputs, dy, ds):
    """The formulas on absolute values, for rows that are centred first (the mean costs nothing)."""
    _, s, *_ = results
    _, _, weight, bias, _ = inputs
    n = (s - s.mean(-1, keepdim=True)) / (s.var(-1, correction=0, keepdim=True) + EPS).sqrt()
    rstd = 1 / (s.var(-1, correction=0, keepdim=True) + EPS).sqrt()
    g = dy * weight
    dx = rstd * (g.abs() + g.mean(-1, keepdim=True).abs() + (n * (g * n).mean(-1, keepdim=True)).abs()) + ds.abs()
    rows = tuple(range(s.dim() - 1))
    sums = [(dy * n).abs().sum(rows), dy.abs().sum(rows), dx.sum(rows)]
    return [(n * weight).abs() + (0 if bias is None else bias.abs()), s.abs(), dx, dx, *sums]


def check(tensors, only_floor=False, residual_dtype=None, backend="triton", **options):
    """The kernels' seven results for these operands, each within assert_accurate's limits. Returns them."""
    inputs, (dy, ds) = tensors[:5], tensors[5:]
    kernel = run(ops.add_layer_norm, inputs, dy, ds, backend=backend, residual_dtype=residual_dtype, **options)
    theirs = run(reference.add_layer_norm, inputs, dy, ds, residual_dtype=residual_dtype, **options)
    exact = run(reference.add_layer_norm, widen(inputs), *widen((dy, ds)), **options)
    sizes = magnitudes(exact, widen(inputs), *widen((dy, ds)))
    scale = 1 / (1 - options.get("dropout_p", 0.0)) if options.get("dropout_p") != 1 else 1
    for name, got, expected, their, size in zip(NAMES, kernel, exact, theirs, sizes, strict=True):
        if expected is not None:
            assert_accurate(got, expected, None if only_floor else their, size * scale, name=name)
    return kernel


@pytest.mark.parametrize("columns", [1, 2, 20, 48, 300, 768, 1600])
def test_widths(columns, device):
    for dtype in DTYPES:
        check(operands((3, 2), columns, dtype, device))


@pytest.mark.parametrize("columns", [4096, 4100, 8192, 16384])
def test_wide_rows(columns, device):
    """Past 4096 channels the backward's sums are a launch of their own: 19 rows are five blocks of rows for it."""
    for dtype in DTYPES if columns == 4100 else [torch.bfloat16]:
        check(operands((19,), columns, dtype, device), dropout_p=0.25, seed=3)
    check(operands((2,), columns, torch.float32, device))


@pytest.mark.parametrize("rows", [(), (1,), (2, 1), (257,), (3, 50)], ids=str)
def test_row_counts(rows, device):
    """257 rows are 33 blocks of rows, of which each of the backward's three programs walks over several."""
    for columns in (20, 100):
        check(operands(rows, columns, torch.float32, device))


@pytest.mark.gpu
@pytest.mark.parametrize("columns", [768, 1024, 1280, 1600, 4096, 16384])
def test_the_sizes_that_people_train(columns):
    rows = (4, 1024) if columns <= 4096 else (2, 150)  # the wide backward's programs walk over several blocks of these
    for dtype in DTYPES:
        check(operands(rows, columns, dtype, "cuda"))


@pytest.mark.parametrize(("bias", "x_bias"), list(itertools.product([True, False], repeat=2)))
def test_without_biases(bias, x_bias, device):
    tensors = operands((5,), 48, torch.float32, device)
    if not bias:
        tensors[3] = None
    if not x_bias:
        tensors[4] = None
    check(tensors)


def test_an_empty_batch(device):
    tensors = operands((0, 7), 48, torch.float32, device)
    y, s, dx, dresidual, dweight, dbias, dx_bias = run(ops.add_layer_norm, tensors[:5], *tensors[5:], backend="triton")
    assert y.shape == s.shape == dx.shape == dresidual.shape == (0, 7, 48)
    for grad in (dweight, dbias, dx_bias):
        assert torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.parametrize("mean", [0.0, 1e2, 1e4])
@pytest.mark.parametrize("sigma", [1.0, 1e-2])
def test_a_large_mean_costs_no_digits(mean, sigma, device):
    """At 1e4 / 1e-2 the mean is 1e6 deviations away: PyTorch's float32 kernels keep one digit there, ours all."""
    x, residual, *others = operands((9,), 768, torch.float32, device, mean, sigma)
    others[2] = None  # adding x or its bias would round the stream before it is normalised
    check([torch.zeros_like(x), residual, *others], only_floor=True)


def test_rows_without_variance_give_the_bias(device):
    x = torch.full((3, 40), 7.25, device=device, requires_grad=True)
    weight, bias = torch.randn(40, device=device), torch.randn(40, device=device)
    y = ops.layer_norm(x, weight, bias, backend="triton")
    assert torch.equal(y, bias.expand(3, 40))
    y.sum().backward()
    assert x.grad.isfinite().all()


def test_s_is_what_torch_adds(device):
    for dtype in DTYPES:
        x, residual, weight, *_ = operands((5,), 48, dtype, device)
        _, s = ops.add_layer_norm(x, residual, weight, backend="triton")
        assert torch.equal(s, x + residual)


def test_plain_layer_norm_is_the_same_without_a_residual(device):
    x, _, weight, bias, _, dy, _ = operands((6,), 300, torch.float32, device)
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    y = ops.layer_norm(*leaves, backend="triton")
    y.backward(dy)
    zero = torch.zeros_like(x)
    expected = run(ops.add_layer_norm, (x, zero, weight, bias, None), dy, zero, backend="triton")
    for got, other in zip(
        (y, *(leaf.grad for leaf in leaves)), (expected[0], *expected[2:3], *expected[4:6]), strict=True
    ):
        assert torch.equal(got, other)


@pytest.mark.parametrize("eps", [1e-12, 1e-5, 1e-1])
def test_eps_is_heard(eps, device):
    x, _, weight, bias, *_ = operands((4,), 48, torch.float32, device, sigma=1e-2)
    y = ops.layer_norm(x, weight, bias, eps, backend="triton")
    expected = reference.layer_norm(*widen((x, weight, bias)), eps)
    assert_accurate(y, expected, reference.layer_norm(x, weight, bias, eps))


STRIDES = {
    "transposed": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "every other column": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "every other row": lambda t: t.repeat_interleave(2, 0)[::2],
    "expanded over rows": lambda t: t[:1].expand_as(t),
    "one number": lambda t: t[:1, :1, :1].expand_as(t),
}


@pytest.mark.parametrize("strides", STRIDES)
@pytest.mark.parametrize("which", ["operands", "gradients"])
def test_strides_change_no_bit(which, strides, device):
    """x and residual, or dy and ds, as a view of any strides; the result equals that of a contiguous copy."""
    tensors = operands((4, 6), 48, torch.float32, device)
    for i in (0, 1) if which == "operands" else (5, 6):
        tensors[i] = STRIDES[strides](tensors[i])
    contiguous = [t.contiguous() for t in tensors]
    assert any(t.stride() != c.stride() for t, c in zip(tensors, contiguous, strict=True))
    for got, expected in zip(
        run(ops.add_layer_norm, tensors[:5], *tensors[5:], backend="triton"),
        run(ops.add_layer_norm, contiguous[:5], *contiguous[5:], backend="triton"),
        strict=True,
    ):
        assert alike(got, expected)


def test_strided_weights(device):
    x, _, weight, bias, *_ = operands((3,), 48, torch.float32, device)
    every_other = [t.repeat_interleave(2)[::2] for t in (weight, bias)]
    assert torch.equal(
        ops.layer_norm(x, *every_other, backend="triton"), ops.layer_norm(x, weight, bias, backend="triton")
    )


@pytest.mark.parametrize("unused", ["y", "s"])
def test_a_gradient_for_one_output_alone(unused, device):
    x, residual, weight, bias, _, dy, ds = operands((4, 6), 48, torch.float32, device)

    def dx(x, residual, weight, bias, dy, ds, backend):
        leaf = x.clone().requires_grad_()
        y, s = ops.add_layer_norm(leaf, residual, weight, bias, backend=backend)
        (s * ds if unused == "y" else y * dy).sum().backward()
        return leaf.grad

    tensors = (x, residual, weight, bias, dy, ds)
    assert_accurate(dx(*tensors, "triton"), dx(*widen(tensors), "torch"), dx(*tensors, "torch"))


def test_any_subset_of_gradients_equals_the_whole(device):
    inputs = operands((4, 6), 48, torch.float32, device)
    whole = run(ops.add_layer_norm, inputs[:5], *inputs[5:], backend="triton")[2:]
    for wanted in itertools.product([True, False], repeat=5):
        if not any(wanted):
            continue
        leaves = [t.clone().requires_grad_(want) for t, want in zip(inputs[:5], wanted, strict=True)]
        x, residual, weight, bias, x_bias = leaves
        y, s = ops.add_layer_norm(x, residual, weight, bias, EPS, x_bias=x_bias, backend="triton")
        outputs = [(t, grad) for t, grad in ((y, inputs[5]), (s, inputs[6])) if t.requires_grad]
        torch.autograd.backward(*zip(*outputs, strict=True))
        for leaf, want, expected in zip(leaves, wanted, whole, strict=True):
            assert alike(leaf.grad, expected) if want else leaf.grad is None


@pytest.mark.parametrize("residual_dtype", [None, torch.float32, torch.float16], ids=str)
def test_the_stream_may_be_wider_than_the_branch(residual_dtype, device):
    """A float16 branch on a float32 stream: normed is float16, and every gradient has its operand's dtype."""
    tensors = operands((4, 6), 48, torch.float32, device)
    tensors[0] = tensors[0].half()
    results = check(tensors, residual_dtype=residual_dtype)
    kinds = [torch.float16, residual_dtype or torch.float32, torch.float16, *[torch.float32] * 4]
    assert [t.dtype for t in results] == kinds


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9, 1.0])
def test_dropout_drops_what_the_reference_drops(p, device):
    for columns in (20, 48, 300):
        tensors = operands((5, 3), columns, torch.float32, device)
        options = dict(dropout_p=p, seed=2**40 + 7)
        kernel = check(tensors, **options)
        theirs = run(reference.add_layer_norm, tensors[:5], *tensors[5:], **options)
        assert torch.equal(kernel[2] == 0, theirs[2] == 0)
        seed = torch.tensor(2**40 + 7, device=device)
        again = run(ops.add_layer_norm, tensors[:5], *tensors[5:], backend="triton", dropout_p=p, seed=seed)
        assert all(torch.equal(a, b) for a, b in zip(kernel, again, strict=True))


def test_a_word_at_the_threshold_is_kept(device):
    """p is chosen so that floor(p * 2**32) is the very word that decides about the element (0, 0)."""
    counter = numpy.array([0, 0, 0, reference.RESIDUAL_SITE], dtype=numpy.uint64)
    p = reference.philox(counter, 7)[0].item() / 2**32
    x, weight = torch.ones(1, 20, device=device), torch.ones(20, device=device)
    for backend in ("triton", "torch"):
        _, s = ops.add_layer_norm(x, torch.zeros_like(x), weight, dropout_p=p, seed=7, backend=backend)
        assert s[0, 0] > 0


def test_dropout_within_the_limits(device):
    for dtype in DTYPES:
        check(operands((5, 3), 300, dtype, device), dropout_p=0.25, seed=12345)


def test_dropout_without_a_seed_follows_manual_seed(device):
    x, residual, weight, *_ = operands((5, 3), 300, torch.float32, device)

    def dropped(seed):
        torch.manual_seed(seed)
        return [ops.add_layer_norm(x, residual, weight, dropout_p=0.5, backend="triton")[1] for _ in range(2)]

    first, second = dropped(1)
    again, _ = dropped(1)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    assert not torch.equal(first, dropped(2)[0])


def test_the_same_input_gives_the_same_bits(device):
    tensors = operands((64, 9), 300, torch.float32, device)
    first, second = (run(ops.add_layer_norm, tensors[:5], *tensors[5:], backend="triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_row_does_not_depend_on_its_neighbours(device):
    x, _, weight, bias, *_ = operands((70,), 48, torch.float32, device)
    whole = ops.layer_norm(x, weight, bias, backend="triton")
    assert torch.equal(ops.layer_norm(x[11:12], weight, bias, backend="triton"), whole[11:12])


def test_nan_stays_in_its_row(device):
    x, _, weight, bias, *_ = operands((70,), 48, torch.float32, device)
    x[5, 7] = float("nan")
    y = ops.layer_norm(x, weight, bias, backend="triton")
    assert y[5].isnan().all()
    assert y[torch.arange(70) != 5].isfinite().all()
