"""A CUDA device that isn't there: shapes, dtypes, strides, autocast and gradients as on a card, and no numbers.

A tensor of it is a meta tensor whose dispatch keys are CUDA's: of PyTorch's own types, so that code which asks for the
type of a tensor finds what it finds on a card, and under CUDA's autocast. Operators give what their meta functions
say; what the host reads is 0. Custom ops run their real launchers, whose Triton launches the caller must replace.
"""

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from fastgpt import cuda_graph


class Card(NamedTuple):
    """What kernels' choices ask of a card; memory in bytes."""

    capability: int  # 90 is 9.0
    shared: int  # shared memory that one block may have
    multiprocessors: int


# Shared memory by compute capability: CUDA C++ Programming Guide, table of features and technical specifications;
# Triton itself does not check. Multiprocessors are those of A100, RTX 3090, RTX 4090, H100, B200 and RTX 5090.
CARDS = {
    80: Card(80, 166_912, 108),
    86: Card(86, 101_376, 82),
    89: Card(89, 101_376, 128),
    90: Card(90, 232_448, 132),
    100: Card(100, 232_448, 148),
    120: Card(120, 101_376, 170),
}
DEVICE, _META = torch.device("cuda", 0), torch.device("meta")
_MEMORY = 80 * 2**30
_KEY = torch._C.DispatchKey


_captures: list[object] = []  # the graph that is being captured


def is_feigned(tensor: torch.Tensor) -> bool:
    return _own(tensor, "is_meta") and torch._C._dispatch_keys(tensor).has(_KEY.CUDA)


def _feigned(value: Any) -> Any:
    """A meta tensor as one of the card; anything else as it is."""
    if isinstance(value, torch.Tensor) and _own(value, "is_meta") and not is_feigned(value):
        return torch.Tensor._make_subclass(torch.Tensor, value, device_for_backend_keys=DEVICE)
    return value


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = {**(kwargs or {})}
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        flat = tree_flatten((args, kwargs))[0]
        tensors = [value for value in flat if isinstance(value, torch.Tensor)]
        if func is torch.ops.aten.detach.default:  # whose own kernel comes back here
            func = torch.ops.aten.alias.default
        to = kwargs.get("device")
        if not any(map(is_feigned, tensors)) and (to is None or to.type not in ("cuda", "meta")):
            return func(*args, **kwargs)
        if _captures and _needs_the_host(func, args, to):
            raise RuntimeError(f"{func} needs the host, which a capture can't wait for")
        if func is torch.ops.aten._fused_adamw_.tensor_lr:  # which has no meta function
            return None
        if func in _HALVES_INTO_FLOAT:
            return _product(func, *args, **kwargs)
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default):
            dtype = tensors[0].dtype
            return False if dtype == torch.bool or len(tensors) > 1 else 0.0 if dtype.is_floating_point else 0
        if to is not None and to.type == "cpu" and tensors:  # the host reads
            return torch.zeros(tensors[0].shape, dtype=kwargs.get("dtype") or tensors[0].dtype)
        if func is torch.ops.aten.copy_.default and not is_feigned(args[0]):
            return args[0].zero_()
        if to is not None:
            kwargs["device"] = _META
        with self:
            if func.namespace == "fastgpt":
                return func._op_dk(_KEY.CompositeExplicitAutograd, *args, **kwargs)
            given = {id(value) for value in tensors}
            result = func._op_dk(_kernel(func.name()), *args, **kwargs)
        return tree_map(lambda value: value if id(value) in given else _feigned(value), result)


_HALVES_INTO_FLOAT = (torch.ops.aten.addmm.dtype, torch.ops.aten.addmm.dtype_out)


def _product(func, total, a, b, out_dtype, *, beta=1, alpha=1, out=None):
    """Of halves, added to `total` in float32, as CUDA alone has it: what PyTorch 2.11 asks for its shape fails."""
    shape = torch.ops.aten.mm.default._op_dk(_KEY.Meta, a, b).shape  # which asks whether they fit
    if torch.broadcast_shapes(total.shape, shape) != shape:
        raise RuntimeError(f"addmm: {tuple(total.shape)} does not expand to {tuple(shape)}")
    if out is None:
        return _feigned(torch.empty(shape, dtype=out_dtype, device=_META))
    if out.shape != shape or out.dtype != out_dtype:
        raise RuntimeError(f"addmm: out is {out.dtype} of {tuple(out.shape)}, not {out_dtype} of {tuple(shape)}")
    return out


