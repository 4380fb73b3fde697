"""The sanitizing interpreter: for each thing that it mends or refuses, a kernel that shows it and one that is right."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not to be had on this platform")

import triton
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

from fastgpt import ops
from fastgpt.kernels import layernorm
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


# Bounds


@triton.jit
def _touch_kernel(
    x_ptr, others_ptr, rows, columns, stride_m, stride_n, shift, KIND: tl.constexpr, MASKED: tl.constexpr
):
    """Touches 4 x 4 elements a program, `shift` elements on, of a matrix of these strides."""
    row = tl.program_id(0) * 4 + tl.arange(0, 4)[:, None]
    column = tl.program_id(1) * 4 + tl.arange(0, 4)[None, :]
    pointers = x_ptr + shift + row * stride_m + column * stride_n
    mask = (row < rows) & (column < columns) if MASKED else row > -1
    if KIND == "load":
        tl.load(pointers, mask)
    elif KIND == "store":
        tl.store(pointers, 0, mask)
    elif KIND == "atomic":
        tl.atomic_add(pointers, 1, mask)
    elif KIND == "swap":
        tl.atomic_cas(pointers, tl.zeros([4, 4], tl.int32), tl.zeros([4, 4], tl.int32))


def touch(x, kind="load", shift=0, masked=True, others=None):
    rows, columns = x.shape
    grid = (triton.cdiv(rows, 4), triton.cdiv(columns, 4))
    launch(_touch_kernel, grid, x, others, rows, columns, *x.stride(), shift, KIND=kind, MASKED=masked)


def matrix(rows, columns):
    return torch.zeros(rows, columns, dtype=torch.int32)


VIEWS = {
    "whole": lambda: matrix(8, 6),
    "columns": lambda: matrix(8, 12)[:, 3:9],
    "every other column": lambda: matrix(8, 12)[:, ::2],
    "every third row": lambda: matrix(24, 6)[::3],
    "transposed": lambda: matrix(6, 8).t(),
    "expanded": lambda: matrix(1, 6).expand(8, 6),
    "one head of many": lambda: torch.zeros(8, 3, 2, 6, dtype=torch.int32)[:, 1, 1],
    "sliding": lambda: torch.zeros(13, dtype=torch.int32).as_strided((8, 6), (1, 1)),
}


@pytest.mark.parametrize("view", VIEWS)
def test_every_element_of_a_view_may_be_touched(view):
    touch(VIEWS[view](), "load")
    if view not in ("expanded", "sliding"):  # where programs would race
        touch(VIEWS[view](), "store")
        touch(VIEWS[view](), "atomic")


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("shift", [1, -1])
def test_no_view_may_be_left(view, shift):
    with pytest.raises(SanitizerError, match="_touch_kernel: load out of bounds of x_ptr"):
        touch(VIEWS[view](), shift=shift)


@pytest.mark.parametrize(
    ("view", "shift"), [("columns", 6), ("every other column", 1), ("every third row", 6), ("one head of many", 6)]
)
def test_what_a_view_leaves_out_is_out_of_bounds(view, shift):
    """Within its extent all the same: its upper left corner, shifted into the gaps between its elements."""
    x = VIEWS[view]()
    with pytest.raises(SanitizerError, match="16 of 16 lanes"):
        launch(_touch_kernel, (1, 1), x, None, 4, 4, *x.stride(), shift, KIND="load", MASKED=True)


@pytest.mark.parametrize("kind", ["load", "store", "atomic", "swap"])
def test_lanes_out_of_bounds_are_counted_and_touch_nothing(kind):
    """Six columns, in tiles of 4: the second tile's last two lanes are beyond the last row, in memory that is ours."""
    memory = torch.full((9, 6), 7, dtype=torch.int32)
    message = (
        rf"^_touch_kernel: {'atomic' if kind == 'swap' else kind} out of bounds of x_ptr \(8, 6\) strided \(6, 1\): "
        r"2 of 16 lanes \(program \(1, 1, 0\)\)$"
    )
    with pytest.raises(SanitizerError, match=message):
        touch(memory[:8], kind, masked=False)
    assert (memory[8] == 7).all()


