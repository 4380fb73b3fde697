"""Other people's GPT-2s at the weights of one of ours: what a user has, or could have instead.

An adapter that can't serve here raises Unavailable with the reason, which is printed in place of its time.
"""

import importlib.util
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from bench.baselines import Unavailable
from bench.machine import Machine
from fastgpt.families import book as book_family
from fastgpt.families import gpt2 as huggingface_family
from fastgpt.families import nanogpt as nanogpt_family
from fastgpt.model import GPT

HUGGING_FACE, NANOGPT, BOOK = "Hugging Face", "nanoGPT", "the book, fast"
EAGER_ATTENTION = "Hugging Face, eager attention"


def hugging_face(model: GPT, attention: str = "sdpa") -> nn.Module:
    """GPT2LMHeadModel with the same weights; its attention by "sdpa", or "eager" as papers write it."""
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
            attn_implementation=attention,
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
    settings, weights, _ = nanogpt_family.write_weights(model.config, model.state_dict())
    theirs = module.GPT(module.GPTConfig(**settings))
    theirs.load_state_dict(weights)
    return _like(theirs, model)


def book(model: GPT) -> nn.Module:
    """The faster model of the package that goes with the book, at the same weights."""
    if find_spec("llms_from_scratch") is None:
        raise Unavailable("llms-from-scratch is not installed (pip install --no-deps llms-from-scratch is enough)")
    from llms_from_scratch.ch04 import GPTModelFast

    settings, weights, _ = book_family.write_weights(model.config, model.state_dict(), "GPTModelFast")
    theirs = GPTModelFast(settings)
    theirs.load_state_dict(weights)
    return _like(theirs, model)


def book_cached(model: GPT, file: Path | None) -> tuple[nn.Module, Callable]:
    """The model of the book's file gpt_with_kv_cache.py, or its optimized one, and the loop that goes with it: the
    package's own cache fails."""
    if file is None:
        raise Unavailable("the book's file with a cache was not given: --book-cached FILE")
    module = _module(file)
    settings, weights, _ = book_family.write_weights(model.config, model.state_dict(), "GPTModel")
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
    kinds = (huggingface_family, nanogpt_family, book_family)
    family = next(kind for kind in kinds if kind.holds(gradients))
    return family.read_weights(gradients, {})[0][name]


class Family(NamedTuple):
    """Another's model at the weights of one of ours."""

    build: Callable[[GPT, Machine], nn.Module]
    logits: Callable[[nn.Module, Tensor], Tensor]  # (B, T, V), of idx
    loss: Callable[[nn.Module, Tensor, Tensor], Tensor]  # of idx and targets, where -100 stands for none
    makes_its_loss: bool  # or leaves it to its caller
    changes: dict  # to our config, for the function that it computes


FAMILIES = {
    HUGGING_FACE: Family(
        lambda model, machine: hugging_face(model),
        lambda model, idx: model(idx).logits,
        lambda model, idx, targets: model(idx, labels=idx).loss,
        True,
        {},
    ),
    NANOGPT: Family(
        lambda model, machine: nanogpt(model, machine.nanogpt),
        lambda model, idx: model(idx, idx)[0],
        lambda model, idx, targets: model(idx, targets.where(targets >= 0, -1))[1],
        True,
        {"gelu": "none"},
    ),
    BOOK: Family(
        lambda model, machine: book(model),
        lambda model, idx: model(idx),
        lambda model, idx, targets: F.cross_entropy(model(idx).flatten(0, 1), targets.flatten()),
        False,
        {},
    ),
}

# Those that a training step alone is compared with.
ALL = FAMILIES | {
    EAGER_ATTENTION: FAMILIES[HUGGING_FACE]._replace(build=lambda model, machine: hugging_face(model, "eager"))
}
