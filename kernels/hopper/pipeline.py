"""What Hopper's kernels share: rings of barriers in shared memory, and what the copy engine (TMA) knows of a tensor.

A tile goes from global to shared memory by one instruction of one thread; a barrier counts its bytes. A ring of STAGES
tiles has two barriers a slot: `full`, on which consumers wait for the bytes, and `empty`, on which the producer waits
until all consumers have read the slot. A wait names the parity of the phase that it wants done: a consumer's begins at
0 and flips where the ring wraps; a producer's is the other one, so that slots count as free at first.

These kernels are in Gluon (triton.experimental.gluon), which may change with every Triton: fastgpt.ops.hopper says
which Tritons are known, and imports this folder on no other.
"""

import functools
from typing import Any

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..launch import COMPILED

barrier = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier  # of a warpgroup; 3.6 named it otherwise

_DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.float32: gl.float32}


@gluon.jit
def next_slot(stage, phase, STAGES: gl.constexpr):
    """The ring's next slot, and the parity of its phase, which flips where the ring wraps."""
    stage += 1
    wrap = stage == STAGES
    return gl.where(wrap, 0, stage), gl.where(wrap, phase ^ 1, phase)


@gluon.jit
def paired_tiles(item, tiles):
    """Work item -> plane (batch and head), its first tile, number of tiles: n - 1 - i, and then i."""
    pairs = (tiles + 1) // 2
    plane = item // pairs
    pair = item - plane * pairs
    tile = tiles - 1 - pair
    return plane, tile, gl.where(tile == pair, 1, 2)


@gluon.jit
def barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    """COUNT barriers in shared memory, each done when ARRIVALS have arrived and all announced bytes are there."""
    found = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(found.index(i), count=ARRIVALS)
    return found


@gluon.jit
def store_sums(
    sums_ptr,  # (B, tiles, 3, H, D): of a tile's queries, keys, values
    batch, tile, tiles, part, heads, head, values, scale,
    D: gl.constexpr, layout: gl.constexpr,
):  # fmt: skip
    """Write scale times the sums of the columns of values [64, D], of a tile that is there; what lies past the last
    token is zero. Places are 32 bits: gradients of so many tiles fit no card."""
    cols = gl.arange(0, D, gl.SliceLayout(0, layout))
    place = (((batch * tiles + tile) * 3 + part) * heads + head) * D
    gl.store(sums_ptr + place + cols, gl.sum(values, 0) * scale, mask=(cols < D) & (tile < tiles))


class Part:
    """A tensor from one of its elements on, for a Map: a view of it would cost several µs a launch."""

    __slots__ = ("begin", "device", "dtype", "whole")

    def __init__(self, whole: torch.Tensor, begin: int):
        self.whole, self.begin, self.dtype, self.device = whole, begin, whole.dtype, whole.device

    def data_ptr(self) -> int:
        return self.whole.data_ptr() + self.begin * self.dtype.itemsize

    def as_strided(self, shape: list[int], strides: list[int]) -> torch.Tensor:
        return self.whole.as_strided(shape, strides, self.whole.storage_offset() + self.begin)


class Map:
    """Of a tensor what Triton makes a tensor map of, for tiles of shape `block`. What lies past `shape` is read as
    zeros and not written. The address and all strides but the last, which is 1, are multiples of 16 bytes."""

    __slots__ = ("base", "block", "shape", "strides")
    padding = "zero"
    round_f32_to_tf32 = False

    def __init__(self, base: torch.Tensor | Part, shape: list[int], strides: list[int], block: tuple[int, ...]):
        self.base, self.shape, self.strides, self.block = base, shape, strides, block

    def checked(self) -> TensorDescriptor:
        """Triton's own, which checks what it is given."""
        base = self.base.as_strided(self.shape, self.strides) if isinstance(self.base, Part) else self.base
        return TensorDescriptor(base, self.shape, self.strides, list(self.block), self._layout())

    def _layout(self) -> gl.NVMMASharedLayout:
        return gl.NVMMASharedLayout.get_default_for(list(self.block), _DTYPES[self.base.dtype])


def launch(
    kernel: Any, key: tuple, programs: int, maps: list[Map], rest: tuple, constants: dict[str, Any], **options: Any
) -> None:
    """kernel[(programs,)](*maps, *rest, **constants, **options), but what Triton asks of each argument of each launch
    (some 50 µs for four tensor maps) is asked of a key's first one alone.

    key: all that a compiled kernel depends on beside dtypes and card: its name, whether pointers divide by 16, numbers
    that are specialised, constants.
    """
    key = (*key, maps[0].base.dtype, maps[0].base.device)
    found = COMPILED.get(key)
    if found is not None:
        found[1][(programs, 1, 1)](*maps, *rest, *constants.values())
        return
    compiled = kernel[(programs,)](*(each.checked() for each in maps), *rest, **constants, **options)
    if compiled is not None:  # as where launches are only recorded
        COMPILED[key] = kernel, compiled, []


@functools.cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