def test_another_argument_is_out_of_bounds_too():
    """As with queries, keys and values that lie in one packed tensor."""
    packed = matrix(8, 12)
    queries, keys = packed[:, :6], packed[:, 6:]
    with pytest.raises(SanitizerError, match=r"out of bounds of x_ptr"):
        touch(queries, shift=6, others=keys)
    with pytest.raises(SanitizerError, match=r"out of bounds of x_ptr or others_ptr"):
        touch(queries, shift=6, others=queries)


def test_nothing_lies_within_an_empty_tensor():
    x = matrix(8, 6)
    with pytest.raises(SanitizerError, match="16 of 16 lanes"):
        launch(_touch_kernel, (1, 1), x[:0], None, 8, 6, 6, 1, 0, KIND="load", MASKED=True)


@triton.jit
def _stray_kernel(x_ptr):
    tl.load((x_ptr.to(tl.int64) & 0xFFFFFFFFFFFF).to(tl.pointer_type(tl.int32)))


def test_a_pointer_from_nowhere_is_out_of_bounds():
    with pytest.raises(SanitizerError, match="out of bounds of all arguments"):
        launch(_stray_kernel, (1,), matrix(1, 1))


@triton.jit
def _descriptor_kernel(x_ptr, y_ptr, rows, columns: tl.constexpr):
    x = tl.make_tensor_descriptor(x_ptr, [rows, columns], [columns, 1], [4, 8])
    y = tl.make_tensor_descriptor(y_ptr, [rows, columns], [columns, 1], [4, 8])
    row = tl.program_id(0) * 4
    y.store([row, 0], x.load([row, 0]))


def test_descriptors_are_held_to_their_tensor():
    x = torch.randn(6, 8)
    y = torch.empty_like(x)
    launch(_descriptor_kernel, (2,), x, y, 6, columns=8)
    assert torch.equal(x, y)
    with pytest.raises(SanitizerError, match=r"load out of bounds of x_ptr .* 8 of 24 lanes \(program \(1, 0, 0\)\)"):
        launch(_descriptor_kernel, (2,), x, y, 7, columns=8)


@triton.jit
def _mask_kernel(x_ptr, y_ptr):
    tl.store(y_ptr + tl.arange(0, 8), tl.load(x_ptr + tl.arange(0, 8)))


def test_booleans_are_bytes():
    x = torch.rand(8) > 0.5
    y = torch.empty_like(x)
    launch(_mask_kernel, (1,), x, y)
    assert torch.equal(x, y)
    with pytest.raises(SanitizerError, match="1 of 8 lanes"):
        launch(_mask_kernel, (1,), x[:7], y)


# Races


@triton.jit
def _race_kernel(x_ptr, y_ptr, N, KIND: tl.constexpr):
    """Each program has one element of its own; all that it does to another's is a race."""
    mine = tl.program_id(0)
    next_one = (mine + 1) % N
    if KIND == "own":
        tl.store(x_ptr + mine, tl.load(x_ptr + mine) + 1)
    elif KIND == "read only":
        tl.store(y_ptr + mine, tl.load(x_ptr) + tl.load(x_ptr + next_one))
    elif KIND == "add":
        tl.atomic_add(x_ptr, 1)
    elif KIND == "masked":
        tl.store(x_ptr + mine, 1)
        tl.store(x_ptr + next_one + tl.arange(0, 2), 1, tl.arange(0, 2) < 0)
    elif KIND == "store/store":
        tl.store(x_ptr + 2, mine)
    elif KIND == "accumulate":
        tl.store(x_ptr + 2, tl.load(x_ptr + 2) + 1)  # right in any interpreter
    elif KIND == "load/store":
        tl.store(x_ptr + mine, tl.load(x_ptr + next_one))
    elif KIND == "atomic/store":
        tl.atomic_add(x_ptr + 1, 1)
        tl.store(x_ptr + mine, 0)
    elif KIND == "atomic/load":
        tl.atomic_add(x_ptr + 1, 1)
        tl.store(y_ptr + mine, tl.load(x_ptr + 1))


@pytest.mark.parametrize("kind", ["own", "read only", "add", "masked"])
@pytest.mark.parametrize("order", [None, 1])
def test_programs_that_keep_apart_do_not_race(kind, order):
    x, y = torch.zeros(2, 4, dtype=torch.int32)
    launch(_race_kernel, (4,), x, y, 4, order=order, KIND=kind)


