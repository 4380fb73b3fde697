"""nanoGPT's character-level folders: read without running code, trained on, fine-tuned, and written as text."""

import os
import pickle
import struct

import numpy as np
import pytest

from fastgpt import cli
from fastgpt.data import load_corpus, read_tokens
from fastgpt.data.characters import name_in
from fastgpt.data.tokenizer import encoding
from fastgpt.weights import load_model
from tests.models import nanogpt
from tests.weights.converted import save_nanogpt

TEXT = 'First "Citizen":\nbefore wé proceed any further, hear me \\ speak.\n' * 40
CHARACTERS = sorted(set(TEXT))
SHORT = ("--batch_size", "8", "--max_iters", "2", "--eval_iters", "1")
TINY = ("--n_layer", "1", "--n_head", "2", "--n_embd", "32", "--block_size", "16", *SHORT)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """As nanoGPT's data/shakespeare_char/prepare.py leaves it."""
    monkeypatch.chdir(tmp_path)
    data = tmp_path / "data"
    data.mkdir()
    numbers = {character: number for number, character in enumerate(CHARACTERS)}
    ids = np.array([numbers[character] for character in TEXT], dtype=np.uint16)
    ids[:2000].tofile(data / "train.bin")
    ids[2000:].tofile(data / "val.bin")
    meta = {"vocab_size": len(CHARACTERS), "itos": dict(enumerate(CHARACTERS)), "stoi": numbers}
    (data / "meta.pkl").write_bytes(pickle.dumps(meta))
    return data


def main(capsys, *arguments):
    code = cli.main(list(map(str, arguments)))
    out, err = capsys.readouterr()
    return code, out, err


def test_its_tokens_are_the_texts_characters(folder):
    name = name_in(folder / "meta.pkl")
    characters = encoding(str(folder / "meta.pkl"))
    assert characters.name == name == "characters:" + "".join(CHARACTERS)
    for source in (folder, folder / "train.bin"):
        assert characters.decode(load_corpus(source, characters, 4).train[:200].tolist()) == TEXT[:200]
    assert characters.encode(TEXT) == list(read_tokens(folder / "train.bin", characters)) + list(
        read_tokens(folder / "val.bin", characters)
    )
    with pytest.raises(ValueError, match="'ß' is none of the 30 characters that the model knows"):
        characters.encode("heaß")


def test_a_run_on_it_writes_its_characters_and_goes_on(folder, capsys):
    code, out, err = main(capsys, "train", "--data", "data", "--out", "run", *TINY)
    assert code == 0, err
    model, config = load_model("run")
    assert (model.config.vocab_size, config["encoding"]) == (30, "characters:" + "".join(CHARACTERS))
    sample = out.partition("a sample:\n\n")[2].partition("\n\nto write more")[0]
    assert len(sample) > 99 and set(sample) <= set(CHARACTERS)
    code, out, err = main(capsys, "train", "--out", "run", "--resume", "--max_iters", 3)
    assert code == 0 and "resuming from" in out and load_model("run")[1]["step"] == 3, err
    code, out, _ = main(capsys, "generate", "--checkpoint", "run", "--prompt", "hear", "--max_new_tokens", 30)
    assert code == 0 and out.startswith("hear") and len(out) == 4 + 30 + 1 and set(out) <= set(CHARACTERS)
    code, _, err = main(capsys, "generate", "--checkpoint", "run", "--prompt", "heaß")
    assert code == 2 and err == "fastgpt generate: 'ß' is none of the 30 characters that the model knows\n"


def test_text_is_evaluated_as_its_tokens_are(folder, capsys):
    assert main(capsys, "train", "--data", "data", "--out", "run", *TINY, "--sample_tokens", 0)[0] == 0
    (folder.parent / "val.txt").write_text(TEXT[2000:], encoding="utf-8")
    said = [main(capsys, "eval", data, "--checkpoint", "run")[1] for data in ("data", "val.txt")]
    assert said[0] == said[1] and "bits a byte" in said[0]


