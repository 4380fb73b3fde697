"""A Decoder for one call more of a model that is as it was: what such a call needs, without a look at every part.

To make a Decoder takes as long as some thirty tokens on a GPU, and a call whose prompt and steps are captured needs
little of it. So what it found is remembered while a Snapshot finds the model's parts, their numbers and their tensors
to be what they were. A Snapshot keeps none of them alive.
"""

import dataclasses
import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastgpt import ops, private
from fastgpt.generation.decoder import Decoder
from fastgpt.generation.view import is_plain_gpt, unwrapped
from fastgpt.model import GPTConfig
from fastgpt.modules import occupied
from fastgpt.private import StorageWeakRef

_NUMBERS = (int, float, str, bool, type(None), torch.dtype, GPTConfig)  # and what is decided by equality


class _Part(NamedTuple):
    """Of one module."""

    kind: type
    numbers: dict[str, Any]
    children: tuple[Any, ...]  # names and modules
    parameters: tuple[Any, ...]  # names and parameters
    size: int  # of its __dict__


def _names_and_ids(found: dict[str, Any]) -> tuple[Any, ...]:
    return (*found, *map(id, found.values()))


def _lying(parameter: Any) -> tuple:
    """How it lies, and where; () where there is none any more."""
    if parameter is None:
        return ()
    return parameter.data_ptr(), parameter.shape, parameter.stride(), parameter.dtype, type(parameter)


class Snapshot:
    """Of a plain GPT of fastgpt's: whether another look finds it changed, but for the numbers in its tensors."""

    def __init__(self, model: nn.Module):
        every = list(model.modules())
        self._modules, self._parts = [weakref.ref(module) for module in every], [_part(module) for module in every]
        parameters = [p for module in every for p in private.parameters(module).values() if p is not None]
        self._parameters, self._lying = [weakref.ref(p) for p in parameters], [_lying(p) for p in parameters]

    def holds(self) -> bool:
        for refers, part in zip(self._modules, self._parts, strict=True):
            module = refers()
            if module is None:
                return False
            own = module.__dict__
            if type(module) is not part.kind or len(own) != part.size or occupied(module) is not None:
                return False
            if _names_and_ids(private.children(module)) != part.children:
                return False
            if _names_and_ids(private.parameters(module)) != part.parameters:
                return False
            for name, value in part.numbers.items():
                if own.get(name, own) != value:
                    return False
        return [_lying(refers()) for refers in self._parameters] == self._lying


def _part(module: nn.Module) -> _Part:
    own = module.__dict__
    numbers = {name: value for name, value in own.items() if name != "training" and isinstance(value, _NUMBERS)}
    held = private.children(module), private.parameters(module)
    children, parameters = map(_names_and_ids, held)
    return _Part(type(module), numbers, children, parameters, len(own))


def snapshot(model: Any) -> Snapshot | None:
    """None for a model whose parts hold what can't be compared, or do more than their class."""
    if not is_plain_gpt(model):
        return None
    ordinary = set(nn.Module().__dict__)
    for module in model.modules():
        others = [value for name, value in module.__dict__.items() if name not in ordinary]
        if occupied(module) or private.buffers(module) or not all(isinstance(value, _NUMBERS) for value in others):
            return None
    return Snapshot(model)


_FOUND = ("device", "dtype", "vocabulary", "outputs", "context", "windows", "calls", "lasts", "one_launch", "passing")


@dataclasses.dataclass
class Found:
    """What a Decoder of a model was, in a call of these options."""

    asked: tuple
    values: dict[str, Any]

    @classmethod
    def of(cls, decoder: Decoder, asked: tuple) -> "Found":
        return cls(asked, {name: getattr(decoder, name) for name in _FOUND})


class Recalled(Decoder):
    """A Decoder that is made in full when something is asked of it that was not Found."""

    def __init__(self, model: Any, found: Found, steps: Any, places: tuple):
        """places: as places_of has them."""
        inner = unwrapped(model)
        own: dict[str, Any] = dict(inner=inner, tokens=inner.wte, steps=steps, _given=(model, found, places))
        self.__dict__.update(found.values, **own)

    def __getattr__(self, name: str) -> Any:  # of what is not there
        if name.startswith("__") or "_given" not in self.__dict__:
            raise AttributeError(name)
        self.ready()
        return self.__dict__[name]

    def ready(self) -> None:
        given = self.__dict__.pop("_given", None)
        if given is None:
            return
        model, found, places = given
        dtype, _, tokens, rows = found.asked
        Decoder.__init__(self, model, dtype=dtype, tokens=tokens, rows=rows)
        if places_of(self)[0] != places:
            raise ValueError("generate: the model has changed since this call began")


def places_of(decoder: Decoder) -> tuple[tuple, tuple]:
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


def asked_of(model: Any, dtype: torch.dtype | None, tokens: int, rows: int) -> tuple:
    """What a Decoder depends on beside the model."""
    device = model.wte.weight.device.type
    automatic = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    return dtype, automatic, tokens, rows


def steps_of(model: Any) -> Any:
    """As the Decoder chooses them."""
    return ops.decoding_steps(model.config.backend, model.head_weight)
