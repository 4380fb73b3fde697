"""Files and options that nobody would write: an error of our own, soon, in little memory, and nothing written."""

import json
import random
import shutil
import time

import numpy as np
import pytest
import torch

from fastgpt import GPT, GPTConfig, cli
from fastgpt.data import load_corpus
from fastgpt.data.tokenizer import encoding
from fastgpt.training.checkpoint import Checkpoints
from fastgpt.training.settings import read_settings
from fastgpt.weights import convert, load_model, save_model

resource = pytest.importorskip("resource", reason="Windows counts memory otherwise")

BYTES = encoding("byte")
SHAPE = dict(vocab_size=257, block_size=16, n_layer=1, n_head=2, n_embd=8)
OURS = (ValueError, FileNotFoundError)
SECONDS, MEBIBYTES = 5, 300


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """A folder of each kind of file that we read and a stranger may have written."""
    folder = tmp_path_factory.mktemp("originals")
    model = GPT(GPTConfig(**SHAPE))
    source = folder / "fastgpt"
    source.mkdir()
    save_model(model, source, "byte")
    for family in ("huggingface", "nanogpt", "book"):
        convert(source, folder / family, family)
    sharded = folder / "sharded"
    shutil.copytree(folder / "huggingface", sharded)
    (sharded / "model.safetensors").rename(sharded / "model-00001-of-00001.safetensors")
    names = dict.fromkeys(_names(sharded / "model-00001-of-00001.safetensors"), "model-00001-of-00001.safetensors")
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    tokens = folder / "tokens"
    tokens.mkdir()
    text = folder / "text.txt"
    text.write_text("def f(x):\n    return x + 1\n" * 200)
    assert cli.main(["tokenize", str(text), "--encoding", "byte", "-o", str(tokens), "--overwrite"]) == 0
    llmc = folder / "llmc"
    llmc.mkdir()
    header = np.zeros(256, dtype=np.int32)
    header[:3] = 20240520, 1, 5000
    (llmc / "data.bin").write_bytes(header.tobytes() + np.full(5000, 65, dtype=np.uint16).tobytes())
    (folder / "settings").mkdir()
    (folder / "settings" / "train.toml").write_text('preset = "byte-0.8M"\nmax_iters = 3\nlearning_rate = 1e-3\n')
    return folder


def _names(path):
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return list(file.keys())


def corrupted(data: bytes, draw: random.Random) -> bytes:
    """One accident or malice: flipped bits, mostly near an end where headers are; a cut; a hole; a repeat; words."""
    data = bytearray(data)
    way = draw.randrange(6)
    near = draw.choice((0, max(0, len(data) - 600))) + draw.randrange(min(600, len(data)))
    place = draw.choice((near, draw.randrange(len(data)))) % len(data)
    if way == 0:
        for _ in range(draw.choice((1, 1, 3, 20))):
            data[(place + draw.randrange(40)) % len(data)] ^= 1 << draw.randrange(8)
    elif way == 1:
        del data[draw.choice((place, 0, len(data) - 1)) :]
    elif way == 2:
        data[place : place + draw.choice((1, 8, 4096))] = bytes(draw.choice((1, 8, 4096)))
    elif way == 3:
        data[place:place] = data[: draw.choice((1, 7, 100))]
    elif way == 4:
        words = (b"99999999999", b"-1", b"null", b"1e400", b'"', b"}", b"[]", b"../../etc/passwd", b"\xff\xfe", b"\0")
        data[place : place + draw.randrange(6)] = draw.choice(words)
    else:
        digits = [i for i, byte in enumerate(data) if chr(byte).isdigit()]
        if digits:
            data[draw.choice(digits)] = ord(draw.choice("0123456789"))
    return bytes(data)


def read_all(folder, target):
    """What the program would read of such a folder; True if it took it."""
    if folder.name == "settings":
        cli.main(["train", "--config", str(folder / "train.toml"), "--data", "/nowhere"])
        read_settings(folder / "train.toml")
    elif folder.name in ("tokens", "llmc"):
        load_corpus(folder if folder.name == "tokens" else folder / "data.bin", BYTES, 17)
    else:
        if folder.name == "fastgpt":
            load_model(folder)
        convert(folder, target, "nanogpt" if folder.name == "huggingface" else "huggingface", n_head=2)


