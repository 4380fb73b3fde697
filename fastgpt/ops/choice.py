"""The one place that chooses a backend for a call, for a model that is decoded too, and that explains the choice.

What follows a call operation by operation (fastgpt.ops.transforms) gets fastgpt.ops.plain, whatever the device.
A form of its own that a backend has for some calls (few rows, Hopper's own kernels, a CPU's MLP and loss) is chosen
where that form stands; here it is put into words, by the same functions.
"""

import inspect
from collections.abc import Callable
from importlib.util import find_spec
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor

from fastgpt.ops import checks, decoding, fp8, loss, plain, pytorch
from fastgpt.ops.cpu import logits, mlp
from fastgpt.ops.transforms import watcher

Backend = Literal["auto", "triton", "torch"]

autograd: Any = None  # the Triton backend, where there is a Triton to import
NO_TRITON = "Triton is not installed"
if find_spec("triton") is not None:
    import triton

    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 6):
        NO_TRITON = f"Triton is {triton.__version__}, the kernels need 3.6 or newer"
    else:
        import fastgpt.ops.autograd as autograd  # `from fastgpt.ops import` would find the None above


def backend_for(name: str, backend: Backend, operand: Tensor, **arguments) -> ModuleType:
    """The module whose function of that name serves such a call.

    operand: the call's first floating-point tensor. arguments: what else the kernel's limits ask about.
    """
    return _choose(name, backend, operand, arguments)[0]


def decoding_steps(backend: Backend, operand: Tensor) -> decoding.OnPyTorch:
    """The steps of decoding of a model of which `operand` is a weight, chosen once for all its calls."""
    if backend_for("layer_norm", backend, operand) is not autograd:
        return decoding.OnPyTorch()

    def choose(name: str, operand: Tensor, **arguments) -> ModuleType:
        return backend_for(name, backend, operand, **arguments)

    return decoding.OnKernels(autograd, choose)


_FP8 = (8, 9)  # the least compute capability that multiplies 8-bit floats


def fp8_obstacle(device: torch.device) -> str | None:
    """Why tensors of that device are not multiplied as 8-bit floats, or None."""
    if device.type != "cuda" or torch.version.hip:
        return f"the weights are on {device}, and the matmuls of 8-bit floats need an NVIDIA GPU"
    if (capability := torch.cuda.get_device_capability(device)) < _FP8:
        return f"the GPU has compute capability {capability[0]}.{capability[1]}, matmuls of 8-bit floats need 8.9"
    return None


def fp8_producers(backend: Backend, operand: Tensor) -> fp8.OnPyTorch:
    """What makes the copies of a model in 8-bit floats, for a tensor of its device."""
    kernels = backend_for("layer_norm", backend, operand) is autograd
    if kernels and (interpreted() or fp8_obstacle(operand.device) is None):
        from fastgpt.ops.fp8_kernels import OnKernels  # of autograd, which only a Triton has

        return OnKernels()
    return fp8.OnPyTorch()


def explain_token(head: Tensor, heads: int, hidden: int, context: int) -> str:
    """How generation writes one sequence's token with a model of this head (V, C), in bfloat16 where the kernels serve,
    and why, in a sentence."""
    if backend_for("layer_norm", "auto", head) is not autograd:
        return f"PyTorch's operators{', replayed as one CUDA graph' if head.is_cuda else ', one after another'}"
    found = autograd.measured_token(head, heads, hidden, context)
    graph = "" if head.is_cuda else ", one after another"
    if isinstance(found, str):
        return f"many launches of kernels{graph or ', replayed as one CUDA graph'}; not one launch: {found}"
    return f"one launch of a kernel for all layers{graph or ', replayed with the next one as one CUDA graph'}"


