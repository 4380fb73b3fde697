"""What `convert --to huggingface` leaves: a folder that transformers' own loaders read, and whose page is true."""

import json
import random
import re
import sysconfig
from pathlib import Path

import pytest
import torch

from fastgpt import GPT, GPTConfig, weights
from fastgpt.data.tokenizer import encoding
from fastgpt.weights import convert
from fastgpt.weights.tokenizer_files import tokenizer_files
from tests.weights.converted import IDX, ours

CHARACTERS = "characters:" + "".join(sorted({*"Hello, world.\n\r\té√"}))


def mixed(size):
    """Source code, and letters of many alphabets with spaces of all kinds: about so many bytes."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    rng = random.Random(0)
    blocks = [(32, 127), (160, 0x500), (0x600, 0x700), (0x3040, 0x30FF), (0x4E00, 0x9FFF), (0x1F300, 0x1F6FF)]
    special = "\n\n\t\r   \u00a0\u2003\u200d\u0301'\u2019"
    drawn = (
        rng.choice(special) if rng.random() < 0.3 else chr(rng.randrange(*rng.choice(blocks))) for _ in range(size // 6)
    )
    text = "".join(file.read_text(encoding="utf-8", errors="ignore") for file in files[:30])[: size // 2]
    return text + "".join(drawn)


def save(model, folder, name, **told):
    """fastgpt's own folder."""
    folder.mkdir()
    weights.save_model(model, folder, name, **told)


def saved(tmp_path, name):
    """A model, and the folder that `convert` makes of it."""
    model = ours(vocab_size=encoding(name).n_vocab)
    save(model, tmp_path / "ours", name)
    assert convert(tmp_path / "ours", tmp_path / "theirs", "huggingface") == []
    return model, tmp_path / "theirs"


@pytest.mark.parametrize("size", [100_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["gpt2", "byte", CHARACTERS], ids=["gpt2", "byte", "characters"])
def test_their_tokens_are_tiktokens(tmp_path, name, size):
    transformers = pytest.importorskip("transformers", reason="the extra `test` brings transformers")
    _, folder = saved(tmp_path, name)
    theirs, own = transformers.AutoTokenizer.from_pretrained(folder), encoding(name)
    text = mixed(size)
    if name == CHARACTERS:
        known = set(name.removeprefix("characters:"))
        text = "".join(character for character in text if character in known)
        with pytest.raises(Exception, match="WordLevel error"):
            theirs("z")
    ids = theirs(text)["input_ids"]
    assert ids == own.encode(text, disallowed_special=()) and theirs.decode(ids) == text
    assert len(theirs) == own.n_vocab
    if name != CHARACTERS:
        ends = "a<|endoftext|> b"
        assert theirs(ends)["input_ids"] == own.encode(ends, allowed_special="all")
        assert theirs.eos_token_id == own.eot_token


@pytest.mark.parametrize("name", ["byte", CHARACTERS], ids=["byte", "characters"])
def test_their_model_ends_a_text_where_ours_does(tmp_path, name):
    transformers = pytest.importorskip("transformers", reason="the extra `test` brings transformers")
    model, folder = saved(tmp_path, name)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    ids = IDX % model.config.vocab_size
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, model(ids), rtol=1e-5, atol=1e-5)
    end = 256 if name == "byte" else None
    for said in (theirs.config, theirs.generation_config):
        assert (said.bos_token_id, said.eos_token_id) == (end, end)
    assert theirs.generation_config.pad_token_id == end
    assert GPT.from_pretrained(folder).config == model.config


def test_the_page_says_what_a_run_left(tmp_path):
    train = dict(init_from="gpt2", max_iters=300, batch_size=8, learning_rate=4e-3, decay_lr=True, lr_decay_iters=None)
    told = dict(step=200, val_loss=2.7183, train=train, data=dict(train_tokens=12345, val_tokens=678, sha256="ab" * 32))
    save(ours(vocab_size=257), tmp_path / "ours", "byte", **told)
    convert(tmp_path / "ours", tmp_path / "a-name", "huggingface")
    page = (tmp_path / "a-name" / "README.md").read_text(encoding="utf-8")
    assert page.startswith("---\nlibrary_name: transformers\n") and "\n# a-name\n" in page
    for said in ("for 200 of 300 steps", "12,345 tokens", "`" + "ab" * 32 + "`", "2.7183 nats", "began from `gpt2`"):
        assert said in page, said
    assert "learning_rate = 0.004\ndecay_lr = true\n" in page and "lr_decay_iters" not in page
    convert(tmp_path / "a-name", tmp_path / "again", "huggingface")
    page = (tmp_path / "again" / "README.md").read_text(encoding="utf-8")
    assert "do not say how it was trained" in page and "steps" not in page


def test_what_is_known_of_an_encoding_decides_which_files_there_are(tmp_path, monkeypatch):
    save(ours(vocab_size=61), tmp_path / "a", "unknown")
    (note,) = convert(tmp_path / "a", tmp_path / "b", "huggingface")
    assert note.startswith("no tokenizer's files: nothing says which encoding")
    assert sorted(file.name for file in (tmp_path / "b").iterdir()) == ["README.md", "config.json", "model.safetensors"]
    config = GPTConfig(vocab_size=257, block_size=8, n_layer=1, n_head=1, n_embd=8)
    save(GPT(config), tmp_path / "c", "byte")
    assert convert(tmp_path / "c", tmp_path / "d", "huggingface", encoding="byte") == []
    assert json.loads((tmp_path / "d" / "tokenizer_config.json").read_text())["model_max_length"] == 8
    convert(tmp_path / "a", tmp_path / "d", "huggingface", overwrite=True)
    assert not (tmp_path / "d" / "tokenizer.json").exists(), "the other model's"
    assert tokenizer_files(encoding("byte"), 8) is not None
    monkeypatch.setattr(weights.saving, "tokenizer_files", lambda *args: None)  # as of cl100k_base
    (note,) = convert(tmp_path / "c", tmp_path / "e", "huggingface")
    assert re.search("those of byte would not be sure", note) and (tmp_path / "e" / "generation_config.json").exists()
