"""What a caller of generate may give, any library's numbers among it, turned into Python's own; or one clear error."""

import operator
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor


def _index(value: Any) -> int | None:
    """Any library's whole number; None for True, False and all else."""
    try:
        return None if isinstance(value, bool | str) else operator.index(value)
    except TypeError:
        return None


def whole_number(name: str, value: Any) -> int:
    if (number := _index(value)) is None:
        raise ValueError(f"generate: {name} is {value!r}, not a whole number")
    return number


def at_least_1(name: str, value: Any) -> int:
    if (number := whole_number(name, value)) < 1:
        raise ValueError(f"generate: {name} is {value!r}, not at least 1")
    return number


def stop_ids_of(stop_ids: Any) -> frozenset[int]:
    several = () if stop_ids is None else stop_ids if np.iterable(stop_ids) else [stop_ids]
    stops = set()
    for each in several:
        if (stop := _index(each)) is None:
            raise TypeError(f"generate: stop_ids holds {each!r}, not an int")
        stops.add(stop)
    return frozenset(stops)


def strings_of(stop_strings: Any) -> list[str]:
    if stop_strings is None or isinstance(stop_strings, str):
        return [] if stop_strings is None else [stop_strings]
    if not np.iterable(stop_strings):
        raise TypeError(f"generate: stop_strings is {stop_strings!r}, not a string or several")
    return list(stop_strings)


def prompts_of(ids: Any, mask: Any) -> list[list[int]]:
    """Each prompt's tokens, without padding."""
    if isinstance(ids, np.ndarray):
        ids = torch.from_numpy(ids) if ids.dtype != object else ids.tolist()
    if isinstance(ids, str | Mapping) or not np.iterable(ids):
        way = "encode it first" if isinstance(ids, str) else "give a list of prompts, such as its input_ids"
        raise TypeError(f"generate: ids is a {type(ids).__name__}; {way}")
    if isinstance(ids, Tensor):
        if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise TypeError(f"generate: ids is {ids.dtype}, not of integers")
        if ids.dim() != 2 or 0 in ids.shape:
            raise ValueError(f"generate: ids has shape {tuple(ids.shape)}, not (B, T) with B and T at least 1")
    rows = [_listed(row, f"prompt {number}") for number, row in enumerate(ids)]
    if mask is not None:
        rows = _unpadded(rows, mask)
    if not rows:
        raise ValueError("generate: there is no prompt")
    for number, row in enumerate(rows):
        if not row:
            raise ValueError(f"generate: prompt {number} is empty; begin with the end-of-text token")
        for place, token in enumerate(row):
            if type(token) is not int:
                if (known := _index(token)) is None:
                    raise TypeError(f"generate: prompt {number} holds {token!r}, not a token id")
                row[place] = known
    return rows


def _listed(row: Any, what: str) -> list:
    """A row of a batch, as a list."""
    if isinstance(row, str):
        raise TypeError(f"generate: {what} is text, {row!r:.40}; encode it first")
    if not np.iterable(row):  # a scalar tensor of a list too
        raise ValueError(f"generate: {what} is {row!r}, not a list of tokens; one prompt alone is [[{row!r}, …]]")
    return row.tolist() if isinstance(row, Tensor | np.ndarray) else list(row)


def _unpadded(rows: list[list], mask: Any) -> list[list]:
    kept = mask.tolist() if isinstance(mask, Tensor | np.ndarray) else mask
    kept = [list(row) if np.iterable(row) else row for row in kept] if np.iterable(kept) else kept
    wanted = [len(row) for row in rows]
    found = [len(row) if isinstance(row, list) else None for row in kept] if isinstance(kept, list) else None
    if found != wanted:
        shape = f"shape {tuple(mask.shape)}" if hasattr(mask, "shape") else f"rows of {found} tokens"
        raise ValueError(f"generate: attention_mask has {shape}, and the prompts have {wanted}")
    for each in (each for row in kept for each in row):
        if each not in (0, 1):  # such as in a mask that is added to the scores, where 0 is a token's
            raise ValueError(f"generate: attention_mask holds {each!r}, not 0 for padding or 1 for a token")
    pairs = zip(rows, kept, strict=True)
    return [[token for token, keep in zip(row, keeps, strict=True) if keep] for row, keeps in pairs]
