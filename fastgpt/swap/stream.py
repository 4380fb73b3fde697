"""The residual stream through swapped blocks: a sum that waits for the next norm, to be made in one pass with it."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from fastgpt import ops
from fastgpt.modules import plain, swap_of
from fastgpt.swap import layers


class Stream:
    """x, and a branch that is still to be added to it: x + dropout(branch + bias). (B, T, C) both.

    Blocks hand it on in place of their sum, and the next norm, in the next block too, adds and normalises in one pass.
    """

    def __init__(self, x: Tensor | None = None, last: Any = None):
        self.x, self.last = x, last  # last: the block that must hand on the sum itself, where others see it
        self.branch: Tensor | None = None
        self.bias: Tensor | None = None
        self.p = 0.0

    def add(self, branch: Tensor, bias: Tensor | None = None, p: float = 0.0) -> None:
        """Let x + dropout(branch + bias) be the stream. p: the dropout's probability, now."""
        self.total()
        self.branch, self.bias, self.p = branch, bias, p

    def total(self) -> Any:
        """The sum, with nothing left to be added."""
        if self.branch is not None:
            x: Any = self.x
            self.x = x + F.dropout(_biased(self.branch, self.bias), self.p)
            self.branch = self.bias = None
        return self.x

    def normed(self, norm: Any, casts: bool) -> Tensor:
        """The norm of the sum, which x is then; in one pass where the norm is ours.

        casts: whether the norm's reader casts it to the branch's dtype at once. In one pass that is the dtype it comes
        in, which under autocast is not the stream's: none but such a reader may be given it.
        """
        branch, x, swap = self.branch, self.x, swap_of(norm)
        if branch is None or x is None or swap is None or swap.function is not layers.layer_norm:
            return norm(self.total())
        weight, shift = layers.affine(norm, swap)
        if not (casts or branch.dtype == x.dtype) or not plain(branch, x, weight, shift):
            return norm(self.total())
        eps = getattr(norm, "eps", 1e-5)
        y, self.x = ops.add_layer_norm(
            branch, x, weight, shift, eps, x_bias=self.bias, dropout_p=self.p, backend=swap.backend
        )
        self.branch = self.bias = None
        return y

    def add_mlp(self, mlp: Any, norm: Any, p: float, waits: bool) -> None:
        """Let the MLP of the sum's norm be the branch, before a dropout of p. waits: for a norm, and then the bias of
        the MLP's last layer does too; a sum that is made at once takes it from the layer."""
        normed = self.normed(norm, casts=swap_of(mlp) is not None)
        found = layers.mlp_branch(mlp, normed) if waits else None
        if found is None:
            return self.add(mlp(normed), None, p)
        branch, bias, inner = found
        if inner and p:  # two dropouts, one behind the other
            branch, bias, inner = F.dropout(_biased(branch, bias), inner), None, 0.0
        return self.add(branch, bias, p or inner)


def _biased(branch: Tensor, bias: Tensor | None) -> Tensor:
    """In the branch's dtype, to which autocast casts a linear layer's bias."""
    return branch if bias is None else branch + bias.to(branch.dtype)
