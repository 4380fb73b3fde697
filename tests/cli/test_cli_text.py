"""`fastgpt generate` and `fastgpt eval` on models of every kind."""

import html.parser
import io
import json
import math
import os
import re
import select
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

from fastgpt import GPT, GPTConfig, cli
from fastgpt.cli import text as cli_text
from fastgpt.cli.surprise import page
from fastgpt.data.tokenizer import Unavailable, encoding
from fastgpt.generation.evaluation import evaluate
from fastgpt.weights import save_model

BYTES = encoding("byte")
SHAPE = dict(vocab_size=257, block_size=32, n_layer=1, n_head=2, n_embd=16)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model in a folder of fastgpt's and of Hugging Face's."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SHAPE)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5)
    folder = tmp_path_factory.mktemp("models")
    (folder / "own").mkdir()
    save_model(model, folder / "own", "byte")
    model.save_pretrained(folder / "huggingface")
    return folder


def run(capsys, *arguments):
    capsys.readouterr()
    try:
        code = cli.main(list(map(str, arguments)))
    except SystemExit as exit:
        code = exit.code
    return code, *capsys.readouterr()


GREEDY = ("--temperature", "0", "--max_new_tokens", "20", "--device", "cpu")


def test_every_kind_of_checkpoint_writes_the_same(capsys, folders):
    texts = {
        run(capsys, "generate", "--checkpoint", folders / path, "--prompt", "ab", *GREEDY)[1]
        for path in ("own", "huggingface")
    }
    file = folders / "huggingface" / "model.safetensors"
    texts.add(run(capsys, "generate", "--checkpoint", file, "--n_head", "2", "--prompt", "ab", *GREEDY)[1])
    assert len(texts) == 1 and texts.pop().startswith("ab")


def test_a_vocabulary_that_tells_no_encoding(capsys, tmp_path):
    GPT(GPTConfig(**{**SHAPE, "vocab_size": 300})).save_pretrained(tmp_path)
    code, _, err = run(capsys, "generate", "--checkpoint", tmp_path)
    assert code == 2 and "has a vocabulary of 300: name its --encoding" in err
    assert run(capsys, "generate", "--checkpoint", tmp_path, "--encoding", "byte", "--seed", "1", *GREEDY)[0] == 0


