import json
import sys

import numpy as np
import pytest
import tiktoken
import torch

from fastgpt.data import Order, builtin_documents, corpora, documents, load_corpus, read_tokens, tokenize, windows
from fastgpt.data.tokenizer import END_OF_TEXT, encoding

BYTE = encoding("byte")
PACKAGES = ("abc", "ast", "asyncio", "email", "json", "logging", "re", "xml")


def all_text(corpus) -> str:
    return BYTE.decode(np.concatenate([corpus.train, corpus.val]))


@pytest.fixture
def stdlib(monkeypatch, tmp_path):
    """A standard library of PACKAGES, two files each, where the first 100 bytes are for validation."""
    monkeypatch.setattr(corpora.sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(corpora, "VALIDATION_BYTES", 100)
    for package in PACKAGES:
        (tmp_path / package / "deep").mkdir(parents=True)
        (tmp_path / f"{package}/__init__.py").write_text(f"{package} # its first file")
        (tmp_path / f"{package}/deep/more.py").write_text(f"{package} # its second file")
    return tmp_path


def test_builtin_corpus_has_a_megabyte_of_validation_and_more_training():
    train, val = (sum(len(text.encode()) for text in part) for part in builtin_documents())
    assert val >= 1_000_000
    assert train > val


def test_builtin_corpus_is_the_same_on_every_call():
    assert builtin_documents() == builtin_documents()


def test_builtin_corpus_has_no_module_in_both_halves(stdlib):
    train, val = (sorted(text.split()[0] for text in part) for part in builtin_documents())
    assert train and val
    assert not set(train) & set(val)
    assert sorted(train + val) == sorted(2 * PACKAGES)


def test_builtin_corpus_does_not_depend_on_the_order_of_a_set(stdlib, monkeypatch):
    monkeypatch.setattr(sys, "stdlib_module_names", PACKAGES)
    forward = builtin_documents()
    monkeypatch.setattr(sys, "stdlib_module_names", PACKAGES[::-1])
    assert builtin_documents() == forward


def test_builtin_corpus_passes_over_what_is_not_the_standard_library(stdlib):
    (stdlib / "site-packages").mkdir()
    (stdlib / "site-packages" / "stranger.py").write_text("stranger")
    train, val = builtin_documents()
    assert "stranger" not in train + val


def test_builtin_corpus_of_an_interpreter_without_source(monkeypatch, tmp_path):
    monkeypatch.setattr(corpora.sysconfig, "get_path", lambda name: str(tmp_path))
    (tmp_path / "abc.py").write_text("import sys\n")
    with pytest.raises(FileNotFoundError, match="holds only 11 bytes of Python source"):
        builtin_documents()


def test_no_source_is_the_builtin_corpus(monkeypatch):
    monkeypatch.setattr(corpora, "builtin_documents", lambda: (["abc", "d"], ["xyz"]))
    corpus = load_corpus(None, BYTE, 2)
    assert corpus.train.tolist() == [*b"abc", 256, *b"d", 256]
    assert corpus.val.tolist() == [*b"xyz", 256]


def test_text_file_gives_its_last_tenth_to_validation(tmp_path):
    text = "é" + "x" * 97  # 99 bytes, and the end of the text is the 100th token
    (tmp_path / "a.txt").write_bytes(text.encode())
    train, val, name, _ = load_corpus(tmp_path / "a.txt", BYTE, 9)
    assert (len(train), len(val)) == (90, 10)
    assert [*train, *val] == [*text.encode(), 256]
    assert name == str(tmp_path / "a.txt")


@pytest.mark.parametrize("name", ["byte", "gpt2"])
def test_text_that_spells_a_special_token_stays_text(tmp_path, name):
    text = f"before {END_OF_TEXT} after " * 9
    (tmp_path / "a.txt").write_text(text)
    corpus = load_corpus(tmp_path / "a.txt", encoding(name), 1)
    ids = [*corpus.train, *corpus.val]
    assert ids.count(encoding(name).encode_single_token(END_OF_TEXT)) == 1
    assert encoding(name).decode(ids) == text + END_OF_TEXT


@pytest.mark.parametrize("name", ["byte", "gpt2"])
def test_tokens_take_two_bytes(tmp_path, name):
    (tmp_path / "a.txt").write_text("some words " * 9)
    assert load_corpus(tmp_path / "a.txt", encoding(name), 1).train.itemsize == 2


def test_folder_is_its_text_files_in_order(tmp_path):
    for file, content in {
        "b.txt": b"second",
        "a.md": b"first of all",
        "c/d.py": b"third",
        "image.png": b"\x89PNG\xff",
        ".hidden": b"hidden",
        ".git/config": b"hidden",
    }.items():
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_bytes(content)
    assert all_text(load_corpus(tmp_path, BYTE, 1)) == END_OF_TEXT.join(["first of all", "second", "third", ""])


@pytest.mark.parametrize("source", ["../corpus", "../.cache/corpus"])
def test_folder_is_hidden_only_by_names_inside_it(tmp_path, monkeypatch, source):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    folder = tmp_path / "here" / source
    folder.mkdir(parents=True)
    (folder / "a.txt").write_text("some text of no length")
    assert all_text(load_corpus(source, BYTE, 1)) == "some text of no length" + END_OF_TEXT


def test_token_file_is_mapped_and_gives_its_last_tenth_to_validation(tmp_path):
    np.arange(200, dtype=np.uint16).tofile(tmp_path / "tokens.bin")
    train, val, *_ = load_corpus(tmp_path / "tokens.bin", BYTE, 19)
    assert isinstance(train, np.memmap)
    assert train.tolist() == list(range(180))
    assert val.tolist() == list(range(180, 200))


def test_folder_of_token_files(tmp_path):
    np.arange(50, dtype=np.uint16).tofile(tmp_path / "train.bin")
    np.arange(60, 70, dtype=np.uint16).tofile(tmp_path / "val.bin")
    (tmp_path / "input.txt").write_text("the text that they were made from")
    train, val, *_ = load_corpus(tmp_path, BYTE, 9)
    assert train.tolist() == list(range(50))
    assert val.tolist() == list(range(60, 70))


def test_windows_targets_are_shifted_by_one():
    tokens = np.arange(50_200, 50_220, dtype=np.uint16)
    inputs, targets = windows(tokens, np.array([0, 15]), 4, torch.device("cpu"))
    assert inputs.tolist() == [[50200, 50201, 50202, 50203], [50215, 50216, 50217, 50218]]
    assert targets.tolist() == [[50201, 50202, 50203, 50204], [50216, 50217, 50218, 50219]]
    assert inputs.dtype == targets.dtype == torch.int64


def test_windows_for_a_gpu_come_from_pinned_memory(monkeypatch):
    """So that the copy does not make the host wait."""
    pinned, copies = [], []

    def pin(batch):
        pinned.append(batch)
        return batch

    def copied(batch, device, non_blocking):
        copies.append((batch is pinned[-1], device.type, non_blocking))
        return batch

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    monkeypatch.setattr(torch.Tensor, "to", copied)
    inputs, targets = windows(np.arange(9, dtype=np.uint16), [0, 3], 4, torch.device("cuda"))
    assert copies == [(True, "cuda", True)]
    assert inputs.tolist() == [[0, 1, 2, 3], [3, 4, 5, 6]]
    assert targets.tolist() == [[1, 2, 3, 4], [4, 5, 6, 7]]


@pytest.mark.parametrize("name", ["gone.txt", "gone.bin", "gone"])
def test_missing_source(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=f"no file or folder .*{name}"):
        load_corpus(tmp_path / name, BYTE, 8)


@pytest.mark.parametrize(
    ("name", "content", "window", "message"),
    [
        ("empty.txt", b"", 8, "empty.txt is empty: 0 bytes"),
        ("short.txt", b"x" * 20, 64, "short.txt: 19 training tokens are too few for a window of 64 + 1"),
        ("short.txt", b"x" * 99, 10, "short.txt: 10 validation tokens are too few for a window of 10 + 1"),
        ("short.bin", bytes(20), 9, "short.bin: 9 training tokens are too few for a window of 9 + 1"),
        ("latin.txt", b"caf\xe9 au lait", 2, "latin.txt is not UTF-8 text: byte 3 is 0xe9"),
        ("empty.bin", b"", 8, "empty.bin has 0 bytes"),
        ("odd.bin", bytes(41), 8, "odd.bin has 41 bytes"),
    ],
    ids=["empty", "short", "short-validation", "short-bin", "not-utf8", "empty-bin", "odd-bin"],
)
def test_bad_file(tmp_path, name, content, window, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError) as error:
        load_corpus(tmp_path / name, BYTE, window)
    assert message in str(error.value)


@pytest.mark.parametrize("files", [{}, {"a.png": b"\xff", "b.gz": b"\x1f\x8b"}], ids=["empty", "binary"])
def test_folder_without_text(tmp_path, files):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(FileNotFoundError, match=f"holds no text: none of its {len(files)} files is UTF-8"):
        load_corpus(tmp_path, BYTE, 8)


@pytest.mark.parametrize("offset", [0, 7, 95], ids=["first", "training", "validation"])
def test_token_outside_the_encoding(tmp_path, offset):
    tokens = np.full(100, 256, dtype=np.uint16)
    tokens[offset] = 257
    tokens.tofile(tmp_path / "tokens.bin")
    with pytest.raises(ValueError, match=rf"tokens.bin: token 257 at offset {offset} is outside the 257 ids .* 'byte'"):
        load_corpus(tmp_path / "tokens.bin", BYTE, 4)


def test_token_outside_the_encoding_in_a_large_file(tmp_path):
    offset = 2**24 + 5  # past the first piece that is looked through at once
    with open(tmp_path / "tokens.bin", "wb") as file:
        file.seek(2 * offset)
        file.write(np.array([300, 0], dtype=np.uint16).tobytes())
    with pytest.raises(ValueError, match=f"token 300 at offset {offset} "):
        load_corpus(tmp_path / "tokens.bin", BYTE, 4)


@pytest.mark.parametrize("part", ["train", "val"])
def test_token_outside_the_encoding_in_a_folder_of_token_files(tmp_path, part):
    np.zeros(50, dtype=np.uint16).tofile(tmp_path / "train.bin")
    np.zeros(50, dtype=np.uint16).tofile(tmp_path / "val.bin")
    np.array([*range(40), 50256], dtype=np.uint16).tofile(tmp_path / f"{part}.bin")
    with pytest.raises(ValueError, match=f"{part}.bin: token 50256 at offset 40 "):
        load_corpus(tmp_path, BYTE, 4)


@pytest.mark.parametrize("alone", ["train.bin", "val.bin"])
def test_half_of_a_pair_of_token_files_is_no_text(tmp_path, alone):
    (tmp_path / alone).write_bytes(bytes(400))
    missing = {"train.bin": "val.bin", "val.bin": "train.bin"}[alone]
    with pytest.raises(FileNotFoundError, match=f"no file or folder .*{missing}"):
        load_corpus(tmp_path, encoding("byte"), 8)


def test_jsonl_is_not_read_as_text(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "some words"}\n' * 9)
    with pytest.raises(ValueError, match=r"`fastgpt tokenize .*a.jsonl -o DIR` takes its texts out"):
        load_corpus(tmp_path / "a.jsonl", BYTE, 4)


@pytest.mark.parametrize("order", ["random", "epoch"])
def test_a_window_depends_on_its_number_alone(order):
    """However many are asked for at once, and whatever was asked before: so a resumed run and any number of processes
    see the same ones."""
    tokens = np.arange(1000)
    at_once = Order(tokens, 16, order, 7).starts(0, 200)
    one_by_one = Order(tokens, 16, order, 7)
    assert at_once.tolist() == [int(one_by_one.starts(number, 1)[0]) for number in range(200)]
    assert at_once[150:].tolist() == Order(tokens, 16, order, 7).starts(150, 50).tolist()
    assert at_once.tolist() != Order(tokens, 16, order, 8).starts(0, 200).tolist()
    assert at_once.min() >= 0 and at_once.max() + 16 + 1 <= 1000


def test_random_windows_start_anywhere():
    starts = Order(np.arange(21), 16, "random", 1).starts(0, 1000)
    assert np.bincount(starts).min() > 150 and len(np.bincount(starts)) == 5


def test_an_epoch_has_every_window_once_in_an_order_of_its_own():
    order = Order(np.arange(1000), 16, "epoch", 1)
    assert order.windows == 62
    first, second = order.starts(0, 62), order.starts(62, 62)
    assert sorted(first) == sorted(second) == [16 * number for number in range(62)]
    assert first.tolist() != second.tolist() and first.tolist() != sorted(first)


def test_documents_begin_with_the_end_of_the_one_before():
    idx = torch.tensor([[5, 9, 6, 7, 9, 9, 8], [9, 1, 2, 3, 4, 5, 6]])
    assert documents(idx, 9).tolist() == [[0, 1, 1, 1, 2, 3, 3], [1] * 7]


@pytest.mark.parametrize("told", [True, False])
def test_one_file_of_a_large_encoding(tmp_path, told):
    """Its ids are read in the width that they were written in, not as pairs of ids half as wide."""
    ranks = {bytes([value]): value for value in range(256)}
    special = {END_OF_TEXT: 200_000, "<|low|>": 70_000, "<|high|>": 199_000}
    large = tiktoken.Encoding("large", pat_str="(?s:.)", mergeable_ranks=ranks, special_tokens=special)
    ids = np.array([70_000, 3, 199_000] * 20, dtype=np.uint32)
    (tmp_path / "train.bin").write_bytes(ids.tobytes())
    if told:
        meta = dict(encoding=large.name, dtype="uint32")
        (tmp_path / "meta.json").write_text(json.dumps(meta))
        with pytest.raises(ValueError, match="holds tokens of the encoding 'large', not of 'byte'"):
            read_tokens(tmp_path / "train.bin", BYTE)
    assert read_tokens(tmp_path / "train.bin", large).tolist() == ids.tolist()
    assert len(load_corpus(tmp_path / "train.bin", large, 4).train) == 54


def test_a_folder_of_tokens_is_evaluated_by_its_validation(tmp_path):
    for part, ids in (("train", [1, 2, 3]), ("val", [4, 5])):
        np.array(ids, dtype=np.uint16).tofile(tmp_path / f"{part}.bin")
    assert read_tokens(tmp_path, BYTE).tolist() == [4, 5]


def test_the_meta_file_of_another_program(tmp_path):
    np.arange(200, dtype=np.uint16).tofile(tmp_path / "x.bin")
    (tmp_path / "meta.json").write_text('{"vocab_size": 65}')
    assert len(load_corpus(tmp_path / "x.bin", BYTE, 4).train) == 180


def test_a_folder_of_text_with_a_file_that_only_sounds_like_tokens(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "pretrained.bin").write_bytes(b"\xff\xff")
    assert read_tokens(tmp_path, BYTE).tolist() == [*b"text", 256]


def test_a_shard_for_both_parts(tmp_path):
    for name in ("retrieval_train_0.bin", "retrieval_val_0.bin"):
        np.arange(100, dtype=np.uint16).tofile(tmp_path / name)
    with pytest.raises(ValueError, match=r"retrieval_train_0\.bin has train and val in its name"):
        load_corpus(tmp_path, BYTE, 4)


def test_a_folder_with_json_is_not_read_as_text(tmp_path):
    (tmp_path / "a.txt").write_text("text " * 100)
    (tmp_path / "b.jsonl").write_text('{"text": "x"}\n')
    with pytest.raises(ValueError, match=r"b\.jsonl holds JSON, not plain text"):
        load_corpus(tmp_path, BYTE, 4)


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.jsonl"])
def test_a_text_of_a_folder_with_a_bad_byte(tmp_path, name):
    (tmp_path / "b.txt").write_text("text " * 100)
    (tmp_path / "c.bin").write_bytes(b"\xff")
    (tmp_path / name).write_bytes(b'"caf\xe9"')
    for read in (lambda: load_corpus(tmp_path, BYTE, 4), lambda: tokenize([tmp_path], BYTE, tmp_path / "out")):
        with pytest.raises(ValueError, match=rf"{name} is not UTF-8 text: byte 4 is 0xe9"):
            read()
    assert not (tmp_path / "out").exists()


def test_half_a_surrogate_pair(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "whole \\ud83d\\ude00"}\n{"text": "half \\ud83d"}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2 has half of a surrogate pair"):
        tokenize([tmp_path / "a.jsonl"], BYTE, tmp_path / "out")


def test_a_copy_that_is_read_late_is_not_made(monkeypatch):
    """On a Mac's GPU, by a stand-in: what is copied without waiting is read when the rows are gone."""
    to = torch.Tensor.to

    def late(self, device, non_blocking=False):
        return to(self, "cpu").mul(0 if non_blocking else 1)

    monkeypatch.setattr(torch.Tensor, "to", late)
    idx, targets = windows(np.arange(1, 40, dtype=np.uint16), [0, 7], 4, torch.device("mps"))
    assert idx.tolist() == [[1, 2, 3, 4], [8, 9, 10, 11]] and targets[0].tolist() == [2, 3, 4, 5]
