"""Steps that a device is given before the host has seen what earlier ones wrote.

A GPU's queue never runs empty so: while the host reads the tokens of some steps, looks for stops and hands them to who
reads the stream, the next ones run. What comes after a row's end is written to that row's tensors, and never told.
"""

import collections
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

EVERY = 4  # steps of a GPU whose tokens come to the host in one copy
AHEAD = 2 * EVERY - 1  # steps at most that a GPU has been given beyond the one that is told


class Told(NamedTuple):
    """One step's next-token ids, on the host."""

    ids: list[list[int]]  # new ones of each row; -1 where the logits were not finite
    logprobs: list[list[float]] | None


class Arriving(Protocol):
    def wait(self) -> list[Told]:
        """What the steps told, in order, once it is there."""


class Device(Protocol):
    every: int  # steps at most between two copies to the host
    depth: int  # copies that are under way before the first of them is waited for

    def advance(self, count: int) -> None:
        """So many steps more, begun."""

    def send(self, first: int, count: int) -> Arriving:
        """Begin to copy what the last `count` steps told, of which the first has this number."""


def told(device: Device, limit: int, ended: Callable[[], bool]) -> Iterator[Told]:
    """What each of `limit` steps tells, in order, until `ended` says after one that no row goes on.

    The first step is waited for at once: whoever reads the stream waits for it. From then on the device has been given
    at most depth * every - 1 steps beyond the one that is told.
    """
    under_way: collections.deque[Arriving] = collections.deque()
    begun = 0
    while begun < limit or under_way:
        count = min(device.every if begun else 1, limit - begun)
        if count:
            device.advance(count)
            under_way.append(device.send(begun, count))
            begun += count
        if 1 < begun < limit and len(under_way) < device.depth:
            continue
        for each in under_way.popleft().wait():
            yield each
            if ended():
                return


class Readback:
    """The way of a batch's news to the host: pinned memory on a GPU, of which the copies in turn are one and another.

    news (rows, ring), logprobs (rows, ring) or None: where the token of a row's place n stands at n modulo ring.
    starts: the place of each row's first new token.
    """

    def __init__(self, news: Tensor, logprobs: Tensor | None, asynchronous: bool):
        self.depth, self.starts = 2 if asynchronous else 1, [0] * len(news)
        self._sources = [tensor for tensor in (news, logprobs) if tensor is not None]
        self._asynchronous = asynchronous
        self._buffers = [[self._buffer(each) for each in self._sources] for _ in range(self.depth)]
        self._events = [self._event() for _ in range(self.depth)]
        self._sent = 0

    def _buffer(self, tensor: Tensor) -> Tensor:
        """The tensor itself, where it is read before the next step."""
        return torch.empty_like(tensor, device="cpu", pin_memory=True) if self._asynchronous else tensor

    def _event(self) -> torch.cuda.Event | None:
        return torch.cuda.Event() if self._asynchronous else None

    def send(self, first: int, count: int) -> "Copy":
        """As Device.send. At most `depth` copies are under way."""
        turn = self._sent % self.depth
        self._sent += 1
        buffers, event = self._buffers[turn], self._events[turn]
        if event is not None:
            self._copy(buffers, event)
        return Copy(event, buffers, self.starts, range(first, first + count))

    def _copy(self, buffers: list[Tensor], event: torch.cuda.Event) -> None:
        for buffer, tensor in zip(buffers, self._sources, strict=True):
            buffer.copy_(tensor, non_blocking=True)
        event.record(torch.cuda.current_stream(self._sources[0].device))


class Copy(NamedTuple):
    event: torch.cuda.Event | None
    buffers: list[Tensor]
    starts: list[int]
    steps: range

    def wait(self) -> list[Told]:
        if self.event is not None:
            self.event.synchronize()
        ids, *logprobs = (buffer.tolist() for buffer in self.buffers)
        return [Told(self._of(ids, step), self._of(logprobs[0], step) if logprobs else None) for step in self.steps]

    def _of(self, rows: list[list], step: int) -> list[list]:
        return [[row[(start + step) % len(row)]] for row, start in zip(rows, self.starts, strict=True)]
