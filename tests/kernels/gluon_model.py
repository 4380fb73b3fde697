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
import random
import threading
import types
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from unittest import mock

import torch
from triton.experimental.gluon._runtime import GluonJITFunction
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.core import constexpr
from triton.runtime.jit import JITFunction

from fastgpt.kernels.hopper import attention, linear_gelu_tiles, pipeline
from fastgpt.kernels.hopper.pipeline import Map


class Barrier:
    def __init__(self):
        self.seen = False  # by the copy engine

    def init(self, count):
        self.count, self.left, self.bytes, self.phase = count, count, 0, 0

    def arrive(self, count=1):
        self.left -= count
        assert self.left >= 0, "more arrive at a barrier than it counts"
        self.settle()

    def settle(self):
        if self.left == 0 and self.bytes == 0:
            self.left, self.phase = self.count, self.phase ^ 1

    def done(self, parity):
        return self.phase != parity


class Tile:
    def __init__(self, program, shape, dtype):
        self.program = program
        self.data = torch.full(shape, float("nan"), dtype=dtype)
        self.readers = 0  # products and copies under way
        self.incoming = False
        self.unfenced = None  # the partition that wrote it last, until its fence

    def read(self):
        assert not self.incoming, "a tile is read while a copy into it is under way"
        return self.data

    def read_asynchronously(self):
        assert self.unfenced is None, "what threads wrote is read by the copy engine or the tensor core with no fence"
        self.read()
        self.readers += 1

    def written(self):
        assert self.readers == 0, "a tile is overwritten while it is read"
        assert not self.incoming, "a tile is written twice at once"


class View:
    """Of a tile, as `index`, `reshape` and `permute` make it."""

    def __init__(self, tile, seen=lambda data: data):
        self.tile, self._seen = tile, seen

    def reshape(self, shape):
        return View(self.tile, lambda data: self._seen(data).reshape(shape))

    def permute(self, order):
        return View(self.tile, lambda data: self._seen(data).permute(order))

    def values(self):
        return self._seen(self.tile.data)

    def load(self, layout):
        self.tile.program.pause()
        return self._seen(self.tile.read())

    def store(self, value):
        self.tile.program.store_tile(self, value)


class Product:
    """A wgmma under way."""

    def __init__(self, a, b, acc, use_acc):
        self.a, self.b, self.acc, self.use_acc, self.value = a, b, acc, use_acc, None
        self.tiles = [each.tile for each in (a, b) if isinstance(each, View)]
        for tile in self.tiles:
            tile.read_asynchronously()

    def finish(self):
        a, b = (each.values() if isinstance(each, View) else each for each in (self.a, self.b))
        acc = self.acc.value if isinstance(self.acc, Product) else self.acc
        self.value = a.float() @ b.float() + (acc if self.use_acc else 0.0)
        for tile in self.tiles:
            tile.readers -= 1


class Pointer:
    def __init__(self, flat, places=0):
        self.flat, self.places = flat, places

    def __add__(self, more):
        return Pointer(self.flat, self.places + more)

    def at(self, mask):
        places = self.places if mask is None else self.places[mask]
        assert places.min() >= 0 and places.max() < len(self.flat), "an address outside of its tensor"
        return places


class Descriptor:
    def __init__(self, given, block):
        self.dtype, self.layout, block = given.base.dtype, None, list(block)
        self.global_ = given.base.as_strided(given.shape, given.strides)
        self.block_type = SimpleNamespace(shape=block, nbytes=torch.Size(block).numel() * self.dtype.itemsize)

    def region(self, corner):
        """The part of a block that lies in the tensor: there, and in the block."""
        spans = list(zip(corner, self.block_type.shape, self.global_.shape, strict=True))
        there = tuple(slice(max(0, c), max(0, min(c + n, size))) for c, n, size in spans)
        return there, tuple(slice(0, s.stop - s.start if s.stop > s.start else 0) for s in there)


class Partition:
    def __init__(self, name, run):
        self.name, self.run = name, run
        self.turn, self.blocked = threading.Semaphore(0), None
        self.products, self.stores, self.alive, self.error = [], [], True, None


class Stop(BaseException):
    """Ends a thread whose program has failed elsewhere."""


