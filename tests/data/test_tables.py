"""Tokens of Parquet files, and of folders that Hugging Face's `datasets` saved: the texts of a column, in order."""

import json
import sys

import numpy as np
import pytest

from fastgpt import cli
from fastgpt.data import load_corpus, tokenize
from fastgpt.data.tokenizer import encoding

arrow = pytest.importorskip("pyarrow", reason="the extra `test` brings it")
parquet = pytest.importorskip("pyarrow.parquet", reason="the extra `test` brings it")
BYTE = encoding("byte")
TEXTS = [f"document {number}, é🙂" for number in range(700)]


def table(texts=TEXTS, column="text", kind=None, **more):
    return arrow.table({"id": list(range(len(texts))), column: arrow.array(texts, kind or arrow.string()), **more})


def write(path, found):
    """As its suffix says; .arrow is the stream that `datasets` writes, in several batches."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        parquet.write_table(found, path, row_group_size=300)
    else:
        with arrow.ipc.new_stream(path, found.schema) as stream:
            stream.write_table(found, 100)
    return path


def dataset(folder, *parts):
    """The files of Dataset.save_to_disk."""
    for number, texts in enumerate(parts):
        write(folder / f"data-{number:05}-of-{len(parts):05}.arrow", table(texts))
    for name in ("dataset_info.json", "state.json"):
        (folder / name).write_text(json.dumps({"features": {"text": {"dtype": "string"}}}))
    return folder


def read(out):
    """The documents of both files of tokens."""
    ids = np.concatenate([np.fromfile(out / name, dtype=np.uint16) for name in ("train.bin", "val.bin")]).tolist()
    *documents, rest = "".join(chr(token) for token in ids).split(chr(256))
    assert rest == ""
    return [document.encode("latin-1").decode() for document in documents]


@pytest.mark.parametrize("kind", ["string", "large_string"])
@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_a_document_a_row(tmp_path, suffix, kind):
    path = write(tmp_path / f"a{suffix}", table(kind=getattr(arrow, kind)()))
    meta = tokenize([path], BYTE, tmp_path / "out")
    assert read(tmp_path / "out") == TEXTS
    assert (meta["documents"], meta["text_bytes"]) == (700, sum(len(text.encode()) for text in TEXTS))


def test_a_file_of_arrows_other_format(tmp_path):
    with arrow.ipc.new_file(tmp_path / "a.arrow", table().schema) as file:
        file.write_table(table(), 100)
    tokenize([tmp_path / "a.arrow"], BYTE, tmp_path / "out")
    assert read(tmp_path / "out") == TEXTS


def test_a_folder_of_datasets(tmp_path, capsys):
    dataset(tmp_path / "saved", TEXTS[:300], TEXTS[300:])
    assert cli.main(["tokenize", str(tmp_path / "saved"), "--encoding", "byte", "-o", str(tmp_path / "out")]) == 0
    assert read(tmp_path / "out") == TEXTS, "and not what its .json files say"
    assert "700 documents" in capsys.readouterr().out


def test_a_folder_of_all_kinds_in_the_order_of_names(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.txt").write_text("first")
    (tmp_path / "in/b.jsonl").write_text('{"body": "second"}\n')
    write(tmp_path / "in/c.parquet", table(["third", "", "fourth"], "body"))
    words = ["tokenize", str(tmp_path / "in"), "--encoding", "byte", "-o", str(tmp_path / "out"), "--columns", "body"]
    assert cli.main(words) == 0
    assert read(tmp_path / "out") == ["first", "second", "third", "", "fourth"]


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: table(column="body"), r"has no column 'text', but id, body: name one by --column"),
        (lambda: table(["x", None, "y"]), r"row 1 has no text in 'text'"),
        (lambda: arrow.table({"text": [1, 2]}), r"the column 'text' holds int64, no text"),
    ],
)
def test_a_table_that_holds_no_such_text(tmp_path, suffix, made, message):
    path = write(tmp_path / f"a{suffix}", made())
    with pytest.raises(ValueError, match=message):
        tokenize([path], BYTE, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
@pytest.mark.parametrize("damage", ["empty", "cut", "text"])
def test_a_file_that_is_no_table(tmp_path, suffix, damage):
    path = write(tmp_path / f"a{suffix}", table())
    whole = path.read_bytes()
    path.write_bytes({"empty": b"", "cut": whole[: len(whole) // 2], "text": b"some text\n" * 99}[damage])
    with pytest.raises(ValueError, match=rf"a\{suffix} is no {suffix[1:]} file that can be read"):
        tokenize([path], BYTE, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_training_says_that_a_table_must_be_tokenized(tmp_path):
    path = write(tmp_path / "a.parquet", table())
    for source in (path, tmp_path):
        with pytest.raises(ValueError, match=r"holds a table, not plain text: `fastgpt tokenize .*a\.parquet -o DIR`"):
            load_corpus(source, BYTE, 4)


def test_without_pyarrow_it_says_what_to_install(tmp_path, monkeypatch):
    path = write(tmp_path / "a.parquet", table())
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"a\.parquet is read by pyarrow, which is not installed: pip install pyarrow"):
        tokenize([path], BYTE, tmp_path / "out")
