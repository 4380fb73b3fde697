"""A launch that goes past Triton's questions must be the launch that Triton would have made."""

import inspect
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not to be had on this platform")

from fastgpt.kernels import launch


class Kernel:
    """Stands for a compiled kernel: what Triton is asked, and what is launched, with all arguments by place."""

    def __init__(self):
        self.signature = inspect.signature(lambda x_ptr, y_ptr, rows, eps, FLAG, BLOCK, more_ptr=None, WIDE=2: None)
        self.asked, self.launched = [], []

    def __getitem__(self, grid):
        return lambda *args, **named: self.compile(grid, args, named)

    def compile(self, grid, args, named):
        self.asked.append((grid, args, named))
        return Compiled(self)


class Compiled:
    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return lambda *args: self.kernel.launched.append((grid, args))


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setattr(launch, "COMPILED", {})
    return Kernel()


X = torch.zeros(64)
CALL = dict(grid=(3, 2), args=(X, torch.zeros(4), 7, 0.5), named=dict(FLAG=True, BLOCK=16, num_warps=4))


def made(kernel, grid=(3, 2), args=CALL["args"], **named):
    """How often Triton was asked, after a launch as CALL and then one with these changes."""
    launch.launch(kernel, CALL["grid"], *CALL["args"], **CALL["named"])
    launch.launch(kernel, grid, *args, **(CALL["named"] | named))
    return len(kernel.asked)


def test_the_second_launch_has_its_own_grid_tensors_and_floats(kernel):
    x, y = torch.ones(64), torch.ones(4)
    assert made(kernel, (9,), (x, y, 7, 0.25)) == 1
    ((grid, args),) = kernel.launched
    assert grid[:3] == (9, 1, 1) and args[0] is x and args[1] is y and args[2:] == (7, 0.25, True, 16, None, 2)


def test_arguments_by_name_are_put_in_place(kernel):
    """In the order of the kernel's own, whatever order they came in; of the options none is an argument."""
    named = dict(BLOCK=16, num_warps=4, eps=0.5, rows=7, FLAG=True, y_ptr=CALL["args"][1])
    for eps in (0.5, 0.125):
        launch.launch(kernel, (1,), X, **(named | dict(eps=eps)))
    ((_, args),) = kernel.launched
    assert args[0] is X and args[1] is named["y_ptr"] and args[2:] == (7, 0.125, True, 16, None, 2)


@pytest.mark.parametrize(
    "changes",
    [
        dict(args=(X.half(), *CALL["args"][1:])),
        dict(args=(X[1:], *CALL["args"][1:])),  # begins 4 bytes past a multiple of 16
        dict(args=(X, None, 7, 0.5)),
        dict(args=(X, CALL["args"][1], 16, 0.5)),
        dict(args=(X, CALL["args"][1], 1, 0.5)),
        dict(args=(X, CALL["args"][1], 7, 1)),
        dict(BLOCK=32),
        dict(FLAG=False),
        dict(num_warps=8),
        dict(maxnreg=64),
    ],
    ids=lambda changes: "-".join(changes),
)
def test_what_triton_may_compile_anew_it_is_asked(kernel, changes):
    assert made(kernel, **changes) == 2 and kernel.launched == []


def test_which_tensor_begins_elsewhere_counts(kernel):
    """One past a multiple of 16 bytes is not the other."""
    args = (X[1:], X, 7, 0.5), (X, X[1:], 7, 0.5)
    for each in args:
        launch.launch(kernel, (1,), *each, **CALL["named"])
    assert len(kernel.asked) == 2


def test_another_device_is_another(kernel):
    """What Triton compiled was loaded onto one."""
    for device in (0, 1):
        there = SimpleNamespace(dtype=torch.float32, data_ptr=lambda: 512, get_device=lambda device=device: device)
        launch.launch(kernel, (1,), there, there, 7, 0.5, **CALL["named"])
    assert len(kernel.asked) == 2


def test_another_kernel_is_another(kernel):
    other = Kernel()
    for each in (kernel, other, kernel, other):
        launch.launch(each, (1,), *CALL["args"], **CALL["named"])
    assert len(kernel.asked) == len(other.asked) == len(kernel.launched) == len(other.launched) == 1


def test_what_is_only_recorded_is_not_kept(kernel, monkeypatch):
    monkeypatch.setattr(kernel, "compile", lambda *call: kernel.asked.append(call))
    assert made(kernel) == 2


def test_what_is_kept_has_an_end(kernel, monkeypatch):
    monkeypatch.setattr(launch, "_MOST", 4)
    for rows in range(2, 13):
        launch.launch(kernel, (1,), X, X, rows, 0.5, **CALL["named"])
        assert len(launch.COMPILED) <= 4
