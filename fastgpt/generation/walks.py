"""A decoder's walks over so few rows that calls and weights take all the time, of models whose parts are all plain.

What Decoder's own walk gives, in as few calls as there can be. `B` batch, `T` time, `C` channels, `H` heads,
`D` head dim.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from fastgpt.generation.decoder import Cache, Decoder


def few_rows_on_kernels(decoder: "Decoder", x: Tensor, attend: Callable[[int, Tensor], Tensor]) -> Tensor:
    """Embedded tokens (B, T, C) -> what the head sees, (B, T, C): four launches a layer beside attention's.

    attend(layer, qkv) turns (B, T, 3C) into (B, T, C).
    """
    steps = decoder.steps
    shape, x = x.shape, x.flatten(0, 1)
    branch: Any = None
    bias: Any = None
    parts: Any  # all of them plain
    for index, parts in enumerate(decoder.layers):
        qkv, x = steps.norm_linear(x, branch, bias, parts.norm_1, parts.qkv[0], "")
        y = attend(index, qkv.view(*shape[:2], -1))
        branch, bias = steps.linear(y.flatten(0, 1), parts.out.weight, None), parts.out.bias
        hidden, x = steps.norm_linear(x, branch, bias, parts.norm_2, parts.mlp.fc, parts.mlp.gelu)
        branch, bias = steps.linear(hidden, parts.mlp.proj.weight, None), parts.mlp.proj.bias
    normed, _ = decoder.add_norm(decoder.norm, branch, x, bias)
    return normed.view(shape)


def one_row_on_cpu(decoder: "Decoder", row: Tensor, place: int, cache: "Cache") -> Tensor:
    """The only row's token at `place`, embedded (1, C), -> what the head sees, (1, C). `row` is overwritten.

    Each product sweeps the caches of the processor with its weights, so the calls between two of them begin cold: one
    takes 10 to 20 µs, three to ten times what it takes in a loop of its own. Hence the plain calls.
    """
    width = row.shape[1:]
    slots = cache.whole[..., place : place + 1, :].unbind(1)  # of each layer's keys and values, (2, 1, H, 1, D)
    keys, values = (half.unbind() for half in cache.whole[..., : place + 1, :])
    parts: Any
    for index, parts in enumerate(decoder.layers):
        weight, bias, eps = parts.norm_1
        qkv = parts.qkv[0](torch.layer_norm(row, width, weight, bias, eps))
        qkv = qkv.view(3, 1, decoder.heads, 1, decoder.head_dim)
        slots[index].copy_(qkv[1:])
        y = F.scaled_dot_product_attention(qkv[0], keys[index], values[index], scale=parts.scale)
        row += parts.out(y.view(1, -1))
        weight, bias, eps = parts.norm_2
        hidden = parts.mlp.fc(torch.layer_norm(row, width, weight, bias, eps))
        row += parts.mlp.proj(F.gelu(hidden, approximate=parts.mlp.gelu))
    norm: Any = decoder.norm
    return F.layer_norm(row, width, *norm)
