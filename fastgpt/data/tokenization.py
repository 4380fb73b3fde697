"""`fastgpt tokenize`: text of any length to files of tokens, on several threads."""

import json
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import tiktoken
from tqdm import tqdm

from fastgpt.atomic import digest, replacing, writable_or_gone
from fastgpt.data import tables, texts
from fastgpt.data.texts import TEXT, chunks, documents, files_in, look_through, not_text
from fastgpt.data.tokenizer import end_of_text
from fastgpt.data.tokens import META, TRAIN, VAL, dtype_of

_LONGEST = 16 * texts.PIECE  # characters that may pass without a place to cut


def tokenize(
    sources: list[str | Path],
    encoding: tiktoken.Encoding,
    out: str | Path,
    *,
    val_share: float = 0.1,
    column: str = "text",
    workers: int | None = None,
    overwrite: bool = False,
) -> dict:
    """Write train.bin, val.bin and meta.json of the texts in `sources` into the folder `out`; returns meta.json.

    A source is a file of UTF-8 text (a document), a .jsonl file (a document a line, in `column`), a .parquet file
    or an .arrow one as Hugging Face's `datasets` saves it (a document a row, in the column `column`), or a folder
    of them, in order of names, where files that are not UTF-8 are passed over but for those named .txt, .md and .jsonl.
    The end-of-text token ends every document, and the last `val_share` of the tokens are for validation. Text goes
    through in pieces, however long a file is, cut where no token can cross; `workers` threads encode, None is one a
    CPU. Everything that is wrong with a source is an error (FileNotFoundError, ValueError) before anything is written.
    """
    if not 0 < val_share < 1:
        raise ValueError(f"tokenize: val_share is {val_share}, not between 0 and 1")
    if workers is not None and workers < 1:
        raise ValueError(f"tokenize: workers is {workers}, not at least 1")
    end_of_text(encoding)
    folder = Path(out)
    for name in (TRAIN, VAL, META):
        if (folder / name).exists() and not overwrite:
            raise FileExistsError(f"{folder / name} is there already: choose another folder (-o) or --overwrite it")
    files = _files([Path(source) for source in sources], column, folder)
    with writable_or_gone(folder), replacing(folder / TRAIN) as train, replacing(folder / VAL) as val:
        with open(train, "r+b") as whole:
            written = _write(whole, files, encoding, column, workers or os.cpu_count() or 1)
            count = written.tokens
            kept = count - int(count * val_share)
            width = dtype_of(encoding).itemsize
            whole.seek(kept * width)
            with open(val, "wb") as rest:
                while piece := whole.read(texts.PIECE):
                    rest.write(piece)
            whole.truncate(kept * width)
        if not 0 < kept < count:
            raise ValueError(f"tokenize: {count} tokens are too few to split: {kept} to train on")
        meta = {
            "encoding": encoding.name,
            "vocab_size": encoding.n_vocab,
            "dtype": "uint16" if width == 2 else "uint32",
            "end_of_text": end_of_text(encoding),
            "documents": written.documents,
            "text_bytes": written.bytes,
            "train": {"tokens": kept, "sha256": digest(train)},
            "val": {"tokens": count - kept, "sha256": digest(val)},
        }
        (folder / META).unlink(missing_ok=True)  # it must never describe other files than those beside it
    with replacing(folder / META) as new:
        new.write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
    return meta


class _File(NamedTuple):
    path: Path
    size: int  # bytes


class _Piece(NamedTuple):
    text: str
    ends: bool  # whether a document ends with it


