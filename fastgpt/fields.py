"""What the two configurations share: each field holds what its annotation says; a wrong name is told the nearest."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal

_WORDS = {int: "a whole number", float: "a number", bool: "True or False", str: "text", types.NoneType: "None"}


def check_fields(config: Any) -> None:
    """ValueError, with the class and the field in it, unless every field of a dataclass holds what its annotation says.

    A whole number serves where a float is asked for; True and False are no numbers.
    """
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value, hint = getattr(config, field.name), hints[field.name]
        said = f"{type(config).__name__}: {field.name} is {value!r}"
        if typing.get_origin(hint) is Literal:
            allowed = typing.get_args(hint)
            if not any(value == each and type(value) is type(each) for each in allowed):  # 1 is no True
                raise ValueError(f"{said}, not {_either(map(repr, allowed))}")
            continue
        kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        accepted = (*kinds, int) if float in kinds else kinds
        if not isinstance(value, accepted) or (isinstance(value, bool) and bool not in kinds):
            raise ValueError(f"{said}, not {_either(_WORDS[kind] for kind in kinds)}")


def build(kind: Any, fields: dict[str, Any]) -> Any:
    """kind(**fields); ValueError for a field that the dataclass does not have, with the nearest that it has."""
    known = [field.name for field in dataclasses.fields(kind)]
    for name in fields:
        if name not in known:
            raise ValueError(f"{kind.__name__} has no field {name!r}{nearest(name, known)}")
    return kind(**fields)


def fields_of(kind: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the options that are fields of this dataclass."""
    known = {field.name for field in dataclasses.fields(kind)}
    return {name: value for name, value in options.items() if name in known}


def _either(names: Iterable[str]) -> str:
    """a, b or c"""
    *most, last = names
    return f"{', '.join(most)} or {last}" if most else last


def nearest(name: str, known: Iterable[str]) -> str:
    """The words " (did you mean …?)" for the known name that is most like this one, "" where none is."""
    matches = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {matches[0]!r}?)" if matches else ""
