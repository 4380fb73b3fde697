"""What a user could call instead of fastgpt's functions, one small adapter each, all on the same tensors.

An adapter that can't serve here raises Unavailable with the reason, which is printed in place of its time.
"""

import importlib
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.machine import Machine

SDPA = {
    "SDPA flash": SDPBackend.FLASH_ATTENTION,
    "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION,
    "SDPA efficient": SDPBackend.EFFICIENT_ATTENTION,
    "SDPA math": SDPBackend.MATH,
}

_NO_KERNEL = ("No available kernel", "No viable backend")  # what PyTorch says on a GPU and on a CPU


class Unavailable(Exception):
    """A baseline can't serve here; the message says why."""


def compiled(machine: Machine, function: Callable) -> Callable:
    """torch.compile of it, for the shapes of the case alone; a graph break is an error, not a slower baseline."""
    if machine.kind == "cpu" and shutil.which("g++") is None and shutil.which("c++") is None:
        raise Unavailable("torch.compile needs a C++ compiler on a CPU, there is none")
    return torch.compile(function, backend=machine.compiler, dynamic=False, fullgraph=True)


def compiles_models(machine: Machine) -> None:
    """Unavailable where compiling a whole model would take longer than all the rest."""
    if machine.kind == "cpu" and not machine.compiles_models:
        raise Unavailable("on a CPU with --bench-compiled alone: compiling whole models takes minutes")


def sdpa(backend: SDPBackend) -> Callable:
    """scaled_dot_product_attention pinned to one of its kernels: whatever it picks unpinned can't hide."""

    def attention(q, k, v):
        with sdpa_kernel(backend):
            try:
                return F.scaled_dot_product_attention(q, k, v, is_causal=True)
            except RuntimeError as error:
                if not any(words in str(error) for words in _NO_KERNEL):
                    raise
                raise Unavailable(f"SDPA has no {backend.name} kernel for these tensors here") from None

    return attention


def flex(machine: Machine, time: int) -> Callable:
    """flex_attention with a causal block mask, compiled as its documentation asks."""
    if machine.kind == "cpu":
        raise Unavailable("flex_attention has no backward on a CPU")
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    mask = create_block_mask(lambda b, h, q, k: q >= k, None, None, time, time, device=machine.device)
    run = torch.compile(flex_attention, backend=machine.compiler, dynamic=False)

    def attention(q, k, v):
        try:
            return run(q, k, v, block_mask=mask)
        except NotImplementedError as error:  # in a dry run
            raise Unavailable(str(error)) from None

    return attention


def flash_attn(machine: Machine, version: int) -> Callable:
    """The flash-attn package's own kernels, 2 or, for Hopper, 3, where someone has installed them."""
    module, package = {2: ("flash_attn", "flash-attn"), 3: ("flash_attn_interface", "flash-attn 3")}[version]
    function = _on_a_gpu(machine, module, package).flash_attn_func

    def attention(q, k, v):  # it wants (B, T, H, D), of any strides
        out = function(*(t.transpose(1, 2) for t in (q, k, v)), causal=True)
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

    return attention


def liger_add_layer_norm(machine: Machine) -> Callable:
    """Its LayerNorm, after the additions, which it leaves to PyTorch."""
    layer_norm = _liger(machine, "liger_layer_norm")

    def function(x, residual, weight, bias, x_bias):
        total = residual + (x + x_bias)
        return layer_norm(total, weight, bias, 1e-5), total

    return function


def liger_cross_entropy(machine: Machine, fused: bool) -> Callable:
    """The head with its cross entropy over all logits, or the one that never holds all of them."""
    if fused:
        whole = _liger(machine, "liger_fused_linear_cross_entropy")
        return lambda x, weight, targets: whole(x, weight, targets)
    cross_entropy = _liger(machine, "liger_cross_entropy")
    return lambda x, weight, targets: cross_entropy(F.linear(x, weight), targets)


def _liger(machine: Machine, name: str) -> Callable:
    """A function of Liger's. In a dry run Triton's interpreter runs it, where it can."""
    function = getattr(_on_a_gpu(machine, "liger_kernel.transformers.functional", "liger-kernel"), name)

    def called(*arguments):
        try:
            return function(*arguments)
        except Exception as error:
            if machine.kind != "dry":
                raise
            raise Unavailable(f"Triton's interpreter can't run it: {error}") from None

    return called


def _on_a_gpu(machine: Machine, module: str, package: str) -> Any:
    """A module of kernels that a CPU can't run."""
    if find_spec(module.partition(".")[0]) is None:
        raise Unavailable(f"{package} is not installed")
    if machine.kind == "cpu":
        raise Unavailable(f"{package} has no kernels for a CPU")
    try:
        return importlib.import_module(module)
    except ImportError as error:  # built for another PyTorch, as often as not
        raise Unavailable(f"{package} can't be imported: {error}") from error


def torch_linear_cross_entropy() -> Callable:
    """PyTorch's own chunked head, which makes its gradients in the forward too; from 2.13 on."""
    if not hasattr(F, "linear_cross_entropy"):
        raise Unavailable(f"PyTorch {torch.__version__} has no linear_cross_entropy")
    options = nn.LinearCrossEntropyOptions()
    return lambda x, weight, targets: F.linear_cross_entropy(x, weight, targets, options=options)


def product(a: Tensor, b: Tensor, times: int = 1) -> Callable:
    """The matmul alone, `times` over, by cuBLAS or the CPU's BLAS: what a fused kernel must not fall behind."""
    out = torch.empty(a.shape[0], b.shape[1], dtype=a.dtype, device=a.device)

    def run():
        for _ in range(times):
            torch.mm(a, b, out=out)
        return (out,)

    return run


def all_logits_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The head as most code writes it: every logit, in float32."""
    return F.cross_entropy(F.linear(x, weight).float(), targets)


def sdpa_decode(q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor) -> Tensor:
    """Over caches that are known to be full, so that no mask is needed."""
    return F.scaled_dot_product_attention(q, k_cache, v_cache)
