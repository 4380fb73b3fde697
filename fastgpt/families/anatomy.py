"""Where the parts of a GPT are, whoever wrote it: what generation makes its view of a model from.

Each family's `anatomy(model)` gives an Anatomy, or None for a model that is not its own.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn

from fastgpt import ops, private
from fastgpt.modules import Swap, dropout_p, occupied, swap_of


class Layer(NamedTuple):
    """x + out(attention(qkv(norm_1(x)))), and to that mlp(norm_2(·))."""

    block: nn.Module
    norm_1: nn.Module
    attn: nn.Module
    qkv: tuple[nn.Module, ...]  # one packed projection, or those of queries, keys and values
    out: nn.Module
    norm_2: nn.Module
    mlp: nn.Module
    dropouts: tuple[nn.Module, ...]  # what generation leaves out
    scale: float | None  # of the scores; None is 1 / sqrt(D)
    window: int | None = None  # tokens that a token sees, itself included; None is all before it


class Anatomy(NamedTuple):
    tokens: nn.Embedding
    positions: nn.Embedding
    layers: tuple[Layer, ...]
    norm: nn.Module
    head: nn.Module
    heads: int  # of attention
    containers: tuple[nn.Module, ...]  # that hold the rest, and are walked through without being called
    backend: ops.Backend
    dropouts: tuple[nn.Module, ...] = ()  # of the embedding's sum, which generation leaves out too

    def passed_by(self) -> Iterator[tuple[nn.Module, str]]:
        """Modules that do more than their class, whose calls generation would leave out, and what they do."""
        for module in (*self.containers, *(part for layer in self.layers for part in (layer.block, layer.attn))):
            if (reason := occupied(module)) and not _only_listened_to(module):
                yield module, reason
        for module in (*self.dropouts, *(dropout for layer in self.layers for dropout in layer.dropouts)):
            if dropout_p(module) is None:
                yield module, occupied(module) or "it is no dropout"


def _only_listened_to(module: nn.Module) -> bool:
    """Whether its only hooks are those that transformers leaves once it was asked for hidden states or attentions: they
    keep an output while that is asked for, and change nothing."""
    hooks = private.hooks(module)
    others = private.has_backward_hooks(module) or "parametrizations" in private.children(module)
    theirs = all(getattr(hook, "__module__", "") == "transformers.utils.output_capturing" for hook in hooks)
    return bool(hooks) and theirs and not others


def hooked(owner: Any, *names: str) -> tuple[nn.Module, ...]:
    """Those of the owner's dropouts that have hooks, unless the owner must be called anyway. Generation would not
    call a hook that only looks, and no comparison of logits shows that."""
    if isinstance(owner, nn.Module) and occupied(owner):
        return ()
    found = [getattr(owner, name, None) for name in names]
    return tuple(each for each in found if isinstance(each, nn.Dropout) and occupied(each))


def backend_of(module: Any) -> ops.Backend:
    """The one that accelerate was given, where the module is swapped."""
    swap: Swap | None = swap_of(module)
    return "auto" if swap is None else swap.backend


_BODY, _ATTENTION = ("wte", "wpe", "ln_f"), ("c_attn", "c_proj", "resid_dropout")


def transformer_anatomy(model: Any, heads: str) -> Anatomy | None:
    """Of a model with GPT-2's names, as Hugging Face and nanoGPT have them; `heads` names attention's count."""
    body: Any = getattr(model, "transformer", None)
    blocks: Any = getattr(body, "h", None)
    if not blocks or getattr(model, "lm_head", None) is None or not all(hasattr(body, name) for name in _BODY):
        return None
    if not all(hasattr(getattr(block, "attn", None), name) for block in blocks for name in (heads, *_ATTENTION)):
        return None
    layers = (
        Layer(
            block,
            block.ln_1,
            block.attn,
            (block.attn.c_attn,),
            block.attn.c_proj,
            block.ln_2,
            block.mlp,
            (block.attn.resid_dropout, *hooked(block.mlp, "dropout"), *_of_scores(block.attn)),
            getattr(block.attn, "scaling", None),
        )
        for block in blocks
    )
    containers: tuple = (model, body, blocks)
    attn = blocks[0].attn
    return Anatomy(
        body.wte,
        body.wpe,
        tuple(layers),
        body.ln_f,
        model.lm_head,
        getattr(attn, heads),
        containers,
        backend_of(attn),
        hooked(body, "drop"),
    )


def _of_scores(attn: Any) -> tuple[nn.Module, ...]:
    """The dropout of attention's weights, where the model's own attention calls it and does not just read its p."""
    eager = getattr(getattr(attn, "config", None), "_attn_implementation", None) == "eager"
    return hooked(attn, "attn_dropout") if eager or getattr(attn, "flash", None) is False else ()
