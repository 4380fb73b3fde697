"""What PyTorch's operators launch on an NVIDIA GPU, and the bytes and flops of each, from shapes, strides and dtypes.

An operator that has no kernel of its own for a device is taken apart into those that have one (`parts`): `_to_copy` is
recorded as the `copy_` in it, and `constant_pad_nd` as a `fill_` and a `copy_`. What is left launches one kernel, but
for the few that COUNTS names. Views launch none. Bytes are each operand read once and each result written once; what
is expanded is read once.
"""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from bench import work
from bench.work import Work

_KEY = torch._C.DispatchKey

# Of operators that are no views and launch nothing all the same: what they make is not written, or they only move ends.
_SILENT = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "resize_", "set_", "_unsafe_view"}
_SILENT |= {"_reshape_alias", "is_same_size", "record_stream", "lift_fresh", "lift"}
_ONLY_WRITTEN = {"copy_", "fill_", "zero_", "arange"}  # of what they write: it is not read


@functools.cache
def is_view(op: Any) -> bool:
    returns = op._schema.returns
    aliases = [each.alias_info for each in returns]
    return bool(aliases) and all(alias is not None and not alias.is_write for alias in aliases)


@functools.cache
def parts(op: Any) -> Any:
    """The dispatch key of the kernel that calls other operators, for an operator without one for a device; or None."""
    name = op.name()
    if _has(name, "CompositeImplicitAutograd"):  # some of them alias what they are given or copy it: to, reshape
        return _KEY.CompositeImplicitAutograd
    if is_view(op) or _has(name, "CPU") or not _has(name, "CompositeExplicitAutograd"):
        return None
    if name.startswith(("aten::copy_", "aten::_foreach")):  # one kernel for all devices, which asks the device, and
        return None  # CUDA's own kernels beside one that takes them apart
    if "Scalar" in op._overloadname:  # makes a tensor of the number, which no dispatch mode is shown rightly
        return None
    return _KEY.CompositeExplicitAutograd