@pytest.mark.parametrize(
    ("kind", "elements"), [("store/store", 1), ("load/store", 4), ("atomic/store", 1), ("atomic/load", 1)]
)
@pytest.mark.parametrize("order", [None, 1])
def test_races_are_found(kind, elements, order):
    x, y = torch.zeros(2, 4, dtype=torch.int32)
    where = r"x_ptr \(4,\) strided \(1,\): programs \(\d, 0, 0\) and \(\d, 0, 0\)"
    with pytest.raises(SanitizerError, match=f"^_race_kernel: {kind} race on {elements} elements of {where}$"):
        launch(_race_kernel, (4,), x, y, 4, order=order, KIND=kind)


def test_the_race_that_adds_up_right_is_found():
    x, y = torch.zeros(2, 4, dtype=torch.int32)
    with pytest.raises(SanitizerError, match="race"):
        launch(_race_kernel, (4,), x, y, 4, KIND="accumulate")
    assert x[2] == 4


def test_one_program_alone_never_races():
    x, y = torch.zeros(2, 4, dtype=torch.int32)
    for kind in ("store/store", "load/store", "atomic/store", "atomic/load"):
        launch(_race_kernel, (1,), x, y, 4, KIND=kind)


def test_launches_do_not_race_with_each_other():
    x, y = torch.zeros(2, 4, dtype=torch.int32)
    for _ in range(2):
        launch(_race_kernel, (4,), x, y, 4, KIND="own")
    assert x.tolist() == [2] * 4


def test_races_are_found_among_accesses_that_were_folded(monkeypatch):
    monkeypatch.setattr("fastgpt.sanitizer._FOLD_LANES", 2)
    test_races_are_found("load/store", 4, None)
    test_programs_that_keep_apart_do_not_race("own", None)


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


# Grids and the order of programs


@triton.jit
def _ticket_kernel(counter_ptr, tickets_ptr):
    """Which turn each program had."""
    x, y, z = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    place = (x * tl.num_programs(1) + y) * tl.num_programs(2) + z
    tl.store(tickets_ptr + place, tl.atomic_add(counter_ptr, 1))


def tickets(order=None):
    counter, turns = torch.zeros(1, dtype=torch.int32), torch.full((24,), -1, dtype=torch.int32)
    launch(_ticket_kernel, lambda meta: (2, 3, 4), counter, turns, order=order)
    return turns.tolist()


def test_programs_run_in_order_or_shuffled():
    assert tickets() == list(range(24))
    assert sorted(tickets(order=1)) == list(range(24))
    assert tickets(order=1) == tickets(order=1)
    assert len({tuple(tickets(order)) for order in (None, 0, 1, 2)}) == 4


def test_the_innermost_order_counts():
    def turns():
        counter, turns = torch.zeros(1, dtype=torch.int32), torch.empty(24, dtype=torch.int32)
        _ticket_kernel[(2, 3, 4)](counter, turns)
        return turns.tolist()

    first, second = tickets(order=1), tickets(order=2)
    with sanitized(order=1):
        assert turns() == first
        with sanitized(order=2):
            assert turns() == second
        assert turns() == first


@pytest.mark.parametrize("grid", [(0,), (2, 0), (1, 1, 0)])
def test_empty_grids_are_refused(grid):
    with pytest.raises(SanitizerError, match=r"^_ticket_kernel: the grid \(.*0.*\) is empty"):
        launch(_ticket_kernel, grid, *torch.zeros(2, 24, dtype=torch.int32))


@pytest.mark.parametrize("grid", [(1, 65536), (1, 1, 65536), (2**31,)])
def test_grids_past_the_limits_are_refused(grid):
    with pytest.raises(SanitizerError, match="is past CUDA's limits"):
        launch(_ticket_kernel, grid, *torch.zeros(2, 24, dtype=torch.int32))


