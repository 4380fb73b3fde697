"""`fastgpt tokenize`, and the files of tokens that nanoGPT and llm.c write."""

import json
import random
import tracemalloc

import numpy as np
import pytest

from fastgpt.atomic import digest
from fastgpt.data import load_corpus, texts, tokenization, tokenize, tokens
from fastgpt.data.tokenizer import END_OF_TEXT, encoding
from fastgpt.data.tokens import Shards, map_tokens

BYTE = encoding("byte")
PROSE = "It's 12,345 o'clock… said  the fox;\n\n\tdon't!!  \r\n你好 naïve\u00a0café 🙂 x² "


def ids_of(folder, dtype=np.uint16):
    return [*np.fromfile(folder / "train.bin", dtype), *np.fromfile(folder / "val.bin", dtype)]


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(texts, "PIECE", 37)  # no multiple of anything, and inside characters of several bytes


def test_what_is_written(tmp_path):
    (tmp_path / "texts/deeper").mkdir(parents=True)
    (tmp_path / "texts/b.txt").write_text("second")
    (tmp_path / "texts/a.txt").write_text(f"first, {END_OF_TEXT} in the text")
    (tmp_path / "texts/deeper/c.jsonl").write_text('{"text": "third"}\n\n{"text": "fourth", "id": 4}\n"fifth"\n')
    (tmp_path / "texts/image.png").write_bytes(b"\x89PNG\xff")
    (tmp_path / "texts/.hidden").write_text("hidden")
    (tmp_path / "more.txt").write_text("sixth")
    meta = tokenize([tmp_path / "texts", tmp_path / "more.txt"], BYTE, tmp_path / "out", val_share=0.25)
    documents = [f"first, {END_OF_TEXT} in the text", "second", "third", "fourth", "fifth", "sixth"]
    ids = ids_of(tmp_path / "out")
    assert BYTE.decode(ids) == END_OF_TEXT.join([*documents, ""])
    assert ids.count(256) == 6
    assert json.loads((tmp_path / "out/meta.json").read_text()) == meta
    assert (meta["encoding"], meta["vocab_size"], meta["dtype"], meta["end_of_text"]) == ("byte", 257, "uint16", 256)
    assert (meta["documents"], meta["val"]["tokens"]) == (6, len(ids) // 4)
    assert meta["train"]["tokens"] + meta["val"]["tokens"] == len(ids)
    for part in ("train", "val"):
        assert meta[part]["sha256"] == digest(tmp_path / f"out/{part}.bin")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["meta.json", "train.bin", "val.bin"]


@pytest.mark.parametrize("name", ["byte", "gpt2"])
def test_pieces_and_threads_change_no_token(tmp_path, small_pieces, name):
    """Of a text that is read in hundreds of pieces."""
    draw = random.Random(1)
    text = "".join(draw.choices([*PROSE.split(" "), " ", "  ", "\n", "fox"], k=4000))
    (tmp_path / "a.txt").write_bytes(text.encode())
    expected = [*encoding(name).encode(text, disallowed_special=()), encoding(name).n_vocab - 1]
    for workers in (1, 3):
        tokenize([tmp_path / "a.txt"], encoding(name), tmp_path / "out", workers=workers, overwrite=True)
        assert ids_of(tmp_path / "out") == expected


def test_a_text_without_spaces_is_cut_at_last(tmp_path, small_pieces, monkeypatch):
    monkeypatch.setattr(tokenization, "_LONGEST", 500)
    text = "foxes" * 1000
    (tmp_path / "a.txt").write_text(text)
    tokenize([tmp_path / "a.txt"], encoding("gpt2"), tmp_path / "out")
    assert encoding("gpt2").decode(ids_of(tmp_path / "out")) == text + END_OF_TEXT


def test_memory_is_bounded(tmp_path, monkeypatch):
    """Three times less than the file has, of which most is what a digest reads at once."""
    monkeypatch.setattr(texts, "PIECE", 1 << 14)
    (tmp_path / "a.txt").write_text("the quick brown fox " * 450_000)
    tracemalloc.start()
    tokenize([tmp_path / "a.txt"], BYTE, tmp_path / "out", workers=1)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 3_000_000 <= (tmp_path / "a.txt").stat().st_size / 3


def test_more_ids_than_uint16_holds(tmp_path, monkeypatch):
    """As tiktoken's cl100k_base, whose files need a network."""
    import tiktoken

    ranks = {bytes([value]): value for value in range(256)}
    wide = tiktoken.Encoding("wide", pat_str=r"(?s:.)", mergeable_ranks=ranks, special_tokens={END_OF_TEXT: 100_000})
    (tmp_path / "a.txt").write_text("x" * 99)
    meta = tokenize([tmp_path / "a.txt"], wide, tmp_path / "out")
    assert meta["dtype"] == "uint32"
    corpus = load_corpus(tmp_path / "out", wide, 5)
    assert corpus.train.tolist() == [ord("x")] * 90
    assert corpus.val.tolist() == [ord("x")] * 9 + [100_000]


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("a.txt", b"caf\xe9 au lait" * 9, ValueError, "a.txt is not UTF-8 text: byte 3 is 0xe9"),
        ("a.txt", b"x" * 50 + b"\xf0\x9f", ValueError, "a.txt is not UTF-8 text: byte 50 is 0xf0"),
        ("a.txt", b"", ValueError, "a.txt: 0 bytes of text"),
        ("a.txt", b"x", ValueError, "2 tokens are too few to split: 2 to train on"),
        ("a.jsonl", b'{"text": "x"}\n{"text": ', ValueError, "a.jsonl, line 2 is not JSON"),
        ("a.jsonl", b'{"text": "x"}\n{"body": "y"}', ValueError, "a.jsonl, line 2 has no text in 'text'"),
        ("gone.txt", None, FileNotFoundError, "no file or folder .*gone.txt"),
        ("folder/a.png", b"\xff", FileNotFoundError, "holds no text: none of its 1 files is UTF-8"),
    ],
)
def test_bad_sources_leave_nothing(tmp_path, small_pieces, name, content, error, message):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(error, match=message):
        tokenize([path.parent if "/" in name else path], BYTE, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("option", "value"), [("val_share", 0.0), ("val_share", 1.0), ("workers", 0)])