class Program:
    """One program of a grid: its memory, its partitions, and who goes next."""

    def __init__(self, number, programs, seed):
        self.number, self.programs, self.random = number, programs, random.Random(f"{seed} {number}")
        self.under_way, self.tiles, self.barriers = [], [], []
        self.back, self.stopped = threading.Semaphore(0), False
        self.current = Partition("before", None)

    # Partitions in turns

    def pause(self, until=None):
        """Others may go on here; `until` is what this partition waits for."""
        me = self.current
        if me.run is None:
            assert until is None or until(), "a wait before there is anyone to wait for"
            return
        me.blocked = until
        self.back.release()
        me.turn.acquire()
        if self.stopped:
            raise Stop
        me.blocked = None

    def specialize(self, functions, warps, registers):
        partitions = [Partition(function.__name__, (function, args)) for function, args in functions]
        threads = [threading.Thread(target=self._thread, args=(each,), daemon=True) for each in partitions]
        weights = {id(each): self.random.choice((0.05, 0.3, 1, 5)) for each in partitions}
        for thread in threads:
            thread.start()
        try:
            while any(each.alive for each in partitions):
                able = [p for p in partitions if p.alive and (p.blocked is None or p.blocked())]
                if self.under_way and (not able or self.random.random() < 0.2):
                    self.under_way.pop(self.random.randrange(len(self.under_way)))()
                    continue
                assert able, "a hang: " + ", ".join(each.name for each in partitions if each.alive)
                self.current = self.random.choices(able, [weights[id(each)] for each in able])[0]
                self.current.turn.release()
                self.back.acquire()
                assert self.current.error is None, f"{self.current.name}: {self.current.error!r}"
            assert not self.under_way, "a program ends while a copy of its memory is under way"
        finally:
            self.stopped = True
            for each in partitions:
                each.turn.release()
            for thread in threads:
                thread.join()

    def _thread(self, me):
        me.turn.acquire()
        try:
            if not self.stopped:
                me.run[0](*me.run[1])
        except Stop:
            return
        except Exception as error:
            me.error = error
        me.alive = False
        self.back.release()

    # What kernels call

    def allocate(self, dtype, shape, layout):
        if dtype is torch.int64:
            found = [Barrier() for _ in range(shape[0])]
            self.barriers += found
            return SimpleNamespace(index=lambda i: found[i])
        tiles = [Tile(self, shape[1:], dtype) for _ in range(shape[0])]
        self.tiles += tiles
        return SimpleNamespace(index=lambda i: View(tiles[i]), dtype=dtype)

    def fence(self):
        for each in self.tiles:
            if each.unfenced is self.current:
                each.unfenced = None
        for each in self.barriers:
            each.seen = True
        self.pause()

    def store_tile(self, view, value):
        self.pause()
        view.tile.written()
        view.tile.data = value.reshape(view.tile.data.shape).to(view.tile.data.dtype)
        view.tile.unfenced = self.current

    def expect(self, bar, count, pred=True):
        if pred:
            assert bar.seen, "a barrier that the copy engine may not see yet"
            bar.bytes += count
            bar.arrive()
            self.pause()

    def arrive(self, bar, count=1):
        self.pause()
        bar.arrive(count)
        self.pause()

    def wait(self, bar, parity, pred=True):
        self.pause((lambda: bar.done(parity)) if pred else None)

    def load(self, desc, corner, bar, view, pred=True):
        if not pred:
            return
        tile = view.tile
        tile.written()
        tile.incoming, tile.unfenced = True, None
        tile.data = torch.full_like(tile.data, float("nan"))

        def land():
            assert tile.readers == 0, "a tile is overwritten while it is read"
            there, here = desc.region(corner)
            block = torch.zeros(desc.block_type.shape, dtype=desc.dtype)
            block[here] = desc.global_[there]
            tile.data, tile.incoming = block.reshape(tile.data.shape), False
            bar.bytes -= desc.block_type.nbytes
            assert bar.bytes >= 0, "a copy of more bytes than its barrier was told"
            bar.settle()

        self.under_way.append(land)
        self.pause()

    def store(self, desc, corner, view):
        view.tile.read_asynchronously()
        operation = SimpleNamespace(done=False)

        def leave():
            there, here = desc.region(corner)
            desc.global_[there] = view.tile.data.reshape(desc.block_type.shape)[here]
            view.tile.readers -= 1
            operation.done = True

        self.current.stores.append(operation)
        self.under_way.append(leave)
        self.pause()

    def store_wait(self, pendings):
        stores = self.current.stores
        older = stores[: len(stores) - pendings]
        self.pause(lambda: all(each.done for each in older))

    def mma(self, a, b, acc, use_acc=True, is_async=False):
        product = Product(a, b, acc, use_acc)
        self.current.products.append(product)
        self.pause()
        return product

    def mma_wait(self, outstanding, deps):
        self.pause()
        products = self.current.products
        while len(products) > outstanding:
            products.pop(0).finish()
        found = tuple(d.value if isinstance(d, Product) and d.value is not None else d for d in deps)
        return found if len(found) > 1 else found[0]


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
        load=lambda pointer: pointer.flat[pointer.at(None)],
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
        stack.enter_context(mock.patch.dict(pipeline._COMPILED, clear=True))
        stack.enter_context(mock.patch.object(JITFunction, "run", run))
        for module in (attention, linear_gelu_tiles):
            stack.enter_context(mock.patch.object(module, "multiprocessors", lambda device: multiprocessors))
        yield
