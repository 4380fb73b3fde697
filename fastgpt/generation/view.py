"""A live model of any family as a GPT in fastgpt's names: of its tensors, and its modules where they must be called."""

from typing import Any

import torch
from torch import Tensor, nn

from fastgpt import private
from fastgpt.families import book, gpt2, nanogpt
from fastgpt.families.anatomy import Anatomy, Layer
from fastgpt.model import GPT, MLP, Block, CausalSelfAttention, GPTConfig, LayerNorm
from fastgpt.modules import bare, free_embedding, free_linear, linear_weight, occupied, own_type, plain
from fastgpt.swap.layers import recognise_mlp, recognise_norm


def unwrapped(model: Any) -> Any:
    """Without torch.compile's, DistributedDataParallel's and PEFT's covers."""
    while True:
        if (inner := private.compiled_from(model)) is not None:
            model = inner
        elif isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif hasattr(model, "get_base_model"):
            model = model.get_base_model()
        else:
            return model


def _own_anatomy(model: GPT) -> Anatomy:
    blocks: Any = model.h
    layers = (
        Layer(b, b.ln_1, b.attn, (b.attn.c_attn,), b.attn.c_proj, b.ln_2, b.mlp, (), *_numbers(b.attn)) for b in blocks
    )
    head = model.wte if model.lm_head is None else model.lm_head
    config = model.config
    return Anatomy(
        model.wte, model.wpe, tuple(layers), model.ln_f, head, config.n_head, (model, blocks), config.backend
    )


def _numbers(attn: Any) -> tuple[float | None, int | None]:
    return getattr(attn, "scale", None), getattr(attn, "window", None)


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
        self._occupied: dict[Any, str | None] = {}
        self._sample: Tensor | None = None

    def add(self, module: Any, copied: bool, names: tuple[str, ...] = ("weight", "bias")) -> None:
        self._occupied[module] = occupied(module)
        for name in names:
            tensor = getattr(module, name, None)
            if tensor is not None and copied:
                self._copied.append((module, name, _version(tensor)))
            else:
                self._shared.append((module, name, _address(tensor)))

    @property
    def copied(self) -> bool:
        """Whether any was."""
        return bool(self._copied)

    def seal(self) -> None:
        """All are read."""
        self._sample = self._numbers()

    def changed(self) -> bool:
        if any(_address(getattr(module, name, None)) != address for module, name, address in self._shared):
            return True
        if any(_version(getattr(module, name, None)) != at for module, name, at in self._copied):
            return True
        if any(occupied(module) != before for module, before in self._occupied.items()):  # by hooks that came later
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
    return None if tensor is None else private.version(tensor)


