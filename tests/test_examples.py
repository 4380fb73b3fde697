"""examples/: each as its page has it, at a smaller size."""

import json
import math
import re
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest

from fastgpt import GPT, GPTConfig, cli, generate
from fastgpt.cli.text import load
from fastgpt.weights import save_model
from tests.models import book_package

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
TEXT = "To be, or not to be, that is the question.\n" * 60
SMALL = [
    "--n_layer=1",
    "--n_head=2",
    "--n_embd=32",
    "--block_size=32",
    "--batch_size=2",
    "--max_iters=2",
    "--eval_iters=1",
]


def commands(beginning):
    """Those of the page, in a list each."""
    found = [line.split() for line in PAGE.splitlines() if line.startswith(beginning)]
    assert found, beginning
    return found


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder where the page's commands run, with its text."""
    monkeypatch.chdir(tmp_path)
    for name in ("input.txt", "texts"):
        Path(name).write_text(TEXT)
    Path("examples").symlink_to(ROOT / "examples")
    return tmp_path


def test_shakespeare(here, capsys):
    (command,) = commands("fastgpt train --config examples/shakespeare.toml")
    assert cli.main([*command[1:], *SMALL]) == 0
    config = json.loads((here / "shakespeare" / "config.json").read_text())
    assert config["model"]["n_embd"] == 32 and config["train"]["beta2"] == 0.99 and config["encoding"] == "byte"


def test_fine_tuning(here, capsys):
    (here / "tiny").mkdir()
    GPT(GPTConfig(vocab_size=50257, block_size=32, n_layer=1, n_head=2, n_embd=16)).save_pretrained(here / "tiny")
    train, write, convert = (command for command in commands("fastgpt ") if "finetuned" in command)
    small = ["--init_from", "tiny", "--max_iters", "2", "--eval_iters", "1", "--gradient_accumulation_steps", "1"]
    assert cli.main([*train[1:], *small]) == 0
    assert cli.main([*(word.strip('"') for word in write[1:]), "--max_new_tokens", "3"]) == 0
    assert cli.main(convert[1:]) == 0
    assert json.loads((here / "finetuned" / "config.json").read_text())["train"]["learning_rate"] == 3e-5


@pytest.mark.slow
def test_gpt2_124m_at_a_hundredth_of_its_size(here, capsys):
    """195 steps of 19,560, from files as llm.c writes them, where each token is one or two above the one before."""
    (here / "fineweb10B").mkdir()
    draw = np.random.default_rng(0)
    for name, count in {"val_000000": 10_000, "train_000001": 40_000, "train_000002": 40_000}.items():
        ids = draw.integers(1, 3, count).cumsum() % 16
        header = np.zeros(256, dtype="<i4")
        header[:3] = 20240520, 1, count
        content = header.tobytes() + ids.astype("<u2").tobytes()
        (here / "fineweb10B" / f"fineweb_{name}.bin").write_bytes(content)
    (command,) = commands("fastgpt train --config examples/gpt2-124M.toml")
    small = "--encoding byte --vocab_size 257 --n_layer 1 --n_head 2 --n_embd 32 --block_size 64 --max_iters 195"
    small += " --total_batch_size 256 --batch_size 2 --warmup_iters 7 --eval_interval 65 --eval_iters 4"
    small += " --sample_tokens 5 --learning_rate 1e-2 --device cpu"
    assert cli.main([*command[1:], *small.split()]) == 0
    said = capsys.readouterr().out
    assert "195 steps of 4 x 64 tokens in 2 x 1 batches" in said and "80,000 tokens to train on" in said
    rows = [line.split(",") for line in (here / "gpt2-124M" / "metrics.csv").read_text().splitlines()]
    losses = [float(row[rows[0].index("val_loss")]) for row in rows[1:]]
    assert len(losses) == 3 and losses[2] < losses[0]
    assert math.log(2) < losses[2] < 1.0, "log(16) = 2.8 for who knows the tokens, and not what follows"
    config = json.loads((here / "gpt2-124M" / "config.json").read_text())["train"]
    assert (config["dtype"], config["order"], config["beta2"], config["min_lr"]) == ("bfloat16", "epoch", 0.95, 0.0)


