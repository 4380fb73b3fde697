"""The fused step of decoding: a few new tokens through all layers, of models whose parts are all plain weights.

`B` batch, `Tq` new tokens, `C` channels.
"""

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

from fastgpt.generation.parts import Norm, Parts
from fastgpt.ops.decoding import OnPyTorch


def fused_step(
    steps: OnPyTorch, layers: Iterable[Parts], norm: Norm, x: Tensor, attend: Callable[[int, Tensor], Tensor]
) -> Tensor:
    """Embedded tokens (B, Tq, C) -> what the head sees, (B, Tq, C): each norm is of one call with the residual add
    before it and the linear layer after it. The block's formula, as model.Block has it.

    attend(layer, qkv) turns (B, Tq, 3C) into (B, Tq, C).
    """
    shape, x = x.shape, x.flatten(0, 1)
    branch: Tensor | None = None
    bias: Tensor | None = None
    layer: Any  # whose parts are all plain
    for index, layer in enumerate(layers):
        qkv, x = steps.norm_linear(x, branch, bias, layer.norm_1, layer.qkv[0], "")
        y = attend(index, qkv.view(*shape[:2], -1))
        branch, bias = steps.product(y.view(-1, shape[2]), layer.out)
        hidden, x = steps.norm_linear(x, branch, bias, layer.norm_2, layer.mlp.fc, layer.mlp.gelu)
        branch, bias = steps.product(hidden, layer.mlp.proj)
    return steps.add_norm(x, branch, bias, norm).view(shape)
