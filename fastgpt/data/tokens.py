"""Files of tokens, as `fastgpt tokenize`, nanoGPT and llm.c write them, read without loading them.

A .bin file is ids and nothing else: uint16, or uint32 for an encoding of more than 65,536 ids, which meta.json beside
it tells. Or it is one of llm.c's, which starts with a header of 256 int32.
"""

import hashlib
from pathlib import Path

import numpy as np
import tiktoken

from fastgpt.atomic import read_json
from fastgpt.data.characters import META_PKL, name_in
from fastgpt.data.tokenizer import Named, undecodable

TRAIN, VAL, META = "train.bin", "val.bin", "meta.json"
_HEADER = 256 * 4  # bytes of llm.c's header: a magic number, a version, the number of tokens, and zeros
_MAGIC: dict[int, np.dtype] = {20240520: np.dtype("<u2"), 20240801: np.dtype("<u4")}  # GPT-2's tokens, and Llama 3's


def dtype_of(encoding: tiktoken.Encoding | Named) -> np.dtype:
    return np.dtype("<u2" if encoding.n_vocab <= 2**16 else "<u4")


class Shards:
    """The tokens of several files as one sequence, of which a slice is read when it is asked for."""

    def __init__(self, parts: list[np.ndarray]):
        self.parts = parts
        self.ends = np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, where: slice) -> np.ndarray:
        start, stop, _ = where.indices(len(self))
        first = int(np.searchsorted(self.ends, start, side="right"))
        found = []
        while start < stop:
            begin = int(self.ends[first]) - len(self.parts[first])
            end = min(stop, int(self.ends[first]))
            found.append(self.parts[first][start - begin : end - begin])
            start, first = end, first + 1
        return np.concatenate(found) if found else self.parts[0][:0]


Tokens = np.ndarray | Shards  # (N,) ids of an unsigned integer type, in memory or mapped


def meta_of(folder: Path) -> dict:
    """What `fastgpt tokenize` wrote beside its files, or nanoGPT of its characters; {} where neither wrote anything."""
    if not (folder / META).is_file():
        pkl = folder / META_PKL
        return {"encoding": name_in(pkl), "dtype": "uint16"} if pkl.is_file() else {}
    meta = read_json(folder / META)
    if meta.get("dtype") not in ("uint16", "uint32") or not isinstance(meta.get("encoding"), str):
        raise ValueError(f"{folder / META} does not say the encoding and the dtype, uint16 or uint32, of its tokens")
    return meta


def meta_beside(path: Path) -> dict:
    """meta_of a file's folder, but for another program's meta.json."""
    file = path.parent / META
    return {} if file.is_file() and not {"encoding", "dtype"} <= read_json(file).keys() else meta_of(path.parent)


def map_tokens(path: Path, dtype: str = "uint16") -> np.ndarray:
    """The ids of a .bin file, left on the disk; ValueError for a size that can't be."""
    if not path.is_file():
        raise FileNotFoundError(f"no file or folder {path}")
    size = path.stat().st_size
    with open(path, "rb") as file:
        header = np.frombuffer(file.read(12), dtype="<i4") if size >= _HEADER else np.zeros(3, dtype="<i4")
    if int(header[0]) in _MAGIC and header[1] in (1, 7):
        kind, count = _MAGIC[int(header[0])], int(header[2])
        if size != _HEADER + count * kind.itemsize or not count:
            raise ValueError(f"{path} has {size} bytes, llm.c's header says {count} tokens of {kind.itemsize}")
        return np.memmap(path, dtype=kind, mode="r", offset=_HEADER)
    width = np.dtype(dtype).itemsize
    if size == 0 or size % width:
        number = "an even number" if width == 2 else f"a multiple of {width}"
        raise ValueError(f"{path} has {size} bytes; a file of {dtype} tokens has {number}, more than 0")
    return np.memmap(path, dtype="<u2" if width == 2 else "<u4", mode="r")


def examine(tokens: np.ndarray, encoding: tiktoken.Encoding | Named, path: Path | str) -> str:
    """The SHA-256 of the ids; ValueError for the first one that the encoding does not have.

    In pieces, so that a mapped file stays on disk.
    """
    whole, piece = hashlib.sha256(), 1 << 24
    holes = () if isinstance(encoding, Named) else undecodable(encoding)
    for start in range(0, len(tokens), piece):
        part = tokens[start : start + piece]
        outside = part >= encoding.n_vocab
        if outside.any():
            offset = start + int(outside.argmax())
            raise ValueError(
                f"{path}: token {tokens[offset]} at offset {offset} is outside the {encoding.n_vocab} ids of the "
                f"encoding {encoding.name!r}"
            )
        if holes and (lost := np.isin(part, holes)).any():
            offset = start + int(lost.argmax())
            raise ValueError(
                f"{path}: token {tokens[offset]} at offset {offset} is none of the encoding {encoding.name!r}, "
                f"which has no bytes for it"
            )
        whole.update(np.ascontiguousarray(part).data)
    return whole.hexdigest()
