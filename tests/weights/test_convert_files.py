"""Files of weights that are wrong, and those that a conversion may not touch or ask for."""

import json
import os
import pickle
import shutil
import sys
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastgpt import GPT, weights
from fastgpt.weights import convert
from tests.models import hugging_face, nanogpt
from tests.weights.converted import logits, ours, save_nanogpt

# Wrong files


@pytest.fixture
def good(tmp_path):
    """The path of a good file of nanoGPT's, and its content."""
    save_nanogpt(nanogpt(), tmp_path / "ckpt.pt")
    return tmp_path / "ckpt.pt", torch.load(tmp_path / "ckpt.pt", weights_only=True)


def _set(name, value):
    return lambda content: content["model"].__setitem__(name, value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["model"].pop("transformer.h.1.mlp.c_fc.weight"), "disagree about 1 tensors, h.1.mlp.c_fc.weight"),
        (lambda c: c["model"].pop("transformer.wpe.weight"), "there is no wpe.weight"),
        (_set("transformer.h.5.ln_1.weight", torch.ones(48)), "the settings say n_layer = 2, the tensors 3"),
        (_set("stranger.weight", torch.ones(3)), "disagree about 1 tensors, stranger.weight first"),
        (_set("transformer.h.0.ln_1.weight", torch.ones(47)), r"ln_1.weight has shape \(47,\), .* says \(48,\)"),
        (
            _set("transformer.ln_f.weight", torch.ones(1).expand(10**12)),
            r"claims the shape \(10+,\) and holds 4",
        ),
        (_set("transformer.ln_f.weight", "text"), "transformer.ln_f.weight is a str, not a tensor"),
        (_set("transformer.ln_f.weight", torch.ones(48).long()), "is torch.int64 of shape"),
        (_set("transformer.ln_f.weight", torch.ones(48).to_sparse()), "is torch.float32 of shape"),
        (_set("transformer.ln_f.weight", torch.ones(2, 2, 12)), r"of shape \(2, 2, 12\), not a vector or matrix"),
        (_set("module.transformer.ln_f.weight", torch.ones(48)), "holds transformer.ln_f.weight twice"),
        (lambda c: c.update(model={}), "no weights of Hugging Face's GPT-2, nanoGPT, the book or fastgpt"),
        (lambda c: c.update(model={"conv.weight": torch.ones(2)}), "there are conv.weight"),
        (lambda c: c.update(model=[1, 2], model_args={}), "not a tensor"),
        (lambda c: c.update(model_args=3), "not a state dict"),
        (lambda c: c["model_args"].update(n_head=5), "48 does not divide into n_head = 5"),
        (lambda c: c["model_args"].update(n_embd=64), "the settings say n_embd = 64, the tensors 48"),
    ],
)
def test_a_wrong_checkpoint(good, tmp_path, change, message):
    path, content = good
    change(content)
    torch.save(content, path)
    with pytest.raises(ValueError, match=message) as error:
        convert(path, tmp_path / "b", "huggingface")
    assert len(str(error.value)) < 600 and not (tmp_path / "b").exists()


@pytest.mark.parametrize("to", ["huggingface", "fastgpt"])
def test_tensors_that_share_their_memory(good, tmp_path, to):
    path, content = good
    content["model"]["transformer.ln_f.bias"] = content["model"]["transformer.ln_f.weight"]
    torch.save(content, path)
    convert(path, tmp_path / "b", to)
    expected = GPT.from_pretrained(path).state_dict()
    for name, tensor in GPT.from_pretrained(tmp_path / "b").state_dict().items():
        assert torch.equal(tensor, expected[name])


def test_a_claim_of_more_than_is_stored(good):
    path, content = good
    content["model"]["transformer.ln_f.weight"] = torch.ones(1).expand(48)
    torch.save(content, path)
    with pytest.raises(ValueError, match=r"claims the shape \(48,\) and holds 4 bytes"):
        GPT.from_pretrained(path)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ".pth"])
@pytest.mark.parametrize(
    "content",
    [b"", b"hello", b"PK\x03\x04", b"\x80\x04", b"\xff" * 9999],
    ids=["empty", "text", "zip", "pickle", "junk"],
)
def test_what_is_no_file_of_weights(tmp_path, suffix, content):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.\w+ is (no|not)"):
        convert(path, tmp_path / "b", "huggingface")
    assert not (tmp_path / "b").exists()


class Stranger:
    pass


