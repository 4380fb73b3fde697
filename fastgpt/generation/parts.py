"""What a decoder walks through: a live model's parts, read as weights, or kept as modules where they must be called."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastgpt.families import book, gpt2, nanogpt
from fastgpt.families.anatomy import Anatomy, Layer
from fastgpt.model import GPT, MLP, Block, CausalSelfAttention, LayerNorm
from fastgpt.modules import free_linear, linear_weight, occupied, own_type, plain
from fastgpt.ops.cpu.linears import BagLinear, Layout, Linear
from fastgpt.swap.layers import recognise_mlp, recognise_norm


class Norm(NamedTuple):
    weight: Tensor
    bias: Tensor | None
    eps: float


class Mlp(NamedTuple):
    fc: Linear | BagLinear
    gelu: Any
    proj: Linear | BagLinear


class Parts(NamedTuple):
    """Of a layer. A module stands where it must be called."""

    norm_1: Norm | nn.Module
    qkv: tuple[Linear | BagLinear | nn.Module, ...]
    out: Linear | BagLinear | nn.Module
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


def is_plain_gpt(model: Any) -> bool:
    """Whether it is fastgpt's GPT, and no subclass or layer of one's own in it."""
    if own_type(model) is not GPT:
        return False
    parts = [(b, b.attn, b.mlp, b.ln_1, b.ln_2) for b in model.h]
    kinds = (Block, CausalSelfAttention, MLP, LayerNorm, LayerNorm)
    return all(tuple(map(own_type, each)) == kinds for each in parts) and own_type(model.ln_f) is LayerNorm


def anatomy(model: Any) -> Anatomy:
    """TypeError for what is no model, ValueError for one that is no GPT of the known families."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"generate: model is a {type(model).__name__}, not an nn.Module")
    if isinstance(model, GPT):
        try:
            return _own_anatomy(model)
        except AttributeError as error:
            raise ValueError(f"generate: this {type(model).__name__} lacks a part of a GPT: {error}") from error
    for family in (gpt2, nanogpt, book):
        if (found := family.anatomy(model)) is not None:
            return found
    raise ValueError(
        f"generate: {type(model).__name__} is not known: fastgpt's GPT, Hugging Face's GPT2LMHeadModel, nanoGPT's GPT "
        f"and the book's GPTModel are"
    )


class Sources:
    """The tensors of a live model that were read, and whether a reader still has what the model has now.

    PyTorch counts what is written to a tensor in place, but not by its fused optimizers, a CUDA graph's replay or
    through `.data`: of tensors that were copied, a few numbers each are compared too. Those of others are looked up.
    """

    def __init__(self) -> None:
        self._copied: list[tuple[Any, str, int | None]] = []  # module, name, version
        self._shared: list[tuple[Any, str, int | None]] = []  # module, name, address
        self._sample: Tensor | None = None

    def add(self, module: Any, copied: bool, names: tuple[str, ...] = ("weight", "bias")) -> None:
        for name in names:
            tensor = getattr(module, name, None)
            if tensor is not None and copied:
                self._copied.append((module, name, _version(tensor)))
            else:
                self._shared.append((module, name, _address(tensor)))

    def seal(self) -> None:
        """All are read."""
        self._sample = self._numbers()

    def changed(self) -> bool:
        if any(_address(getattr(module, name, None)) != address for module, name, address in self._shared):
            return True
        if any(_version(getattr(module, name, None)) != at for module, name, at in self._copied):
            return True
        if any(occupied(module) for module, *_ in (*self._shared, *self._copied)):  # by hooks that came later
            return True
        now = self._numbers()
        if now is None or self._sample is None:
            return now is not self._sample
        return now.device != self._sample.device or not torch.equal(now, self._sample)

    def _numbers(self) -> Tensor | None:
        """Bits of some numbers of each copied tensor."""
        some = [_some(getattr(module, name).detach()) for module, name, _ in self._copied]
        return torch.cat(some).view(torch.uint8) if some else None


def _version(tensor: Tensor | None) -> int | None:
    return None if tensor is None else 0 if tensor.is_inference() else tensor._version


def _some(tensor: Tensor) -> Tensor:
    """Some sixty numbers from all over a tensor of one or two axes, without a copy of it."""
    if tensor.dim() == 2:
        rows = tensor if tensor.is_contiguous() else tensor.t()
        tensor = rows.view(-1) if rows.is_contiguous() else rows.diagonal()
    return tensor[:: len(tensor) // 64 | 1]


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


class Reader:
    """Reads parts, cast to `dtype` unless None; `called` lists those that do more than their class and are kept.

    layout: how their weights lie in memory.
    """

    def __init__(self, dtype: torch.dtype | None, layout: Layout):
        self._cast, self._layout = dtype, layout
        self.sources = Sources()
        self.called: list[nn.Module] = []

    def linear(self, module: Any) -> Linear | BagLinear | nn.Module:
        if isinstance(module, nn.Embedding) and not occupied(module) and plain(module.weight):  # a tied head
            return self._laid_out(module.weight, None, [module])
        if not free_linear(module):
            self.called.append(module)
            return module
        return self._linear(module)

    def _linear(self, module: Any) -> Linear | BagLinear:
        return self._laid_out(linear_weight(module), module.bias, [module])

    def _laid_out(self, weight: Tensor, bias: Tensor | None, modules: list[Any]) -> Linear | BagLinear:
        linear = self._layout.linear(self._as(weight), None if bias is None else self._as(bias))
        copied = isinstance(linear, BagLinear) or linear.weight.data_ptr() != modules[0].weight.data_ptr()
        for module in modules:
            self.sources.add(module, copied)
        return linear

    def _as(self, tensor: Tensor) -> Tensor:
        return tensor.detach() if self._cast is None else tensor.detach().to(self._cast)

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
        self.sources.add(module, copied=False, names=names)
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
        fc, proj = (self._linear(linear) for linear in linears)
        return Mlp(fc, gelu, proj)

    def layer(self, layer: Layer) -> Parts:
        qkv: list[Any] = list(layer.qkv)
        packed: tuple[Linear | BagLinear | nn.Module, ...]
        if len(qkv) > 1 and all(map(free_linear, qkv)) and len({part.bias is None for part in qkv}) == 1:
            weight = torch.cat([linear_weight(part) for part in qkv])  # one product for the three
            bias = None if qkv[0].bias is None else torch.cat([part.bias for part in qkv])
            packed = (self._laid_out(weight, bias, qkv),)
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
