"""What the sanitizer finds in memory: lanes out of bounds, races, and what a kernel forgets to write."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not to be had on this platform")

import triton
import triton.language as tl

from fastgpt.kernels import layernorm
from fastgpt.sanitizer import SanitizerError, sanitized

pytestmark = pytest.mark.interpreter


@pytest.fixture(autouse=True)
def _sanitized():
    """In place of conftest's: these tests say where it begins and ends."""


def launch(kernel, grid, *args, order=None, **kwargs):
    with sanitized(order=order):
        kernel[grid](*args, **kwargs)


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
    monkeypatch.setattr("fastgpt.sanitizer.launch._FOLD_LANES", 2)
    test_races_are_found("load/store", 4, None)
    test_programs_that_keep_apart_do_not_race("own", None)


# What a kernel forgets to write


@triton.jit
def _copy_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(x_ptr + i))


def test_what_launchers_allocate_is_poisoned():
    """By torch, as conftest.py turns deterministic algorithms on."""
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        x, weight = torch.randn(5, 48).to(dtype), torch.randn(48)
        outputs = layernorm.layer_norm_fwd_outputs(x, x, weight, weight, weight, None, 1e-5, 0.1, dtype)
        outputs += layernorm.layer_norm_bwd_outputs(x, x, x, weight, outputs[2], None, 0.1, dtype, True)
        assert all(t.numel() and t.isnan().all() for t in outputs)
    y = torch.empty(2**17)
    launch(_copy_kernel, (1,), torch.randn(2**17), y, BLOCK=65536)
    assert y[:65536].isfinite().all() and y[65536:].isnan().all()
