"""examples/: each as its page has it, at a smaller size."""

import io
import json
import math
import os
import re
import runpy
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

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


def test_shakespeare(here, capsys, monkeypatch):
    train, write = (command for command in commands("fastgpt ") if "shakespeare" in command)
    assert cli.main([*train[1:], *SMALL]) == 0
    monkeypatch.setattr(sys, "stdin", io.StringIO("ROMEO:\n"))
    assert cli.main([*write[1:], "--max_new_tokens", "3"]) == 0
    assert "ROMEO:" in capsys.readouterr().out
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


@pytest.mark.slow
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


def test_in_place_of_flash_attention(here):
    """Against SDPA with the mask that FlashAttention's documentation describes: query i sees from key i - left on."""
    ((_, *command),) = commands("python examples/flash_attn_func.py")
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout.startswith("(2, 512, 6, 64) causal_attention runs on"), done.stderr
    names: dict = {"__name__": "example"}
    exec(Path("examples/flash_attn_func.py").read_text(), names)
    theirs = names["flash_attn_func"]
    tensors = [torch.randn(2, 40, heads, 16, dtype=torch.float64).requires_grad_() for heads in (6, 2, 2)]
    distance = torch.arange(40)[:, None] - torch.arange(40)
    upstream = torch.randn(2, 40, 6, 16, dtype=torch.float64)
    for left in (-1, 0, 1, 15, 39, 100):
        seen = (distance >= 0) & (distance <= (left if left >= 0 else 40))
        heads = [t.transpose(1, 2) for t in tensors]
        plain = F.scaled_dot_product_attention(*heads, attn_mask=seen, enable_gqa=True).transpose(1, 2)
        found = theirs(*tensors, causal=True, window_size=(left, 0))
        for y in (found, plain):
            y.grads = torch.autograd.grad(y, tensors, upstream)
        torch.testing.assert_close((found, *found.grads), (plain, *plain.grads))
    for wrong in (dict(), dict(causal=True, window_size=(3, 3))):
        with pytest.raises(ValueError, match="attention is causal, and causal="):
            theirs(*tensors, **wrong)


def test_hugging_faces_trainer(here):
    pytest.importorskip("transformers", reason="the extra `test` brings transformers")
    pytest.importorskip("accelerate", reason="the extra `test` brings it")
    ((_, *command),) = commands("python examples/trainer.py")
    small = ["--steps", "1", "--layers", "1", "--width", "64"]
    done = subprocess.run([sys.executable, *command, *small], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert re.search(r"loss \d\.\d+ over 1 steps", done.stdout) and "gelu_mlp" in done.stdout
    assert GPT.from_pretrained(here / "trained").config.n_embd == 64


def ran(command, **environment):
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, env={**os.environ, **environment})
    assert done.returncode == 0, (done.stdout[-2000:], done.stderr[-4000:])
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("beginning", "package"),
    [("accelerate launch", "accelerate"), ("python examples/fabric_loop.py", "lightning"),
     ("python examples/ray_train.py", "ray")],
    ids=["accelerate", "fabric", "ray"],
)  # fmt: skip
def test_other_engines_train_it(here, beginning, package):
    """In two processes but for Fabric's; on a CPU Accelerate's own launcher starts one, so torchrun starts them."""
    pytest.importorskip(package, reason="its test was run by hand where it is installed; see examples/README.md")
    ((*_, command),) = [commands(beginning)]
    command[command.index("100")] = "3"
    launcher = [sys.executable]
    if package == "accelerate":
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    words = command[command.index(next(word for word in command if word.endswith(".py"))) :]
    out = ran([*launcher, *words], PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1", ACCELERATE_USE_CPU="true")
    if package == "ray":
        state = json.loads((here / "trained-by-ray/checkpoints/step-00000003/state.json").read_text())
        assert (state["processes"], state["windows"]) == (2, 24)
    else:
        losses = [float(loss) for loss in re.findall(r"^loss (\d\.\d+)$", out, re.M)]
        assert len(losses) == (2 if package == "accelerate" else 1) and len({*losses}) == 1 and 3 < losses[0] < 6


def test_weights_for_torchtitan(here, capsys):
    ((_, script, source, target),) = commands("python examples/to_torchtitan.py")
    GPT(GPTConfig(vocab_size=31, block_size=8, n_layer=1, n_head=2, n_embd=8)).save_pretrained(source)
    assert runpy.run_path(script)["main"](source, target) == 0
    assert re.fullmatch(r"16 tensors, [\d,]+ numbers, 0 wrong\n", capsys.readouterr().out)


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
