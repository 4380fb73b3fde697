"""The files by which Hugging Face's tokenizers read an encoding of ours: tokenizer.json and tokenizer_config.json."""

from collections.abc import Iterator
from typing import Any

import tiktoken

from fastgpt.data.characters import Characters
from fastgpt.data.tokenizer import END_OF_TEXT, has_end_of_text

TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
_GPT2S = ("gpt2", "r50k_base")  # by whose pattern ByteLevel splits a text


def tokenizer_files(encoding: tiktoken.Encoding, context: int) -> dict[str, dict] | None:
    """Each file's content, for a model of so many tokens. None where its tokens would not be sure to equal tiktoken's,
    whose other encodings split a text by patterns that another engine of regular expressions reads otherwise."""
    model: dict[str, Any]
    splits: dict[str, Any]
    if isinstance(encoding, Characters):
        model, splits, decoder = _of_characters(encoding)
    elif encoding.name == "byte" or encoding.name in _GPT2S:
        ranks = _ranks(encoding)
        words = {_written(token): rank for token, rank in ranks.items()}
        model = {"type": "BPE", "vocab": words, "merges": list(_merges(ranks)), "ignore_merges": False}
        splits = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
        decoder = splits
    else:
        return None
    end = has_end_of_text(encoding)
    flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    added = [{"id": encoding.encode_single_token(END_OF_TEXT), "content": END_OF_TEXT, **flags}] if end else []
    told: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": context}
    told["clean_up_tokenization_spaces"] = False  # else " ." loses its space on the way back
    told |= dict.fromkeys(("bos_token", "eos_token", "pad_token"), END_OF_TEXT) if end else {}
    tokenizer: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
    }
    tokenizer |= {"pre_tokenizer": splits, "post_processor": None, "decoder": decoder, "model": model}  # in this order
    return dict(zip(TOKENIZER, (tokenizer, told), strict=True))


def _of_characters(encoding: Characters) -> tuple[dict, dict, dict]:
    """An unknown character is an error in both: there is no token for it."""
    words = {token.decode(): rank for token, rank in _ranks(encoding).items()}
    every = {"type": "Split", "pattern": {"Regex": r"(?m)."}, "behavior": "Isolated", "invert": False}
    return {"type": "WordLevel", "vocab": words, "unk_token": "[UNK]"}, every, {"type": "Fuse"}


def _ranks(encoding: tiktoken.Encoding) -> dict[bytes, int]:
    """The bytes of each ordinary token, and its id, in the order of the ids."""
    ids = {token: encoding.encode_single_token(token) for token in encoding.token_byte_values()}
    return dict(sorted(ids.items(), key=lambda item: item[1]))


def _written(token: bytes) -> str:
    return "".join(_LETTERS[byte] for byte in token)


def _letters() -> list[str]:
    """A letter for each byte, as GPT-2's vocabulary is written: itself where that can be printed, else one from 256."""
    printed = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in printed else chr(next(others)) for byte in range(256)]


_LETTERS = _letters()


def _merges(ranks: dict[bytes, int]) -> Iterator[list[str]]:
    """The two parts of each token that is made of others, in the order of the ranks: what is left of its bytes when all
    that ranks before it is merged."""
    for token, rank in ranks.items():
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            place = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], rank))
            parts[place : place + 2] = [parts[place] + parts[place + 1]]
        if len(parts) == 2:
            yield [_written(part) for part in parts]
