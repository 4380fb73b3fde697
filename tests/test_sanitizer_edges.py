"""Every check of the sanitizer at its edge: faults planted one step past it are found, what ends on it passes."""

import itertools

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not to be had on this platform")

import triton
import triton.language as tl

from fastgpt.sanitizer import SanitizerError, sanitized
from fastgpt.sanitizer.launch import Launch

pytestmark = pytest.mark.interpreter


@pytest.fixture(autouse=True)
def _sanitized():
    """In place of conftest's: these tests say where it begins and ends."""


# Bounds, to the byte

VIEWS = {
    "whole": lambda x: x.view(6, 4),
    "rows apart": lambda x: x.view(4, 6)[:, 1:5],
    "columns apart": lambda x: x.view(4, 6)[:, ::2],
    "both apart": lambda x: x.view(4, 6)[::2, ::3],
    "transposed": lambda x: x.view(4, 6)[:, 1:5].t(),
    "expanded": lambda x: x.view(4, 6)[1:2, 1:5].expand(3, -1),
    "expanded, columns apart": lambda x: x.view(4, 6)[1:2, 0:6:2].expand(3, -1),
    "expanded in the last axis": lambda x: x.view(4, 6)[:, 2:3].expand(-1, 5),
    "in three axes": lambda x: x.view(2, 3, 4)[:, ::2, 1:3],
    "an axis of one": lambda x: x.as_strided((2, 3, 1), (9, 2, 3)),
    "one element": lambda x: x[7],
    "of one row": lambda x: x.view(4, 6)[2:3, 1:3],
    "the last element": lambda x: x[23:],
}


@triton.jit
def _bytes_kernel(x_ptr, places_ptr, wanted_ptr, N: tl.constexpr, KIND: tl.constexpr, WIDE: tl.constexpr):
    """Touches a WIDE at each of the places, in bytes from x_ptr on, that are wanted."""
    lanes = tl.arange(0, N)
    at = x_ptr.to(tl.pointer_type(tl.int8)) + tl.load(places_ptr + lanes)
    at = at.to(tl.pointer_type(WIDE))
    wanted = tl.load(wanted_ptr + lanes)
    if KIND == "load":
        tl.load(at, wanted)
    elif KIND == "store":
        tl.store(at, 0, wanted)
    elif KIND == "atomic":
        tl.atomic_add(at, 0, wanted)


WIDTHS = {"int8": (tl.int8, 1), "int16": (tl.int16, 2), "int32": (tl.int32, 4), "int64": (tl.int64, 8)}


def bytes_of(view):
    """Those of the elements, from the first one on."""
    size = view.element_size()
    starts = [
        sum(i * s for i, s in zip(place, view.stride(), strict=True)) * size
        for place in itertools.product(*map(range, view.shape))
    ]
    return {start + byte for start in starts for byte in range(size)}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize(
    ("kind", "width"), [("load", "int8"), ("load", "int32"), ("load", "int64"), ("store", "int16"), ("atomic", "int64")]
)
def test_bounds_are_those_of_the_elements_bytes(view, kind, width):
    """A touch of any width that lies within elements which follow each other passes; one that begins a byte before, or
    ends a byte after, does not. int64 reads two elements at once: the last one begins one before the last."""
    x = VIEWS[view](torch.zeros(24, dtype=torch.int32))
    wide, size = WIDTHS[width]
    theirs = bytes_of(x)
    places = torch.arange(-16, 112)
    inside = torch.tensor([all(place + byte in theirs for byte in range(size)) for place in places.tolist()])

    def touch(wanted):
        with sanitized():
            _bytes_kernel[(1,)](x, places, wanted, N=128, KIND=kind, WIDE=wide)

    touch(inside)
    outside = len(places) - int(inside.sum())
    with pytest.raises(SanitizerError, match=rf"{kind} out of bounds of x_ptr .*: {outside} of {outside} lanes"):
        touch(~inside)


