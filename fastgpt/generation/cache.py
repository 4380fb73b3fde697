"""The keys and values of tokens that were read, and how a pass over new tokens attends with them.

`B` batch, `T` time, `C` channels, `H` heads, `D` head dim; `Tq` new tokens.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastgpt import ops
from fastgpt.model import GPTConfig

MAX_STEP = 16  # new tokens that decode_attention takes at once

Windows = Sequence[int | None]  # of each layer; None is one that sees all tokens


class Cache:
    """Keys and values of `rows` sequences of up to `slots` tokens, allocated once.

    A layer with a window has a ring: place p lies in slot p % ring, and the ring is as long as its window and the
    newest tokens of a step together. So a step may be taken back, as speculation does, and what the tokens in its
    place see is still there.
    """

    def __init__(
        self,
        config: GPTConfig,
        rows: int,
        slots: int,
        dtype: torch.dtype,
        device: torch.device,
        windows: Windows = (),
    ):
        """windows: () is None for every layer."""
        self.rows, self.slots = rows, slots
        self.windows = tuple(None if w is None or w >= slots else w for w in windows or [None] * config.n_layer)
        ring = _ring(self.windows, slots)
        self.rings = tuple(w is not None and ring > 0 for w in self.windows)  # whether a layer has one
        full, rounds = _shapes(config, rows, slots, self.windows)
        self.whole = torch.zeros(full, dtype=dtype, device=device)  # of the layers without a ring
        self.round = torch.zeros(rounds, dtype=dtype, device=device)
        self.words: torch.Tensor | None = None  # where one kernel writes a token: its programs' own
        self.k, self.v = self.halves(self.whole)  # of each layer, (rows, H, slots, D)

    def halves(self, whole: Tensor) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Keys and values by layer; whole: self.whole, or its first slots."""
        keys, values = (self.by_layer(*(x.unbind() for x in half)) for half in zip(whole, self.round, strict=True))
        return keys, values

    def by_layer(self, whole: Sequence[Tensor], rounds: Sequence[Tensor]) -> Sequence[Tensor]:
        """What is of each layer, of what is of those without a ring and of those with one."""
        if not any(self.rings):
            return whole
        kinds = iter(whole), iter(rounds)
        return [next(kinds[ring]) for ring in self.rings]

    def clear(self) -> None:
        """Zeros, as it was made."""
        self.whole.zero_()
        self.round.zero_()
        if self.words is not None:
            self.words.zero_()

    @staticmethod
    def size(config: GPTConfig, rows: int, slots: int, dtype: torch.dtype, windows: Windows = ()) -> int:
        """Bytes."""
        return sum(map(math.prod, _shapes(config, rows, slots, windows))) * dtype.itemsize


def _ring(windows: Windows, slots: int) -> int:
    """Slots of the rings, 0 where there would be no fewer than `slots`."""
    ring = max((window + MAX_STEP - 1 for window in windows if window is not None), default=slots)
    return ring if ring < slots else 0