def test_bad_options(tmp_path, option, value):
    with pytest.raises(ValueError, match=f"{option} is {value}, not"):
        tokenize([tmp_path], BYTE, tmp_path / "out", **{option: value})


def test_tokens_that_are_there_stay(tmp_path):
    (tmp_path / "a.txt").write_text("some text of no length")
    tokenize([tmp_path / "a.txt"], BYTE, tmp_path / "out")
    with pytest.raises(FileExistsError, match=r"train.bin is there already"):
        tokenize([tmp_path / "a.txt"], encoding("gpt2"), tmp_path / "out")
    assert BYTE.decode(ids_of(tmp_path / "out")).startswith("some text")


def test_files_of_another_encoding_or_changed_since(tmp_path):
    (tmp_path / "a.txt").write_text("some text of no length")
    tokenize([tmp_path / "a.txt"], BYTE, tmp_path / "out")
    with pytest.raises(ValueError, match="holds tokens of the encoding 'byte', not of 'gpt2'"):
        load_corpus(tmp_path / "out", encoding("gpt2"), 1)
    with open(tmp_path / "out/train.bin", "r+b") as file:
        file.write(b"S\0")
    with pytest.raises(ValueError, match=r"train.bin is not what meta.json beside it describes"):
        load_corpus(tmp_path / "out", BYTE, 1)


def llmc(path, ids, magic=20240520, version=1, dtype=np.uint16, count=None):
    header = np.zeros(256, dtype=np.int32)
    header[:3] = magic, version, len(ids) if count is None else count
    with open(path, "wb") as file:
        file.write(header.tobytes())
        file.write(np.array(ids, dtype=dtype).tobytes())


