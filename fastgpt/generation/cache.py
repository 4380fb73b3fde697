"""The keys and values of tokens that were read, and how a pass over new tokens attends with them.

`B` batch, `T` time, `C` channels, `H` heads, `D` head dim; `Tq` new tokens.
"""

import math

import torch
from torch import Tensor

from fastgpt import ops
from fastgpt.model import GPTConfig


class Cache:
    """Keys and values of `rows` sequences of up to `slots` tokens, allocated once."""

    def __init__(self, config: GPTConfig, rows: int, slots: int, dtype: torch.dtype, device: torch.device):
        self.rows, self.slots = rows, slots
        self.whole = torch.zeros(_shape(config, rows, slots), dtype=dtype, device=device)
        self.words: torch.Tensor | None = None  # where one kernel writes a token: its programs' own
        self.k, self.v = (half.unbind() for half in self.whole)  # of each layer, (rows, H, slots, D)

    def clear(self) -> None:
        """Zeros, as it was made."""
        self.whole.zero_()
        if self.words is not None:
            self.words.zero_()

    @staticmethod
    def size(config: GPTConfig, rows: int, slots: int, dtype: torch.dtype) -> int:
        """Bytes."""
        return math.prod(_shape(config, rows, slots)) * dtype.itemsize


def _shape(config: GPTConfig, rows: int, slots: int) -> tuple[int, ...]:
    return 2, config.n_layer, rows, config.n_head, slots, config.n_embd // config.n_head


class Prompts:
    """A pass over B prompts, each token over those of its prompt up to itself.

    cache: keeps them, unless None; of a multiple of B rows, each prompt that many times, in a row.
    """

    positions = None  # the first ones

    def __init__(self, steps: ops.DecodingSteps, heads: int, prompts: int, cache: Cache | None = None):
        self._causal_attention, self._heads = steps.causal_attention, heads
        self._cache, self._copies = cache, 1 if cache is None else cache.rows // prompts

    def attend(self, layer: int, qkv: Tensor, scale: float | None) -> Tensor:
        """(B, T, 3C) -> (B, T, C)."""
        if self._cache is not None:
            _, k, v = _split(qkv, self._heads)
            for kept, new in ((self._cache.k, k), (self._cache.v, v)):
                kept[layer].unflatten(0, (-1, self._copies))[:, :, :, : qkv.shape[1]] = new[:, None]
        return self._causal_attention(qkv, self._heads, scale)


class Step:
    """A pass over the next few tokens of each row, which go into the cache first.

    lengths: (B,), of the rows with the new tokens counted in.
    """

    _lengths: Tensor | None  # None where they are all the caches' slots

    def __init__(self, steps: ops.DecodingSteps, cache: Cache, lengths: Tensor, new: int):
        self._steps, self._lengths, whole = steps, lengths, cache.whole
        reached = None if steps.on_kernels else _on_the_host(lengths)  # a kernel reads no further by itself
        if reached is not None:
            longest = max(reached)
            whole = whole[..., :longest, :]
            if min(reached) == longest:
                self._lengths = None
                self.positions = torch.arange(longest - new, longest, dtype=torch.int64, device=lengths.device)
                self._newest = whole[..., longest - new :, :].unbind(1)  # of each layer, (2, B, H, Tq, D)
        if self._lengths is not None:
            self.positions = lengths[:, None] - 1  # of the new tokens
            if new > 1:
                self.positions = self.positions + torch.arange(1 - new, 1, dtype=torch.int64, device=lengths.device)
        self._k, self._v = (half.unbind() for half in whole)

    def attend(self, layer: int, qkv: Tensor, scale: float | None) -> Tensor:
        """(B, Tq, 3C) -> (B, Tq, C), each token over all of its row up to itself."""
        keys, values = self._k[layer], self._v[layer]
        packed = _split(qkv, keys.shape[1])
        if self._lengths is None:
            self._newest[layer].copy_(packed[1:])
        else:
            self._steps.append(qkv, keys, values, self._lengths)
        y = self._steps.attend(packed[0], keys, values, self._lengths, scale)
        return y.transpose(1, 2).reshape(*qkv.shape[:2], -1)


def _split(qkv: Tensor, heads: int) -> Tensor:
    """(B, T, 3C) -> queries, keys and values, a view (3, B, H, T, D)."""
    return qkv.view(*qkv.shape[:2], 3, heads, -1).permute(2, 0, 3, 1, 4)


def _on_the_host(lengths: Tensor) -> list[int] | None:
    """The lengths, where to ask for them does not stop a queue of steps: not on a GPU."""
    return None if lengths.is_cuda else lengths.tolist()
