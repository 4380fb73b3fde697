"""The linear layers of a decoder, and how their weights lie in memory where one row at a time is multiplied.

To write one token reads every weight once, so it takes as long as the memory does: what counts is the order in which
the weights are read, and the pages that they lie on. `N` outputs, `K` inputs.
"""

import threading
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt import reference
from fastgpt.memory import LargePages

_HALVES = (torch.bfloat16, torch.float16)
# PyTorch's embedding bags are compiled for the processor by FBGEMM where that is built in, and are slow elsewhere.
_FAST_BAGS = "fbgemm" in torch.backends.quantized.supported_engines and (
    torch.backends.cpu.get_cpu_capability().startswith("AVX")
)
_TILE = 128  # outputs; rows of weights that are transposed while a core's cache holds them
# Tokens that make a layout worth while. On a CPU it takes as long as 5 to 10 tokens of float32, as 10 to 20 of 16 bits,
# and saves an eighth of the time of each, or of 16 bits without AVX-512 more than a third. Large pages take up to 25
# tokens more, where the system must ask for them: a virtual machine that reports its free pages to its host.
_FROM, _HALVES_FROM, _LARGE_PAGES_FROM = 64, 256 if reference.AVX512 else 32, 1000


class Linear(NamedTuple):
    """(…, K) -> (…, N)."""

    weight: Tensor  # (N, K), in any order in memory
    bias: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        return reference.linear(x, self.weight, self.bias)


class BagLinear:
    """(…, K) -> (…, N) with weights of 16 bits, on a CPU: one row as a few embedding bags.

    An embedding bag is a sum of a table's rows, each times a factor. With the K weights of some outputs as its rows and
    x as the factors it is a product that is summed in float32 and rounded once, over weights that lie in the order in
    which they are read: in turns from STREAMS places of a bag, for a processor fetches several streams ahead at once.
    All of GPT-2 124M takes 0.65 of the time of PyTorch's products of matrix and vector, with one stream 0.73 (bfloat16,
    Xeon with AMX, 2 cores, PyTorch 2.13). The bias is one more row, of factor 1. More rows are multiplied as always.
    """

    BLOCK, STREAMS = 384, 4  # outputs of a bag; places of its table that are read in turns

    def __init__(self, weight: Tensor, bias: Tensor | None, empty: Callable[..., Tensor] = torch.empty):
        outputs, inputs = weight.shape
        self.weight, self.bias = weight, bias
        self._bags = -(-outputs // self.BLOCK)
        table = empty((self._bags, inputs + 1, self.BLOCK), dtype=weight.dtype)
        for rows, part in zip(table, weight.split(self.BLOCK), strict=True):
            _transpose(part, rows[:inputs, : len(part)])
            rows[:inputs, len(part) :] = 0
        table[:, inputs] = 0
        if bias is not None:
            table[:, inputs] = F.pad(bias, (0, self._bags * self.BLOCK - outputs)).view(self._bags, self.BLOCK)
        self._table = table.view(-1, self.BLOCK)
        self._streams = next(streams for streams in (self.STREAMS, 2, 1) if inputs % streams == 0)
        order = torch.arange(inputs, dtype=torch.int32).view(self._streams, -1).t().flatten()
        order = torch.cat([order, order.new_tensor([inputs])])  # the bias
        self._starts = torch.arange(0, len(self._table), inputs + 1, dtype=torch.int32)
        self._rows = (self._starts[:, None] + order).view(-1)

    def __call__(self, x: Tensor) -> Tensor:
        outputs, inputs = self.weight.shape
        if x.numel() != inputs:
            return reference.linear(x, self.weight, self.bias)
        factors, by_stream = _scratch.factors(self._bags, inputs, self._streams, x.dtype)
        by_stream.copy_(x.reshape(self._streams, -1))
        y = torch.embedding_bag(self._table, self._rows, self._starts, False, 0, False, factors)[0]
        y = y.view(*x.shape[:-1], -1)
        return y if y.shape[-1] == outputs else y[..., :outputs]


class _Scratch(threading.local):
    """Each thread's own."""

    def __init__(self) -> None:
        self._kept: dict[tuple[int, int, int, torch.dtype], tuple[Tensor, Tensor]] = {}

    def factors(self, bags: int, inputs: int, streams: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(bags * (inputs + 1),), a bag's last 1, and of the others a view (bags, streams, inputs / streams)."""
        kind = bags, inputs, streams, dtype
        if kind not in self._kept:
            ones = torch.ones(bags, inputs + 1, dtype=dtype)
            self._kept[kind] = ones.view(-1), ones[:, :inputs].unflatten(1, (-1, streams)).mT
        return self._kept[kind]


_scratch = _Scratch()


class Layout:
    """How the layers of a decoder lie that is to write about so many tokens, one row at a time."""

    def __init__(self, tokens: int):
        self._tokens = tokens
        self._empty: Callable[..., Tensor] = LargePages().empty if tokens >= _LARGE_PAGES_FROM else torch.empty

    def linear(self, weight: Tensor, bias: Tensor | None) -> Linear | BagLinear:
        """The layer with its weight (N, K) in the order in memory in which a single row reads it fastest.

        On a GPU that is (N, K), as the kernels for few rows want it. On a CPU it is (K, N) in float32 where there are
        at least as many outputs as inputs: on two busy cores of an AMD EPYC (Zen 3), PyTorch 2.13, that takes 0.5 to
        0.65 of the time of (N, K) where there are more, 0.8 to 0.9 where there are as many; on a Xeon with AMX 0.77
        for the head's 50257 outputs, 0.92 to 0.96 for less.
        """
        halves = weight.device.type == "cpu" and weight.dtype in _HALVES
        if self._tokens < (_HALVES_FROM if halves else _FROM):
            return Linear(weight, bias)
        if weight.device.type != "cpu" or (halves and not _FAST_BAGS):
            return Linear(weight.contiguous(), bias)
        if halves:
            return BagLinear(weight.contiguous(), bias, self._empty)
        outputs, inputs = weight.shape
        if outputs >= inputs:
            lying = self._empty((inputs, outputs), dtype=weight.dtype)
            _transpose(weight, lying)
            return Linear(lying.t(), bias)
        return Linear(self._empty(weight.shape, dtype=weight.dtype).copy_(weight), bias)


def _transpose(weight: Tensor, out: Tensor) -> None:
    """(N, K) into (K, N), in 0.45 of the time of one copy of it all."""
    if weight.stride(0) == 1:  # as Hugging Face keeps it
        out.copy_(weight.t())
        return
    for part, columns in zip(weight.split(_TILE), out.split(_TILE, dim=1), strict=True):
        columns.copy_(part.t())