def _shapes(config: GPTConfig, rows: int, slots: int, windows: Windows) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of what the layers without a ring have, and of the rings."""
    ring = _ring(windows, slots)
    count = sum(window is not None for window in windows) if ring else 0
    head_dim = config.n_embd // config.n_head
    return (
        (2, config.n_layer - count, rows, config.n_head, slots, head_dim),
        (2, count, rows, config.n_head, ring, head_dim),
    )


class Prompts:
    """A pass over B prompts, each token over those of its prompt up to itself.

    cache: keeps them, unless None; of a multiple of B rows, each prompt that many times, in a row. lengths: (B,), of
    the prompts, which rings are filled by; None where all are T long. windows: of a pass without a cache. What pads a
    prompt is at its last place, so that no weight is read that the prompt itself would not need: one may be NaN.
    """

    def __init__(
        self,
        steps: ops.DecodingSteps,
        heads: int,
        prompts: int,
        time: int,
        cache: Cache | None = None,
        lengths: Tensor | None = None,
        windows: Windows = (),
    ):
        self._causal_attention, self._heads = steps.causal_attention, heads
        self._kept = () if cache is None else cache.by_layer(cache.whole.unbind(1), cache.round.unbind(1))
        self._cache, self._copies = cache, 1 if cache is None else cache.rows // prompts
        self._lengths, self._windows = lengths, windows if cache is None else cache.windows
        self.positions: Tensor | None = None  # the first ones
        if lengths is not None:
            places = torch.arange(time, dtype=torch.int64, device=lengths.device)
            self.positions = torch.minimum(places, lengths[:, None] - 1)

    def attend(self, layer: int, qkv: Tensor, scale: float | None) -> Tensor:
        """(B, T, 3C) -> (B, T, C)."""
        if self._cache is not None:
            new, kept = _split(qkv, self._heads)[1:], self._kept[layer]  # (2, B, H, T, D), (2, rows, H, slots, D)
            if new.shape[3] > kept.shape[3]:
                new = torch.stack([self._last(each, kept.shape[3]) for each in new])
            kept.unflatten(1, (-1, self._copies))[:, :, :, :, : new.shape[3]] = new[:, :, None]
        window = self._windows[layer] if self._windows else None
        if window is not None and window >= qkv.shape[1]:
            window = None
        return self._causal_attention(qkv, self._heads, scale, window)

    def _last(self, new: Tensor, ring: int) -> Tensor:
        """(B, H, T, D) -> (B, H, ring, D), the last tokens of each prompt in their slots."""
        batch, heads, time, dim = new.shape
        slots = torch.arange(ring, dtype=torch.int64, device=new.device)
        last = torch.full_like(slots[:1], time) if self._lengths is None else self._lengths
        last = last[:, None] - 1
        places = (last - (last - slots) % ring).clamp(min=0)  # of a slot without a token, which is never read, any
        return new.gather(2, places[:, None, :, None].expand(batch, heads, ring, dim))


class Step:
    """A pass over the next few tokens of each row, which go into the cache first.

    lengths: (B,), of the rows with the new tokens counted in.
    """

    _lengths: Tensor | None  # None where they are all the caches' slots

    def __init__(self, steps: ops.DecodingSteps, cache: Cache, lengths: Tensor, new: int):
        self._steps, self._lengths, whole = steps, lengths, cache.whole
        self._windows, self._rings, self._of_rings = cache.windows, cache.rings, lengths
        reached = None if steps.on_kernels else _on_the_host(lengths)  # a kernel reads no further by itself
        if reached is not None:
            longest = max(reached)
            whole = whole[..., :longest, :]
            if min(reached) == longest:
                self._lengths = None
                self.positions = torch.arange(longest - new, longest, dtype=torch.int64, device=lengths.device)
                newest = whole[..., longest - new :, :].unbind(1)  # of each layer, (2, B, H, Tq, D)
                self._newest = cache.by_layer(newest, cache.round.unbind(1))
        if self._lengths is not None:
            self.positions = lengths[:, None] - 1  # of the new tokens
            if new > 1:
                self.positions = self.positions + torch.arange(1 - new, 1, dtype=torch.int64, device=lengths.device)
        self._k, self._v = cache.halves(whole)

    def attend(self, layer: int, qkv: Tensor, scale: float | None) -> Tensor:
        """(B, Tq, 3C) -> (B, Tq, C), each token over all of its row up to itself."""
        keys, values, ring = self._k[layer], self._v[layer], self._rings[layer]
        lengths = self._of_rings if ring else self._lengths
        if lengths is None:
            packed = _split(qkv, keys.shape[1])
            self._newest[layer].copy_(packed[1:])
            y = self._steps.attend(packed[0], keys, values, lengths, scale, self._windows[layer])
        else:
            y = self._steps.append_and_attend(qkv, keys, values, lengths, scale, self._windows[layer], ring)
        return y.transpose(1, 2).reshape(*qkv.shape[:2], -1)


def _split(qkv: Tensor, heads: int) -> Tensor:
    """(B, T, 3C) -> queries, keys and values, a view (3, B, H, T, D)."""
    return qkv.view(*qkv.shape[:2], 3, heads, -1).permute(2, 0, 3, 1, 4)


def _on_the_host(lengths: Tensor) -> list[int] | None:
    """The lengths, where to ask for them does not stop a queue of steps: not on a GPU."""
    return None if lengths.is_cuda else lengths.tolist()