def _some(tensor: Tensor) -> Tensor:
    """Some sixty numbers from all over a tensor of one or two axes, without a copy of it."""
    if tensor.dim() == 2:
        rows = tensor if tensor.is_contiguous() else tensor.t()
        tensor = rows.view(-1) if rows.is_contiguous() else rows.diagonal()
    return tensor[:: len(tensor) // 64 | 1]


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


class Called(nn.Module):
    """Live modules in the place of a view's part, which do more than their class and are called as they are: one, or
    the projections of queries, keys and values, whose results are put together."""

    c_proj = None  # in an MLP's place: no bias is left to the next norm

    def __init__(self, *modules: nn.Module):
        super().__init__()
        self.called = modules  # no children: the view's mode is not theirs

    def forward(self, x: Tensor, add_bias: bool = True) -> Tensor:
        made = [module(x) for module in self.called]
        return made[0] if len(made) == 1 else torch.cat(made, dim=-1)

    def add(self, branch: Tensor | None, x: Tensor, branch_bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """As LayerNorm's."""
        if branch is not None:
            x = x + (branch if branch_bias is None else branch + branch_bias)
        return self(x), x


class Lying(nn.Linear):
    """A linear layer in a form that multiplies by itself."""

    form: Any

    def forward(self, x: Tensor) -> Tensor:
        return self.form(x)


class View:
    """A live model in fastgpt's names: `gpt`, a GPT whose parameters are the model's own tensors, or copies of them
    that are cast to `cast` unless None, and laid out. Norms and embeddings are never copied.

    Each norm and linear layer has a `form`, what the fused step takes: (weight, bias, eps), or a function with a weight
    and a bias. called: the parts that do more than their class, in whose places a Called stands.
    """

    def __init__(self, found: Anatomy, cast: torch.dtype | None, layout: Any, residual: Any):
        """layout: ops.decoding_steps' own. residual: as in GPTConfig."""
        self._cast, self._layout, self._backend = cast, layout, found.backend
        self.dtype = found.tokens.weight.dtype if cast is None else cast
        self.sources = Sources()
        self.called: list[nn.Module] = []
        (vocabulary, width), context = found.tokens.weight.shape, len(found.positions.weight)
        shape: dict = dict(vocab_size=vocabulary, block_size=context, n_layer=len(found.layers), n_head=found.heads)
        self.gpt = bare(
            GPT,
            config=GPTConfig(**shape, n_embd=width, tie=False, residual=residual, backend=found.backend),
            dtype=self.dtype,
            wte=self._table(found.tokens),
            wpe=self._table(found.positions),
            h=nn.ModuleList(self._block(number, layer, found.heads) for number, layer in enumerate(found.layers)),
            ln_f=self._norm(found.norm),
            lm_head=self._linear(found.head),
        )
        self.plain = len(self.called) == isinstance(self.gpt.lm_head, Called)  # all layers, and the last norm
        self.sources.seal()

    def _block(self, number: int, layer: Layer, heads: int) -> nn.Module:
        attn = bare(
            CausalSelfAttention,
            c_attn=self._packed(layer.qkv),
            c_proj=self._linear(layer.out),
            **dict(n_head=heads, dropout=0.0, backend=self._backend, layer=number, scale=layer.scale),
            window=layer.window,
        )
        return bare(
            Block, ln_1=self._norm(layer.norm_1), attn=attn, ln_2=self._norm(layer.norm_2), mlp=self._mlp(layer.mlp)
        )

    def _call(self, *modules: Any) -> nn.Module:
        self.called.extend(modules)
        return Called(*modules)

    def _table(self, module: Any) -> nn.Module:
        if not free_embedding(module):
            return Called(module)
        self.sources.add(module, copied=False)
        return nn.Embedding.from_pretrained(module.weight.detach())

    def _norm(self, module: Any) -> nn.Module:
        names = ("weight", "bias")
        if not isinstance(module, LayerNorm):
            swap = recognise_norm(module)
            if isinstance(swap, str) or swap is None:
                return self._call(module)
            names = swap.names
        weight, bias = (getattr(module, name) for name in names)
        if occupied(module) or not plain(weight, bias):
            return self._call(module)
        self.sources.add(module, copied=False, names=names)
        norm = weight.detach(), None if bias is None else bias.detach(), getattr(module, "eps", 1e-5)
        own: dict = dict(zip(("weight", "bias", "eps"), norm, strict=True), form=norm)
        return bare(LayerNorm, **own, dropout=0.0, backend=self._backend, dtype=self.dtype)

    def _linear(self, module: Any) -> nn.Module:
        if isinstance(module, nn.Embedding) and plain(module.weight):  # a tied head, which GPT does not call
            return self._laid_out(module.weight, None, [module])
        return self._read(module) if free_linear(module) else self._call(module)

    def _read(self, module: Any) -> nn.Module:
        return self._laid_out(linear_weight(module), module.bias, [module])

    def _packed(self, parts: tuple[Any, ...]) -> nn.Module:
        if len(parts) == 1:
            return self._linear(parts[0])
        if not all(map(free_linear, parts)) or len({part.bias is None for part in parts}) > 1:
            return self._call(*parts)
        weight = torch.cat([linear_weight(part) for part in parts])  # one product for the three
        bias = None if parts[0].bias is None else torch.cat([part.bias for part in parts])
        return self._laid_out(weight, bias, list(parts))

    def _laid_out(self, weight: Tensor, bias: Tensor | None, modules: list[Any]) -> nn.Module:
        form = self._layout.linear(self._as(weight), None if bias is None else self._as(bias))
        itself = not isinstance(form, tuple)  # or weight and bias alone
        copied = itself or form.weight.data_ptr() != modules[0].weight.data_ptr()
        for module in modules:
            self.sources.add(module, copied)
        shape: dict = dict(zip(("out_features", "in_features"), form.weight.shape, strict=True))
        return bare(Lying if itself else nn.Linear, weight=form.weight, bias=form.bias, form=form, **shape)

    def _as(self, tensor: Tensor) -> Tensor:
        return tensor.detach() if self._cast is None else tensor.detach().to(self._cast)

    def _mlp(self, module: Any) -> nn.Module:
        children = list(module.children())
        inner = children[0] if len(children) == 1 and not occupied(module) else module  # the book's ff.layers
        if isinstance(module, MLP):
            fc, proj, gelu, act = module.c_fc, module.c_proj, module.gelu, None
        else:
            swap = recognise_mlp(inner)
            if isinstance(swap, str) or swap is None:
                return self._call(module)
            (fc, proj), gelu, act = (getattr(inner, name) for name in swap.names[:2]), swap.gelu, swap.act
        changed = any(occupied(part) for part in (module, inner, act) if part is not None)
        if changed or not (free_linear(fc) and free_linear(proj)):
            return self._call(module)
        own = dict(gelu=gelu, recompute=False, backend=self._backend)
        return bare(MLP, c_fc=self._read(fc), c_proj=self._read(proj), **own)