@pytest.mark.parametrize(
    ("data", "prompt"),
    [(b"a\r\nb <|endoftext|>", "a\r\nb <|endoftext|>"), (b"a\xff\xfeb", "a��b"), (b"", "")],
    ids=["special", "no UTF-8", "empty"],
)
def test_a_prompt_from_a_file_or_standard_input_is_text(capsys, folders, tmp_path, monkeypatch, data, prompt):
    (tmp_path / "prompt.txt").write_bytes(data)
    command = ["generate", "--checkpoint", folders / "own", "--json", *GREEDY, "--prompt_file"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    for source in (tmp_path / "prompt.txt", "-"):
        code, out, err = run(capsys, *command, source)
        assert (code, err) == (0, "")
        assert json.loads(out)["prompt"] == prompt
        assert json.loads(out)["prompt_tokens"] == (len(prompt.encode()) or 1)


def test_json_and_samples(capsys, folders):
    options = ("--num_samples", "3", "--seed", "5", "--max_new_tokens", "9")
    command = ("generate", "--checkpoint", folders / "own", "--prompt", "ab", *options)
    code, out, _ = run(capsys, *command, "--json")
    told = json.loads(out)
    assert code == 0 and len(told["samples"]) == 3 and told["tokens_per_second"] > 0
    for sample in told["samples"]:
        assert BYTES.decode_bytes(sample["tokens"]).decode("utf-8", "replace") == sample["text"]
        assert len(sample["logprobs"]) == len(sample["tokens"]) == 9 and sample["reason"] == "length"
    code, out, err = run(capsys, *command)
    expected = "".join(f"--- {n}\nab{sample['text']}\n" for n, sample in enumerate(told["samples"], 1))
    assert out == expected and err.startswith("27 tokens in ")


def test_a_draft(capsys, folders):
    command = ("generate", "--checkpoint", folders / "own", "--prompt", "ab", *GREEDY)
    assert run(capsys, *command)[1] == run(capsys, *command, "--draft", folders / "huggingface")[1]


def test_a_conversation(capsys, folders, monkeypatch):
    """A prompt after another until the input ends; Ctrl-C ends a text alone, a mistake is told."""
    prompts = iter(["ab", "interrupted", "x" * 33])

    def ask(question):
        assert question == "prompt> "
        try:
            return next(prompts)
        except StopIteration:
            raise EOFError from None

    written = cli_text.write

    def write(decoder, tokens, prompt, *rest, **how):
        if prompt == "interrupted":
            raise KeyboardInterrupt
        written(decoder, tokens, prompt, *rest, **how)

    monkeypatch.setattr("builtins.input", ask)
    monkeypatch.setattr(cli_text, "write", write)
    options = ("--interactive", "--overflow", "error", *GREEDY)
    code, out, err = run(capsys, "generate", "--checkpoint", folders / "own", *options)
    assert code == 0 and out.startswith("ab")
    assert "33 + 20 tokens pass the context of 32" in err and "tokens/s" in err


@pytest.mark.skipif(sys.platform == "win32", reason="a terminal of Unix")
def test_a_conversation_on_a_terminal(folders):
    """The arrow key brings the last prompt back, to be edited; Ctrl-C ends a line or a text, Ctrl-D the whole."""
    import fcntl
    import pty
    import termios

    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "fastgpt", "generate", "--interactive", "--checkpoint", str(folders / "own")]
    command += ["--temperature", "0", "--device", "cpu", "--max_new_tokens"]

    def on_the_terminal():
        fcntl.ioctl(theirs, termios.TIOCSCTTY, 0)
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background job has it ignored, and hands that on

    process = subprocess.Popen(
        [*command, "1000000"], stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True, close_fds=True,
        preexec_fn=on_the_terminal,
    )  # fmt: skip
    os.close(theirs)
    said = ""

    def until(words, keys=b""):
        """Type the keys, and wait for the words. After seconds of silence type them again: Python passes over a Ctrl-C
        that comes as a prompt is being shown, until the next key."""
        nonlocal said
        for _ in range(12):
            os.write(ours, keys)
            while words not in said and select.select([ours], [], [], 5)[0]:
                said += os.read(ours, 4096).decode(errors="replace")
            if words in said:
                said = said.split(words, 1)[1]
                return
        raise AssertionError(f"no {words!r} came after {said[-200:]!r}")

    try:
        until("prompt> ")
        until("prompt> ", b"given up\x03")
        until("\nab", b"ab\n")
        until("prompt> ", b"\x03")  # of a text that would go on for an hour
        until("\nzab", b"\x1b[A" + b"\x01" + b"z\n")  # the line before, and at its beginning a z
        until("prompt> ", b"\x03")
        os.write(ours, b"\x04")
        assert process.wait(60) == 0
    finally:
        process.kill()
        os.close(ours)


