"""What a user could run instead of fastgpt, one small adapter each, all on the same tensors and the same weights.

An adapter that can't serve here raises Unavailable with the reason, which is printed in place of its time.
"""

import importlib.util
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.machine import Machine
from fastgpt import families
from fastgpt.model import GPT

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


def hugging_face(model: GPT) -> nn.Module:
    """GPT2LMHeadModel with the same weights, its attention by SDPA."""
    if find_spec("transformers") is None:
        raise Unavailable("transformers is not installed")
    from transformers import GPT2Config, GPT2LMHeadModel

    config = model.config
    theirs = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=config.vocab_size,
            n_positions=config.block_size,
            n_embd=config.n_embd,
            n_layer=config.n_layer,
            n_head=config.n_head,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=None,
            attn_implementation="sdpa",
        )
    )
    weights = {f"transformer.{name}": as_conv1d(name, tensor) for name, tensor in model.state_dict().items()}
    weights["lm_head.weight"] = weights["transformer.wte.weight"]
    theirs.load_state_dict(weights)
    return _like(theirs, model)


def nanogpt(model: GPT, folder: Path | None) -> nn.Module:
    """nanoGPT's GPT of the same shape and weights, from a file that the user named. Its GELU is the exact one."""
    if folder is None:
        raise Unavailable("no checkout of nanoGPT was given: --nanogpt DIR")
    module = _module(folder / "model.py")
    settings, weights, _ = families.nanogpt.write_weights(model.config, model.state_dict())
    theirs = module.GPT(module.GPTConfig(**settings))
    theirs.load_state_dict(weights)
    return _like(theirs, model)


def book(model: GPT) -> nn.Module:
    """The faster model of the package that goes with the book, at the same weights."""
    if find_spec("llms_from_scratch") is None:
        raise Unavailable("llms-from-scratch is not installed (pip install --no-deps llms-from-scratch is enough)")
    from llms_from_scratch.ch04 import GPTModelFast

    settings, weights, _ = families.raschka.write_weights(model.config, model.state_dict(), "GPTModelFast")
    theirs = GPTModelFast(settings)
    theirs.load_state_dict(weights)
    return _like(theirs, model)


def book_cached(model: GPT, file: Path | None) -> tuple[nn.Module, Callable]:
    """The model of the book's file gpt_with_kv_cache.py, or its optimized one, and the loop that goes with it: the
    package's own cache fails."""
    if file is None:
        raise Unavailable("the book's file with a cache was not given: --book-cached FILE")
    module = _module(file)
    settings, weights, _ = families.raschka.write_weights(model.config, model.state_dict(), "GPTModel")
    theirs = module.GPTModel(settings)
    theirs.load_state_dict(weights, strict=False)  # its masks are buffers, in one of the files
    return _like(theirs, model), module.generate_text_simple_cached


def _module(file: Path) -> Any:
    """What a file that the user named defines."""
    spec = importlib.util.spec_from_file_location(f"bench_{file.stem}", file)
    if spec is None or spec.loader is None or not file.is_file():
        raise Unavailable(f"there is no {file}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _like(theirs: nn.Module, model: GPT) -> nn.Module:
    parameter = next(model.parameters())
    return theirs.to(parameter.device, parameter.dtype).train(model.training)


def as_conv1d(name: str, tensor: Tensor) -> Tensor:
    """Between Linear's (out, in) and Conv1D's (in, out)."""
    linear = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
    return tensor.t() if linear else tensor


def named_gradient(model: nn.Module, name: str) -> Tensor:
    """The gradient of fastgpt's parameter `name`, in any family's model."""
    gradients = {own: parameter.grad for own, parameter in model.named_parameters()}
    if name in gradients:
        return gradients[name]
    kinds = (families.gpt2, families.nanogpt, families.raschka)
    family = next(kind for kind in kinds if kind.holds(gradients))
    return family.read_weights(gradients, {})[0][name]
