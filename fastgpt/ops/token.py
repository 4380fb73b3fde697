"""Which models one kernel writes a whole token of (kernels/token.py), and why the others' tokens take many.

As in hopper.py: what the table does not hold was not measured, and a kernel serves nobody on a Triton with which its
tests have not passed on a card.
"""

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from fastgpt.kernels import launch, token

INTERPRETED = triton.knobs.runtime.interpret
TRITONS = ("3.6.0", "3.7.1")  # that `python -m bench compile` compiles it with
RAN: tuple[str, ...] = ("3.6.0",)  # with which tests/kernels/test_token_gpu.py has passed on a card


class Measured(NamedTuple):
    """GPTs of which it was faster on a card, or compiles without much spilling: docs/generation.md has the figures."""

    channels: int
    heads: int
    hidden: int
    programs: int = 132  # multiprocessors of an H100 SXM and of an H200
    capability: int | None = 90  # 9.0; None is Triton's interpreter
    context: int = 1024  # at most: longer ones have longer splits of keys, which take more registers
    tiles: dict[str, int] = {}  # noqa: RUF012


TABLE = (Measured(768, 12, 3072),)


class Logits:
    """A token's logits from one launch."""

    def __init__(self, model: token.Model):
        self._model = model
        self.words = model.words  # those of one cache
        self.own_tensors = model.own_tensors

    def __call__(self, ids: Tensor, lengths: Tensor, cache: Tensor, words: Tensor) -> Tensor:
        """ids (1, 1), whose key and value go into the cache (2, L, 1, H, slots, D); lengths (1,), with it counted in;
        words: this cache's. -> float32 (1, 1, V)."""
        with torch.cuda.device(cache.device) if cache.is_cuda else contextlib.nullcontext():
            return self._model.logits(ids, lengths, cache, words)


def whole_token(
    layers: Sequence[tuple], norm: tuple, tables: tuple[Tensor, Tensor], head: Any, heads: int, stream: torch.dtype
) -> Logits | str:
    """The launch for a decoder, or why there is none.

    layers: as Decoder has them, (norm_1, qkv, scale, out, norm_2, fc, gelu, proj) of each; norm: the last (weight,
    bias, eps); tables: the weights of the embeddings (·, C), (context, C); head: (weight, bias) or a form of its own.
    """
    weight, context, hidden = head.weight, len(tables[1]), layers[0][5].weight.shape[0]
    row = measured(weight, heads, hidden, context)
    if isinstance(row, str):
        return row
    if (why := _unlike(layers, norm, tables, head, stream)) is not None:
        return why
    shape = token.Shape(len(layers), weight.shape[1], heads, hidden, weight.shape[0], context, row.programs)
    tiles = token.tiles(shape, **row.tiles)
    if isinstance(tiles, str):
        return tiles
    blocks = [
        token.Layer(norm_1[:2], _pair(qkv), _pair(out), norm_2[:2], _pair(fc), _pair(proj))
        for norm_1, qkv, _, out, norm_2, fc, _, proj in layers
    ]
    scale, gelu = layers[0][2], layers[0][6]
    scale = (shape.channels // heads) ** -0.5 if scale is None else scale
    return Logits(token.Model(blocks, norm[:2], *tables, weight, shape, tiles, scale, norm[2], gelu == "tanh"))


def measured(weight: Tensor, heads: int, hidden: int, context: int) -> Measured | str:
    """The row that serves a model of this head (V, C) on its card, or why there is none. No number is read."""
    card, there = launch.capability(weight), launch.multiprocessors(weight)
    row = next((row for row in TABLE if row.capability == card and row.channels == weight.shape[1]), None)
    if row is None:
        return f"it was not measured for {weight.shape[1]} channels on this device"
    if card is not None and INTERPRETED:
        return "Triton's interpreter runs programs one after another, and these wait for each other"
    if card is not None and triton.__version__ not in TRITONS:
        return f"Triton is {triton.__version__}, it was compiled with {' and '.join(TRITONS)} alone"
    if card is not None and triton.__version__ not in RAN:
        return f"it has not yet run on a card with Triton {triton.__version__}"
    if there is not None and there != row.programs:
        return f"it was not measured on {there} multiprocessors"
    if (heads, hidden) != (row.heads, row.hidden):
        return f"it was not measured for {heads} heads and {hidden} hidden units"
    if context > row.context:
        return f"a context of {context} is longer than the {row.context} it was measured with"
    return row


def _pair(form: Any) -> tuple[Tensor, Tensor | None]:
    return form.weight, form.bias


def _unlike(layers: Sequence[tuple], norm: tuple, tables: Sequence[Tensor], head: Any, stream: Any) -> str | None:
    """What of a model's tensors and numbers is unlike what the kernel reads."""
    norms = [norm, *(layer[place] for layer in layers for place in (0, 4))]
    forms = [layer[place] for layer in layers for place in (1, 3, 5, 7)]
    for form in (*forms, head):
        if form.weight.dtype != torch.bfloat16 or (form.bias is not None and form.bias.dtype != torch.bfloat16):
            return f"a linear layer is {form.weight.dtype}, it was measured in torch.bfloat16"
    if stream != torch.bfloat16:
        return f"the residual stream is {stream}, it was measured in torch.bfloat16"
    if head.bias is not None:
        return "the head has a bias"
    if any(other[2] != norm[2] or other[0] is None or other[0].dtype != norm[0].dtype for other in norms):
        return "the norms differ in eps or dtype, or one has no weight"
    vectors = [part for pair in (*(n[:2] for n in norms), *map(_pair, forms)) for part in pair if part is not None]
    if any(not t.is_contiguous() or t.data_ptr() % 16 for t in (*vectors, *tables, head.weight)):
        return "a weight does not lie in rows from a multiple of 16 bytes on"
    shapes = {tuple(tuple(part.weight.shape) for part in (layer[1], layer[3], layer[5], layer[7])) for layer in layers}
    if len(shapes | {(layer[2], layer[6]) for layer in layers}) != 2:
        return "the layers differ in shape, in their GELU or in the scale of attention"
    return None
