"""A GPU that is none, for what generation does with one: what it is given waits in a queue, and runs when it likes.

A Batch on the CPU takes the ways of one on a GPU: captures, replays, copies that arrive late. The order of what is
given to the device is kept, as on a stream; when it runs, beside the host, is drawn.
"""

import collections
import contextlib
import random

import pytest
import torch

from fastgpt.generation import batch
from fastgpt.generation.ahead import Readback
from fastgpt.generation.batch import Batch
from fastgpt.generation.kept import clear_all


class Card:
    """The device: its queue, and a log of what it was given."""

    def __init__(self, seed=0):
        self.random, self.queue, self.log = random.Random(seed), collections.deque(), []
        self.steps = 0  # that it was given in this call

    def give(self, command):
        self.queue.append(command)
        for _ in range(self.random.choice((0, 0, 1, 3, 99))):
            self.work()

    def work(self):
        if self.queue:
            self.queue.popleft()()

    def drain(self):
        while self.queue:
            self.work()


class Event:
    def __init__(self, card):
        self.card, self.done = card, True

    def synchronize(self):
        while not self.done:
            self.card.work()


class Graph:
    def __init__(self, card, step):
        self.card, self.step = card, step

    def replay(self):
        self.card.log.append("replay")
        self.step()


@contextlib.contextmanager
def card(seed=0):
    """Batches made inside are on a Card. Its draws are not those of a capture: a captured step runs at each replay."""
    device = Card(seed)

    class Late(Readback):
        def _buffer(self, tensor):
            return torch.full_like(tensor, -7)

        def _event(self):
            return Event(device)

        def _copy(self, buffers, event):
            def copy():
                for buffer, tensor in zip(buffers, self._sources, strict=True):
                    buffer.copy_(tensor)
                event.done = True

            assert event.done, "a buffer is written to before it was read"
            event.done = False
            device.give(copy)

    def captured(self, step):
        device.log.append("capture")
        return Graph(device, step)

    def warmed(_, step):
        device.log.append("warm")
        step()

    advance, begin = Batch._advance, Batch.begin

    def advance_later(self, count):
        decoder = self.decoder

        def run():
            now = self.__dict__.get("decoder")  # none after the call
            self.decoder = decoder
            advance(self, count)
            self.decoder = now
            if now is None:
                del self.decoder

        device.steps += count
        device.give(run)

    def begin_in_order(self, decoder, *given):
        device.drain()  # what begin writes comes after all that the device was given before
        device.steps = 0
        device.log.append("begin")
        self.decoder = decoder
        return begin(self, decoder, *given)

    clear_all()  # what another card's batches have kept
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batch, "is_queued", lambda _: True)
        patch.setattr(batch, "Readback", Late)
        patch.setattr(Batch, "_captured", captured)
        patch.setattr(batch, "warmed", warmed)
        patch.setattr(batch, "BLOCKS_FROM", 7)
        patch.setattr(Batch, "_advance", advance_later)
        patch.setattr(Batch, "begin", begin_in_order)
        yield device
    clear_all()
