"""With no network and no package that has GPT-2's files: tokens are trained on and evaluated, for no text is needed."""

import json

import numpy as np
import pytest
import requests

from fastgpt import GPTConfig, cli
from fastgpt.data import tokenizer
from fastgpt.training import TrainConfig, monitor, plan_run
from fastgpt.weights import load_model

TINY = "--n_layer 1 --n_embd 8 --n_head 2 --block_size 16 --batch_size 2 --max_iters 2 --eval_iters 1 --device cpu"
GPT2 = ["--preset", "gpt2-124M", *TINY.split()]
WHY = "the files of the encoding 'gpt2' can't be had"


@pytest.fixture(autouse=True)
def asked(monkeypatch, tmp_path):
    """The addresses that were asked for; nothing answers."""
    asked = []

    def unreachable(address, *arguments, **options):
        asked.append(address)
        raise requests.exceptions.ConnectionError("out of reach")

    monkeypatch.setattr(requests, "get", unreachable)
    monkeypatch.setattr(tokenizer, "find_spec", lambda name: None)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "no cache"))
    monkeypatch.setattr("tiktoken.registry.ENCODINGS", {})
    tokenizer.encoding.cache_clear()
    monkeypatch.chdir(tmp_path)
    yield asked
    tokenizer.encoding.cache_clear()


def nanogpts(folder):
    ids = (np.arange(300) * 7919 % 50257).astype("<u2")
    ids.tofile(folder / "train.bin"), ids[:100].tofile(folder / "val.bin")


def llm_cs(folder):
    for name in ("fineweb_train_000001.bin", "fineweb_val_000000.bin"):
        header = np.zeros(256, dtype="<i4")
        header[:3] = 20240520, 1, 300
        (folder / name).write_bytes(header.tobytes() + (np.arange(300) * 7919 % 50257).astype("<u2").tobytes())


def ours(folder, name="gpt2", size=50257, end=50256):
    nanogpts(folder)
    (folder / "meta.json").write_text(
        json.dumps({"encoding": name, "dtype": "uint16", "vocab_size": size, "end_of_text": end})
    )


@pytest.fixture(params=[nanogpts, llm_cs, ours])
def tokens(request, tmp_path):
    folder = tmp_path / "tokens"
    folder.mkdir()
    request.param(folder)
    return folder


def main(capsys, *arguments):
    code = cli.main(list(map(str, arguments)))
    out, err = capsys.readouterr()
    return code, out, err


def test_tokens_are_trained_on(tokens, capsys):
    code, out, err = main(capsys, "train", "--data", tokens, *GPT2)
    assert (code, err) == (0, "")
    assert out.count("samples are left out") == 1 and out.count(WHY) == 1 and "out of reach" in out
    assert "failed" not in out and "\nsaved in out\n" in out and "generate" not in out
    assert load_model("out")[1]["encoding"] == "gpt2"
    code, out, _ = main(capsys, "train", "--data", tokens, *GPT2, "--resume", "--max_iters", "4")
    assert code == 0 and load_model("out")[1]["step"] == 4 and out.count("samples are left out") == 1


def test_without_samples_nothing_is_asked_for_and_nothing_said(tokens, capsys, asked):
    code, out, err = main(capsys, "train", "--data", tokens, *GPT2, "--sample_tokens", "0")
    assert (code, err, asked) == (0, "", [])
    said = out.replace(str(tokens), "")
    assert "encoding" not in said and "sample" not in said


def test_one_file_of_tokens(tmp_path, capsys):
    nanogpts(tmp_path)
    assert main(capsys, "train", "--data", tmp_path / "train.bin", *GPT2, "--sample_tokens", 0)[0] == 0


def test_documents_end_at_the_token_that_meta_tells(tmp_path, capsys):
    ours(tmp_path)
    assert main(capsys, "train", "--data", tmp_path, *GPT2, "--document_mask", "true")[0] == 0


