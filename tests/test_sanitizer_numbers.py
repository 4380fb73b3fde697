"""The sanitizer's arithmetic: bfloat16 and TF32 as a GPU has them, and int32 that may not overflow."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not to be had on this platform")

import triton
import triton.language as tl

from fastgpt.sanitizer import SanitizerError, sanitized

pytestmark = pytest.mark.interpreter


@pytest.fixture(autouse=True)
def _sanitized():
    """In place of conftest's: these tests say where it begins and ends."""


def launch(kernel, grid, *args, order=None, **kwargs):
    with sanitized(order=order):
        kernel[grid](*args, **kwargs)


# bfloat16


@triton.jit
def _cast_kernel(x_ptr, y_ptr, N, ROUNDING: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets, offsets < N)
    tl.store(y_ptr + offsets, x.to(y_ptr.dtype.element_ty, fp_downcast_rounding=ROUNDING), offsets < N)


def cast(x, dtype, rounding=None):
    y = torch.empty(x.shape, dtype=dtype)
    launch(_cast_kernel, (triton.cdiv(x.numel(), 65536),), x, y, x.numel(), ROUNDING=rounding, BLOCK=65536)
    return y


def bits(x):
    """As integers, every NaN the same: torch itself makes 0x7FC0 of some and 0xFFFF of others."""
    x = torch.where(x.isnan(), torch.nan, x)
    return x.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def every_bfloat16():
    return torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)


def around_every_bfloat16():
    """float32: each, what lies just beside it and beside each tie (NaN and infinities too); then any at all."""
    exact = every_bfloat16().view(torch.int16).to(torch.int32) << 16
    near = torch.cat([exact + low for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)])
    anywhere = torch.randint(-(2**31), 2**31, (2**18,)).to(torch.int32)
    return torch.cat([near, anywhere]).view(torch.float32)


def test_casts_to_bfloat16_round_as_torch_does():
    x = around_every_bfloat16()
    assert torch.equal(bits(cast(x, torch.bfloat16)), bits(x.to(torch.bfloat16)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int32, torch.int64], ids=str)
def test_casts_from_other_types_round_as_torch_does(dtype):
    x = (torch.randn(2**16, dtype=torch.float64) * 1000).to(dtype)
    assert torch.equal(bits(cast(x, torch.bfloat16)), bits(x.to(torch.bfloat16)))


@pytest.mark.filterwarnings("ignore:.* encountered in cast:RuntimeWarning")  # of NaN, and past the largest float16
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_casts_from_bfloat16_are_exact(dtype):
    x = every_bfloat16()
    assert torch.equal(bits(cast(x, dtype)), bits(x.to(dtype)))


def test_casts_truncate_where_asked_to():
    x = around_every_bfloat16()
    truncated = (x.view(torch.int32) >> 16).to(torch.int16).view(torch.bfloat16)
    truncated[x.isnan()] = torch.nan
    assert torch.equal(bits(cast(x, torch.bfloat16, "rtz")), bits(truncated))
    assert not torch.equal(bits(cast(x, torch.bfloat16, "rtne")), bits(truncated))


@triton.jit
def _bfloat16_kernel(x_ptr, y_ptr, OPERATION: tl.constexpr):
    offsets = tl.arange(0, 16)
    x = tl.load(x_ptr + offsets)
    if OPERATION == "add":
        x = x + x
    elif OPERATION == "scale":
        x = x * 2.0
    elif OPERATION == "negate":
        x = -x
    elif OPERATION == "compare":
        x = tl.where(x > x, x, x)
    elif OPERATION == "fma":
        x = tl.fma(x, x, x)
    elif OPERATION == "sum":
        x = tl.where(offsets < 8, x, tl.sum(x))
    elif OPERATION == "abs":
        x = tl.abs(x)
    elif OPERATION == "maximum":
        x = tl.maximum(x, -1.0 + tl.zeros([16], tl.float32)).to(tl.bfloat16)
    elif OPERATION == "choose":
        x = tl.where(offsets < 8, x, tl.full([16], 1.0, tl.bfloat16))
    elif OPERATION == "widen":
        x = (x.to(tl.float32) * 2.0).to(tl.bfloat16)
    tl.store(y_ptr + offsets, x)


@pytest.mark.parametrize("operation", ["add", "scale", "negate", "compare", "fma", "sum"])
def test_arithmetic_in_bfloat16_is_refused(operation):
    x = torch.randn(16).bfloat16()
    with pytest.raises(SanitizerError, match=r"_bfloat16_kernel: arithmetic in bfloat16; .* \(program \(0, 0, 0\)\)"):
        launch(_bfloat16_kernel, (1,), x, torch.empty_like(x), OPERATION=operation)


