"""Weights between the families: exact by value, both ways, and a wrong file says what is wrong and writes nothing."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastgpt import GPT, weights
from fastgpt.weights import convert, load_model
from fastgpt.weights.files import read_weights_of
from tests.models import CONTEXT, VOCAB, book, book_package, hugging_face, nanogpt
from tests.weights.converted import IDX, logits, ours, same, save_nanogpt

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


@pytest.mark.parametrize(("to", "gelu"), [("nanogpt", "none"), ("book", "tanh")])
def test_hidden_units_that_are_told_and_are_the_usual_ones(tmp_path, to, gelu):
    model = ours(n_inner=192, gelu=gelu)
    assert model.config.n_inner == 4 * model.config.n_embd
    weights.save_model(model, tmp_path, "byte")
    convert(tmp_path, tmp_path / "there", to)
    assert torch.equal(logits(GPT.from_pretrained(tmp_path / "there")), logits(model))