def _pickled(path):
    path.write_bytes(pickle.dumps({"a": Stranger()}, protocol=2))


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (
            lambda path: torch.save({"model": {}, "config": Stranger()}, path),
            r"it holds [\w.]*Stranger, which is no tensor",
        ),
        (
            lambda path: torch.save(torch.nn.Linear(2, 2), path),
            "it holds torch.nn.modules.linear.Linear, which is no tensor",
        ),
        (_pickled, r"it holds [\w.]*Stranger, which is no tensor"),
        (lambda path: path.write_text("hello world\n"), "its bytes are none"),
        (lambda path: path.write_bytes(b""), "its bytes are none"),
        (lambda path: path.write_bytes(b"PK\x03\x04junk"), "failed reading zip archive: not a ZIP archive"),
    ],
    ids=["object", "module", "pickle", "text", "empty", "zip"],
)
def test_what_is_no_checkpoint_is_told_in_a_line(tmp_path, write, message):
    """Of ours: PyTorch's goes on about how to run the code in it."""
    path = tmp_path / "a.pt"
    write(path)
    with pytest.raises(ValueError, match=message + "$") as caught:
        GPT.from_pretrained(path)
    said = str(caught.value)
    assert "weights_only" not in said and "trust" not in said and said.isprintable() and len(said) < 300


def test_nothing_is_unpickled_or_unpacked(good, tmp_path):
    path, content = good

    class Trap:
        def __reduce__(self):
            return open, (str(tmp_path / "sprung"), "w")

    torch.save({**content, "trap": Trap()}, tmp_path / "trap.pt")
    with pytest.raises(ValueError, match="is not a file of weights that torch"):
        GPT.from_pretrained(tmp_path / "trap.pt")
    assert not (tmp_path / "sprung").exists()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.namelist():
            new.writestr(entry, old.read(entry))
    with pytest.raises(ValueError, match="is compressed"):
        GPT.from_pretrained(tmp_path / "bomb.pt")


@pytest.mark.parametrize("name", ["../a.safetensors", "/etc/passwd", "..", "", "a/b.safetensors", "..\\a.safetensors"])
def test_an_index_never_leaves_its_folder(tmp_path, name):
    folder = tmp_path / "shards"
    theirs = hugging_face()
    theirs.save_pretrained(folder, max_shard_size="60KB")
    shutil.copy(next(folder.glob("model-*.safetensors")), tmp_path / "a.safetensors")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"][next(iter(index["weight_map"]))] = name
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="which is not in its folder"):
        GPT.from_pretrained(folder)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (b"[]", "holds a list, not an object"),
        (b"{", "is not JSON"),
        (b"{}", "has no weight_map"),
        (b'{"weight_map": {"wte.weight": "gone.safetensors"}}', "names gone.safetensors, which is not there"),
    ],
)
def test_a_wrong_index(tmp_path, index, message):
    (tmp_path / "model.safetensors.index.json").write_bytes(index)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        GPT.from_pretrained(tmp_path)


def test_a_shard_that_lacks_what_the_index_says(tmp_path):
    hugging_face().save_pretrained(tmp_path, max_shard_size="60KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    index["weight_map"]["transformer.more"] = next(iter(index["weight_map"].values()))
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"has no transformer.more, which model.safetensors.index.json says it has"):
        GPT.from_pretrained(tmp_path)


def test_nothing_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="no weights in"):
        GPT.from_pretrained(tmp_path)
    for name in ("gone", "./gone", "/gone/away", "a/b.pt"):
        with pytest.raises(FileNotFoundError, match=r"there is no file or folder .*gone|b\.pt"):
            GPT.from_pretrained(name)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no such files")
def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(ValueError, match=r"pipe\.safetensors is neither a file nor a folder"):
        GPT.from_pretrained(tmp_path / "pipe.safetensors")


@pytest.mark.parametrize("to", ["huggingface", "nanogpt", "book", "fastgpt"])
def test_a_folder_that_holds_something_is_left_alone(good, tmp_path, to):
    path, _ = good
    target = tmp_path / "b"
    target.mkdir()
    (target / "config.json").write_text("mine")
    with pytest.raises(ValueError, match=r"holds config.json already; overwrite=True"):
        convert(path, target, to)
    assert (target / "config.json").read_text() == "mine" and len(list(target.iterdir())) == 1
    with pytest.raises(ValueError, match="is not a folder"):
        convert(path, target / "config.json", to)