@pytest.mark.parametrize("operation", ["copy", "choose", "abs", "maximum", "widen"])
def test_bfloat16_may_be_moved_chosen_and_cast(operation):
    x = torch.randn(16).bfloat16()
    y = torch.empty_like(x)
    launch(_bfloat16_kernel, (1,), x, y, OPERATION=operation)
    ones = torch.ones(16, dtype=torch.bfloat16)
    expected = {
        "copy": x,
        "choose": torch.cat([x[:8], ones[8:]]),
        "abs": x.abs(),
        "maximum": torch.maximum(x, -ones),
        "widen": x * 2,
    }
    assert torch.equal(y, expected[operation])


# tl.dot


@triton.jit
def _dot_kernel(a_ptr, b_ptr, c_ptr, PRECISION: tl.constexpr, N: tl.constexpr):
    square = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    c = tl.dot(tl.load(a_ptr + square), tl.load(b_ptr + square), input_precision=PRECISION)
    tl.store(c_ptr + square, c)


def dot_error(dtype, precision=None):
    """Of a product of two random matrices, relative to the product's norm."""
    a, b = torch.randn(2, 64, 64).to(dtype)
    c = torch.empty(64, 64)
    launch(_dot_kernel, (1,), a, b, c, PRECISION=precision, N=64)
    exact = a.double() @ b.double()
    return ((c - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_dots_are_exact_products_added_in_float32(dtype):
    assert dot_error(dtype) < 3e-7


@pytest.mark.parametrize("precision", [None, "tf32"])
def test_float32_dots_are_tf32_unless_told_otherwise(precision):
    assert 3e-4 < dot_error(torch.float32, precision) < 3e-3


@pytest.mark.parametrize("precision", ["ieee", "tf32x3"])
def test_float32_dots_are_exact_where_asked_to(precision):
    assert dot_error(torch.float32, precision) < 3e-7


# int32


@triton.jit
def _overflow_kernel(y_ptr, factor, KIND: tl.constexpr):
    index = tl.arange(0, 4)
    if KIND == "mul":
        index = index * factor
    elif KIND == "add":
        index = index + (factor - 4 + factor)
    elif KIND == "sub":
        index = index - factor - factor
    elif KIND == "int64":
        index = index.to(tl.int64) * factor
    elif KIND == "uint32":
        index = index.to(tl.uint32) * 0xD2511F53
    tl.store(y_ptr + tl.arange(0, 4), index)


@pytest.mark.parametrize(("kind", "value"), [("mul", 2 * (2**30 + 1)), ("add", 2**31), ("sub", -(2**31) - 2)])
def test_int32_overflow_is_refused(kind, value):
    message = rf"^_overflow_kernel: int32 overflow in {kind}: {value}, in 2 lanes \(program \(0, 0, 0\)\)$"
    with pytest.raises(SanitizerError, match=message):
        launch(_overflow_kernel, (1,), torch.empty(4, dtype=torch.int64), 2**30 + 1, KIND=kind)


def test_the_largest_int32_is_none():
    y = torch.empty(4, dtype=torch.int64)
    launch(_overflow_kernel, (1,), y, 2**30, KIND="add")
    assert y[3] == 2**31 - 1
    launch(_overflow_kernel, (1,), y, 2**30, KIND="int64")
    assert y[3] == 3 * 2**30


def test_unsigned_integers_may_wrap():
    y = torch.empty(4, dtype=torch.int64)
    launch(_overflow_kernel, (1,), y, 1, KIND="uint32")
    assert y.tolist() == [i * 0xD2511F53 % 2**32 for i in range(4)]


@triton.jit
def _philox_kernel(seed_ptr, counter_ptr, y_ptr):
    one = tl.arange(0, 1)
    counters = counter_ptr + one
    w0, w1, w2, w3 = tl.philox(
        tl.load(seed_ptr), tl.load(counters), tl.load(counters + 1), tl.load(counters + 2), tl.load(counters + 3)
    )
    tl.store(y_ptr + one, w0)
    tl.store(y_ptr + 1 + one, w1)
    tl.store(y_ptr + 2 + one, w2)
    tl.store(y_ptr + 3 + one, w3)


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [  # Random123's own test vectors for philox4x32-10
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_may_wrap(counter, key, words):
    low, high = (int(word, 16) for word in key.split())
    seed = torch.tensor([low + (high << 32)], dtype=torch.uint64).view(torch.int64)
    counters = torch.tensor([int(word, 16) for word in counter.split()], dtype=torch.uint32).view(torch.int32)
    y = torch.empty(4, dtype=torch.int64)
    launch(_philox_kernel, (1,), seed, counters, y)
    assert [f"{word:08x}" for word in y.tolist()] == words.split()
