"""Tokens to train on: the built-in corpus, a text file, a folder, or token files; and batches of windows from them."""

import hashlib
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tiktoken
import torch
from torch import Tensor

from fastgpt.tokenizer import END_OF_TEXT

VALIDATION_BYTES = 1_000_000  # of the built-in corpus, at least
VALIDATION_SHARE = 0.1  # of a user's text that is not split already


class Corpus(NamedTuple):
    train: np.ndarray  # (N,) of an unsigned integer type, in memory or mapped
    val: np.ndarray
    name: str


def load_corpus(source: str | Path | None, encoding: tiktoken.Encoding, window: int) -> Corpus:
    """Training and validation tokens of `source`, each at least window + 1 long.

    None is the built-in corpus. A text file, or a folder's files that are UTF-8 text, in order of their names, gives
    its last tenth to validation; every file is a document, and the end-of-text token ends it. A `.bin` file holds
    uint16 ids, as nanoGPT writes them, and is mapped, not read; a folder with train.bin and val.bin is those two.
    FileNotFoundError or ValueError says what is wrong with it.
    """
    if source is None:
        train, val = (_encode(documents, encoding) for documents in builtin_documents())
        corpus = Corpus(train, val, "the standard library's source")
    elif (path := Path(source)).is_dir() and any((path / name).exists() for name in ("train.bin", "val.bin")):
        corpus = Corpus(_map(path / "train.bin", encoding), _map(path / "val.bin", encoding), str(path))
    elif path.is_dir() or path.suffix != ".bin":
        corpus = Corpus(*_split(_encode(_read_documents(path), encoding)), str(path))
    else:
        corpus = Corpus(*_split(_map(path, encoding)), str(path))
    for part, tokens in (("training", corpus.train), ("validation", corpus.val)):
        if len(tokens) <= window:
            raise ValueError(f"{corpus.name}: {len(tokens)} {part} tokens are too few for a window of {window} + 1")
    return corpus


def read_tokens(source: str | Path, encoding: tiktoken.Encoding) -> np.ndarray:
    """(N,): all tokens of a text file, a folder of them or a `.bin` file, each read as load_corpus does."""
    path = Path(source)
    return _map(path, encoding) if path.suffix == ".bin" else _encode(_read_documents(path), encoding)


def builtin_documents() -> tuple[list[str], list[str]]:
    """The source files of the running interpreter's standard library, for training and for validation.

    The split is by top-level module, for files of one package repeat each other. Modules come in the order of a hash
    of their names, which no list of files changes; the first of them that make up a megabyte are for validation.
    FileNotFoundError where an interpreter has no source.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    parts: dict[bool, list[str]] = {True: [], False: []}
    size = 0
    for module in sorted(sys.stdlib_module_names, key=lambda name: hashlib.sha256(name.encode()).digest()):
        files = [folder / f"{module}.py", *sorted((folder / module).rglob("*.py"))]
        texts = [text for file in files if file.is_file() and (text := _utf8(file)) is not None]
        validation = size < VALIDATION_BYTES
        parts[validation] += texts
        size += sum(len(text.encode()) for text in texts)
    if not parts[False]:
        raise FileNotFoundError(f"{folder} holds only {size} bytes of Python source; give a corpus with --data")
    return parts[False], parts[True]


def windows(tokens: np.ndarray, starts: np.ndarray, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Inputs and targets (len(starts), length) int64: the windows at `starts`, and the same shifted by one."""
    rows = np.stack([tokens[start : start + length + 1] for start in starts]).astype(np.int64)
    batch = torch.from_numpy(rows).to(device)
    return batch[:, :-1], batch[:, 1:]


def _read_documents(path: Path) -> list[str]:
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file() and not _hidden(file.relative_to(path)))
        texts = [text for file in files if (text := _utf8(file)) is not None]
        if not texts:
            raise FileNotFoundError(f"{path} holds no text: none of its {len(files)} files is UTF-8")
        return texts
    if not path.is_file():
        raise FileNotFoundError(f"no file or folder {path}")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty: 0 bytes")
    try:
        return [path.read_bytes().decode("utf-8")]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: byte {error.start} is 0x{error.object[error.start]:02x}") from None


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _utf8(path: Path) -> str | None:
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        return None


def _encode(documents: list[str], encoding: tiktoken.Encoding) -> np.ndarray:
    """One array of ids, an end-of-text token after each document. Text that spells a special token stays text."""
    end = [encoding.encode_single_token(END_OF_TEXT)]
    pieces = [ids for text in documents for ids in (encoding.encode_to_numpy(text, disallowed_special=()), end)]
    return np.concatenate(pieces).astype(np.uint16 if encoding.n_vocab <= 2**16 else np.uint32)


def _map(path: Path, encoding: tiktoken.Encoding) -> np.ndarray:
    if not path.is_file():
        raise FileNotFoundError(f"no file or folder {path}")
    size = path.stat().st_size
    if size == 0 or size % 2:
        raise ValueError(f"{path} has {size} bytes; a file of uint16 tokens has an even number, more than 0")
    tokens = np.memmap(path, dtype=np.uint16, mode="r")
    _check_ids(tokens, encoding, path)
    return tokens


def _split(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    cut = len(tokens) - int(len(tokens) * VALIDATION_SHARE)
    return tokens[:cut], tokens[cut:]


def _check_ids(tokens: np.ndarray, encoding: tiktoken.Encoding, path: Path) -> None:
    """ValueError for the first id that the encoding does not have; in pieces, so that a mapped file stays on disk."""
    piece = 1 << 24
    for start in range(0, len(tokens), piece):
        outside = tokens[start : start + piece] >= encoding.n_vocab
        if outside.any():
            offset = start + int(outside.argmax())
            raise ValueError(
                f"{path}: token {tokens[offset]} at offset {offset} is outside the {encoding.n_vocab} ids of the "
                f"encoding {encoding.name!r}"
            )
