"""Files of text that anyone may have written: read in pieces, and held to UTF-8."""

import codecs
import json
from collections.abc import Iterator
from pathlib import Path

from fastgpt.data import tables

TEXT = (".txt", ".md", ".jsonl")  # of a folder's files, those that must be text; others may be
PIECE = 1 << 20  # characters of text that are encoded at once, and bytes of a file that are read at once
BOM = "\ufeff"  # what some editors put in front of a file's text; it is none of it


def not_text(path: Path, why: str) -> str:
    return f"{path} is not UTF-8 text: {why}"


def files_in(folder: Path) -> list[Path]:
    """A folder's files in order of their names, but for hidden ones, and for folders below it that fastgpt wrote: no
    text stays the same that counts its own tokens, or the runs on it."""
    written = [path.parent for path in folder.rglob("train.*") if path.parent != folder and _is_ours(path.parent)]
    files = [path for path in folder.rglob("*") if path.is_file() and not _hidden(path, folder)]
    if any(path.suffix == ".arrow" for path in files):
        files = [path for path in files if path.name not in tables.BESIDE]
    return sorted(path for path in files if not any(each in path.parents for each in written))


def _is_ours(folder: Path) -> bool:
    made = [("train.bin", "val.bin", "meta.json"), ("train.toml", ".lock")]  # by tokenize, and by train
    return any(all((folder / name).is_file() for name in names) for names in made)


def _hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def bad_byte(error: UnicodeDecodeError, before: int = 0) -> str:
    return f"byte {before + error.start} is 0x{error.object[error.start]:02x}"


def decoded(content: bytes) -> str:
    """A whole file's text; UnicodeDecodeError where it is none."""
    return content.decode("utf-8").removeprefix(BOM)


def look_through(path: Path, column: str) -> None:
    """UnicodeDecodeError, or ValueError for a line of .jsonl, or a row of a table, that is no document."""
    for _ in documents(path, column) or chunks(path):
        pass


def documents(path: Path, column: str) -> Iterator[str] | None:
    """The texts of a file that holds many; None for one that is a text itself."""
    if path.suffix in tables.SUFFIXES:
        return tables.rows(path, column)
    return lines(path, column) if path.suffix == ".jsonl" else None


def chunks(path: Path) -> Iterator[str]:
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
            if not before:
                text = text.removeprefix(BOM)
            before += len(piece)
            if text:
                yield text
            if not piece:
                return


def lines(path: Path, column: str) -> Iterator[str]:
    before = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                content = line.decode("utf-8")
            except UnicodeDecodeError as error:
                error.reason = bad_byte(error, before)
                raise
            content = content.removeprefix(BOM) if not before else content
            before += len(line)
            if not content.strip():
                continue
            try:
                found = json.loads(content)
            except ValueError as error:
                raise ValueError(f"{path}, line {number} is not JSON: {error}") from None
            text = found.get(column) if isinstance(found, dict) else found
            if not isinstance(text, str):
                raise ValueError(f"{path}, line {number} has no text in {column!r}")
            if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
                raise ValueError(f"{path}, line {number} has half of a surrogate pair, which is no character")
            yield text
