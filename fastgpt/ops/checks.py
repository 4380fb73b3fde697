"""Checks of fastgpt.ops' arguments: a message names the function, the argument, what was given and what is needed."""

import math

import torch
from torch import Tensor

from fastgpt.ops.transforms import unwrapped

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.int32, torch.int64)


def names(dtypes) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def every(name, dtypes, device, tensors):
    for label, tensor in tensors.items():
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: {label} is a {type(tensor).__name__}, not a tensor")
        if tensor.layout != torch.strided or tensor.is_nested:
            kind = "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")
            raise TypeError(f"{name}: {label} is a {kind} tensor, not a dense one")
        if tensor.dtype not in dtypes:
            raise TypeError(f"{name}: {label} is {tensor.dtype}, not one of {names(dtypes)}")
        if tensor.device != device:
            raise ValueError(f"{name}: {label} is on {tensor.device}, the others on {device}")


def floats(name, **tensors):
    """All floating-point tensors, on the device of the first; None is passed over."""
    label, first = next(iter(tensors.items()))
    if first is None:
        raise TypeError(f"{name}: {label} is None, not a tensor")
    every(name, FLOATS, getattr(first, "device", None), tensors)


def gathered(name, **tensors):
    """None spread over processes: a matmul of DTensors is a collective, which chunks of rows would repeat."""
    for label, tensor in tensors.items():
        if type(tensor).__name__ == "DTensor":
            way = f"call the model that fully_shard wraps, which gathers it, or give {label}.full_tensor()"
            raise TypeError(f"{name}: {label} is a DTensor of shape {tuple(tensor.shape)} over processes; {way}")


def integers(name, device, **tensors):
    every(name, INTEGERS, device, tensors)


def one_dtype(name, **tensors):
    """One dtype for the operands of a matmul, unless autocast chooses it."""
    (first_label, first), *others = ((label, t) for label, t in tensors.items() if t is not None)
    if torch.is_autocast_enabled(first.device.type):
        return
    for label, tensor in others:
        if tensor.dtype != first.dtype:
            raise TypeError(f"{name}: {first_label} is {first.dtype} but {label} is {tensor.dtype}")


def shape(name, label, tensor, shape):
    if tensor is not None and tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name}: {label} has shape {tuple(tensor.shape)}, not {tuple(shape)}")


def columns(name, x):
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"{name}: x has shape {tuple(x.shape)}, not (…, C) with C at least 1")


def norm(name, x, weight, bias, eps):
    floats(name, x=x, weight=weight, bias=bias)
    columns(name, x)
    shape(name, "weight", weight, x.shape[-1:])
    shape(name, "bias", bias, x.shape[-1:])
    if not 0 < eps < math.inf:
        raise ValueError(f"{name}: eps is {eps}, not a positive number")


def dropout(name, dropout_p, seed, device):
    if not 0 <= dropout_p <= 1:
        raise ValueError(f"{name}: dropout_p is {dropout_p}, not in [0, 1]")
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64:
            raise TypeError(f"{name}: seed is {seed.dtype}, not int64")
        if seed.numel() != 1 or seed.device != device:
            raise ValueError(f"{name}: seed has {seed.numel()} elements on {seed.device}, not one on {device}")
    elif seed is not None and not (isinstance(seed, int) and -(2**63) <= seed < 2**63):
        kind = ValueError if isinstance(seed, int) else TypeError
        raise kind(f"{name}: seed is {seed!r}, not a 64-bit integer, a tensor of one, or None")


def attention_scale(name, scale):
    if scale is not None and not 0 < scale < math.inf:
        raise ValueError(f"{name}: scale is {scale}, not a positive number")


def heads(name, **tensors):
    """Queries (B, H, Tq, D), then keys and values of one shape (B, Hkv, Tk, D), all of one dtype; Hkv divides H."""
    floats(name, **tensors)
    one_dtype(name, **tensors)
    for label, tensor in tensors.items():
        if tensor.dim() != 4:
            raise ValueError(f"{name}: {label} has shape {tuple(tensor.shape)}, not (B, H, T, D)")
    (_, q), (_, k), (values, v) = tensors.items()
    shape(name, values, v, k.shape)
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        shapes = f"{tuple(q.shape)} and {tuple(k.shape)}"
        raise ValueError(f"{name}: queries and keys have shapes {shapes}, not (B, H, Tq, D) and (B, Hkv, Tk, D)")
    if q.shape[3] == 0:
        raise ValueError(f"{name}: the head dimension is 0")


def attention_options(name, queries_shape, keys, device, scale, dropout_p, seed, key_mask, documents, window_size):
    """queries_shape: (B, H, Tq, D). Returns the options for the backends' functions, but for the seed."""
    attention_scale(name, scale)
    dropout(name, dropout_p, seed, device)
    if key_mask is not None:
        every(name, (torch.bool,), device, {"key_mask": key_mask})
        shape(name, "key_mask", key_mask, (queries_shape[0], keys))
    if documents is not None:
        integers(name, device, documents=documents)
        shape(name, "documents", documents, (queries_shape[0], keys))
        if queries_shape[2] != keys:
            raise ValueError(f"{name}: documents need as many queries as keys, not {queries_shape[2]} and {keys}")
    given = dict(scale=scale, dropout_p=dropout_p, key_mask=key_mask, documents=documents)
    return dict(given, window=window(name, window_size, keys))


def window(name, size, keys):
    """The window that a call has, which is None where it reaches all keys. It holds the query's own key at least."""
    if size is None:
        return None
    if isinstance(size, bool) or not isinstance(size, int | torch.SymInt):
        raise TypeError(f"{name}: window is {size!r}, not a whole number of keys or None")
    if size < 1:
        raise ValueError(f"{name}: window is {size}; a query sees 1 key at least, its own")
    return size if size < keys else None


def in_range(name, what, values, limit, place, ignored=None):
    """0 <= value < limit, on a CPU: on a GPU the check would make the host wait, and a compiler can't branch on it."""
    if values.device.type != "cpu" or torch.compiler.is_compiling() or values.numel() == 0:
        return
    values = unwrapped(values)
    outside = (values < 0) | (values >= limit)
    if ignored is not None:
        outside &= values != ignored
    if outside.any():
        where = tuple(outside.nonzero()[0].tolist())
        raise ValueError(f"{name}: {what} {values[where].item()} at {where} is outside {place}")


def cumulative(name, cu_seqlens, time):
    """0 <= cu_seqlens[0] <= … <= time, on a CPU."""
    if cu_seqlens.device.type != "cpu" or torch.compiler.is_compiling():
        return
    cu_seqlens = unwrapped(cu_seqlens)
    steps = torch.diff(cu_seqlens, prepend=cu_seqlens.new_zeros(1), append=cu_seqlens.new_full((1,), time))
    if (steps < 0).any():
        values = cu_seqlens.tolist() if len(cu_seqlens) <= 8 else f"{cu_seqlens[:8].tolist()}…"
        raise ValueError(f"{name}: cu_seqlens {values} do not rise from 0 to at most {time}")


def loss(name: str, reduction: str, label_smoothing: float, z_loss: float) -> None:
    """What linear_cross_entropy may be asked to do with the losses of rows."""
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"{name}: reduction is {reduction!r}, not 'mean', 'sum' or 'none'")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"{name}: label_smoothing is {label_smoothing}, not in [0, 1]")
    if not 0 <= z_loss < math.inf:
        raise ValueError(f"{name}: z_loss is {z_loss}, not a finite number of at least 0")