@functools.cache
def _kernel(name: str) -> Any:
    """The dispatch key of the operator's kernel for meta tensors."""
    kinds = ("Meta", "CompositeExplicitAutograd", "CompositeExplicitAutogradNonFunctional", "CompositeImplicitAutograd")
    return getattr(_KEY, next(kind for kind in kinds if torch._C._dispatch_has_kernel_for_dispatch_key(name, kind)))


# CUDA's autocast casts only what is on a CUDA device, and asks for it below Python: these stand in for it. Of its lists
# (torch's documentation, "CUDA Op-Specific Behavior") what GPT-2s call.
_CAST_TO_HALF = ("addmm", "baddbmm", "bmm", "einsum", "linear", "matmul", "mm", "scaled_dot_product_attention")
_CAST_TO_FLOAT = (
    *("exp", "layer_norm", "log", "logsumexp", "native_layer_norm", "nll_loss"),
    *("pow.Scalar", "pow.Tensor_Scalar", "pow.Tensor_Tensor", "rsqrt"),
)
_TOLD_FLOAT = ("cumsum", "log_softmax.int", "softmax.int", "sum", "sum.dim_IntList")  # their dtype, where none is given


def _operator(name: str) -> Any:
    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.aten, packet), overload or "default")


def _telling(name: str) -> Callable:
    op = _operator(name)
    place = [argument.name for argument in op._schema.arguments].index("dtype")

    def kernel(x, *args, **kwargs):
        floating = x.is_floating_point() and x.dtype != torch.float64
        if floating and len(args) + 1 <= place and kwargs.get("dtype") is None:
            kwargs["dtype"] = torch.float32
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(_KEY.AutocastCUDA)):
            return op(x, *args, **kwargs)

    return kernel


def _autocasting(name: str, to: Callable[[], torch.dtype]) -> Callable:
    op = _operator(name)

    def cast(value):
        floating = isinstance(value, torch.Tensor) and value.is_floating_point() and value.dtype != torch.float64
        return value.to(to()) if floating and value.is_cuda else value

    def kernel(*args, **kwargs):
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(_KEY.AutocastCUDA)):
            return op(*tree_map(cast, args), **tree_map(cast, kwargs))

    return kernel


@contextlib.contextmanager
def _below_python(capability: int) -> Iterator[None]:
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that kernels are overridden
        for name in _CAST_TO_HALF:
            library.impl(name, _autocasting(name, lambda: torch.get_autocast_dtype("cuda")), "AutocastCUDA")
        for name in _CAST_TO_FLOAT:
            library.impl(name, _autocasting(name, lambda: torch.float32), "AutocastCUDA")
        for name in _TOLD_FLOAT:
            library.impl(name, _telling(name), "AutocastCUDA")
        library.impl("scaled_dot_product_attention", _attention(capability), "AutogradCUDA")
    try:
        yield
    finally:
        library._destroy()


# scaled_dot_product_attention asks a tensor's device below Python too, and would take its plain form. On a card it
# takes cuDNN's kernel for halves where the capability is 9.0 or more, and FlashAttention's on others.


def _attention(capability: int) -> Callable:
    aten = torch.ops.aten

    def kernel(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None, enable_gqa=False):
        plain = attn_mask is not None or enable_gqa or q.dtype.itemsize != 2 or q.shape[-1] % 8 or q.shape[-1] > 128
        if plain:
            return aten.scaled_dot_product_attention.default.decompose(
                q, k, v, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
        if capability < 90:
            return aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal, scale=scale)[0]
        log_sum = any(t.requires_grad for t in (q, k, v))
        made = aten._scaled_dot_product_cudnn_attention(q, k, v, None, log_sum, dropout_p, is_causal, scale=scale)
        return made[0]

    return kernel


class _Asks(TorchFunctionMode):
    """Who asks for the card is given a meta device: PyTorch without CUDA would refuse at once."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.device:
            return func(*args, **kwargs)
        if func is torch.Tensor.cuda:
            func, args = torch.Tensor.to, (args[0], DEVICE)
        args = [_META if _is_cuda(value) else value for value in args]
        kwargs = {name: _META if _is_cuda(value) else value for name, value in kwargs.items()}
        if func is torch.tensor and _captures and kwargs.get("device") is _META:
            raise RuntimeError("torch.tensor copies from the host, which a capture can't wait for")
        result = func(*args, **kwargs)
        return _feigned(result) if func in (torch.tensor, torch.as_tensor) else result  # they reach no mode


_group = torch._C._group_tensors_by_device_and_dtype


def _grouped(lists: list, *options) -> dict:
    """By device and dtype, and a feigned tensor's is the card: clipping and optimizers ask for it below Python."""
    groups = _group(lists, *options).items()
    there = bool(lists) and any(each.is_cuda for each in lists[0] if each is not None)
    return {(DEVICE if there and device.type == "meta" else device, dtype): group for (device, dtype), group in groups}