@triton.jit
def _copy_kernel(x_ptr, y_ptr, N, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    tl.store(y_ptr + lanes, tl.load(x_ptr + lanes, lanes < N), lanes < N)


def test_bytes_at_odd_addresses():
    """An address and the tag above it are told apart to the last bit."""
    memory, out = torch.arange(64, dtype=torch.int8), torch.zeros(64, dtype=torch.int8)
    with sanitized():
        _copy_kernel[(1,)](memory[1:], out[3:], 60, BLOCK=64)
    assert torch.equal(out[3:63], memory[1:61]) and not out[:3].any() and not out[63:].any()
    with pytest.raises(SanitizerError, match=r"store out of bounds of y_ptr .*: 1 of 62 lanes"), sanitized():
        _copy_kernel[(1,)](memory[1:], out[3:], 62, BLOCK=64)


# Races


@triton.jit
def _move_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    lanes = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + lanes, tl.load(x_ptr + lanes))


@pytest.mark.parametrize("order", [None, 3])
@pytest.mark.parametrize("block", [1, 2])
def test_arguments_that_share_memory(order, block):
    """What a program reads another may not write, whichever argument each knows it by: moved by no more than the
    program's own tile, or by all of it, nothing races."""
    memory = torch.zeros(40)
    for distance in range(18):
        x, y = memory[:16], memory[distance : distance + 16]
        shared = [i for i in range(distance, 16) if i // block != (i - distance) // block]
        with sanitized(order=order):
            if not shared:
                _move_kernel[(16 // block,)](x, y, BLOCK=block)
                continue
            with pytest.raises(SanitizerError, match=f"load/store race on {len(shared)} elements"):
                _move_kernel[(16 // block,)](x, y, BLOCK=block)


@triton.jit
def _tiles_kernel(y_ptr, stride, COLUMNS: tl.constexpr):
    """Each program a row of so many columns, `stride` apart."""
    tl.store(y_ptr + tl.program_id(0) * stride + tl.arange(0, COLUMNS), 1.0)


@pytest.mark.parametrize("programs", [2, 5])
def test_tiles_that_touch_and_tiles_that_overlap(programs):
    y = torch.zeros(programs * 8)
    with sanitized():
        _tiles_kernel[(programs,)](y, 8, COLUMNS=8)
    assert y.all()
    with pytest.raises(SanitizerError, match=f"store/store race on {programs - 1} elements of y_ptr"), sanitized():
        _tiles_kernel[(programs,)](y, 7, COLUMNS=8)


# What a kernel forgets to write


@pytest.mark.parametrize(
    "empty",
    [
        lambda: torch.empty(16),
        lambda: torch.empty_like(torch.ones(16)),
        lambda: torch.ones(1).new_empty(16),
        lambda: torch.empty_strided((16,), (1,)),
    ],
    ids=["empty", "empty_like", "new_empty", "empty_strided"],
)
def test_an_element_that_is_left_out(empty):
    x = torch.ones(16)
    for count in (16, 15):
        y = empty()
        with sanitized():
            _copy_kernel[(1,)](x, y, count, BLOCK=16)
        assert y.isnan().tolist() == [False] * count + [True] * (16 - count)


# int32


@triton.jit
def _int32_kernel(a_ptr, b_ptr, y_ptr, KIND: tl.constexpr, SCALAR: tl.constexpr):
    lanes = tl.arange(0, 2)
    a = tl.load(a_ptr) if SCALAR else tl.load(a_ptr + lanes)
    b = tl.load(b_ptr) if SCALAR else tl.load(b_ptr + lanes)
    y = a + b if KIND == "add" else a - b if KIND == "sub" else a * b
    tl.store(y_ptr + lanes, y)


@pytest.mark.parametrize("scalar", [False, True])
@pytest.mark.parametrize(
    ("kind", "a", "b"),
    [
        ("add", 2**31 - 2, 1),
        ("add", -(2**31) + 1, -1),
        ("sub", -(2**31) + 1, 1),
        ("sub", 2**31 - 2, -1),
        ("mul", 46340, 46340),
        ("mul", -65536, 32768),
        ("mul", 2**31 - 1, 1),
        ("mul", -(2**31), 1),
    ],
)
def test_the_first_integer_past_32_bits(kind, a, b, scalar):
    """The largest and the smallest product, sum and difference that fit do; what is one step further does not."""
    exact = {"add": int.__add__, "sub": int.__sub__, "mul": int.__mul__}[kind]

    def computed(a, b):
        y = torch.zeros(2, dtype=torch.int64)
        first, second = (torch.tensor([value] * 2, dtype=torch.int32) for value in (a, b))
        with sanitized():
            _int32_kernel[(1,)](first, second, y, KIND=kind, SCALAR=scalar)
        return y.tolist()

    assert computed(a, b) == [exact(a, b)] * 2
    if kind == "mul":
        a, b = (a + 1, b + 1) if a == b else (a, b + 1)
    else:
        b += 1 if b > 0 else -1
    value, lanes = exact(a, b), 1 if scalar else 2
    with pytest.raises(SanitizerError, match=f"int32 overflow in {kind}: {value}, in {lanes} lanes"):
        computed(a, b)


# tf32


@triton.jit
def _dot_kernel(a_ptr, b_ptr, c_ptr, PRECISION: tl.constexpr):
    square = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    tl.store(c_ptr + square, tl.dot(tl.load(a_ptr + square), tl.load(b_ptr + square), input_precision=PRECISION))


@pytest.mark.parametrize("side", [0, 1])
def test_the_last_bit_that_tf32_keeps(side):
    """Ten of the mantissa: what lies below them is cut, of either operand."""
    kept, cut = 1 + 2.0**-10, 2.0**-11
    for value, expected in ((kept, kept), (kept + cut, kept), (-kept - cut, -kept), (1 + 2.0**-23, 1.0)):
        operands = [torch.eye(16), torch.eye(16)]
        operands[side] = operands[side] * value
        c = torch.zeros(16, 16)
        for precision, told in (("tf32", expected), ("ieee", value)):
            with sanitized():
                _dot_kernel[(1,)](*operands, c, PRECISION=precision)
            assert torch.equal(c, torch.eye(16) * told)


# Grids


@pytest.mark.parametrize("axis", [1, 2])
def test_the_largest_grid(axis):
    grid = [1, 1, 1]
    for size, fits in ((65535, True), (65536, False)):
        grid[axis] = size
        launch = Launch("kernel", {}, None)
        if fits:
            launch.begin(tuple(grid))
            assert len(launch.programs) == size
        else:
            with pytest.raises(SanitizerError, match="is past CUDA's limits"):
                launch.begin(tuple(grid))


def test_the_smallest_grid():
    y = torch.zeros(8)
    with sanitized():
        _tiles_kernel[(1,)](y, 8, COLUMNS=8)
    assert y.all()
    with pytest.raises(SanitizerError, match="is empty"), sanitized():
        _tiles_kernel[(0,)](y, 8, COLUMNS=8)


# Pointers made of numbers


@triton.jit
def _follow_kernel(table_ptr, out_ptr, place):
    at = tl.load(table_ptr).to(tl.pointer_type(tl.float32)) + place
    tl.store(out_ptr, tl.load(at))


def test_the_tensors_behind_a_pointer_end_where_they_end():
    """Each is held to its own tensor, though the next one's memory begins where it ends."""
    memory, out = torch.arange(8.0), torch.zeros(1)
    first, second = memory[:4], memory[4:]
    with sanitized(behind=[first, second]):
        for tensor, begin in ((first, 0), (second, 4)):
            table = torch.tensor([tensor.data_ptr()])
            for place in (0, 3):
                _follow_kernel[(1,)](table, out, place)
                assert out.item() == begin + place
            for place in (-1, 4):
                with pytest.raises(SanitizerError, match="load out of bounds of a tensor"):
                    _follow_kernel[(1,)](table, out, place)
        for stray in (memory.data_ptr() - 1, memory.data_ptr() + 32):
            with pytest.raises(SanitizerError, match="load out of bounds of all arguments"):
                _follow_kernel[(1,)](torch.tensor([stray]), out, 0)


# Programs by turns


@triton.jit
def _looking_kernel(flag_ptr, seen_ptr, LOOKS: tl.constexpr):
    for _ in range(LOOKS):
        tl.atomic_add(flag_ptr, 0)


def test_looking_for_long_is_no_deadlock(monkeypatch):
    """It is one where none writes any more: so many looks in a row as LOOKS allows each program, and one."""
    monkeypatch.setattr("fastgpt.sanitizer.turns.Turns.LOOKS", 5)

    def run(looks, programs):
        flag, seen = torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
        with sanitized(in_turns=True):
            _looking_kernel[(programs,)](flag, seen, LOOKS=looks)

    for programs in (1, 3):
        run(5, programs)
        with pytest.raises(SanitizerError, match="wait for what none of them writes"):
            run(6, programs)
