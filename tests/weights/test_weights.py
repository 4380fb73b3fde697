import dataclasses
import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastgpt import GPT, GPTConfig
from fastgpt.weights import files, load_model, save_model

CONFIG = GPTConfig(vocab_size=11, block_size=8, n_layer=2, n_head=2, n_embd=8)


@pytest.fixture
def folder(tmp_path):
    """A saved model."""
    save_model(GPT(CONFIG), tmp_path, "byte")
    return tmp_path


def rewrite_config(folder, **fields):
    config = json.loads((folder / "config.json").read_text())
    config["model"].update(fields)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("changes", [{}, {"bias": False, "n_inner": 20, "dropout": 0.5, "gelu": "none"}])
def test_save_then_load(tmp_path, changes):
    model = GPT(dataclasses.replace(CONFIG, **changes))
    save_model(model, tmp_path, "gpt2", step=7)
    loaded, config = load_model(tmp_path)
    assert loaded.config == model.config
    assert (config["encoding"], config["step"]) == ("gpt2", 7)
    assert not loaded.training
    tensors, expected = loaded.state_dict(), model.state_dict()
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)


def test_load_with_changed_fields(folder):
    model, _ = load_model(folder, dropout=0.25, backend="torch")
    assert model.config == dataclasses.replace(CONFIG, dropout=0.25, backend="torch")


def test_an_interrupted_save_leaves_the_old_model(folder, monkeypatch):
    def interrupted(tensors, path, metadata):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    old = {name: (folder / name).read_bytes() for name in ("model.safetensors", "config.json")}
    monkeypatch.setattr(files, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_model(GPT(CONFIG), folder, "byte")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == old


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_missing_file(folder, name):
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError) as error:
        load_model(folder)
    assert f"no {name} in {folder}" in str(error.value)


def test_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no model.safetensors in .*gone"):
        load_model(tmp_path / "gone")


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_truncated_weights(folder, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"model.safetensors is not a whole safetensors file: "):
        load_model(folder)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b'{"model": {',
        b"\xff" * 10_000,
        b"[1, 2]",
        b"null",
        b'{"encoding": "byte"}',
        b'{"encoding": "byte", "model": [1]}',
        b'{"encoding": "byte", "model": {"dropout": "much"}}',
        b'{"model": {}}',
        b'{"model": {}, "encoding": ["byte"]}',
    ],
    ids=[
        "empty",
        "half",
        "not-utf8",
        "list",
        "null",
        "no-model",
        "list-model",
        "wrong-type",
        "no-encoding",
        "list-encoding",
    ],
)
def test_bad_config(folder, content):
    (folder / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"config.json(: | is not | holds a )") as error:
        load_model(folder)
    assert len(str(error.value)) < 500, "the content is not part of the message"


def test_unknown_field_in_config(folder):
    rewrite_config(folder, n_heads=2)
    with pytest.raises(ValueError, match=r"no field 'n_heads' \(did you mean 'n_head'\?\)"):
        load_model(folder)


def test_wrong_shape(folder):
    rewrite_config(folder, block_size=9)
    with pytest.raises(ValueError, match=r"wpe.weight has shape \(8, 8\), config.json says \(9, 8\)"):
        load_model(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("ln_f.weight"), r"disagree about 1 tensors, ln_f.weight first"),
        (lambda tensors: tensors.update(stranger=torch.ones(1)), r"disagree about 1 tensors, stranger first"),
    ],
    ids=["missing", "extra"],
)
def test_missing_and_extra_tensors(folder, change, message):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        load_model(folder)


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize(
    "dump",
    [lambda trap, path: path.write_bytes(pickle.dumps(trap)), lambda trap, path: torch.save({"w": trap}, path)],
    ids=["pickle", "torch.save"],
)
@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_nothing_is_unpickled(folder, name, dump):
    dump(Trap(folder / "sprung"), folder / name)
    with pytest.raises(ValueError):
        load_model(folder)
    assert not (folder / "sprung").exists()
