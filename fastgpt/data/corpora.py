"""Tokens to train on: of the built-in corpus, of text, or of token files."""

import hashlib
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tiktoken

from fastgpt.data import tables
from fastgpt.data.texts import TEXT, bad_byte, decoded, files_in, not_text
from fastgpt.data.tokenizer import END_OF_TEXT, Named, Unavailable, has_end_of_text
from fastgpt.data.tokens import META, TRAIN, VAL, Shards, Tokens, dtype_of, examine, map_tokens, meta_beside, meta_of

VALIDATION_BYTES = 1_000_000  # of the built-in corpus, at least
VALIDATION_SHARE = 0.1  # of a user's text that is not split already


class Corpus(NamedTuple):
    train: Tokens
    val: Tokens
    name: str
    digest: str  # SHA-256 of both parts

    def facts(self) -> dict:
        """What a resumed run must find again."""
        return {"train_tokens": len(self.train), "val_tokens": len(self.val), "sha256": self.digest}


def load_corpus(source: str | Path | None, encoding: tiktoken.Encoding | Named, window: int) -> Corpus:
    """Training and validation tokens of `source`, each at least window + 1 long, every one an id of the encoding.

    None is the built-in corpus. A text file, or a folder's files that are UTF-8 text, in order of their names, gives
    its last tenth to validation; every file is a document, and the end-of-text token ends it. A `.bin` file of tokens
    is mapped, not read, and split likewise; a folder with files of tokens has them in train.bin and val.bin, or in
    several that have train and val in their names, as llm.c's. Files of tokens need no more of an encoding than is
    Named. FileNotFoundError or ValueError says what is wrong.
    """
    if source is None:
        name = "the standard library's source"
        encoded = (_encode(documents, encoding) for documents in builtin_documents())
        files = {part: [(name, ids)] for part, ids in zip(("train", "val"), encoded, strict=True)}
    elif (path := Path(source)).is_dir() and (pair := _token_files(path)):
        name, _ = str(path), meta_of(path)  # which says whether it says enough
        files = {part: [(str(file), _mapped(file, encoding)) for file in found] for part, found in pair.items()}
    else:
        whole = _mapped(path, encoding) if path.suffix == ".bin" else _encode(_read_documents(path), encoding)
        name, files = str(path), {"": [(str(path), whole)]}
    train: Tokens
    val: Tokens
    digests = [[examine(ids, encoding, file) for file, ids in part] for part in files.values()]
    if "" in files:
        train, val = _split(files[""][0][1])
    else:
        train, val = (_join([ids for _, ids in files[part]]) for part in ("train", "val"))
        _hold_meta(source, digests)
    for part, tokens in (("training", train), ("validation", val)):
        if len(tokens) <= window:
            raise ValueError(f"{name}: {len(tokens)} {part} tokens are too few for a window of {window} + 1")
    return Corpus(train, val, name, hashlib.sha256(repr(digests).encode()).hexdigest())


def holds_tokens(source: str | Path | None) -> bool:
    """Whether load_corpus finds tokens there, and no text."""
    path = None if source is None else Path(source)
    return path is not None and (bool(_token_files(path)) if path.is_dir() else path.suffix == ".bin")


def _mapped(path: Path, encoding: tiktoken.Encoding | Named) -> np.ndarray:
    """The ids of a file, in the width that meta.json beside it tells, or that the encoding needs."""
    meta = meta_beside(path)
    if meta.get("encoding", encoding.name) != encoding.name:
        named = f"the encoding {meta['encoding']!r:.60}, not of {encoding.name!r:.60}"
        raise ValueError(f"{path.parent} holds tokens of {named}")
    return map_tokens(path, meta.get("dtype", dtype_of(encoding).name))


def _token_files(folder: Path) -> dict[str, list[Path]]:
    """Its files of tokens for training and for validation, {} if there are none of either."""
    found = {}
    for part, usual in (("train", TRAIN), ("val", VAL)):
        found[part] = [folder / usual] if (folder / usual).exists() else sorted(folder.glob(f"*{part}*.bin"))
    if not any(found.values()):
        return {}
    if both := sorted({*found["train"]} & {*found["val"]}):
        raise ValueError(f"{both[0]} has train and val in its name: is it to train on, or to validate?")
    return {part: files or [folder / f"{part}.bin"] for part, files in found.items()}  # the missing one is named


def _hold_meta(source: str | Path | None, digests: list[list[str]]) -> None:
    meta = {} if source is None else meta_of(Path(source))
    for part, found in zip(("train", "val"), digests, strict=True):
        said = meta.get(part)
        if isinstance(said, dict) and said.get("sha256") != found[0]:
            raise ValueError(
                f"{Path(str(source)) / part}.bin is not what {META} beside it describes: its SHA-256 differs"
            )


def _join(parts: list[np.ndarray]) -> Tokens:
    return parts[0] if len(parts) == 1 else Shards(parts)


def read_tokens(source: str | Path, encoding: tiktoken.Encoding | Named) -> np.ndarray:
    """(N,): all tokens of a text file, a folder of them or a `.bin` file, each read as load_corpus does; of a folder of
    token files those for validation."""
    path = Path(source)
    pair = _token_files(path) if path.is_dir() else {}
    if pair and all(file.is_file() for file in pair["val"]):
        tokens = _join([_mapped(file, encoding) for file in pair["val"]])[:]
    else:
        tokens = _mapped(path, encoding) if path.suffix == ".bin" else _encode(_read_documents(path), encoding)
    examine(tokens, encoding, path)
    return tokens


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


def _read_documents(path: Path) -> list[str]:
    if path.is_dir():
        files = files_in(path)
        texts = [text for file in files if (text := _utf8(file)) is not None]
        if packed := [file for file in files if file.suffix in _PACKED]:
            raise ValueError(_taken_out(packed[0]))
        if not texts:
            raise FileNotFoundError(f"{path} holds no text: none of its {len(files)} files is UTF-8")
        return texts
    if not path.is_file():
        raise FileNotFoundError(f"no file or folder {path}")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty: 0 bytes")
    if path.suffix in _PACKED:
        raise ValueError(_taken_out(path))
    try:
        return [decoded(path.read_bytes())]
    except UnicodeDecodeError as error:
        raise ValueError(not_text(path, bad_byte(error))) from None


_PACKED = {".jsonl": "JSON", **dict.fromkeys(tables.SUFFIXES, "a table")}


def _taken_out(path: Path) -> str:
    return f"{path} holds {_PACKED[path.suffix]}, not plain text: `fastgpt tokenize {path} -o DIR` takes its texts out"


def _utf8(path: Path) -> str | None:
    """None for a file that is no text; ValueError where its name says that it is."""
    try:
        return decoded(path.read_bytes())
    except UnicodeDecodeError as error:
        if path.suffix in TEXT:
            raise ValueError(not_text(path, bad_byte(error))) from None
        return None


def _encode(documents: list[str], encoding: tiktoken.Encoding | Named) -> np.ndarray:
    """One array of ids, an end-of-text token after each document where there is one. Text that spells a special token
    stays text.
    """
    if isinstance(encoding, Named):
        raise Unavailable(f"text needs an encoding: {encoding.why}")
    end = [encoding.encode_single_token(END_OF_TEXT)] if has_end_of_text(encoding) else []
    pieces = [ids for text in documents for ids in (encoding.encode_to_numpy(text, disallowed_special=()), end)]
    return np.concatenate(pieces).astype(dtype_of(encoding))


def _split(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    cut = len(tokens) - int(len(tokens) * VALIDATION_SHARE)
    return tokens[:cut], tokens[cut:]
