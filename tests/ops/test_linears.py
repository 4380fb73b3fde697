"""A decoder's linear layers in every layout against float64, and the pages that they lie on."""

import mmap
import threading

import pytest
import torch
import torch.nn.functional as F

from fastgpt.memory import LargePages
from fastgpt.ops.cpu import linears
from fastgpt.ops.cpu.linears import BagLinear, Layout
from fastgpt.testing import assert_accurate

HALVES = [torch.bfloat16, torch.float16]


def layer(outputs, inputs, dtype, bias=True):
    weight = torch.randn(outputs, inputs, dtype=dtype) / inputs**0.5
    return weight, torch.randn(outputs, dtype=dtype) if bias else None


def assert_linear(linear, x, weight, bias):
    wide = [None if t is None else t.double() for t in (x, weight, bias)]
    size = wide[0].abs() @ wide[1].abs().T + (0 if bias is None else wide[2].abs())
    assert_accurate(linear(x), F.linear(*wide), F.linear(x, weight, bias), size)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 1), (48, 20), (384, 65), (385, 16), (2304, 768), (1000, 3)])
def test_bags_are_a_linear_layer(outputs, inputs, bias, dtype):
    weight, bias = layer(outputs, inputs, dtype, bias)
    linear = BagLinear(weight, bias, linears._ordinary)
    for shape in [(inputs,), (1, inputs), (1, 1, inputs), (2, inputs), (3, 2, inputs)]:
        assert_linear(linear, torch.randn(shape).to(dtype), weight, bias)
    assert_linear(linear, torch.randn(1, inputs, 2).to(dtype)[..., 1], weight, bias)


@pytest.mark.parametrize("dtype", HALVES)
def test_a_bag_is_rounded_once(dtype):
    weight, bias = layer(500, 3000, dtype)
    x = torch.randn(1, 3000).to(dtype)
    exact = F.linear(x.double(), weight.double(), bias.double())
    got = BagLinear(weight, bias, linears._ordinary)(x)
    assert (got == exact.to(dtype)).double().mean() > 0.98  # but for what falls on the middle of two


def test_layers_of_one_shape_keep_out_of_each_others_way():
    """They, and threads that decode at once, would share what x is written to."""
    layers = [layer(500, 300, torch.bfloat16) for _ in range(2)]
    bags = [BagLinear(*each, LargePages().empty) for each in layers]
    inputs = [torch.randn(1, 300).bfloat16() for _ in range(2)]
    expected = [bag(x) for bag, x in zip(bags, inputs, strict=True)]
    wrong = []

    def work(index):
        for _ in range(300):
            if not torch.equal(bags[index](inputs[index]), expected[index]):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and not torch.equal(*expected)
    assert torch.equal(bags[0](inputs[0]), expected[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES])
@pytest.mark.parametrize(("outputs", "inputs"), [(300, 40), (40, 40), (40, 300)])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("tokens", [0, 300, 10_000])
def test_a_layout_keeps_the_numbers(dtype, outputs, inputs, transposed, tokens):
    weight, bias = layer(outputs, inputs, dtype)
    given = weight.t().contiguous().t() if transposed else weight.clone()  # as Hugging Face keeps it
    linear = Layout(tokens).linear(given, bias)
    assert torch.equal(linear.weight, weight)
    for rows in (1, 3):
        x = torch.randn(rows, inputs).to(dtype)
        if dtype != torch.float64:
            assert_linear(linear, x, weight, bias)


WIDE, NARROW, HALF = (300, 40, torch.float32), (40, 300, torch.float32), (300, 40, torch.bfloat16)


def laid_out(shape, tokens, transposed=False, **options):
    """What becomes of such a layer: 'as it is', 'copied', 'turned' or 'bags'."""
    weight, bias = layer(*shape)
    if transposed:
        weight = weight.t().contiguous().t()
    linear = Layout(tokens, **options).linear(weight, bias)
    if isinstance(linear, BagLinear):
        return "bags"
    turned = linear.weight.stride(0) == 1
    return "as it is" if linear.weight.data_ptr() == weight.data_ptr() else "turned" if turned else "copied"