def _is_cuda(value: Any) -> bool:
    return (isinstance(value, torch.device) and value.type == "cuda") or (
        isinstance(value, str) and value.split(":")[0] == "cuda"
    )


class _Nothing:
    """In place of streams, events and graphs: takes any arguments, does nothing, is any context."""

    cuda_stream = 0  # the default one

    def __init__(self, *args, **kwargs):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: None


class _Capture(_Nothing):
    """In place of torch.cuda.graph: inside, what needs the host is an error as on a card."""

    def __enter__(self):
        _captures.append(self)
        return self

    def __exit__(self, *error):
        _captures.pop()


def _random_state(*_) -> torch.Tensor:
    """Of the card's generator, which a capture does not tell, and is not told."""
    if _captures:
        raise RuntimeError("the generator's state needs the host, which a capture can't wait for")
    return torch.zeros(16, dtype=torch.uint8)


def _needs_the_host(func: Any, args: tuple, to: torch.device | None) -> bool:
    """Whether the operator reads from the card, or copies from the host to it what is no number of the call's own."""
    aten = torch.ops.aten
    if func in (aten._local_scalar_dense.default, aten.equal.default, aten.nonzero.default):
        return is_feigned(args[0])
    tensors = [value for value in args if isinstance(value, torch.Tensor)]
    if func is aten.copy_.default:
        return is_feigned(args[0]) != is_feigned(args[1])
    return to is not None and any(is_feigned(tensor) != (to.type in ("cuda", "meta")) for tensor in tensors)


@contextlib.contextmanager
def card(capability: int) -> Iterator[Card]:
    """Inside, device "cuda" is a card of this compute capability (90 is 9.0), whether or not there is a GPU."""
    there = CARDS[capability]
    properties = SimpleNamespace(
        name=f"feigned {capability / 10}",
        major=capability // 10,
        minor=capability % 10,
        multi_processor_count=there.multiprocessors,
        shared_memory_per_block_optin=there.shared,
        total_memory=_MEMORY,
    )
    in_python = {
        "device": property(lambda tensor: DEVICE if is_feigned(tensor) else _own(tensor, "device")),
        "is_cuda": property(lambda tensor: is_feigned(tensor) or _own(tensor, "is_cuda")),
        "is_meta": property(lambda tensor: not is_feigned(tensor) and _own(tensor, "is_meta")),
        "pin_memory": lambda tensor, *_: tensor,
    }
    module = {
        "is_available": lambda: True,
        "_lazy_init": lambda: None,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "is_bf16_supported": lambda *_, **__: True,
        "get_device_capability": lambda *_: divmod(capability, 10),
        "get_device_properties": lambda *_: properties,
        "get_device_name": lambda *_: properties.name,
        "manual_seed_all": lambda seed: None,
        "_initialized": True,
        "get_rng_state": _random_state,
        "set_rng_state": _random_state,
        "memory_reserved": lambda *_: 0,
        "memory_allocated": lambda *_: 0,
        "mem_get_info": lambda *_: (_MEMORY, _MEMORY),
        "synchronize": lambda *_: None,
        "current_stream": _Nothing,
        "is_current_stream_capturing": lambda: bool(_captures),
        **dict.fromkeys(("device", "stream", "CUDAGraph", "Stream", "Event"), _Nothing),
        "graph": _Capture,
    }
    with contextlib.ExitStack() as stack:
        for name, value in in_python.items():
            stack.enter_context(mock.patch.object(torch.Tensor, name, value))
        for name, value in module.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        stack.enter_context(mock.patch.object(cuda_graph, "_stream", _Nothing))  # which keeps what it made
        stack.enter_context(_below_python(capability))
        stack.enter_context(mock.patch.object(torch._C, "_group_tensors_by_device_and_dtype", _grouped))
        stack.enter_context(_Mode())
        stack.enter_context(_Asks())
        yield there


def _own(tensor: torch.Tensor, name: str) -> Any:
    return getattr(torch._C.TensorBase, name).__get__(tensor)