def test_the_books_chapter_as_a_notebook(here, capsys):
    """It was run from its first cell to its last and its outputs are kept; and it runs."""
    book_package("ch05")
    cells = json.loads((ROOT / "examples" / "book.ipynb").read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == [*range(1, len(code) + 1)]
    kept = "".join("".join(output.get("text", "")) for cell in code for output in cell["outputs"])
    assert "causal_attention" in kept and "apart in the run" in kept and "Error" not in kept
    names: dict = {}
    for cell in code:
        lines = "".join(cell["source"])
        for big, small in {"CHARACTERS = 120_000": "CHARACTERS = 20_000", '"n_layers": 4': '"n_layers": 1'}.items():
            lines = lines.replace(big, small)
        exec(compile(lines, "book.ipynb", "exec"), names)
    assert names["CHARACTERS"] == 20_000 and names["CONFIG"]["n_layers"] == 1
    assert len(names["before"][0]) == len(names["after"][0]) > 0 and "seconds: " in capsys.readouterr().out


def test_hugging_faces_trainer(here):
    pytest.importorskip("transformers", reason="the extra `test` brings transformers")
    pytest.importorskip("accelerate", reason="the extra `test` brings it")
    ((_, *command),) = commands("python examples/trainer.py")
    small = ["--steps", "1", "--layers", "1", "--width", "64"]
    done = subprocess.run([sys.executable, *command, *small], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert re.search(r"loss \d\.\d+ over 1 steps", done.stdout) and "gelu_mlp" in done.stdout
    assert GPT.from_pretrained(here / "trained").config.n_embd == 64


@pytest.fixture
def server(here):
    (here / "shakespeare").mkdir()
    model = GPT(GPTConfig(vocab_size=257, block_size=64, n_layer=1, n_head=2, n_embd=16))
    save_model(model, here / "shakespeare", "byte")
    ((_, *command),) = commands("python examples/serve.py")
    command[command.index("8000")] = "0"
    process = subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, text=True)
    try:
        yield process.stdout.readline().strip() + "/completions"
    finally:
        process.kill()
        process.communicate()


def ask(address, **asked):
    request = urllib.request.Request(address, json.dumps(asked).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return answer.read().decode()


def test_a_server_of_completions(server):
    model, bytes_ = load("shakespeare", None)
    asked = dict(prompt="ROMEO:", max_tokens=20, seed=3)
    whole = json.loads(ask(server, **asked))["choices"][0]
    ids, how = [bytes_.encode("ROMEO:")], dict(temperature=1.0, seed=3, encoding=bytes_)
    assert whole["text"] == generate(model, ids, 20, **how).texts[0] and whole["finish_reason"] == "length"
    *pieces, done, end = ask(server, **asked, stream=True).split("\n\n")
    assert (done, end) == ("data: [DONE]", "") and len(pieces) == 20
    choices = [json.loads(piece.removeprefix("data: "))["choices"][0] for piece in pieces]
    assert "".join(choice["text"] for choice in choices) == whole["text"]
    stopped = json.loads(ask(server, **asked, stop=whole["text"][3]))["choices"][0]
    assert stopped["finish_reason"] == "stop" and stopped["text"] == whole["text"].split(whole["text"][3])[0]
    for wrong, said in (
        (dict(prompt="x", max_tokens=0), "max_new_tokens is 0"),
        (dict(prompt="x", temperature=-1.0), "temperature"),
        (dict(), "prompt"),
    ):
        with pytest.raises(urllib.error.HTTPError) as error:
            ask(server, **wrong)
        assert error.value.code == 400 and said in json.loads(error.value.read())["error"]["message"]
    assert json.loads(ask(server, **asked))["choices"][0] == whole, "a mistake leaves it as it was"