def test_which_layout(monkeypatch):
    monkeypatch.setattr(linears, "_FAST_BAGS", True)
    monkeypatch.setattr(linears, "_FLOAT32_FROM", 64)
    for tokens, wide, half in [
        (0, "as it is", "as it is"),
        (31, "as it is", "as it is"),
        (63, "as it is", "bags"),
        (64, "turned", "bags"),
    ]:
        assert (laid_out(WIDE, tokens), laid_out(HALF, tokens)) == (wide, half)
        assert laid_out(NARROW, tokens) == "as it is" and laid_out(WIDE, tokens, transposed=True) == "as it is"
        assert laid_out(WIDE, tokens, rows=2) == laid_out(HALF, tokens, rows=2) == "as it is"
    assert laid_out(NARROW, 64, transposed=True) == "copied" and laid_out(NARROW, 63, transposed=True) == "as it is"
    for shape in (WIDE, HALF):  # kernels for few rows, as many as they are
        for rows in (1, 4):
            assert laid_out(shape, 10_000, rows=rows, on_kernels=True) == "as it is"
            assert laid_out(shape, 31, transposed=True, rows=rows, on_kernels=True) == "as it is"
            assert laid_out(shape, 32, transposed=True, rows=rows, on_kernels=True) == "copied"


def test_large_pages_are_for_many_tokens(monkeypatch):
    asked = []
    monkeypatch.setattr(
        LargePages, "empty", lambda self, shape, dtype: asked.append(1) or torch.empty(*shape, dtype=dtype)
    )
    assert laid_out(WIDE, 999) == "turned" and not asked
    assert laid_out(WIDE, 1000) == "turned" and laid_out(NARROW, 1000) == "copied" and len(asked) == 2
    assert laid_out(WIDE, 1000, transposed=True) == "turned" and len(asked) == 3


def test_without_fbgemm_halves_are_read_by_rows(monkeypatch):
    monkeypatch.setattr(linears, "_FAST_BAGS", False)
    assert laid_out(HALF, 300) == "as it is" and laid_out(HALF, 32, transposed=True) == "copied"
    assert laid_out(HALF, 31, transposed=True) == "as it is"


@pytest.mark.parametrize("outputs", [1, 100, 800])
@pytest.mark.parametrize("threads", [1, 2, 8])
def test_bags_for_any_number_of_threads(outputs, threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    weight, bias = layer(outputs, 30, torch.bfloat16)
    assert_linear(BagLinear(weight, bias, linears._ordinary), torch.randn(1, 30).bfloat16(), weight, bias)


def test_another_default_device_changes_nothing():
    weight, bias = layer(300, 42, torch.bfloat16)
    wide, x = layer(300, 42, torch.float32)[0], torch.randn(1, 42)
    for tokens in (64, 10_000):
        with torch.device("meta"):
            bags, turned = Layout(tokens).linear(weight, bias), Layout(tokens).linear(wide, None)
            bags(x.bfloat16())
        assert_linear(bags, x.bfloat16(), weight, bias)
        assert_linear(turned, x, wide, None)


def test_inference_mode_leaves_nothing_behind():
    weight, bias = layer(300, 43, torch.bfloat16)
    linear, x = BagLinear(weight, bias, linears._ordinary), torch.randn(1, 43).bfloat16()
    with torch.inference_mode():
        linear(x)
    assert_linear(linear, x, weight, bias)


# Pages.


@pytest.mark.parametrize("system", ["this one", "without large pages", "that refuses them"])
def test_tensors_on_large_pages(system, monkeypatch):
    if system == "without large pages":
        monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    elif system == "that refuses them" and hasattr(mmap, "MADV_HUGEPAGE"):
        monkeypatch.setattr(mmap, "MADV_HUGEPAGE", -1)
    monkeypatch.setattr("fastgpt.memory._CHUNK", 2**16)
    pages = LargePages()
    shapes = [(3, 5), (1,), (100, 70), (), (7, 1), (300, 300)]  # the last one is larger than a chunk
    dtypes = [torch.bfloat16, torch.float32, torch.float64]
    tensors = [pages.empty(shape, dtype) for shape in shapes for dtype in dtypes]
    for number, tensor in enumerate(tensors):
        tensor.fill_(number)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        assert tensors[0].data_ptr() % 2**21 == 0
    del pages
    for number, tensor in enumerate(tensors):
        assert tensor.shape == shapes[number // 3] and tensor.dtype == dtypes[number % 3]
        assert tensor.is_contiguous() and (tensor == number).all()
    assert len({tensor.data_ptr() % 64 for tensor in tensors}) == 1
