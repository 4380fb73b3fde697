"""GPT-2 from fastgpt's functions, with GPT-2's own parameter names: wte, wpe, h.N.ln_1, attn.c_attn, …, ln_f.

Small parts first, the whole last. `B` batch, `T` time, `C` = n_embd channels, `V` vocabulary.

A residual add is never a pass of its own: a block hands on its stream x and the branch that is still to be added, and
the next LayerNorm adds it, with the bias of the linear layer that made it and with dropout, in one go.
"""

import dataclasses
import math
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastgpt import ops
from fastgpt.fields import build, check_fields, nearest
from fastgpt.fp8 import Fp8, Layer, Mode, block_of_copies, check_sizes, loss_of_copies, serves
from fastgpt.modules import free_embedding, free_linear, is_linear, occupied, packed_projection


@dataclasses.dataclass(frozen=True)
class GPTConfig:
    """The shape of a GPT, in nanoGPT's names. ValueError for a shape that can't be."""

    vocab_size: int = 50257
    block_size: int = 1024  # the context: the most tokens one pass may see
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    n_inner: int | None = None  # hidden units of the MLP; None is 4 * n_embd
    dropout: float = 0.0  # GPT-2's four places: embedding, attention, and both branches of a block
    bias: bool = True  # in the linear layers and the norms
    gelu: Literal["tanh", "none"] = "tanh"  # "tanh" is GPT-2's, "none" the exact one, as in torch's `approximate`
    layer_norm_eps: float = 1e-5
    residual: Literal["compute", "float32"] = "compute"  # dtype of the stream; "compute" is autocast's or the weights'
    activation_checkpointing: Literal["off", "mlp", "block"] = "off"  # what the backward computes again to save memory
    tie: bool = True  # the head's weight is the token embedding's
    window: int | None = None  # tokens that a token sees in a windowed layer, itself included; None is no such layer
    window_pattern: str = "SSSL"  # of the layers, over and over: S has the window, L and the last layer see all
    backend: ops.Backend = "auto"
    fp8: Mode = "none"  # matmuls that training makes of 8-bit floats; fastgpt/fp8.py says which
    fp8_simulate: bool = False  # the same numbers where the hardware has no such matmuls, slowly

    def __post_init__(self):
        check_fields(self)
        for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd", "n_inner", "window"):
            value = getattr(self, name)
            if value is not None and not 1 <= value < 2**31:
                raise ValueError(f"GPTConfig: {name} is {value}, not a whole number of at least 1 and below 2**31")
        if self.n_embd % self.n_head:
            raise ValueError(f"GPTConfig: n_embd = {self.n_embd} does not divide into n_head = {self.n_head} heads")
        if not 0 <= self.dropout <= 1:
            raise ValueError(f"GPTConfig: dropout is {self.dropout}, not in [0, 1]")
        if not 0 < self.layer_norm_eps < math.inf:
            raise ValueError(f"GPTConfig: layer_norm_eps is {self.layer_norm_eps}, not a positive number")
        if not self.window_pattern or self.window_pattern.strip("SL"):
            raise ValueError(f"GPTConfig: window_pattern is {self.window_pattern!r}, not a word of S and L")
        check_sizes(self)

    def window_of(self, layer: int) -> int | None:
        """The window of a layer, None of one that sees all of the context. The last layer does, whatever the pattern
        says, as in nanochat: what is far away reaches the head by one step at least."""
        short = self.window_pattern[layer % len(self.window_pattern)] == "S" and layer < self.n_layer - 1
        return self.window if short and self.window is not None and self.window < self.block_size else None

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Of each layer, as window_of has it."""
        return tuple(map(self.window_of, range(self.n_layer)))

    @classmethod
    def preset(cls, name: str, **changes) -> "GPTConfig":
        """A named shape of PRESETS, with fields changed as given. ValueError for a name or field that is not there."""
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}{nearest(name, PRESETS)}; there are {', '.join(PRESETS)}")
        return cls.from_dict({**PRESETS[name], **changes})

    @classmethod
    def from_dict(cls, fields: dict) -> "GPTConfig":
        """As GPTConfig(**fields), but an unknown field is a ValueError that names the nearest known one."""
        return build(cls, fields)


# gpt2-*: the four released sizes (Radford et al., 2019), by their number of parameters. byte-*: for a CPU.
PRESETS: dict[str, dict] = {
    "gpt2-124M": dict(n_layer=12, n_head=12, n_embd=768),
    "gpt2-355M": dict(n_layer=24, n_head=16, n_embd=1024),
    "gpt2-774M": dict(n_layer=36, n_head=20, n_embd=1280),
    "gpt2-1558M": dict(n_layer=48, n_head=25, n_embd=1600),
    "byte-0.1M": dict(vocab_size=257, block_size=64, n_layer=2, n_head=2, n_embd=64),
    "byte-0.8M": dict(vocab_size=257, block_size=128, n_layer=4, n_head=4, n_embd=128),
    "byte-10M": dict(vocab_size=257, block_size=256, n_layer=6, n_head=6, n_embd=384),
}


def compute_dtype(weight: Tensor) -> torch.dtype:
    """Of matmuls with this weight: autocast's where it is on, the weight's elsewhere."""
    if torch.is_autocast_enabled(weight.device.type) and weight.dtype != torch.float64:
        return torch.get_autocast_dtype(weight.device.type)
    return weight.dtype


def only_multiplies(linear: nn.Module) -> bool:
    """Whether a branch's last layer may leave its bias to the next norm; one with an adapter or hooks is called. To be
    asked once, before the branch is called, for hooks may come and go in it."""
    return is_linear(linear) and not occupied(linear)


class CachedPass(Protocol):
    """A pass over new tokens that attends over a cache of keys and values, and keeps theirs there."""

    def attend(self, layer: int, qkv: Tensor, scale: float | None) -> Tensor:
        """The new tokens' queries, keys and values, (B, T, 3C), in this layer -> (B, T, C)."""


