"""Every launch of a piece of code on a card that isn't there: PyTorch's operators and Triton's kernels, in order, each
with its bytes and flops, and the part of a training step that it belongs to.

What can't be seen: kernels that cuBLAS adds to a product (split sums, their memsets), and the memset before a sum that
several blocks share.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.jit import JITFunction

from bench.gates import feign
from bench.gates.record import afresh
from bench.launches import kernels, operators
from bench.launches.parts import Sizes, part_of
from bench.work import Work


class Launch(NamedTuple):
    phase: str  # "forward", "backward", or "update"
    part: str
    name: str  # of the operator, or of the Triton kernel
    tensors: str  # its arguments' dtypes and shapes; all but these make one line of the account
    kernels: int  # that one such call launches
    work: Work  # of the call


class _Recorder(TorchDispatchMode):
    def __init__(self, sizes: Sizes):
        super().__init__()
        self.sizes, self.found = sizes, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        inside = _INSIDE if func.namespace == "fastgpt" else operators.parts(func) if func.namespace == "aten" else None
        if inside is not None:
            with self:
                return func._op_dk(inside, *args, **kwargs)
        result = func(*args, **kwargs)
        if func.namespace == "aten" and any(_on_card(value) for value in tree_leaves((args, kwargs, result))):
            self.note_operator(func, args, kwargs, result)
        return result

    def note_operator(self, func, args, kwargs, result) -> None:
        count = operators.launches(func, args, kwargs, result)
        if not count:
            return
        name = func._schema.name.removeprefix("aten::")
        tensors = [value for value in tree_leaves((args, kwargs, result)) if isinstance(value, Tensor)]
        self.note(name, args, tensors, count, operators.work_of(func, args, kwargs, result))

    def note_kernel(self, kernel: JITFunction, args: tuple, kwargs: dict) -> None:
        given = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        given = {name: kernels.described(value) for name, value in given.items()}
        tensors = {name: value for name, value in given.items() if isinstance(value, Tensor) and value.numel()}
        name = kernel.__name__.strip("_")
        self.note(name, tuple(tensors.values()), [*tensors.values()], 1, kernels.work_of(name, tensors))

    def note(self, name: str, args: Any, tensors: list[Tensor], count: int, work: Work) -> None:
        phase = "backward" if torch._C._current_graph_task_id() != -1 else "forward"
        if phase == "forward" and self.found and self.found[-1].phase != "forward":
            phase = "update"
        described = " ".join(operators.described(args))
        if phase == "update":  # over all parameters, of which more layers have more
            described = re.sub(r"\[\d+\]", "[…]", described)
        self.found.append(Launch(phase, part_of(name, phase, tensors, self.sizes), name, described, count, work))


_INSIDE = torch._C.DispatchKey.CompositeExplicitAutograd


def _on_card(value: Any) -> bool:
    return isinstance(value, Tensor) and feign.is_feigned(value)


@contextmanager
def recorded(sizes: Sizes) -> Iterator[list[Launch]]:
    """Inside a `feign.card`, fills the list with what is launched, and launches no Triton kernel."""
    recorder = _Recorder(sizes)

    def note(kernel, *args, grid, warmup, **kwargs):
        recorder.note_kernel(kernel, args, kwargs)

    with mock.patch.object(JITFunction, "run", note), afresh(), recorder:
        yield recorder.found


def step(run: Callable[[], object], sizes: Sizes) -> list[Launch]:
    """What a training step launches once the optimizer's state is there: the second one."""
    with recorded(sizes):
        run()
    with recorded(sizes) as found:
        run()
    return found
