"""What a decoder walks through: a live model's parts, read as weights, or kept as modules where they must be called."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastgpt import reference
from fastgpt.families import (
    free_linear,
    gpt2,
    linear_weight,
    nanogpt,
    occupied,
    plain,
    raschka,
    recognise_mlp,
    recognise_norm,
)
from fastgpt.families.anatomy import Anatomy, Layer
from fastgpt.model import GPT, MLP, LayerNorm


class Linear(NamedTuple):
    weight: Tensor  # (out, in), in any order in memory
    bias: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        return reference.linear(x, self.weight, self.bias)


class Norm(NamedTuple):
    weight: Tensor
    bias: Tensor | None
    eps: float


class Mlp(NamedTuple):
    fc: Linear
    gelu: Any
    proj: Linear


class Parts(NamedTuple):
    """Of a layer. A module stands where it must be called."""

    norm_1: Norm | nn.Module
    qkv: tuple[Linear | nn.Module, ...]
    out: Linear | nn.Module
    norm_2: Norm | nn.Module
    mlp: Mlp | nn.Module
    scale: float | None


def unwrapped(model: Any) -> Any:
    """Without torch.compile's, DistributedDataParallel's and PEFT's covers."""
    while True:
        if isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod
        elif isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif hasattr(model, "get_base_model"):
            model = model.get_base_model()
        else:
            return model


def _own_anatomy(model: GPT) -> Anatomy:
    blocks: Any = model.h
    layers = (
        Layer(b, b.ln_1, b.attn, (b.attn.c_attn,), b.attn.c_proj, b.ln_2, b.mlp, (), None) for b in blocks
    )  # fmt: skip
    head = model.wte if model.lm_head is None else model.lm_head
    config = model.config
    return Anatomy(
        model.wte, model.wpe, tuple(layers), model.ln_f, head, config.n_head, (model, blocks), config.backend
    )


def anatomy(model: Any) -> Anatomy:
    """TypeError for what is no model, ValueError for one that is no GPT of the known families."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"generate: model is a {type(model).__name__}, not an nn.Module")
    if isinstance(model, GPT):
        return _own_anatomy(model)
    for family in (gpt2, nanogpt, raschka):
        if (found := family.anatomy(model)) is not None:
            return found
    raise ValueError(
        f"generate: {type(model).__name__} is not known: fastgpt's GPT, Hugging Face's GPT2LMHeadModel, nanoGPT's GPT "
        f"and the book's GPTModel are"
    )


class Reader:
    """Reads parts, cast to `dtype` unless None; `called` lists those that do more than their class and are kept.

    laid_out: in the order in memory that a single row reads fastest.
    """

    def __init__(self, dtype: torch.dtype | None, laid_out: bool):
        self._cast, self._laid_out = dtype, laid_out
        self.called: list[nn.Module] = []

    def linear(self, module: Any) -> Linear | nn.Module:
        if isinstance(module, nn.Embedding) and not occupied(module) and plain(module.weight):  # a tied head
            return Linear(self._ready(module.weight))
        if not free_linear(module):
            self.called.append(module)
            return module
        return Linear(self._ready(linear_weight(module)), self._as(module.bias))

    def _as(self, tensor: Any) -> Any:
        return tensor if tensor is None or self._cast is None else tensor.detach().to(self._cast)

    def _ready(self, weight: Tensor) -> Tensor:
        """(out, in), cast, and in the order that a single row reads fastest: on a GPU as (out, in), as the kernels for
        few rows want it.

        Measured on two busy cores of an AMD EPYC (Zen 3), PyTorch 2.13, in turns: (in, out) in memory takes 0.5 to 0.65
        of the time of (out, in) where there are more outputs than inputs, 0.8 to 0.9 where there are as many, and as
        long or longer where there are fewer. bfloat16 is read fastest as (out, in): see reference.linear.
        """
        weight = self._as(weight.detach())
        if self._laid_out and (weight.is_cuda or weight.dtype == torch.bfloat16):
            return weight.contiguous()
        wide = weight.shape[0] >= weight.shape[1]
        if self._laid_out and weight.device.type == "cpu" and wide and weight.stride(0) != 1:
            return weight.t().contiguous().t()
        return weight

    def norm(self, module: Any) -> Norm | nn.Module:
        names = ("weight", "bias")
        if not isinstance(module, LayerNorm):
            swap = recognise_norm(module)
            if isinstance(swap, str) or swap is None:
                self.called.append(module)
                return module
            names = swap.names
        weight, bias = (getattr(module, name) for name in names)
        if occupied(module) or not plain(weight, bias):
            self.called.append(module)
            return module
        return Norm(weight.detach(), None if bias is None else bias.detach(), getattr(module, "eps", 1e-5))

    def _mlp(self, module: Any) -> Mlp | nn.Module:
        children = list(module.children())
        inner = children[0] if len(children) == 1 and not occupied(module) else module  # the book's ff.layers
        if isinstance(module, MLP):
            linears, gelu = (module.c_fc, module.c_proj), module.gelu
            act = None
        else:
            swap = recognise_mlp(inner)
            if isinstance(swap, str) or swap is None:
                self.called.append(module)
                return module
            linears, gelu = (getattr(inner, swap.names[0]), getattr(inner, swap.names[1])), swap.gelu
            act = swap.act
        others = [part for part in (module, inner, act) if part is not None]
        if any(occupied(part) for part in others) or not all(free_linear(linear) for linear in linears):
            self.called.append(module)
            return module
        fc, proj = (self.linear(linear) for linear in linears)
        return Mlp(fc, gelu, proj)  # type: ignore[arg-type]

    def layer(self, layer: Layer) -> Parts:
        qkv = tuple(layer.qkv)
        packed: tuple[Linear | nn.Module, ...]
        if len(qkv) > 1 and all(free_linear(part) for part in qkv):  # one product for the three
            weight = torch.cat([linear_weight(part) for part in qkv]).detach()
            biases: Any = [part.bias for part in qkv]
            bias = None if any(b is None for b in biases) else self._as(torch.cat(biases).detach())
            packed = (Linear(self._ready(weight), bias),)
        else:
            packed = tuple(self.linear(part) for part in qkv)
        return Parts(
            self.norm(layer.norm_1),
            packed,
            self.linear(layer.out),
            self.norm(layer.norm_2),
            self._mlp(layer.mlp),
            layer.scale,
        )