class LayerNorm(nn.Module):
    """LayerNorm over (…, C), with or without the residual add before it."""

    dtype: torch.dtype | None = None  # of what `add` returns, where neither autocast nor the weight says it

    def __init__(self, config: GPTConfig):
        super().__init__()
        # as nn.Linear makes its own: on the default device and of the default dtype
        self.weight = nn.Parameter(torch.ones(config.n_embd))
        self.bias = nn.Parameter(torch.zeros(config.n_embd)) if config.bias else None
        self.eps, self.dropout, self.backend = config.layer_norm_eps, config.dropout, config.backend

    def forward(self, x: Tensor) -> Tensor:
        return ops.layer_norm(x, self.weight, self.bias, self.eps, backend=self.backend)

    def add(self, branch: Tensor | None, x: Tensor, branch_bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """The stream x with dropout(branch + branch_bias) added: returns (its norm, itself), both (…, C)."""
        p = self.dropout if self.training else 0.0
        if branch is not None and not occupied(self) and type(self).forward is LayerNorm.forward:
            more: Any = dict(x_bias=branch_bias, dropout_p=p, backend=self.backend)
            return ops.add_layer_norm(branch, x, self.weight, self.bias, self.eps, **more)
        if branch is not None:
            branch = branch if branch_bias is None else branch + branch_bias.to(branch.dtype)
            x = x + F.dropout(branch, p)
        return self(x).to(self.dtype or compute_dtype(self.weight)), x


class CausalSelfAttention(nn.Module):
    scale: float | None = None  # of the scores; None is 1 / sqrt(D)
    window: int | None = None  # tokens that a token sees, itself included; None is all before it

    def __init__(self, config: GPTConfig, layer: int = 0):
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.n_head, self.dropout, self.backend, self.layer = config.n_head, config.dropout, config.backend, layer
        self.window = config.window_of(layer)

    def forward(
        self, x: Tensor, add_bias: bool = True, documents: Tensor | None = None, cache: CachedPass | None = None
    ) -> Tensor:
        """(B, T, C) -> (B, T, C). Without add_bias, c_proj's bias is left to whoever adds the result to the stream."""
        if cache is not None:
            qkv = self.c_attn(x)  # (B, T, 3C)
            return self.project(cache.attend(self.layer, qkv, self.scale), add_bias)
        qkv, bias = packed_projection(self.c_attn, x, self.backend)
        return self.attend(qkv, bias, add_bias, documents)

    def attend(self, qkv: Tensor, qkv_bias: Tensor | None, add_bias: bool, documents: Tensor | None) -> Tensor:
        """What comes after the projection (B, T, 3C), whose bias is one that it was given as a constant, or None."""
        options: Any = dict(dropout_p=self.dropout if self.training else 0.0, documents=documents)
        options |= dict(scale=self.scale, window=self.window, qkv_bias=qkv_bias)
        return self.project(ops.causal_attention_qkv(qkv, self.n_head, **options, backend=self.backend), add_bias)

    def project(self, y: Tensor, add_bias: bool) -> Tensor:
        return self.c_proj(y) if add_bias else F.linear(y, self.c_proj.weight)


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        hidden = 4 * config.n_embd if config.n_inner is None else config.n_inner
        self.c_fc = nn.Linear(config.n_embd, hidden, bias=config.bias)
        self.c_proj = nn.Linear(hidden, config.n_embd, bias=config.bias)
        self.gelu, self.backend = config.gelu, config.backend
        self.recompute = config.activation_checkpointing == "mlp"

    def forward(self, x: Tensor, add_bias: bool = True) -> Tensor:
        """(B, T, C) -> (B, T, C). Without add_bias, c_proj's bias is left to whoever adds the result to the stream."""
        if not (free_linear(self.c_fc) and free_linear(self.c_proj)):
            hidden = F.gelu(self.c_fc(x), approximate=self.gelu)
            return self.c_proj(hidden) if add_bias else F.linear(hidden, self.c_proj.weight)
        return ops.gelu_mlp(
            x,
            self.c_fc.weight,
            self.c_fc.bias,
            self.c_proj.weight,
            self.c_proj.bias if add_bias else None,
            approximate=self.gelu,
            recompute=self.recompute,
            backend=self.backend,
        )


class Block(nn.Module):
    """One layer. In training it launches these kernels, and no pass over activations that only copies, casts or adds
    (`mm` and `addmm` are cuBLAS's; `sum` adds up a kernel's partial sums, each for one or more biases):

        forward    layer_norm_fwd  addmm  attention_fwd  mm  layer_norm_fwd  addmm  gelu_fwd  mm
        backward   mm  mm  gelu_bwd  sum  mm  mm  layer_norm_bwd  sum
                   mm  mm  attention_dq  attention_dkdv  sum  mm  mm  layer_norm_bwd  sum

    Under autocast each weight is cast once a step as well, and its gradient back. What a token of a layer keeps for the
    backward, in elements of the compute dtype: 2 C of stream, 2 C normed, 3 C qkv, C attended, 8 C of the MLP
    (16 C in all; 12 C with activation_checkpointing "mlp", 2 C with "block"), and 6 + H numbers of statistics.
    """

    copies: Layer | None = None  # where training makes them

    def __init__(self, config: GPTConfig, layer: int = 0):
        super().__init__()
        self.ln_1 = LayerNorm(config)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = LayerNorm(config)
        self.mlp = MLP(config)

    def forward(
        self,
        x: Tensor,
        branch: Tensor | None = None,
        branch_bias: Tensor | None = None,
        documents: Tensor | None = None,
        add_bias: bool = False,
        cache: CachedPass | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The stream x and the branch that is not yet added to it, both (B, T, C), and the bias (C,) that the branch
        still lacks -> stream and branch again; the new branch lacks the bias of this block's mlp.c_proj, unless
        add_bias."""
        if self.copies is not None and self.training and cache is None and serves(self):
            return block_of_copies(self, self.copies, x, branch, branch_bias, documents, add_bias)
        normed, x = self.ln_1.add(branch, x, branch_bias)
        leaves_bias = only_multiplies(self.attn.c_proj)
        seen: dict = dict(documents=documents) if cache is None else dict(cache=cache)
        branch = self.attn(normed, add_bias=not leaves_bias, **seen)
        normed, x = self.ln_2.add(branch, x, self.attn.c_proj.bias if leaves_bias else None)
        return x, self.mlp(normed, add_bias=add_bias)


class GPT(nn.Module):
    """GPT-2. A tied head's weight is the token embedding's: a state dict holds it once, as wte.weight.

    model(idx) -> logits (B, T, V); model(idx, targets) -> the mean loss in nats, without ever holding all logits.
    """

    dtype: torch.dtype | None = None  # of the activations, where neither autocast nor the embedding says it
    blocks_alone: bool = False  # a block's weights are gone once it was called, so it adds all its biases itself

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = LayerNorm(config)
        self.lm_head = None if config.tie else nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.fp8 = None if config.fp8 == "none" else Fp8(config, self.h)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """GPT-2's: normal with deviation 0.02, the residual branches' last layers scaled by 1 / sqrt(2 n_layer)."""
        for name, parameter in self.named_parameters():
            if parameter.dim() == 1:
                nn.init.constant_(parameter, 1.0 if "ln_" in name and name.endswith("weight") else 0.0)
            else:
                residual = name.endswith("c_proj.weight")
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * self.config.n_layer) if residual else 0.02)

    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    def embed(self, idx: Tensor, positions: Tensor | None = None) -> Tensor:
        """(B, T) -> the stream before the first block, (B, T, C). positions: as `features` takes them."""
        config = self.config
        p = config.dropout if self.training else 0.0
        dtype = torch.float32 if config.residual == "float32" else self.dtype or compute_dtype(self.wte.weight)
        if free_embedding(self.wte) and free_embedding(self.wpe):
            tables = self.wte.weight, self.wpe.weight
            return ops.embedding(idx, *tables, positions, dropout_p=p, dtype=dtype, backend=config.backend)
        if positions is None:
            if idx.shape[1] > config.block_size:
                raise ValueError(f"GPT: {idx.shape[1]} tokens are more than the context of {config.block_size}")
            positions = torch.arange(idx.shape[1], dtype=torch.int64, device=idx.device)
        x = self.wte(idx) + self.wpe(positions)
        return F.dropout(x.to(dtype), p)

    def features(
        self,
        idx: Tensor,
        documents: Tensor | None = None,
        positions: Tensor | None = None,
        cache: CachedPass | None = None,
    ) -> Tensor:
        """Token ids (B, T) -> what the head sees, (B, T, C). documents: (B, T) integers; a token sees its own document
        alone. positions: (B, T) or (T,), the first T if None. cache: what attends in each layer's place. ValueError for
        more tokens than the context holds."""
        x, branch, branch_bias = self.stream(idx, documents, positions, cache)
        normed, _ = self.ln_f.add(branch, x, branch_bias)
        return normed

    def stream(
        self, idx: Tensor, documents: Tensor | None, positions: Tensor | None = None, cache: CachedPass | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """What `features` norms: the stream, the branch that is not yet added to it, and the bias that it lacks."""
        config = self.config
        if cache is None and self.training and self.fp8 is not None:
            self.fp8.begin(self)
        x = self.embed(idx, positions)
        branch, branch_bias = None, None
        again = config.activation_checkpointing == "block" and self.training and torch.is_grad_enabled()
        again = again and not ops.watcher()  # torch.func knows no checkpoints
        block: Any  # ModuleList does not say what it holds
        for block in self.h:
            leaves_bias = not self.blocks_alone and only_multiplies(block.mlp.c_proj)
            given = x, branch, branch_bias, documents, not leaves_bias, cache
            x, branch = checkpoint(block, *given, use_reentrant=False) if again else block(*given)
            branch_bias = block.mlp.c_proj.bias if leaves_bias else None  # a parameter is no output to checkpoint
        return x, branch, branch_bias

    def forward(self, idx: Tensor, targets: Tensor | None = None, documents: Tensor | None = None) -> Tensor:
        """idx, targets: (B, T) integers; a target of -100 is ignored. documents: as `features` takes it."""
        own = self.lm_head is not None and not (free_linear(self.lm_head) and self.lm_head.bias is None)
        if self.training and self.fp8 is not None and targets is not None and not own and not occupied(self.ln_f):
            return loss_of_copies(self, *self.stream(idx, documents), targets)
        x = self.features(idx, documents)
        if targets is None:
            return self.head(x)
        if own:
            logits = self.head(x).flatten(0, 1)
            wide = torch.promote_types(logits.dtype, torch.float32)
            return F.cross_entropy(logits.to(wide), targets.flatten().long())
        return ops.linear_cross_entropy(x, self.head_weight, targets, backend=self.config.backend)

    def head(self, x: Tensor) -> Tensor:
        """(…, C) -> logits (…, V)."""
        return F.linear(x, self.head_weight) if self.lm_head is None else self.lm_head(x)

    @property
    def head_weight(self) -> Tensor:
        """(V, C)."""
        return self.wte.weight if self.lm_head is None else self.lm_head.weight

    @classmethod
    def from_pretrained(cls, source: str, **changes) -> "GPT":
        """The GPT-2 in a folder, in a file, or on the Hugging Face hub ("gpt2"); see weights.from_pretrained."""
        from fastgpt import weights  # of this floor, and it builds models

        return weights.from_pretrained(source, **changes)

    def save_pretrained(self, folder: str) -> None:
        """Write a folder that transformers' GPT2LMHeadModel.from_pretrained reads; see weights.save_pretrained."""
        from fastgpt import weights

        weights.save_pretrained(self, folder)