def test_an_encoding_of_another_size_is_what_meta_says(tmp_path, capsys):
    ours(tmp_path, "cl100k_base", 100277, 100257)
    shape = [*TINY.split(), "--vocab_size", "100277"]
    code, out, _ = main(capsys, "train", "--data", tmp_path, *shape)
    assert code == 0 and "the files of the encoding 'cl100k_base' can't be had" in out
    code, _, err = main(capsys, "train", "--data", tmp_path, *TINY.split(), "--vocab_size", 300, "--out", "b")
    assert code == 2 and "the encoding 'cl100k_base' has 100277 ids" in err


@pytest.mark.parametrize("options", ["--encoding gpt2", "--sample_prompt The", "--sample_tokens 9"])
def test_what_was_asked_for_and_can_not_be_had_is_an_error_before_anything_is_touched(tokens, capsys, options):
    code, out, err = main(capsys, "train", "--data", tokens, *GPT2, *options.split())
    assert code == 2 and out == "" and err.startswith(f"fastgpt train: {WHY}") and err.count("\n") == 1
    assert not (tokens.parent / "out").exists()


@pytest.mark.parametrize("samples", [0, 1])
def test_one_token_of_a_sample_is_worth_asking_for_the_files(tokens, asked, samples):
    """A plan that writes none asks for nothing."""
    shape = GPTConfig(n_layer=1, n_embd=8, n_head=2, block_size=16)
    plan = plan_run(shape, TrainConfig(sample_tokens=samples), None, tokens, tokens / "out")
    assert plan.encoding.name == "gpt2" and bool(asked) == bool(samples)


def test_text_needs_its_encoding(tmp_path, capsys):
    (tmp_path / "text.txt").write_text("some words " * 50)
    code, _, err = main(capsys, "train", "--data", tmp_path / "text.txt", *GPT2)
    assert code == 2 and WHY in err
    code, _, err = main(capsys, "train", *GPT2)
    assert code == 2 and WHY in err and not (tmp_path / "out").exists()


def test_a_token_past_the_vocabulary_is_still_found(tmp_path, capsys):
    nanogpts(tmp_path)
    np.array([1, 50257] * 300, dtype="<u2").tofile(tmp_path / "train.bin")
    code, _, err = main(capsys, "train", "--data", tmp_path, *GPT2)
    assert code == 2 and "token 50257 at offset 1 is outside the 50257 ids" in err


def test_eval_leaves_out_bits_a_byte(tokens, capsys):
    assert main(capsys, "train", "--data", tokens, *GPT2, "--sample_tokens", 0)[0] == 0
    code, out, err = main(capsys, "eval", tokens)
    assert code == 0 and out.startswith("loss ") and "bits" not in out
    assert err.count("bits a byte are left out: ") == err.count(WHY) == 1
    code, out, err = main(capsys, "eval", tokens, "--json")
    found = json.loads(out)
    assert code == 0 and found["bits_per_byte"] is None and found["loss"] > 0
    code, _, err = main(capsys, "eval", tokens, "--encoding", "gpt2")
    assert code == 2 and err.startswith(f"fastgpt eval: {WHY}")


def test_generate_says_what_is_missing(tokens, capsys):
    assert main(capsys, "train", "--data", tokens, *GPT2, "--sample_tokens", 0)[0] == 0
    code, _, err = main(capsys, "generate", "--prompt", "a")
    assert code == 2 and err.startswith(f"fastgpt generate: {WHY}") and err.count("\n") == 1


def test_with_the_files_it_samples(tmp_path, capsys, monkeypatch):
    """The same run where they are to be had."""
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    tokenizer.encoding.cache_clear()
    nanogpts(tmp_path)
    code, out, _ = main(capsys, "train", "--data", tmp_path, *GPT2, "--sample_tokens", "3")
    assert code == 0 and "left out" not in out and "a sample:" in out
    assert (tmp_path / "out" / monitor.SAMPLES).is_file()
