"""Files of tokens: made of text by `fastgpt tokenize`, and read as nanoGPT and llm.c write them too.

A .bin file is ids and nothing else: uint16, or uint32 for an encoding of more than 65,536 ids, which meta.json beside
it tells. Or it is one of llm.c's, which starts with a header of 256 int32.
"""

import codecs
import hashlib
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

from fastgpt.atomic import digest, read_json, replacing, writable_folder
from fastgpt.data.tokenizer import END_OF_TEXT, Named, undecodable

TRAIN, VAL, META = "train.bin", "val.bin", "meta.json"
TEXT = (".txt", ".md", ".jsonl")  # of a folder's files, those that must be text; others may be
PIECE = 1 << 20  # characters of text that are encoded at once, and bytes of a file that are read at once
_LONGEST = 16 * PIECE  # characters that may pass without a place to cut
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
    """What `fastgpt tokenize` wrote beside its files; {} where it wrote nothing."""
    if not (folder / META).is_file():
        return {}
    meta = read_json(folder / META)
    if meta.get("dtype") not in ("uint16", "uint32") or not isinstance(meta.get("encoding"), str):
        raise ValueError(f"{folder / META} does not say the encoding and the dtype, uint16 or uint32, of its tokens")
    return meta


def meta_beside(path: Path) -> dict:
    """meta_of a file's folder, where that is `fastgpt tokenize`'s and no other program's meta.json."""
    file = path.parent / META
    return meta_of(path.parent) if file.is_file() and {"encoding", "dtype"} <= read_json(file).keys() else {}


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


