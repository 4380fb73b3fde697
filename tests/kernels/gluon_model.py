"""Gluon kernels run in Python: their own source, with what a card does at the same time done in random orders.

A kernel's partitions are threads of which one runs at a time; after every step that others could notice a random one
goes on. Copies by the copy engine happen at a random time after they were asked for, products of a warpgroup are done
when they are waited for. A failure is

- a hang: nobody can go on;
- a tile that is written while a product or a copy still reads it, or read while a copy is under way into it;
- a tile or barrier that threads wrote and the copy engine or the tensor core reads with no fence between;
- a barrier at which more arrive than it counts, a copy of other bytes than the barrier was told, an address outside.

Numbers are computed as well, so that what is read too early or too late shows in the results: memory that nobody wrote
is NaN. What a model can't show is what the compiler makes of it: the order of instructions is the gate's.
"""

import functools
import types
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from unittest import mock

import torch
from triton.experimental.gluon._runtime import GluonJITFunction
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.core import constexpr
from triton.runtime.jit import JITFunction

from fastgpt.kernels.hopper import attention, attention_backward, linear_gelu_tiles, pipeline
from fastgpt.kernels.hopper.pipeline import Map
from tests.kernels.gluon_program import Descriptor, Pointer, Program


def _either(pick, of_tensors):
    def choose(a, b, propagate_nan=None):
        if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
            a, b = (x if isinstance(x, torch.Tensor) else torch.tensor(x) for x in (a, b))
            return of_tensors(a, b)
        return pick(a, b)

    return choose


def _where(condition, a, b):
    return torch.where(condition, a, b) if isinstance(condition, torch.Tensor) else (a if condition else b)


def _assembly(text, constraints, args, dtype, is_pure, pack):
    known = {
        "ex2.approx.ftz.f32": torch.exp2,
        "rcp.approx.ftz.f32": torch.reciprocal,
        "cvt.rn.bf16x2.f32": lambda x: x.to(torch.bfloat16),
        "cvt.rn.f16x2.f32": lambda x: x.to(torch.float16),
    }
    return known[text.split()[0]](args[0])


def _load(pointer, mask=None, other=0.0):
    if mask is None:
        return pointer.flat[pointer.at(None)]
    found = torch.full(mask.shape, other, dtype=pointer.flat.dtype)
    found[mask] = pointer.flat[pointer.at(mask)]
    return found


def _store(pointer, value, mask=None):
    value = value if mask is None else value[mask]
    if value.numel():
        pointer.flat[pointer.at(mask)] = value.to(pointer.flat.dtype)


def _names(program):
    """What a kernel's globals stand for."""
    nothing = lambda *args, **kwargs: None  # noqa: E731
    layouts = ("NVMMADistributedLayout", "DotOperandLayout", "SliceLayout", "BlockedLayout")
    gl = SimpleNamespace(
        **dict.fromkeys(layouts, nothing),
        bfloat16=torch.bfloat16,
        float16=torch.float16,
        float32=torch.float32,
        int64=torch.int64,
        program_id=lambda axis: program.number,
        num_programs=lambda axis: program.programs,
        static_range=range,
        to_tensor=lambda value: value,
        cdiv=lambda a, b: -(-a // b),
        where=_where,
        minimum=_either(min, torch.minimum),
        maximum=_either(max, torch.maximum),
        max=lambda x, axis: x.amax(axis),
        sum=lambda x, axis: x.sum(axis),
        exp2=torch.exp2,
        log2=torch.log2,
        abs=torch.abs,
        arange=lambda begin, end, layout=None: torch.arange(begin, end),
        zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype),
        full=lambda shape, value, dtype, layout: torch.full(shape, value, dtype=dtype),
        expand_dims=lambda x, axis: x.unsqueeze(axis),
        convert_layout=lambda x, layout, assert_trivial=False: x,
        split=lambda x: (x[..., 0], x[..., 1]),
        load=_load,
        store=_store,
        inline_asm_elementwise=_assembly,
        allocate_shared_memory=program.allocate,
        warp_specialize=program.specialize,
    )
    return {
        "gl": gl,
        "mbarrier": SimpleNamespace(
            MBarrierLayout=nothing,
            init=lambda bar, count: bar.init(count),
            expect=program.expect,
            arrive=program.arrive,
            wait=program.wait,
        ),
        "tma": SimpleNamespace(
            async_copy_global_to_shared=program.load,
            async_copy_shared_to_global=program.store,
            store_wait=program.store_wait,
        ),
        "fence_async_shared": program.fence,
        "barrier": lambda: None,  # of the warps of a partition, which the model has as one
        "warpgroup_mma": program.mma,
        "warpgroup_mma_wait": program.mma_wait,
    }


def _python(function, names, made):
    """A Gluon function, and all that it calls, as Python runs them."""
    if function in made:
        return made[function]
    inside: dict = {}
    made[function] = types.FunctionType(function.fn.__code__, inside, function.__name__, function.fn.__defaults__)
    for name, value in function.fn.__globals__.items():
        if isinstance(value, GluonJITFunction):
            value = _python(value, names, made)
        inside[name] = value.value if isinstance(value, constexpr) else value
    inside.update({name: value for name, value in names.items() if name in inside})
    return made[function]


def _seen(value):
    if isinstance(value, TensorDescriptor):
        return Descriptor(value, value.block_shape)
    if isinstance(value, Map):
        return Descriptor(value, value.block)
    return Pointer(value.view(-1)) if isinstance(value, torch.Tensor) else value


class Again:
    """In place of a compiled kernel, which is launched with all arguments in a row."""

    def __init__(self, run):
        self.run = run

    def __getitem__(self, grid):
        return functools.partial(self.run, grid=grid)


@contextmanager
def modelled(seed=0, multiprocessors=2):
    """Inside, launches of Gluon kernels run here, on CPU tensors, for a card of so many multiprocessors."""

    def run(kernel, *args, grid, warmup=False, **kwargs):
        assert isinstance(kernel, GluonJITFunction), kernel
        given = {name: value for name, value in kwargs.items() if name in kernel.arg_names}
        for number in range(grid[0]):
            _python(kernel, _names(Program(number, grid[0], seed)), {})(*map(_seen, args), **given)
        return Again(functools.partial(run, kernel))

    with ExitStack() as stack:
        stack.enter_context(mock.patch.dict(pipeline.COMPILED, clear=True))
        stack.enter_context(mock.patch.object(JITFunction, "run", run))
        for module in (attention, attention_backward, linear_gelu_tiles):
            stack.enter_context(mock.patch.object(module, "multiprocessors", lambda device: multiprocessors))
        yield