def explain(function: Callable, *args, **kwargs) -> str:
    """Which backend `function` (one of fastgpt.ops) would take for these arguments, and why, in a sentence; and which
    special form of it, where the backend has one for such a call.

    explain(layer_norm, x, weight) -> "layer_norm runs on PyTorch: the tensors are on cpu, …"
    """
    bound = inspect.signature(function).bind(*args, **kwargs)
    bound.apply_defaults()
    arguments = dict(bound.arguments)
    backend = arguments.pop("backend")
    label = next(name for name, a in arguments.items() if isinstance(a, Tensor) and a.is_floating_point())
    operand = arguments.pop(label)
    name = function.__name__
    if arguments.get("window") is not None:  # as the call has it
        keys = arguments.get("k", operand).shape[-2]
        arguments["window"] = checks.window(name, arguments["window"], keys)
    chosen, sentence = _choose(name, backend, operand, arguments)
    form = ""
    if chosen is pytorch and name in _FORMS:
        form = _FORMS[name](operand, **arguments)
    elif chosen is autograd and not autograd.INTERPRETED:
        sentence += _untimed(operand.device)
        if name in _OPERANDS:
            operands = [operand, *(arguments[label] for label in _OPERANDS[name])]
            form = autograd.hopper.in_words(name, autograd.cast(*operands), arguments)
    return f"{sentence}; {form}" if form else sentence


def _untimed(device: torch.device) -> str:
    """What a kernel's tiles are worth there, as the end of a sentence; "" where they were measured."""
    capability = torch.cuda.get_device_capability(device)
    if capability == _TIMED:
        return ""
    return f", with tiles chosen by arithmetic: none was timed on compute capability {capability[0]}.{capability[1]}"


_TIMED = (9, 0)  # the compute capability of the cards that bench/results has times of


def interpreted() -> bool:
    """Whether the kernels run in Triton's interpreter (TRITON_INTERPRET=1), on any device's tensors."""
    return autograd is not None and autograd.INTERPRETED


def no_triton() -> str | None:
    """Why no Triton kernel can run in this process, whatever the device; None where one can."""
    return NO_TRITON if autograd is None else None


def kernels_run_on(device: torch.device) -> bool:
    """Whether tensors of that device may reach a Triton kernel."""
    return _device_obstacle(device) is None


def backend_in_words(backend: Backend, operand: Tensor) -> str:
    """What serves a model of which `operand` is a weight, as words after "on the CPU, " or "on cuda:0, "."""
    found, sentence = _choose("layer_norm", backend, operand, {})
    if found is autograd:
        return "with the Triton kernels" + (" in Triton's interpreter" if interpreted() else "")
    ours = "with PyTorch's own functions"
    if backend == "torch":
        return f"{ours}, as backend='torch' asks"
    if operand.device.type == "cuda":  # an NVIDIA GPU that lacks something, or an AMD one
        return f"{ours}: {sentence.partition(': ')[2]}"
    return f"{ours}; the Triton kernels need an NVIDIA GPU"


def _choose(name: str, backend: Backend, operand: Tensor, arguments: dict) -> tuple[ModuleType, str]:
    if isinstance(backend, ModuleType):  # the naive reference, for who judges a whole model; ops does not know it
        return backend, f"{name} runs on {backend.__name__}"
    if backend not in ("auto", "triton", "torch"):
        raise ValueError(f"{name}: backend is {backend!r}, not 'auto', 'triton' or 'torch'")
    followed = watcher()
    if followed is not None and backend != "triton":
        return plain, f"{name} runs on PyTorch's own differentiable operations: {followed}"
    if backend == "torch":
        return pytorch, f"{name} runs on PyTorch: backend='torch' was asked for"
    obstacle = _obstacle(name, operand, arguments) if followed is None else followed
    if autograd is not None and obstacle is None:
        where = "Triton's interpreter" if autograd.INTERPRETED else f"its Triton kernel on {operand.device}"
        return autograd, f"{name} runs on {where}"
    if backend == "triton":
        raise ValueError(f"{name}: backend='triton' can't be had: {obstacle}")
    return pytorch, f"{name} runs on PyTorch: {obstacle}"


