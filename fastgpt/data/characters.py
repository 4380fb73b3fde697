"""nanoGPT's character-level vocabularies: its meta.pkl read without running code, and the encoding that it tells.

The encoding's name is the vocabulary itself, "characters:" and the characters in the order of their ids, so whatever
keeps an encoding's name (a model's folder, a run's settings, a checkpoint) keeps all of it.
"""

import io
import pickle
import pickletools
from pathlib import Path
from typing import Any

import tiktoken

PREFIX, META_PKL = "characters:", "meta.pkl"
_LARGEST = 1 << 26  # bytes of a meta.pkl; each of Unicode's 1,114,112 characters, twice, takes no more

# What a pickle of dicts, lists, strings and whole numbers is made of. None of these imports or calls anything.
_OPCODES = {
    *("PROTO", "FRAME", "STOP", "MARK", "MEMOIZE", "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET"),
    *("EMPTY_DICT", "EMPTY_LIST", "SETITEM", "SETITEMS", "APPEND", "APPENDS"),
    *("SHORT_BINUNICODE", "BINUNICODE", "BININT", "BININT1", "BININT2"),
}


class Characters(tiktoken.Encoding):
    """One token a character, and no end of text. ValueError for text with a character that is not in the vocabulary."""

    def __init__(self, characters: str):
        ranks = {character.encode(): number for number, character in enumerate(characters)}
        super().__init__(PREFIX + characters, pat_str="(?s:.)", mergeable_ranks=ranks, special_tokens={})
        self._known = frozenset(characters)

    def encode(self, text: str, **options: Any) -> list[int]:
        self._hold(text)
        return super().encode(text, **options)

    def encode_to_numpy(self, text: str, **options: Any) -> Any:
        self._hold(text)
        return super().encode_to_numpy(text, **options)

    def _hold(self, text: str) -> None:
        if lost := sorted(set(text) - self._known):
            raise ValueError(f"{lost[0]!r} is none of the {len(self._known)} characters that the model knows")


def characters(name: str) -> Characters:
    """The encoding of a name that begins with PREFIX; ValueError where its characters are no vocabulary."""
    found = name.removeprefix(PREFIX)
    if not found or len(set(found)) < len(found) or any("\ud800" <= character <= "\udfff" for character in found):
        raise ValueError(f"{name!r:.60} names no vocabulary: it has each of its characters once, and one at least")
    return Characters(found)


def name_in(path: Path) -> str:
    """The name of the encoding in a meta.pkl; ValueError for what is not nanoGPT's vocabulary of characters."""
    wrong = f"{path} is no vocabulary of characters as nanoGPT writes it"
    if path.stat().st_size > _LARGEST:
        raise ValueError(f"{wrong}: it has {path.stat().st_size} bytes")
    data = path.read_bytes()
    try:
        argument: Any
        for opcode, argument, _ in pickletools.genops(data):  # reads, and does nothing
            if opcode.name not in _OPCODES or (opcode.name == "LONG_BINPUT" and argument > len(data)):
                raise ValueError(f"{opcode.name} is in it, and only dicts, lists, text and numbers are read")
        names = pickle.Unpickler(io.BytesIO(data)).load()["itos"]
        listed = [names[number] for number in range(len(names))]
        if not all(isinstance(each, str) and len(each) == 1 for each in listed):
            raise ValueError("its itos holds more than single characters")
        return characters(PREFIX + "".join(listed)).name
    except Exception as error:  # whatever bytes make of a reader of pickles
        raise ValueError(f"{wrong}: {error if isinstance(error, ValueError) else type(error).__name__}") from error
