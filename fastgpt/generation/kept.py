"""Batches that no call is using, for the next call of the same plan: their memory and their captures.

To allocate a batch, to run a step beside the stream and to capture it takes some twenty milliseconds of a call on a
GPU (docs/generation.md), as long as a hundred tokens. A Decoder keeps its own. Of a model that is given itself nothing
is kept that was read of it, for it may change: its batches serve while a new Decoder finds every tensor where the
captured steps read it. They go with the model.
"""

import threading
import weakref
from typing import Any

import torch
from torch import nn

from fastgpt.generation.batch import Batch, Plan
from fastgpt.generation.decoder import Decoder
from fastgpt.generation.recalled import Found, Recalled, Snapshot, asked_of, places_of, snapshot, steps_of
from fastgpt.generation.view import unwrapped
from fastgpt.model import GPT

REMEMBERED = 8  # Decoders of a model, of as many options
SHARE = 64  # of a device's memory, the part that kept batches may take
_LOCK = threading.Lock()


class Kept:
    """Of one model or Decoder. It refers to neither, but for the addresses of what is read."""

    def __init__(self, places: tuple = (), storages: tuple = ()):
        self.places, self._storages = places, storages
        self._snapshot: Snapshot | None = None
        self._found: list[Found] = []  # the latest last
        self._batches: list[tuple[Batch, Any]] = []  # the latest last, with an event of its last use

    def holds(self, places: tuple) -> bool:
        """Whether what is read at these places is what was, in the same memory all the time."""
        return places == self.places and not any(storage.expired() for storage in self._storages)

    def remember(self, decoder: Decoder, asked: tuple) -> None:
        """What a Decoder of a model found, which is as it was when it was made."""
        if self._snapshot is None or not self._snapshot.holds():
            self._snapshot, self._found = snapshot(decoder.inner), []
        if self._snapshot is not None:
            self._found = [*self._found[1 - REMEMBERED :], Found.of(decoder, asked)]

    def recall(self, model: Any, asked: tuple) -> Decoder | None:
        """A Decoder like that one, unless the model has changed."""
        found = next((each for each in self._found if each.asked == asked), None)
        if found is None or self._snapshot is None or not self._snapshot.holds():
            return None
        if any(storage.expired() for storage in self._storages):
            return None
        steps = steps_of(unwrapped(model))
        if steps.on_kernels != self.places[1]:
            return None
        decoder = Recalled(model, found, steps, self.places)
        decoder.kept = self
        return decoder

    def take(self, plan: Plan) -> Batch | None:
        """A batch of this plan, which is then the caller's alone."""
        with _LOCK:
            found = next((pair for pair in reversed(self._batches) if pair[0].plan == plan), None)
            if found is None:
                return None
            self._batches.remove(found)
        batch, used = found
        if used is not None:  # steps nobody waited for, on what may be another stream
            torch.cuda.current_stream(batch.history.device).wait_event(used)
        return batch

    def give(self, batch: Batch, used: Any, most: int) -> None:
        """used: an event after its last step. most: bytes of all, the latest first."""
        with _LOCK:
            self._batches.append((batch, used))
            total, first = 0, len(self._batches)
            while first and (total := total + self._batches[first - 1][0].bytes) <= most:
                first -= 1
            del self._batches[:first]

    def clear(self) -> None:
        """Give the memory back."""
        with _LOCK:
            self._batches.clear()

    def __len__(self) -> int:
        return len(self._batches)


_OF_MODELS: weakref.WeakKeyDictionary[nn.Module, Kept] = weakref.WeakKeyDictionary()
_ALL: weakref.WeakSet[Kept] = weakref.WeakSet()


def passing(model: Any, dtype: torch.dtype | None, tokens: int, rows: int) -> Decoder:
    """A Decoder for one call of a model, of which the same was asked before or not."""
    inner = unwrapped(model)
    before = _OF_MODELS.get(inner) if isinstance(inner, GPT) else None
    asked = None if before is None else asked_of(inner, dtype, tokens, rows)
    found = before.recall(model, asked) if before is not None and asked is not None else None
    if found is not None:
        return found
    decoder = Decoder(model, dtype=dtype, tokens=tokens, rows=rows)
    decoder.passing = True
    kept = kept_of(decoder)
    if decoder.lasts and isinstance(inner, GPT):
        kept.remember(decoder, asked_of(inner, dtype, tokens, rows))
    return decoder


def kept_of(decoder: Decoder) -> Kept:
    """What calls before have left for this Decoder's."""
    if decoder.kept is None:
        decoder.kept = Kept()
        if decoder.passing and decoder.lasts:
            places, storages = places_of(decoder)
            found = _OF_MODELS.get(decoder.inner)
            if found is None or not found.holds(places):
                found = _OF_MODELS[decoder.inner] = Kept(places, storages)
            decoder.kept = found
        _ALL.add(decoder.kept)
    return decoder.kept


def keep(batch: Batch) -> None:
    """Leave a batch that a call has done with, all of whose steps were sound, for the next one of its plan."""
    decoder = batch.decoder
    if not batch.plan.captures or (decoder.passing and not decoder.lasts):
        return
    used = None
    if decoder.device.type == "cuda":
        used = torch.cuda.Event()
        used.record(torch.cuda.current_stream(decoder.device))
    del batch.decoder  # which may keep it
    kept_of(decoder).give(batch, used, most_bytes(decoder.device))


def most_bytes(device: torch.device) -> int:
    """That the batches kept for one model may take."""
    return torch.cuda.get_device_properties(device).total_memory // SHARE if device.type == "cuda" else 2**28


def clear_all() -> None:
    """Give back what is kept for any model and Decoder."""
    for kept in list(_ALL):
        kept.clear()


def release(model: nn.Module | Decoder) -> None:
    """Give back the memory of what generate keeps for later calls: of a Decoder, or of a model that it was given."""
    kept = model.kept if isinstance(model, Decoder) else _OF_MODELS.pop(unwrapped(model), None)
    if kept is not None:
        kept.clear()