KINDS = ("fastgpt", "huggingface", "sharded", "nanogpt", "book", "tokens", "llmc", "settings")


@pytest.mark.parametrize("kind", KINDS)
def test_corrupted_files(originals, tmp_path, kind):
    """Seventy of each kind, over five hundred in all. What is taken in spite of it is at least written whole."""
    draw, refused = random.Random(kind), 0
    files = sorted(path.name for path in (originals / kind).iterdir())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(70):
        folder, target = tmp_path / str(number) / kind, tmp_path / f"{number} out"
        shutil.copytree(originals / kind, folder)
        path = folder / files[number % len(files)]
        path.write_bytes(corrupted(path.read_bytes(), draw))
        content = {each.name: each.read_bytes() for each in folder.iterdir()}
        began = time.monotonic()
        try:
            read_all(folder, target)
        except OURS as error:
            assert len(str(error)) < 1000 and "\n" not in str(error).strip(), "one line"
            assert not target.exists()
            refused += 1
        assert time.monotonic() - began < SECONDS
        assert {each.name: each.read_bytes() for each in folder.iterdir()} == content
        shutil.rmtree(tmp_path / str(number))
        shutil.rmtree(target, ignore_errors=True)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert refused >= 15 and grown < MEBIBYTES


def test_corrupted_checkpoints_of_training(tmp_path):
    """A checkpoint with a file that is not what was written is passed over for the one before, and never an error."""
    draw, checkpoints = random.Random(0), Checkpoints(tmp_path)

    def write(folder):
        (folder / "state.json").write_text(json.dumps({"text": "x" * 500}))
        torch.save(torch.arange(50), folder / "moments.pt")

    for step in (1, 2):
        newest = checkpoints.save(step, write, 0)
    for _ in range(60):
        path = draw.choice(sorted(newest.path.iterdir()))
        whole = path.read_bytes()
        path.write_bytes(corrupted(whole, draw))
        found, passed = checkpoints.newest()
        if path.name != "manifest.json" and path.read_bytes() != whole:
            assert (found.step, [checkpoint.step for checkpoint, _ in passed]) == (1, [2])
        assert found.step in (1, 2)
        path.write_bytes(whole)


VALUES = ("", " ", "-1", "0", "nan", "inf", "-inf", "1e400", "0x10", "1.5", "🙂", "\0", "None", "/")
HUGE = "99999999999999999999"  # train is spared it: steps without end are a fair wish


def options_of(command):
    (commands,) = (action for action in cli._parser()._actions if action.dest == "command")
    actions = commands.choices[command]._actions
    return [action.option_strings[0] for action in actions if action.option_strings and action.nargs != 0]


@pytest.mark.parametrize("command", ["train", "tokenize", "generate", "eval", "convert", "verify"])
def test_options_with_values_that_make_no_sense(originals, tmp_path, capsys, monkeypatch, command):
    """Each option with each of these values: done, or one line and exit code 2, and nothing written."""
    monkeypatch.chdir(tmp_path)
    model, text = str(originals / "fastgpt"), str(originals / "text.txt")
    tiny = (
        "--max_iters 1 --n_layer 1 --n_embd 8 --n_head 2 --block_size 8 --eval_iters 1 --sample_tokens 1 --batch_size 1"
    )
    given = {
        "train": ["--data", text, "--out", "run", *tiny.split()],
        "tokenize": [text, "--encoding", "byte", "-o", "run"],
        "generate": ["--checkpoint", model, "--prompt", "a", "--max_new_tokens", "2"],
        "eval": ["--checkpoint", model, "--data", text],
        "convert": [model, "run", "--to", "book"],
        "verify": [model, "--tokens", "3"],
    }[command]
    wrong = []
    for option in options_of(command):
        for value in VALUES if command == "train" else (*VALUES, HUGE):
            capsys.readouterr()
            try:
                code = cli.main([command, *given, f"{option}={value}"])
            except SystemExit as exit:
                code = exit.code
            except Exception as error:
                wrong.append(f"{option}={value}: {type(error).__name__}: {error}")
                continue
            said = capsys.readouterr().err.splitlines()
            if code not in (0, 1, 2) or (code == 2 and len(said) != 1):
                wrong.append(f"{option}={value}: exit {code}: {said}")
            shutil.rmtree("run", ignore_errors=True)
    assert not wrong, "\n".join(wrong)