def test_llmcs_files(tmp_path):
    """A header, and shards that are one sequence, as its FineWeb and tiny Shakespeare are."""
    for number, ids in enumerate([range(30), range(30, 50), range(50, 90)]):
        llmc(tmp_path / f"words_train_{number:06d}.bin", ids)
    llmc(tmp_path / "words_val_000000.bin", range(20))
    corpus = load_corpus(tmp_path, BYTE, 9)
    assert isinstance(corpus.train, Shards) and len(corpus.train) == 90
    assert corpus.train[0:90].tolist() == list(range(90))
    assert corpus.train[25:55].tolist() == list(range(25, 55))
    assert corpus.train[89:95].tolist() == [89] and corpus.train[30:30].tolist() == []
    assert corpus.val.tolist() == list(range(20))
    llmc(tmp_path / "llama.bin", range(70_000, 70_020), 20240801, 7, np.uint32)
    assert map_tokens(tmp_path / "llama.bin").tolist() == list(range(70_000, 70_020))


def test_an_llmc_file_that_was_cut(tmp_path):
    llmc(tmp_path / "a.bin", range(20), count=30)
    with pytest.raises(ValueError, match=r"a.bin has 1064 bytes, llm.c's header says 30 tokens of 2"):
        map_tokens(tmp_path / "a.bin")


def test_a_token_outside_is_found_in_its_shard(tmp_path):
    for number, ids in enumerate([range(30), [*range(20), 400]]):
        llmc(tmp_path / f"words_train_{number:06d}.bin", ids)
    llmc(tmp_path / "words_val_000000.bin", range(20))
    with pytest.raises(ValueError, match=r"words_train_000001.bin: token 400 at offset 20 is outside the 257 ids"):
        load_corpus(tmp_path, BYTE, 9)


def test_a_meta_file_that_says_too_little(tmp_path):
    (tmp_path / "meta.json").write_text('{"encoding": "byte"}')
    with pytest.raises(ValueError, match="does not say the encoding and the dtype"):
        tokens.meta_of(tmp_path)


def test_a_byte_order_mark_is_no_text(tmp_path):
    """In front of a file, as Windows' editors write it; inside a text it stays."""
    mark, text = "\ufeff".encode(), "some\ufeff words " * 9
    (tmp_path / "a.txt").write_bytes(mark + text.encode())
    (tmp_path / "b.jsonl").write_bytes(mark + b'{"text": "more"}\n')
    tokenize([tmp_path / "a.txt", tmp_path / "b.jsonl"], BYTE, tmp_path / "out")
    assert BYTE.decode(ids_of(tmp_path / "out")) == f"{text}{END_OF_TEXT}more{END_OF_TEXT}"
    corpus = load_corpus(tmp_path / "a.txt", BYTE, 4)
    assert BYTE.decode([*corpus.train, *corpus.val]) == text + END_OF_TEXT


def test_the_tokens_never_lie_among_the_texts(tmp_path):
    (tmp_path / "a.txt").write_text("some words " * 9)
    with pytest.raises(ValueError, match="holds the texts, and its tokens would lie among them"):
        tokenize([tmp_path], BYTE, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    first = tokenize([tmp_path], BYTE, tmp_path / "tokens")
    assert tokenize([tmp_path], BYTE, tmp_path / "tokens", overwrite=True) == first, "not of what it wrote itself"
    assert tokenize([tmp_path], BYTE, tmp_path / "more") == first, "nor of what it wrote elsewhere among them"


def test_a_folder_of_ones_own_is_read_whatever_its_names(tmp_path):
    for name, folder in (("train.toml", "settings"), ("meta.json", "notes"), ("train.txt", "notes")):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / name).write_text(f"{name} " * 9)
    (tmp_path / "b.txt").write_text("some words " * 9)
    corpus = load_corpus(tmp_path, BYTE, 4)
    said = BYTE.decode([*corpus.train, *corpus.val])
    assert said.count(END_OF_TEXT) == 4 and {"train.toml", "meta.json", "train.txt", "words"} <= set(
        said.replace(END_OF_TEXT, "").split()
    )


@pytest.mark.parametrize("again", ["texts", "texts/a.txt", "texts/../texts"])
def test_a_text_that_is_given_twice(tmp_path, again):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/a.txt").write_text("some words " * 9)
    with pytest.raises(ValueError, match=r"a\.txt is given twice, by .*texts and by "):
        tokenize([tmp_path / "texts", tmp_path / again], BYTE, tmp_path / "new/out")
    assert not (tmp_path / "new").exists()