def _files(sources: list[Path], column: str, out: Path) -> list[_File]:
    """The files to read, each of which has been looked through once; what lies in `out` is none of them."""
    found: list[Path] = []
    given: dict[Path, Path] = {}  # a file, and the source that it came with
    for source in sources:
        if source.is_dir() and source.resolve() == out.resolve():
            raise ValueError(f"tokenize: {out} holds the texts, and its tokens would lie among them; choose another -o")
        before = len(found)
        if source.is_dir():
            inside = [path for path in files_in(source) if out.resolve() not in path.resolve().parents]
            readable = []
            for path in inside:
                try:
                    look_through(path, column)
                    readable.append(path)
                except UnicodeDecodeError as error:
                    if path.suffix in TEXT:
                        raise ValueError(not_text(path, error.reason)) from None
            if not readable:
                raise FileNotFoundError(f"{source} holds no text: none of its {len(inside)} files is UTF-8")
            found += readable
        elif source.is_file():
            try:
                look_through(source, column)
            except UnicodeDecodeError as error:
                raise ValueError(not_text(source, error.reason)) from None
            found.append(source)
        else:
            raise FileNotFoundError(f"no file or folder {source}")
        for path in found[before:]:
            if path.resolve() in given:
                raise ValueError(f"tokenize: {path} is given twice, by {given[path.resolve()]} and by {source}")
        given.update((path.resolve(), source) for path in found[before:])
    files = [_File(path, path.stat().st_size) for path in found]
    if not any(file.size for file in files):
        raise ValueError(f"{', '.join(map(str, sources))}: 0 bytes of text")
    return files


def _pieces(file: _File, column: str) -> Iterator[_Piece]:
    if (found := documents(file.path, column)) is not None:
        yield from (_Piece(text, True) for text in found)
        return
    kept = ""
    for text in chunks(file.path):
        kept += text
        cut = _cut(kept)
        if cut:
            yield _Piece(kept[:cut], False)
            kept = kept[cut:]
    yield _Piece(kept, True)


def _cut(text: str) -> int:
    """Where to cut so that the tokens of both sides are those of the whole: before a space that follows a letter or
    digit of ASCII, which no encoding of tiktoken's reads together. 0 if there is no such place yet."""
    place = text.rfind(" ", 1)
    while place > 0:
        before = text[place - 1]
        if before.isascii() and before.isalnum():
            return place
        place = text.rfind(" ", 1, place)
    return len(text) if len(text) >= _LONGEST else 0  # a text without spaces: the one token there may differ


def _batches(pieces: Iterable[_Piece]) -> Iterator[list[_Piece]]:
    batch, size = [], 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece.text)
        if size >= texts.PIECE:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class _Written(NamedTuple):
    documents: int
    tokens: int
    bytes: int  # of text


def _write(file: IO[bytes], files: list[_File], encoding: tiktoken.Encoding, column: str, workers: int) -> _Written:
    """No more than a few pieces for each worker are in memory at a time."""
    end, dtype = end_of_text(encoding), dtype_of(encoding)

    def encode(batch: list[_Piece]) -> np.ndarray:
        ids = []
        for piece in batch:
            ids.append(encoding.encode_to_numpy(piece.text, disallowed_special=()))  # text stays text
            if piece.ends:
                ids.append(np.array([end], dtype=np.uint32))
        return np.concatenate(ids).astype(dtype)

    count = tokens = read = 0
    waiting: deque[tuple[Future, int]] = deque()
    packed = any(each.path.suffix in tables.SUFFIXES for each in files)  # into fewer bytes than their text has
    total = None if packed else sum(each.size for each in files)
    line = tqdm(total=total, unit="B", unit_scale=True, disable=None, desc="tokenize")
    with line, ThreadPoolExecutor(workers) as pool:

        def take() -> int:
            future, size = waiting.popleft()
            ids = future.result()
            file.write(ids)
            line.update(size)
            return len(ids)

        for batch in _batches(piece for each in files for piece in _pieces(each, column)):
            count += sum(piece.ends for piece in batch)
            size = sum(len(piece.text.encode()) for piece in batch)
            read += size
            waiting.append((pool.submit(encode, batch), size))
            if len(waiting) > 2 * workers:
                tokens += take()
        while waiting:
            tokens += take()
    return _Written(count, tokens, read)