def _has(name: str, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(name, key)


def launches(op: Any, args: tuple, kwargs: dict, result: Any) -> int:
    """How many kernels the call launches, as PyTorch 2.11's sources have it."""
    name = op._schema.name.removeprefix("aten::")
    tensors = [each for each in tree_leaves((args, kwargs, result)) if isinstance(each, Tensor)]
    if name in _SILENT or is_view(op) or not any(t.numel() for t in tensors):
        return 0
    return COUNTS[name](args, result) if name in COUNTS else 1


# Operators of many tensors: multi_tensor_apply gives a kernel so many tensors and blocks of so many elements, by the
# number of lists that it walks over (aten/src/ATen/native/cuda/MultiTensorApply.cuh).
_TENSORS_A_LAUNCH = {1: 110, 2: 64, 3: 48, 4: 36}
_BLOCKS_A_LAUNCH, _ELEMENTS_A_BLOCK = 320, 65536


def multi_tensor(tensors: list[Tensor], lists: int) -> int:
    """Launches of one operator over `lists` lists of such tensors."""
    most, count, held, blocks = _TENSORS_A_LAUNCH[lists], 0, 0, 0
    for tensor in tensors:
        held += 1
        chunks = -(-tensor.numel() // _ELEMENTS_A_BLOCK)
        for chunk in range(chunks):
            blocks += 1
            ends = chunk == chunks - 1
            if (held == most and ends) or blocks == _BLOCKS_A_LAUNCH:
                count, blocks, held = count + 1, 0, 0 if ends else 1
    return count + (blocks > 0)


COUNTS: dict[str, Callable[[tuple, Any], int]] = {
    "_fused_adamw_": lambda args, result: multi_tensor(args[0], 4),
    "_foreach_add_": lambda args, result: multi_tensor(args[0], 1),
    "_foreach_sub_": lambda args, result: multi_tensor(args[0], 2),
    "_foreach_mul_": lambda args, result: multi_tensor(args[0], 1),
    "_foreach_norm": lambda args, result: 2 + multi_tensor(args[0], 1),  # zeros for the parts, and their sum
    "cat": lambda args, result: -(-len(args[0]) // 128),
    "native_layer_norm_backward": lambda args, result: 2,  # dx; dweight and dbias
    "nll_loss_backward": lambda args, result: 2,  # zeros; one number a row
    # Radix sorts, about: an arange, a histogram, its sums and a pass for each 8 bits of a 64-bit key; of an embedding's
    # keys only the 16 bits that a vocabulary needs, then runs of equal keys are found, counted and added up.
    "sort": lambda args, result: 12,
    # Of few long rows, about: two for each 8 bits of the k-th value, what counts those above it, two scans, the
    # gathering and a sort of the k (aten/src/ATen/native/cuda/TensorTopK.cu).
    "topk": lambda args, result: 16,
    "embedding_dense_backward": lambda args, result: 15 if args[1].numel() > 3072 else 2,
}


def memory(tensor: Tensor) -> int:
    """Bytes; an axis along which it is expanded is there once."""
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return tensor.element_size() * math.prod(size for size, stride in sizes if stride or size == 0)


def work_of(op: Any, args: tuple, kwargs: dict, result: Any) -> Work:
    name = op._schema.name.removeprefix("aten::")
    if name in _WORK:
        return _WORK[name](args, result)
    given = dict(zip((each.name for each in op._schema.arguments), args, strict=False)) | kwargs
    moved, written = 0, set()
    for argument in op._schema.arguments:
        writes = argument.alias_info is not None and argument.alias_info.is_write
        tensors = [each for each in tree_leaves(given.get(argument.name)) if isinstance(each, Tensor)]
        reads = not writes or not (argument.kwarg_only or name in _ONLY_WRITTEN)
        moved += sum(memory(each) for each in tensors) * (writes + reads)
        written |= {id(each) for each in tensors if writes}
    results = [each for each in tree_leaves(result) if isinstance(each, Tensor)]
    moved += sum(memory(each) for each in results if id(each) not in written)
    return Work(_flops(name, args), moved)


def _flops(name: str, args: tuple) -> int:
    if name not in ("mm", "addmm", "bmm"):
        return 0
    a, b = args[1:3] if name == "addmm" else args[:2]
    return 2 * a.numel() * b.shape[-1]


def _attention(backward: bool, q: Tensor) -> Work:
    return (work.attention_bwd if backward else work.attention_fwd)(*q.shape, q.element_size())


def _gathered(args: tuple, result: Tensor) -> Work:
    """Rows of a table, of which only those are read."""
    return Work(0, 2 * memory(result) + memory(args[2]))


def _scattered(args: tuple, result: Tensor) -> Work:
    return Work(0, memory(args[0]) + memory(args[1]) + memory(result))


def _logits_gradient(args: tuple, result: Tensor) -> Work:
    """nll_loss_backward: the zeros, and one number a row."""
    return Work(0, memory(result) + 2 * memory(args[2]))


_WORK: dict[str, Callable[[tuple, Any], Work]] = {
    "_scaled_dot_product_cudnn_attention": lambda args, result: _attention(False, args[0]),
    "_scaled_dot_product_flash_attention": lambda args, result: _attention(False, args[0]),
    "_scaled_dot_product_cudnn_attention_backward": lambda args, result: _attention(True, args[1]),
    "_scaled_dot_product_flash_attention_backward": lambda args, result: _attention(True, args[1]),
    "index_select": _gathered,
    "embedding_dense_backward": _scattered,
    "nll_loss_forward": lambda args, result: Work(0, 3 * memory(args[1])),  # one logit a row
    "nll_loss_backward": _logits_gradient,
    # parameter, gradient and two moments read; all but the gradient written
    "_fused_adamw_": lambda args, result: Work(0, sum(7 * memory(each) for each in args[0])),
}


def described(values: Any) -> Iterator[str]:
    """The tensors among an operator's arguments, in words; of a list what one of its kind is."""
    for value in values:
        if isinstance(value, Tensor):
            yield _tensor(value)
        elif isinstance(value, list | tuple) and value and isinstance(value[0], Tensor):
            yield f"{_tensor(value[0])}…" if len({each.shape for each in value}) == 1 else f"{_dtype(value[0])}[…]"


def _tensor(tensor: Tensor) -> str:
    strides = "" if tensor.is_contiguous() else " strided" if 0 not in tensor.stride() else " expanded"
    if tensor.dim() == 2 and tensor.t().is_contiguous() and not tensor.is_contiguous():
        strides = "ᵀ"
    return f"{_dtype(tensor)}[{','.join(map(str, tensor.shape))}]{strides}"


def _dtype(tensor: Tensor) -> str:
    names = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32", torch.int64: "i64", torch.bool: "bool"}
    return names.get(tensor.dtype, str(tensor.dtype).removeprefix("torch."))
