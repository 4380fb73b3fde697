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
from torch import Tensor, nn

from fastgpt.generation.batch import Batch, Plan
from fastgpt.generation.decoder import Decoder
from fastgpt.generation.view import unwrapped
from fastgpt.private import StorageWeakRef

SHARE = 64  # of a device's memory, the part that kept batches may take
_LOCK = threading.Lock()


class Kept:
    """Of one model or Decoder. It refers to neither, but for the addresses of what is read."""

    def __init__(self, places: tuple = (), storages: tuple = ()):
        self.places, self._storages = places, storages
        self._batches: list[tuple[Batch, Any]] = []  # the latest last, with an event of its last use

    def holds(self, places: tuple) -> bool:
        """Whether what is read at these places is what was, in the same memory all the time."""
        return places == self.places and not any(storage.expired() for storage in self._storages)

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


def kept_of(decoder: Decoder) -> Kept:
    """What calls before have left for this Decoder's."""
    if decoder.kept is None:
        decoder.kept = Kept()
        if decoder.passing and decoder.lasts:
            places, storages = _places(decoder)
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


def _places(decoder: Decoder) -> tuple[tuple, tuple]:
    """All that a decoder's steps read, as numbers: where tensors lie and how, and what else there is."""
    places: list[Any] = [decoder.dtype, decoder.steps.on_kernels, decoder.one_launch, str(decoder.gpt.config)]
    storages = []
    for value in decoder.read():
        if isinstance(value, Tensor):
            places += [value.data_ptr(), value.shape, value.stride(), value.dtype]
            storages.append(StorageWeakRef(value.untyped_storage()))
        else:
            places.append(value)
    return tuple(places), tuple(storages)
