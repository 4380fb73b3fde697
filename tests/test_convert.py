"""Weights between the families: exact by value, both ways, and a wrong file says what is wrong and writes nothing."""

import json
import os
import shutil
import sys
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastgpt import GPT, GPTConfig, weights
from fastgpt.files import read_weights_of
from fastgpt.weights import convert, load_model
from tests.models import CONTEXT, VOCAB, book, book_package, hugging_face, nanogpt, randomised

IDX = torch.randint(0, VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))
SHAPE = dict(vocab_size=VOCAB, block_size=CONTEXT, n_embd=48, n_layer=2, n_head=4)


def ours(**changes):
    return randomised(GPT(GPTConfig(**{**SHAPE, **changes}))).eval()


def logits(model):
    with torch.no_grad():
        found = model.eval()(IDX)
    return getattr(found, "logits", found)


def same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


def save_nanogpt(model, path):
    args = {name: getattr(model.config, name) for name in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")}
    args.update(bias=model.config.bias, dropout=model.config.dropout)
    content = {"model": model.state_dict(), "optimizer": {"state": {}}, "model_args": args, "iter_num": 3}
    torch.save({**content, "best_val_loss": torch.tensor(2.0), "config": {"dataset": "x"}}, path)


# Every model's own numbers


def test_hugging_faces_model_gives_its_own_logits(tmp_path):
    theirs = hugging_face(activation_function="gelu", n_inner=100, layer_norm_epsilon=1e-3)
    theirs.save_pretrained(tmp_path)
    model = GPT.from_pretrained(tmp_path)
    config = model.config
    assert (config.gelu, config.n_inner, config.layer_norm_eps, config.tie) == ("none", 100, 1e-3, True)
    torch.testing.assert_close(logits(model), logits(theirs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
def test_nanogpts_model_gives_its_own_logits(tmp_path, bias):
    theirs = nanogpt(bias=bias)
    save_nanogpt(theirs, tmp_path / "ckpt.pt")
    model = GPT.from_pretrained(tmp_path / "ckpt.pt")
    assert (model.config.gelu, model.config.bias) == ("none", bias)
    torch.testing.assert_close(logits(model), theirs(IDX, IDX)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("qkv_bias", [True, False])
@pytest.mark.parametrize("variant", ["GPTModel", "GPTModelFast", "cache"])
def test_the_books_model_gives_its_own_logits(tmp_path, variant, qkv_bias):
    kind = dict(kind="GPTModel", module="kv_cache.gpt2") if variant == "cache" else dict(kind=variant)
    theirs = book(**kind, qkv_bias=qkv_bias)
    torch.save({"model_state_dict": theirs.state_dict(), "optimizer_state_dict": {}}, tmp_path / "model.pth")
    model = GPT.from_pretrained(tmp_path / "model.pth", n_head=4)
    assert (model.config.gelu, model.config.tie) == ("tanh", False), "the book's head is its own"
    torch.testing.assert_close(logits(model), logits(theirs), rtol=1e-5, atol=1e-5)


# There and back


def test_save_pretrained_and_transformers_read_each_other(tmp_path):
    transformers = pytest.importorskip("transformers", reason="the extra `test` brings transformers")
    for changes in (dict(), dict(tie=False), dict(gelu="none", n_inner=20, layer_norm_eps=1e-2), dict(bias=False)):
        folder = tmp_path / str(len(changes)) / next(iter(changes), "as-is")
        model = ours(**changes)
        model.save_pretrained(folder / "ours")
        theirs, found = transformers.GPT2LMHeadModel.from_pretrained(folder / "ours", output_loading_info=True)
        assert not any(found[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-5, atol=1e-5)
        theirs.save_pretrained(folder / "theirs")
        again = GPT.from_pretrained(folder / "theirs")
        assert again.config == model.config
        same(again.state_dict(), model.state_dict())


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("to", ["huggingface", "nanogpt", "book", "fastgpt"])
@pytest.mark.parametrize("bias", [True, False])
def test_fastgpts_own_round_trips(tmp_path, to, tie, bias):
    if to == "nanogpt" and not tie:
        return  # refused, below
    model = ours(tie=tie, bias=bias, gelu="none" if to == "nanogpt" else "tanh")
    weights.save_model(model, tmp_path, "byte")
    convert(tmp_path, tmp_path / "there", to)
    convert(tmp_path / "there", tmp_path / "back", "fastgpt")
    again, config = load_model(tmp_path / "back")
    if to == "book" and not bias:  # its layers always have biases: zeros, but for qkv
        same({k: v for k, v in again.state_dict().items() if not k.endswith(".bias")}, model.state_dict())
        assert all(not v.any() for k, v in again.state_dict().items() if k.endswith(".bias"))
    else:
        assert again.config == model.config
        same(again.state_dict(), model.state_dict())
    assert config["encoding"] == ("byte" if to == "fastgpt" else "unknown")
    assert torch.equal(logits(again), logits(model))


def test_hugging_face_to_nanogpt_and_back_is_its_own_file(tmp_path):
    theirs = hugging_face(activation_function="gelu")
    theirs.save_pretrained(tmp_path / "a")
    assert convert(tmp_path / "a", tmp_path / "b", "nanogpt") == []
    checkpoint = torch.load(tmp_path / "b" / "ckpt.pt", weights_only=True)
    model = nanogpt(**{k: v for k, v in checkpoint["model_args"].items() if k != "dropout"})
    model.load_state_dict(checkpoint["model"])
    torch.testing.assert_close(model(IDX, IDX)[0], logits(theirs), rtol=1e-5, atol=1e-5)
    convert(tmp_path / "b", tmp_path / "c", "huggingface")
    same(load_file(tmp_path / "c" / "model.safetensors"), load_file(tmp_path / "a" / "model.safetensors"))


@pytest.mark.parametrize("variant", ["GPTModel", "GPTModelFast", "cache"])
@pytest.mark.parametrize("qkv_bias", [True, False])
def test_hugging_face_to_the_book_and_back(tmp_path, variant, qkv_bias):
    theirs = hugging_face()
    if not qkv_bias:
        for block in theirs.transformer.h:
            block.attn.c_attn.bias.data.zero_()
    theirs.save_pretrained(tmp_path / "a")
    assert convert(tmp_path / "a", tmp_path / "b", "book", variant=variant) == []
    cfg = json.loads((tmp_path / "b" / "config.json").read_text())
    assert cfg["qkv_bias"] == qkv_bias
    module = book_package("kv_cache.gpt2" if variant == "cache" else "ch04")
    model = getattr(module, "GPTModelFast" if variant == "GPTModelFast" else "GPTModel")(cfg)
    model.load_state_dict(torch.load(tmp_path / "b" / "model.pth", weights_only=True))
    torch.testing.assert_close(logits(model), logits(theirs), rtol=1e-5, atol=1e-5)
    convert(tmp_path / "b", tmp_path / "c", "huggingface")
    same(load_file(tmp_path / "c" / "model.safetensors"), load_file(tmp_path / "a" / "model.safetensors"))


def test_square_weights_are_transposed_by_value(tmp_path):
    theirs = hugging_face()
    theirs.save_pretrained(tmp_path)
    state = GPT.from_pretrained(tmp_path).state_dict()
    for i, block in enumerate(theirs.transformer.h):
        assert torch.equal(state[f"h.{i}.attn.c_proj.weight"], block.attn.c_proj.weight.T)
        assert not torch.equal(state[f"h.{i}.attn.c_proj.weight"], block.attn.c_proj.weight)


def test_notes_say_which_gelu_differs(tmp_path):
    weights.save_model(ours(gelu="tanh"), tmp_path, "byte")
    (note,) = convert(tmp_path, tmp_path / "a", "nanogpt")
    assert "exact GELU" in note
    assert GPT.from_pretrained(tmp_path / "a", gelu="tanh").config.gelu == "tanh"
    (note,) = convert(tmp_path / "a", tmp_path / "b", "book")
    assert "tanh GELU" in note
    assert convert(tmp_path / "a", tmp_path / "c", "book", gelu="tanh") == []


# The forms that files come in


def test_prefixes_of_wrappers_and_old_mask_buffers(tmp_path):
    theirs = nanogpt(flash=False)
    state = {f"module._orig_mod.{name}": tensor for name, tensor in theirs.state_dict().items()}
    assert any(name.endswith("attn.bias") for name in state)
    state["module._orig_mod.transformer.h.0.attn.masked_bias"] = torch.tensor(-1e4)
    torch.save(state, tmp_path / "a.pt")
    same(GPT.from_pretrained(tmp_path / "a.pt", n_head=4).state_dict(), _nanogpts(theirs))


def _nanogpts(model):
    state = {name.removeprefix("transformer."): tensor for name, tensor in model.state_dict().items()}
    return {name: t for name, t in state.items() if name != "lm_head.weight" and not name.endswith(".attn.bias")}


def test_mask_buffers_say_nothing(tmp_path):
    torch.save(book().state_dict(), tmp_path / "a.pth")
    names = set(read_weights_of(tmp_path / "a.pth")[0])
    assert not {name for name in names if "mask" in name}
    assert names == {name for name in book().state_dict() if not name.endswith("att.mask")}


def test_the_hubs_file_has_no_prefix_and_no_head(tmp_path):
    """As openai-community/gpt2 has it, with its mask buffers."""
    theirs = hugging_face()
    theirs.save_pretrained(tmp_path)
    tensors = {k.removeprefix("transformer."): v for k, v in load_file(tmp_path / "model.safetensors").items()}
    tensors["h.0.attn.bias"] = torch.ones(1, 1, CONTEXT, CONTEXT)
    save_file(tensors, tmp_path / "model.safetensors")
    torch.testing.assert_close(logits(GPT.from_pretrained(tmp_path)), logits(theirs), rtol=1e-5, atol=1e-5)
    model = GPT.from_pretrained(tmp_path / "model.safetensors", n_head=4)
    assert torch.equal(logits(model), logits(GPT.from_pretrained(tmp_path)))


def test_hugging_faces_old_pickles_and_shards(tmp_path):
    theirs = hugging_face()
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="60KB")
    assert (tmp_path / "shards" / "model.safetensors.index.json").is_file()
    (tmp_path / "bin").mkdir()
    shutil.copy(tmp_path / "shards" / "config.json", tmp_path / "bin")
    torch.save(theirs.state_dict(), tmp_path / "bin" / "pytorch_model.bin")
    expected = GPT.from_pretrained(tmp_path / "bin").state_dict()
    same(GPT.from_pretrained(tmp_path / "shards").state_dict(), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_dtype_is_kept(tmp_path, dtype):
    weights.save_model(ours().to(dtype), tmp_path, "byte")
    for to in ("huggingface", "nanogpt", "book"):
        convert(tmp_path, tmp_path / to, to)
        convert(tmp_path / to, tmp_path / f"{to}-back", "fastgpt")
        found = load_file(tmp_path / f"{to}-back" / "model.safetensors")
        assert {tensor.dtype for tensor in found.values()} == {dtype}


def test_the_vocabulary_is_padded_and_cropped(tmp_path):
    model = ours(tie=False)
    weights.save_model(model, tmp_path, "byte")
    padded = GPT.from_pretrained(tmp_path, vocab_size=64)
    assert padded.wte.weight.shape == padded.lm_head.weight.shape == (64, 48) and padded.config.vocab_size == 64
    torch.testing.assert_close(logits(padded)[..., :VOCAB], logits(model))
    assert not logits(padded)[..., VOCAB:].any()
    convert(tmp_path, tmp_path / "wide", "huggingface", vocab_size=64)
    same(GPT.from_pretrained(tmp_path / "wide", vocab_size=VOCAB).state_dict(), model.state_dict())


def test_an_untied_head_of_hugging_faces(tmp_path):
    theirs = hugging_face(tie_word_embeddings=False)
    theirs.save_pretrained(tmp_path)
    model = GPT.from_pretrained(tmp_path)
    assert not model.config.tie and torch.equal(model.lm_head.weight, theirs.lm_head.weight)
    torch.testing.assert_close(logits(model), logits(theirs), rtol=1e-5, atol=1e-5)


def test_changes_of_the_configuration(tmp_path):
    weights.save_model(ours(), tmp_path, "byte")
    model = GPT.from_pretrained(tmp_path, dropout=0.25, backend="torch")
    assert (model.config.dropout, model.config.backend) == (0.25, "torch") and not model.training


# What has no counterpart


@pytest.mark.parametrize(
    ("to", "changes", "message"),
    [
        ("nanogpt", dict(tie=False), "nanoGPT has tie = True alone, this model has False"),
        ("nanogpt", dict(layer_norm_eps=1e-6), "nanoGPT has layer_norm_eps = 1e-05 alone"),
        ("book", dict(n_inner=20), "the book's GPTModel has n_inner = 192 alone, this model has 20"),
        ("book", dict(layer_norm_eps=1e-6), "the book's GPTModel has layer_norm_eps"),
    ],
)
def test_what_a_family_has_not(tmp_path, to, changes, message):
    weights.save_model(ours(**changes), tmp_path / "a" if (tmp_path / "a").mkdir() is None else None, "byte")
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "a", tmp_path / "b", to)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("scale_attn_weights", False),
        ("scale_attn_by_inverse_layer_idx", True),
        ("add_cross_attention", True),
        ("activation_function", "relu"),
        ("model_type", "llama"),
        ("n_layer", 3),
        ("n_head", 5),
        ("n_head", "four"),
        ("n_positions", 64),
        ("vocab_size", 50257),
        ("n_inner", 7),
        ("resid_pdrop", "much"),
        ("layer_norm_epsilon", -1),
    ],
)
def test_settings_that_are_not_fastgpts_or_not_the_files(tmp_path, field, value):
    hugging_face().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, field: value}))
    with pytest.raises(ValueError) as error:
        convert(tmp_path, tmp_path / "b", "fastgpt")
    name = {"n_positions": "block_size", "resid_pdrop": "TypeError", "layer_norm_epsilon": "layer_norm_eps"}
    assert name.get(field, field) in str(error.value) and str(tmp_path) in str(error.value)
    assert not (tmp_path / "b").exists()


def test_the_number_of_heads_must_be_said(tmp_path):
    torch.save(book().state_dict(), tmp_path / "model.pth")
    with pytest.raises(ValueError, match="nothing says how many heads there are: name n_head"):
        GPT.from_pretrained(tmp_path / "model.pth")
    with pytest.raises(ValueError, match="48 does not divide into n_head = 5"):
        GPT.from_pretrained(tmp_path / "model.pth", n_head=5)


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