def test_its_own_checkpoint_is_fine_tuned_on_it_and_converted(folder, capsys):
    save_nanogpt(nanogpt(vocab_size=30, block_size=16, bias=False), folder.parent / "ckpt.pt")
    fine = ("train", "--init_from", "ckpt.pt", "--data", "data", "--out", "fine", *SHORT)
    code, out, err = main(capsys, *fine)
    assert code == 0 and "a sample" in out, err
    assert load_model("fine")[1]["encoding"] == "characters:" + "".join(CHARACTERS)
    code, out, err = main(capsys, "convert", "ckpt.pt", "ours", "--to", "fastgpt", "--encoding", "data/meta.pkl")
    assert code == 0 and load_model("ours")[1]["encoding"] == "characters:" + "".join(CHARACTERS), err
    for path in (["ours"], ["ckpt.pt", "--encoding", "data/meta.pkl"]):
        code, out, err = main(capsys, "generate", "--max_new_tokens", 9, "--checkpoint", *path)
        assert code == 0 and len(out) == 10 and set(out) <= set(CHARACTERS), err


def test_what_has_no_end_of_text_is_told(folder, capsys):
    (folder.parent / "a.txt").write_text(TEXT, encoding="utf-8")
    code, _, err = main(capsys, "tokenize", "a.txt", "-o", "new", "--encoding", "data/meta.pkl")
    assert code == 2 and "has no end-of-text token" in err and not (folder.parent / "new").exists()
    code, _, err = main(capsys, "train", "--data", "data", "--out", "run", *TINY, "--document_mask", "true")
    assert code == 2 and "has no end-of-text token" in err and not (folder.parent / "run").exists()


def test_tokens_of_characters_are_no_bytes(folder, capsys):
    code, _, err = main(capsys, "train", "--data", "data", "--out", "run", *TINY, "--encoding", "byte")
    assert code == 2 and "data holds tokens of the encoding 'characters:" in err and "not of 'byte'" in err
    assert len(err) < 200 and not (folder.parent / "run").exists()


class Harm:
    def __reduce__(self):
        return os.mkdir, ("harm",)


def wide(number):
    """A pickle that names a place in the memo so far out that one reader would take all of memory for it."""
    return b"\x80\x02}r" + struct.pack("<I", number) + b"."


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps(Harm()), "STACK_GLOBAL is in it, and only dicts, lists, text and numbers are read"),
        (pickle.dumps(Harm(), protocol=2), "GLOBAL is in it"),
        (pickle.dumps({"itos": {0: Harm()}}), "STACK_GLOBAL is in it"),
        (wide(2**32 - 1), "LONG_BINPUT is in it"),
        (pickle.dumps({"vocab_size": 50304}), "KeyError"),
        (pickle.dumps({"itos": {1: "a"}}), "KeyError"),
        (pickle.dumps({"itos": {0: "ab"}}), "its itos holds more than single characters"),
        (pickle.dumps({"itos": {0: "a", 1: "a"}}), "has each of its characters once"),
        (pickle.dumps({"itos": {}}), "and one at least"),
        (pickle.dumps(["a"]), "TypeError"),
        (pickle.dumps({"itos": {0: "a"}})[:-3], "pickle exhausted before seeing STOP"),
        (b"", "pickle exhausted before seeing STOP"),
        (b"no pickle at all", "at position 0, opcode b'n' unknown"),
    ],
    ids=str,
)
def test_a_file_of_anyones_runs_no_code(folder, capsys, content, message):
    (folder / "meta.pkl").write_bytes(content)
    for arguments in (("train", "--data", "data", *TINY), ("train", "--data", "data/train.bin", *TINY)):
        code, _, err = main(capsys, *arguments)
        assert code == 2 and err.startswith("fastgpt train: data/meta.pkl is no vocabulary of characters"), err
        assert message in err and err.count("\n") == 1
    assert sorted(each.name for each in folder.parent.iterdir()) == ["data"]


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_every_protocol_and_many_characters(tmp_path, protocol):
    many = [chr(number) for number in range(0x4E00, 0x4E00 + 3000)]
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"itos": dict(enumerate(many))}, protocol=protocol))
    found = encoding(name_in(tmp_path / "meta.pkl"))
    assert found.encode("一丁一") == [0, 1, 0] and found.decode([2999]) == many[-1]


@pytest.mark.parametrize("name", ["characters:", "characters:aa", "characters:\ud800"])
def test_a_name_that_is_no_vocabulary(name):
    with pytest.raises(ValueError, match="names no vocabulary"):
        encoding(name)