def _obstacle(name: str, operand: Tensor, arguments: dict) -> str | None:
    """What keeps the Triton kernel from serving this call, or None."""
    if (obstacle := _device_obstacle(operand.device)) is not None:
        return obstacle
    if operand.dtype == torch.float64 and not interpreted():
        return "the kernels compute in float32 at most, the operand is torch.float64"
    return _LIMITS[name](operand, **arguments) if name in _LIMITS else None


def _device_obstacle(device: torch.device) -> str | None:
    """What keeps all Triton kernels from tensors of that device, or None."""
    if not interpreted() and (device.type != "cuda" or torch.version.hip):  # with a Triton or without
        kind = "an AMD GPU" if torch.version.hip and device.type == "cuda" else device
        return f"the tensors are on {kind}, the kernels run on NVIDIA GPUs"
    if autograd is None:
        return NO_TRITON
    if not autograd.INTERPRETED and (capability := torch.cuda.get_device_capability(device)) < (8, 0):
        return f"the GPU has compute capability {capability[0]}.{capability[1]}, the kernels need 8.0 or newer"
    return None


def _row_limit(x, **_):
    if x.shape[-1] > autograd.layernorm.MAX_COLUMNS:
        return f"rows of {x.shape[-1]} channels are wider than the kernel's {autograd.layernorm.MAX_COLUMNS}"
    return None


def _attention_limit(q, *, heads=None, **_):
    """q (B, H, T, D), or a packed qkv with its heads."""
    head_dim = q.shape[-1] if heads is None else q.shape[-1] // 3 // heads
    if head_dim > autograd.attention.MAX_HEAD_DIM:
        return f"heads of {head_dim} channels are wider than the kernel's {autograd.attention.MAX_HEAD_DIM}"
    return None


def _decode_limit(q, *, k_cache, v_cache, **_):
    if torch.is_grad_enabled() and any(t.requires_grad for t in (q, k_cache, v_cache)):
        return "the decode kernel has no derivative, and an operand requires one"
    return _attention_limit(q)


_LIMITS: dict[str, Callable[..., str | None]] = {  # of functions whose kernels have one
    "layer_norm": _row_limit,
    "add_layer_norm": _row_limit,
    "causal_attention": _attention_limit,
    "causal_attention_qkv": _attention_limit,
    "decode_attention": _decode_limit,
}


# The fallback's special forms, in words.


def _mlp_form(x, *, w_in, b_in, w_out, b_out, approximate, recompute) -> str:
    form = pytorch.mlp_form([x, w_in, b_in, w_out, b_out], recompute)
    if form in ("plain", "recomputed"):
        return "its hidden units are computed again in the backward" if form == "recomputed" else ""
    dtype = loss.compute_dtype(x)
    units = x.numel() // x.shape[-1] * w_in.shape[0]
    gelu = f"{units:,} hidden units in {dtype} make its GELU " + (
        "passes over what a core's cache holds" if mlp.by_passes(units, dtype, approximate) else "PyTorch's own"
    )
    if form == "differentiated in place":
        return f"on a CPU its backward writes over the hidden units, and {gelu}"
    return f"without a derivative on a CPU {gelu}"


def _loss_form(x, *, weight, **_) -> str:
    rows, vocab = x.numel() // x.shape[-1], weight.shape[0]
    chunk = logits.rows_at_once(rows, vocab, loss.compute_dtype(x))
    return f"{rows:,} rows of {vocab:,} logits are made " + (
        "at once" if chunk >= rows else f"{chunk:,} rows at a time"
    )


# The tensors that a matmul reads, beside the first, of functions that Hopper's own kernels may serve.
_OPERANDS = {
    "causal_attention": ("k", "v"),
    "causal_attention_qkv": (),
    "gelu_mlp": ("w_in", "b_in", "w_out", "b_out"),
}
_FORMS: dict[str, Callable[..., str]] = {"gelu_mlp": _mlp_form, "linear_cross_entropy": _loss_form}
