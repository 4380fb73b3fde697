"""What Hopper's kernels share: rings of barriers in shared memory, and what the copy engine (TMA) knows of a tensor.

A tile goes from global to shared memory by one instruction of one thread; a barrier counts its bytes. A ring of STAGES
tiles has two barriers a slot: `full`, on which consumers wait for the bytes, and `empty`, on which the producer waits
until all consumers have read the slot. A wait names the parity of the phase that it wants done: a consumer's begins at
0 and flips where the ring wraps; a producer's is the other one, so that slots count as free at first.

These kernels are in Gluon (triton.experimental.gluon), which may change with every Triton: fastgpt.ops.hopper says
which Tritons are known, and imports this folder on no other.
"""

import functools

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

barrier = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier  # of a warpgroup; 3.6 named it otherwise

_DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


@gluon.jit
def next_slot(stage, phase, STAGES: gl.constexpr):
    """The ring's next slot, and the parity of its phase, which flips where the ring wraps."""
    stage += 1
    wrap = stage == STAGES
    return gl.where(wrap, 0, stage), gl.where(wrap, phase ^ 1, phase)


@gluon.jit
def barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    """COUNT barriers in shared memory, each done when ARRIVALS have arrived and all announced bytes are there."""
    found = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(found.index(i), count=ARRIVALS)
    return found


@functools.cache
def _layout(block: tuple[int, ...], dtype: torch.dtype) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for(list(block), _DTYPES[dtype])


def descriptor(base: torch.Tensor, shape: list[int], strides: list[int], block: tuple[int, ...]) -> TensorDescriptor:
    """Of tiles of shape `block` in the tensor that begins where `base` does. What lies past `shape` is read as zeros
    and not written. The address and all strides but the last, which is 1, are multiples of 16 bytes."""
    return TensorDescriptor(base, shape, strides, list(block), _layout(block, base.dtype))


@functools.cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
