"""The linear layers of a decoder, and how their weights lie in memory where one row at a time is multiplied.

To write one token reads every weight once, so it takes as long as the memory does: what counts is the order in which
the weights are read, and the pages that they lie on. `N` outputs, `K` inputs.
"""

import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt.memory import LargePages
from fastgpt.ops import pytorch

_HALVES = (torch.bfloat16, torch.float16)
# PyTorch's embedding bags are compiled for the processor by FBGEMM where that is built in, and are slow elsewhere.
_FAST_BAGS = "fbgemm" in torch.backends.quantized.supported_engines and (
    torch.backends.cpu.get_cpu_capability().startswith("AVX")
)
_TILE = 128  # outputs; rows of weights that are transposed while a core's cache holds them
# Tokens that make a layout worth while. On a CPU it takes the time of 5 to 10 tokens of float32, and saves a tenth of
# the time of each later one with AVX-512, more on an EPYC with AVX2 (see _wide); of 16 bits a quarter and more.
# Large pages save some more, and may take 40 tokens' time to get, where a virtual machine gave its free ones back.
_FROM, _FLOAT32_FROM, _LARGE_PAGES_FROM = 32, 96 if pytorch.AVX512 else 32, 1000


Empty = Callable[[Sequence[int], torch.dtype], Tensor]


def _ordinary(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="cpu")


class Linear(NamedTuple):
    """(…, K) -> (…, N)."""

    weight: Tensor  # (N, K), in any order in memory
    bias: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        return pytorch.linear(x, self.weight, self.bias)


class BagLinear:
    """(…, K) -> (…, N) with weights of 16 bits, on a CPU: one row as a few embedding bags.

    An embedding bag is a sum of a table's rows, each times a factor. With the K weights of some outputs as its rows and
    x as the factors it is a product that is summed in float32 and rounded once, over weights that lie in the order in
    which they are read: in turns from STREAMS places of a bag, for a processor fetches several streams ahead at once.
    All of GPT-2 124M takes 0.65 of the time of PyTorch's products of matrix and vector, with one stream 0.73 (bfloat16,
    Xeon with AMX, 2 cores, PyTorch 2.13). The bias is one more row, of factor 1. More rows are multiplied as always.
    """

    STREAMS = 4

    def __init__(self, weight: Tensor, bias: Tensor | None, empty: Empty):
        outputs, inputs = weight.shape
        self.weight, self.bias = weight, bias
        # A bag is summed by one thread, in registers: 24 of AVX-512, or fewer where there would not be a bag for each.
        threads = torch.get_num_threads()
        block = next((block for block in (384, 192) if outputs >= threads * block), 96)
        bags = -(-outputs // block)
        table = empty((bags, inputs + 1, block), weight.dtype)
        for rows, part in zip(table, weight.split(block), strict=True):
            _transpose(part, rows[:inputs, : len(part)])
            rows[:inputs, len(part) :] = 0
        table[:, inputs] = 0
        if bias is not None:
            table[:, inputs] = F.pad(bias, (0, bags * block - outputs)).view(bags, block)
        self._table = table.view(-1, block)
        streams = next(streams for streams in (self.STREAMS, 2, 1) if inputs % streams == 0)
        order = torch.arange(inputs, dtype=torch.int32, device="cpu").view(streams, -1).t().flatten()
        order = torch.cat([order, order.new_tensor([inputs])])  # the bias
        self._starts = torch.arange(0, len(self._table), inputs + 1, dtype=torch.int32, device="cpu")
        self._rows = (self._starts[:, None] + order).view(-1)
        self._inputs, self._whole = inputs, outputs == bags * block
        self._factors, self._by_stream = _Factors(bags, inputs, streams, weight.dtype), (streams, inputs // streams)

    def __call__(self, x: Tensor) -> Tensor:
        if x.numel() != self._inputs:
            return pytorch.linear(x, self.weight, self.bias)
        factors, by_stream = _scratch.factors(self._factors)
        by_stream.copy_(x.reshape(self._by_stream))
        y = torch.embedding_bag(self._table, self._rows, self._starts, False, 0, False, factors)[0]
        y = y.view(1, -1) if self._whole else y.view(1, -1)[:, : len(self.weight)]
        return y if x.dim() == 2 else y.view(*x.shape[:-1], -1)


class _Factors(NamedTuple):
    """The shape of what x is written to."""

    bags: int
    inputs: int
    streams: int
    dtype: torch.dtype


class _Scratch(threading.local):
    """Each thread's own."""

    def __init__(self) -> None:
        self._kept: dict[_Factors, tuple[Tensor, Tensor]] = {}

    def factors(self, kind: _Factors) -> tuple[Tensor, Tensor]:
        """(bags * (inputs + 1),), a bag's last 1, and of the others a view (bags, streams, inputs / streams)."""
        if kind not in self._kept:
            bags, inputs, streams, dtype = kind
            with torch.inference_mode(False):  # where it would stay a tensor that later calls may not write to
                ones = torch.ones(bags, inputs + 1, dtype=dtype, device="cpu")
            self._kept[kind] = ones.view(-1), ones[:, :inputs].unflatten(1, (-1, streams)).mT
        return self._kept[kind]


_scratch = _Scratch()


class Layout:
    """How a decoder's layers lie that is to write about so many tokens, `rows` at a time, on kernels or on PyTorch."""

    def __init__(self, tokens: int, rows: int = 1, on_kernels: bool = False):
        self._tokens, self._alone, self._on_kernels = tokens, rows == 1, on_kernels
        self._large_pages = tokens >= _LARGE_PAGES_FROM
        self._empty: Empty = LargePages().empty if self._large_pages else _ordinary

    def linear(self, weight: Tensor, bias: Tensor | None) -> Linear | BagLinear:
        """The layer with its weight (N, K) in the order in memory in which it is read fastest."""
        if self._on_kernels or weight.is_cuda:  # (N, K), as the kernels for few rows want it
            return Linear(weight.contiguous() if self._tokens >= _FROM else weight, bias)
        halves = weight.dtype in _HALVES
        pays = self._alone and self._tokens >= (_FROM if halves else _FLOAT32_FROM)
        if not (pays and weight.is_cpu and (bias is None or bias.dtype == weight.dtype)):
            return Linear(weight, bias)
        if halves and _FAST_BAGS:
            return BagLinear(weight.contiguous(), bias, self._empty)
        return Linear(weight.contiguous() if halves else self._wide(weight), bias)

    def _wide(self, weight: Tensor) -> Tensor:
        """(K, N) in memory where there are at least as many outputs as inputs. On two busy cores of an AMD EPYC (Zen
        3), PyTorch 2.13, that takes 0.5 to 0.65 of the time of (N, K) where there are more, 0.8 to 0.9 where there are
        as many; on a Xeon with AMX 0.77 for the head's 50257 outputs, 0.92 to 0.96 for less.
        """
        outputs, inputs = weight.shape
        turned = outputs >= inputs
        if weight.stride(0 if turned else 1) == 1 and not self._large_pages:
            return weight
        shape = (inputs, outputs) if turned else (outputs, inputs)
        lying = self._empty(shape, weight.dtype)
        if not turned:
            return lying.copy_(weight)
        _transpose(weight, lying)
        return lying.t()


def _transpose(weight: Tensor, out: Tensor) -> None:
    """(N, K) into (K, N), in 0.45 of the time of one copy of it all."""
    if weight.stride(0) == 1:  # as Hugging Face keeps it
        out.copy_(weight.t())
        return
    for part, columns in zip(weight.split(_TILE), out.split(_TILE, dim=1), strict=True):
        columns.copy_(part.t())