@pytest.mark.parametrize("options", [(), ("--stride", "32"), ("--window", "7", "--stride", "3", "--batch_size", "2")])
def test_eval_is_the_plain_sum_over_tokens(capsys, folders, tmp_path, options):
    text = "the quick brown fox é🙂 jumps. " * 7
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    code, out, _ = run(capsys, "eval", tmp_path / "text.txt", "--checkpoint", folders / "own", "--json", *options)
    found = json.loads(out)
    given = dict(zip(options[::2], map(int, options[1::2]), strict=True))
    window = given.get("--window", 32)
    stride = given.get("--stride", window // 2)
    model, _ = cli_text.load(str(folders / "own"), None)
    ids, total, seen = [256, *text.encode()], 0.0, 0
    for place in range(1, len(ids)):
        if place > seen:  # the next pass
            seen = min(len(ids) - 1, seen + (stride if seen else window))
            begin = max(0, seen - window)
        with torch.no_grad():
            scores = model.double()(torch.tensor([ids[begin:place]]))[0, -1]
        total -= scores.log_softmax(-1)[ids[place]].item()
    assert code == 0
    assert found["tokens"] == found["bytes"] == len(text.encode())
    assert found["loss"] == pytest.approx(total / len(text.encode()), rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
    assert found["bits_per_byte"] == pytest.approx(found["loss"] / math.log(2), rel=1e-6)


def test_eval_draws_each_token_in_the_colour_of_its_surprise(capsys, folders, tmp_path):
    text = "a <b> & é🙂\nend\n" * 9
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    file, command = tmp_path / "page.html", ("eval", tmp_path / "text.txt", "--checkpoint", folders / "own")
    code, out, _ = run(capsys, *command, "--html", file)
    assert code == 0 and out.startswith("loss ")
    shown = html.parser.HTMLParser(convert_charrefs=True)
    pieces, inside = [], []
    shown.handle_starttag = lambda tag, attrs: pieces.append([dict(attrs), ""]) if tag == "i" else None
    shown.handle_data = lambda data: pieces[-1].__setitem__(1, data) if inside else None
    shown.feed(file.read_text(encoding="utf-8").split("<pre>")[0])
    legend = [piece["class"] for piece, _ in pieces]
    assert legend == [f"s{step}" for step in range(11)]
    pieces.clear()
    inside.append(True)
    shown.feed(file.read_text(encoding="utf-8").split("<pre>")[1].split("</pre>")[0])
    assert "".join(piece for _, piece in pieces) == text
    ids = np.array([256, *text.encode()])
    losses = np.array(evaluate(cli_text.load(str(folders / "own"), None)[0], ids, each=True).losses)
    assert losses.sum() == pytest.approx(sum(float(attrs["title"].split()[0]) for attrs, _ in pieces), rel=1e-3)
    emoji = next(attrs for attrs, piece in pieces if piece == "🙂")
    place = text.encode().index("🙂".encode())
    own = losses[place : place + 4]
    assert emoji["title"].endswith(", 4 tokens") and emoji["class"] == f"s{min(10, round(float(own.mean())))}"
    assert emoji["title"].startswith(f"{own.sum():.2f} nats")


def test_a_page_writes_tokens_as_text():
    gpt2 = encoding("gpt2")
    ids = gpt2.encode('<script>alert("x")</script> &amp;')
    written = page("<title>", "<facts>", ids, [1.0] * len(ids), gpt2)
    shown = html.parser.HTMLParser()
    tags = []
    shown.handle_starttag = lambda tag, attrs: tags.append(tag)
    shown.feed(written)
    assert {*tags} == {"html", "meta", "title", "style", "h1", "p", "i", "pre"} and "&amp;amp;" in "".join(
        piece.split(">", 1)[1] for piece in written.split("<pre>")[1].split("</i>")[:-1]
    )


def test_a_page_needs_text(capsys, folders, tmp_path, monkeypatch):
    def unavailable(name):
        raise Unavailable("no network")

    monkeypatch.setattr(cli_text, "encoding", unavailable)
    np.zeros(9, dtype=np.uint16).tofile(tmp_path / "val.bin")
    GPT(GPTConfig(**{**SHAPE, "vocab_size": 50257})).save_pretrained(tmp_path / "m")
    code, _, err = run(capsys, "eval", tmp_path / "val.bin", "--checkpoint", tmp_path / "m", "--html", tmp_path / "p")
    assert code == 2 and "--html shows text" in err and not (tmp_path / "p").exists()


def test_eval_of_a_token_file(capsys, folders, tmp_path):
    np.array([*b"some words", 256, *b"and more"], dtype=np.uint16).tofile(tmp_path / "val.bin")
    code, out, _ = run(capsys, "eval", tmp_path / "val.bin", "--checkpoint", folders / "huggingface")
    assert code == 0
    assert "bits a byte (18 tokens, 17 bytes)" in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--window 33", "window is 33, not from 1 to the context of 32"),
        ("--window 0", "window is 0, not from 1 to the context of 32"),
        ("--window 8 --stride 9", "stride is 9, not from 1 to the window of 8"),
        ("--batch_size 0", "batch_size is 0, not at least 1"),
        ("--encoding gpt2", "token 50256 at offset 0 is outside a vocabulary of 257"),
    ],
)
def test_a_mistake_in_eval(capsys, folders, tmp_path, options, message):
    (tmp_path / "text.txt").write_text("some words")
    command = ("eval", tmp_path / "text.txt", "--checkpoint", folders / "own", *options.split())
    code, _, err = run(capsys, *command)
    assert code == 2
    assert err.startswith("fastgpt eval: ") and err.count("\n") == 1
    assert message in err


def test_eval_of_one_token_alone(folders):
    model, _ = cli_text.load(str(folders / "own"), None)
    with pytest.raises(ValueError, match="eval: 1 tokens leave nothing to predict"):
        evaluate(model, np.zeros(1, dtype=np.uint16))


def test_eval_of_a_model_that_is_not_finite(capsys, folders, tmp_path):
    model, _ = cli_text.load(str(folders / "own"), None)
    model.wpe.weight.data[3] = math.nan
    save_model(model, tmp_path, "byte")
    (tmp_path / "text.txt").write_text("some words")
    code, _, err = run(capsys, "eval", tmp_path / "text.txt", "--checkpoint", tmp_path)
    assert code == 2 and re.search(r"the loss of the token at offset [1-4] is nan", err)