@pytest.mark.parametrize("to", ["huggingface", "nanogpt", "book", "fastgpt"])
def test_overwriting_ones_own_files(good, tmp_path, to):
    path, content = good
    target = tmp_path / "b"
    convert(path, target, to)
    content["model"]["transformer.ln_f.weight"] *= 2
    torch.save(content, path)
    convert(path, target, to, overwrite=True)
    assert torch.equal(logits(GPT.from_pretrained(target, gelu="none")), logits(GPT.from_pretrained(path)))
    (target / "notes.txt").touch()
    with pytest.raises(ValueError, match=r"holds notes.txt, which is none of what would be written"):
        convert(path, target, to, overwrite=True)


def test_an_unknown_family_or_variant(good, tmp_path):
    with pytest.raises(ValueError, match="to is 'llama', not one of huggingface, book, nanogpt, fastgpt"):
        convert(good[0], tmp_path / "b", "llama")
    with pytest.raises(ValueError, match="variant is 'GPT', not one of GPTModel, GPTModelFast, cache"):
        convert(good[0], tmp_path / "b", "book", variant="GPT")
    assert not (tmp_path / "b").exists()


# The hub


def test_the_hub_is_asked_for_the_files_alone(tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub", reason="transformers brings it")
    hugging_face().save_pretrained(tmp_path)
    asked = []
    monkeypatch.setattr(
        hub, "snapshot_download", lambda name, **kwargs: (asked.append((name, kwargs)), str(tmp_path))[1]
    )
    assert GPT.from_pretrained("gpt2").config.n_layer == 2
    GPT.from_pretrained("someone/model")
    model, _ = weights.load_named("gpt2")  # as --checkpoint gpt2 has it
    assert model.config.n_layer == 2 and asked.pop() == asked[0]
    assert [name for name, _ in asked] == ["openai-community/gpt2", "someone/model"]
    assert all("json" in pattern or "safetensors" in pattern for pattern in asked[0][1]["allow_patterns"])


def test_with_no_network_it_says_what_to_do(monkeypatch):
    hub = pytest.importorskip("huggingface_hub", reason="transformers brings it")

    def offline(*args, **kwargs):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(hub, "snapshot_download", offline)
    with pytest.raises(OSError, match=r"gpt2 can't be had from the .* hub: no route to host. With no network"):
        GPT.from_pretrained("gpt2")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match=r"pip install huggingface_hub` reaches. With no network"):
        GPT.from_pretrained("gpt2")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(to="fastgpt", encoding="klingon"), "unknown encoding 'klingon'; there are byte, "),
        (dict(to="fastgpt", encoding="gpt"), r"unknown encoding 'gpt' \(did you mean 'gpt2'\?\)"),
        (dict(to="book", encoding="byte"), "encoding = 'byte' is for fastgpt and huggingface alone, not for book"),
        (dict(to="nanogpt", variant="GPTModelFast"), "variant = 'GPTModelFast' is for book alone, not for nanogpt"),
        (dict(to="nanogpt", n_head=2), "n_head is 2, and its settings say 4"),
    ],
)
def test_what_the_new_family_would_not_hear_is_refused(tmp_path, options, message):
    ours().save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "model", tmp_path / "new", **options)
    assert not (tmp_path / "new").exists()


def test_layers_in_several_dtypes_load_in_the_widest(tmp_path):
    """Halves beside float32 norms, as mixed precision leaves them."""
    model = ours().bfloat16()
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    tensors = {name: t.float() if "ln_" in name else t for name, t in stored.items()}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    loaded = GPT.from_pretrained(tmp_path)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    assert torch.equal(logits(loaded), logits(model.float()))


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("wide", ["ln_", "wte", "wpe", ".bias", "h.0."])
def test_whichever_part_is_wider_a_model_computes(tmp_path, stored, wide):
    model = ours().to(stored)
    model.save_pretrained(tmp_path)
    tensors = {name: t.float() if wide in name else t for name, t in load_file(tmp_path / "model.safetensors").items()}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    assert torch.equal(logits(GPT.from_pretrained(tmp_path)), logits(model.float()))


@pytest.mark.parametrize("part", ["", "h.1.mlp"])
def test_numbers_that_no_model_computes_in_are_refused(tmp_path, part):
    ours().save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    tensors = {name: t.to(torch.float8_e4m3fn) if part in name else t for name, t in stored.items()}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=rf"{part}[\w.]+ is torch.float8_e4m3fn of shape .* of 16, 32 or 64 bits"):
        GPT.from_pretrained(tmp_path)


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="names of files are Unicode there")
def test_a_folder_whose_name_is_not_utf8(tmp_path):
    folder = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")
    model = ours()
    model.save_pretrained(folder)
    torch.testing.assert_close(GPT.from_pretrained(folder).state_dict(), model.state_dict(), rtol=0, atol=0)
