"""One program of a Gluon kernel: its memory, its partitions, and who goes next. gluon_model.py says what it is for."""

import random
import threading
from types import SimpleNamespace

import torch


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
    """Of a tile, as `index`, `reshape`, `permute` and `slice` make it."""

    def __init__(self, tile, seen=lambda data: data):
        self.tile, self._seen = tile, seen

    def reshape(self, shape):
        return View(self.tile, lambda data: self._seen(data).reshape(shape))

    def permute(self, order):
        return View(self.tile, lambda data: self._seen(data).permute(order))

    def slice(self, begin, count):
        return View(self.tile, lambda data: self._seen(data)[begin : begin + count])

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
        inside = places.numel() == 0 or (places.min() >= 0 and places.max() < len(self.flat))
        assert inside, "an address outside of its tensor"
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