def tokenize(
    sources: list[str | Path],
    encoding: tiktoken.Encoding,
    out: str | Path,
    *,
    val_share: float = 0.1,
    text_field: str = "text",
    workers: int | None = None,
    overwrite: bool = False,
) -> dict:
    """Write train.bin, val.bin and meta.json of the texts in `sources` into the folder `out`; returns meta.json.

    A source is a file of UTF-8 text (a document), a .jsonl file (a document a line, in `text_field`), or a folder of
    both, in order of names, where files that are not UTF-8 are passed over but for those named .txt, .md and .jsonl.
    The end-of-text token ends every document, and the last `val_share` of the tokens are for validation. Text goes
    through in pieces, however long a file is, cut where no token can cross; `workers` threads encode, None is one a
    CPU. Everything that is wrong with a source is an error (FileNotFoundError, ValueError) before anything is written.
    """
    if not 0 < val_share < 1:
        raise ValueError(f"tokenize: val_share is {val_share}, not between 0 and 1")
    if workers is not None and workers < 1:
        raise ValueError(f"tokenize: workers is {workers}, not at least 1")
    folder = Path(out)
    for name in (TRAIN, VAL, META):
        if (folder / name).exists() and not overwrite:
            raise FileExistsError(f"{folder / name} is there already: choose another folder (-o) or --overwrite it")
    files = _files([Path(source) for source in sources], text_field)
    writable_folder(folder)
    with replacing(folder / TRAIN) as train, replacing(folder / VAL) as val:
        with open(train, "r+b") as whole:
            documents, count = _write(whole, files, encoding, text_field, workers or os.cpu_count() or 1)
            kept = count - int(count * val_share)
            width = dtype_of(encoding).itemsize
            whole.seek(kept * width)
            with open(val, "wb") as rest:
                while piece := whole.read(PIECE):
                    rest.write(piece)
            whole.truncate(kept * width)
        if not 0 < kept < count:
            raise ValueError(f"tokenize: {count} tokens are too few to split: {kept} to train on")
        meta = {
            "encoding": encoding.name,
            "vocab_size": encoding.n_vocab,
            "dtype": "uint16" if width == 2 else "uint32",
            "end_of_text": encoding.encode_single_token(END_OF_TEXT),
            "documents": documents,
            "text_bytes": sum(file.size for file in files),
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


def _files(sources: list[Path], text_field: str) -> list[_File]:
    """The files to read, each of which has been looked through once."""
    found = []
    for source in sources:
        if source.is_dir():
            inside = sorted(path for path in source.rglob("*") if path.is_file() and not hidden(path, source))
            texts = []
            for path in inside:
                try:
                    _look_through(path, text_field)
                    texts.append(path)
                except UnicodeDecodeError as error:
                    if path.suffix in TEXT:
                        raise ValueError(not_text(path, error.reason)) from None
            if not texts:
                raise FileNotFoundError(f"{source} holds no text: none of its {len(inside)} files is UTF-8")
            found += texts
        elif source.is_file():
            try:
                _look_through(source, text_field)
            except UnicodeDecodeError as error:
                raise ValueError(not_text(source, error.reason)) from None
            found.append(source)
        else:
            raise FileNotFoundError(f"no file or folder {source}")
    files = [_File(path, path.stat().st_size) for path in found]
    if not any(file.size for file in files):
        raise ValueError(f"{', '.join(map(str, sources))}: 0 bytes of text")
    return files


def not_text(path: Path, why: str) -> str:
    return f"{path} is not UTF-8 text: {why}"


def hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def _look_through(path: Path, text_field: str) -> None:
    """UnicodeDecodeError, or ValueError for a line of .jsonl that is no document."""
    if path.suffix == ".jsonl":
        for _ in _lines(path, text_field):
            pass
    else:
        for _ in _chunks(path):
            pass


def _chunks(path: Path) -> Iterator[str]:
    """A file's text in pieces as they come; UnicodeDecodeError says at which byte of the file it is none."""
    decoder, before = codecs.getincrementaldecoder("utf-8")(), 0
    with open(path, "rb") as file:
        while True:
            piece = file.read(PIECE)
            pending = len(decoder.getstate()[0])
            try:
                text = decoder.decode(piece, final=not piece)
            except UnicodeDecodeError as error:
                error.reason = bad_byte(error, before - pending)
                raise
            before += len(piece)
            if text:
                yield text
            if not piece:
                return


def bad_byte(error: UnicodeDecodeError, before: int = 0) -> str:
    return f"byte {before + error.start} is 0x{error.object[error.start]:02x}"


def _lines(path: Path, text_field: str) -> Iterator[str]:
    before = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                content = line.decode("utf-8")
            except UnicodeDecodeError as error:
                error.reason = bad_byte(error, before)
                raise
            before += len(line)
            if not content.strip():
                continue
            try:
                found = json.loads(content)
            except ValueError as error:
                raise ValueError(f"{path}, line {number} is not JSON: {error}") from None
            text = found.get(text_field) if isinstance(found, dict) else found
            if not isinstance(text, str):
                raise ValueError(f"{path}, line {number} has no text in {text_field!r}")
            if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
                raise ValueError(f"{path}, line {number} has half of a surrogate pair, which is no character")
            yield text


def _pieces(file: _File, text_field: str) -> Iterator[_Piece]:
    if file.path.suffix == ".jsonl":
        for text in _lines(file.path, text_field):
            yield _Piece(text, True)
        return
    kept = ""
    for text in _chunks(file.path):
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
        if size >= PIECE:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _write(
    file: IO[bytes], files: list[_File], encoding: tiktoken.Encoding, text_field: str, workers: int
) -> tuple[int, int]:
    """Documents and tokens written; no more than a few pieces for each worker are in memory at a time."""
    end, dtype = encoding.encode_single_token(END_OF_TEXT), dtype_of(encoding)

    def encode(batch: list[_Piece]) -> np.ndarray:
        ids = []
        for piece in batch:
            ids.append(encoding.encode_to_numpy(piece.text, disallowed_special=()))  # text stays text
            if piece.ends:
                ids.append(np.array([end], dtype=np.uint32))
        return np.concatenate(ids).astype(dtype)

    documents = tokens = 0
    waiting: deque[tuple[Future, int]] = deque()
    line = tqdm(total=sum(each.size for each in files), unit="B", unit_scale=True, disable=None, desc="tokenize")
    with line, ThreadPoolExecutor(workers) as pool:

        def take() -> int:
            future, size = waiting.popleft()
            ids = future.result()
            file.write(ids)
            line.update(size)
            return len(ids)

        for batch in _batches(piece for each in files for piece in _pieces(each, text_field)):
            documents += sum(piece.ends for piece in batch)
            waiting.append((pool.submit(encode, batch), sum(len(piece.text.encode()) for piece in batch)))
            if len(waiting) > 2 * workers:
                tokens += take()
        while waiting:
            tokens += take()
    return documents, tokens