def test_layer_norm_does_not_depend_on_the_order():
    x, residual, dy, ds = torch.randn(4, 64, 300)
    weight, bias, x_bias = torch.randn(3, 300)

    def results(order):
        leaves = [t.clone().requires_grad_() for t in (x, residual, weight, bias, x_bias)]
        with sanitized(order=order):
            outputs = ops.add_layer_norm(*leaves[:4], x_bias=leaves[4], dropout_p=0.5, seed=1, backend="triton")
            torch.autograd.backward(outputs, (dy, ds))
        return [*outputs, *(leaf.grad for leaf in leaves)]

    for shuffled in (1, 2):
        assert all(torch.equal(a, b) for a, b in zip(results(None), results(shuffled), strict=True))


# What a kernel forgets to write


def test_what_launchers_allocate_is_poisoned():
    """By torch, as conftest.py turns deterministic algorithms on."""
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        x, weight = torch.randn(5, 48).to(dtype), torch.randn(48)
        outputs = layernorm.layer_norm_fwd_outputs(x, x, weight, weight, weight, None, 1e-5, 0.1, dtype)
        outputs += layernorm.layer_norm_bwd_outputs(x, x, x, weight, outputs[2], None, 0.1, dtype, True)
        assert all(t.numel() and t.isnan().all() for t in outputs)
    y = torch.empty(2**17)
    launch(_cast_kernel, (1,), torch.randn(2**17), y, 2**17, ROUNDING=None, BLOCK=65536)
    assert y[:65536].isfinite().all() and y[65536:].isnan().all()


# The interpreter itself


@triton.jit
def _strided_kernel(y_ptr, N):
    for i in range(tl.program_id(0), N, tl.num_programs(0)):
        tl.store(y_ptr + i, tl.program_id(0))


def test_bounds_of_a_range_may_be_tensors():
    y = torch.full((10,), -1, dtype=torch.int32)
    launch(_strided_kernel, (4,), y, 10)
    assert y.tolist() == [i % 4 for i in range(10)]


@triton.jit
def _out_of_bounds(x_ptr):
    return tl.sum(tl.load(x_ptr + tl.arange(0, 8)))


@triton.jit
def _calling_kernel(x_ptr):
    tl.store(x_ptr, _out_of_bounds(x_ptr))


def test_a_finding_in_a_device_function_is_the_kernels():
    with pytest.raises(SanitizerError, match=r"_calling_kernel: load out of bounds of x_ptr .*: 4 of 8 lanes"):
        launch(_calling_kernel, (1,), torch.zeros(4))


@triton.jit
def _failing_kernel(x_ptr):
    tl.static_assert(False, "as it says")


def test_a_kernels_own_errors_pass_through():
    with pytest.raises(interpreter.InterpreterError, match="as it says"):
        launch(_failing_kernel, (1,), torch.zeros(4))


PATCHED = [
    *(interpreter, interpreter.InterpreterBuilder, interpreter.ReduceScanOpInterface, TritonSemantic),
    *(tl, tl.core, tl.math, tl.tensor, tl.dtype, tl.core.tensor_descriptor_base),
]


def patched_things():
    """All that Triton or the sanitizer replaces."""
    return [type(interpreter.interpreter_builder), *(dict(vars(owner)) for owner in PATCHED)]


def test_everything_is_put_back():
    launch(_calling_kernel, (1,), torch.zeros(8))  # Triton rewrites a kernel and its callees once, for good
    before = patched_things()
    ours = [value for things in before[1:5] for value in things.values() if "fastgpt" in str(value)]
    assert before[0] is interpreter.InterpreterBuilder and ours == []
    with sanitized():
        inside = patched_things()
        assert inside != before
        with sanitized(order=3):
            launch(_calling_kernel, (1,), torch.zeros(8))
            with pytest.raises(SanitizerError):
                launch(_calling_kernel, (1,), torch.zeros(4))
        assert patched_things() == inside
    assert patched_things() == before


def test_compiled_kernels_are_not_silently_unchecked(monkeypatch):
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"), sanitized():
        pass


def test_an_unknown_interpreter_is_refused(monkeypatch):
    monkeypatch.delattr(interpreter.InterpreterBuilder, "create_atomic_cas")
    before = patched_things()
    with pytest.raises(RuntimeError, match=r"Triton .* has no create_atomic_cas"), sanitized():
        pass
    assert patched_things() == before
