import csv
import dataclasses
import io
import json
import math
import shutil
import signal
import sys

import numpy as np
import pytest
import torch

from fastgpt import GPT, GPTConfig, data, training
from fastgpt.data import corpora
from fastgpt.data.tokenizer import encoding
from fastgpt.training import fit
from fastgpt.training.run import Run
from fastgpt.training.settings import TrainConfig
from fastgpt.weights import load_model

BYTE = encoding("byte")
MODEL = GPTConfig(vocab_size=257, block_size=16, n_layer=1, n_head=2, n_embd=16)
FEW = TrainConfig(max_iters=4, batch_size=4, eval_interval=100, eval_iters=2, sample_tokens=0, device="cpu")
STEADY = dict(learning_rate=0.01, min_lr=0.01, warmup_iters=0)
COLUMNS = ["step", "train_loss", "val_loss", "learning_rate", "tokens_per_second", "seconds", "grad_norm"]
FILES = [".lock", "config.json", "loss.png", "metrics.csv", "model.safetensors", "train.toml"]


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "fox.txt"
    path.write_text("the quick brown fox jumps over the lazy dog. " * 50)
    return path


@pytest.fixture
def run(text, tmp_path):
    """Trains on `text` with FEW as changed; the folder is `out`."""

    def run(out="out", source=text, model=MODEL, overwrite=False, **changes):
        return fit(model, dataclasses.replace(FEW, **changes), BYTE, source, tmp_path / out, overwrite)

    run.out = tmp_path / "out"
    return run


@pytest.fixture
def no_step(monkeypatch):
    def step(self):
        raise AssertionError("a step ran")

    monkeypatch.setattr(Run, "step", step)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def equal(a: GPT, b: GPT) -> bool:
    b = b.state_dict()
    return all(torch.equal(tensor, b[name]) for name, tensor in a.state_dict().items())


def after(steps, error, monkeypatch):
    """Let the step after so many raise `error`."""
    step = Run.step

    def limited(self):
        if self.steps_done == steps:
            raise error
        return step(self)

    monkeypatch.setattr(Run, "step", limited)


def metrics(folder):
    with open(folder / "metrics.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_training_lowers_the_loss_and_leaves_its_files(run):
    model = run(max_iters=60, batch_size=8, eval_interval=20, warmup_iters=5, learning_rate=0.01)
    rows = metrics(run.out)
    assert abs(float(rows[0]["train_loss"]) - math.log(257)) < 1.5
    assert float(rows[-1]["train_loss"]) < float(rows[0]["train_loss"]) - 0.5
    assert float(rows[-1]["val_loss"]) < float(rows[0]["val_loss"]) - 0.5

    assert sorted(contents(run.out)) == FILES
    assert sorted(path.name for path in run.out.iterdir() if path.is_dir()) == ["checkpoints"]
    assert (run.out / "loss.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    loaded, config = load_model(run.out)
    assert equal(loaded, model)
    assert (config["encoding"], config["step"]) == ("byte", 60)
    assert config["val_loss"] == pytest.approx(float(rows[-1]["val_loss"]), rel=1e-6)
    assert config["train"]["learning_rate"] == 0.01


def test_metrics_have_a_row_for_each_evaluation(run):
    run(max_iters=5, eval_interval=2, warmup_iters=2)
    rows = metrics(run.out)
    assert list(rows[0]) == COLUMNS
    assert [int(row["step"]) for row in rows] == [2, 4, 5]
    config = dataclasses.replace(FEW, max_iters=5, warmup_iters=2)
    rates = [config.learning_rate_at(step) for step in (1, 3, 4)]
    assert [float(row["learning_rate"]) for row in rows] == pytest.approx(rates, rel=1e-6)
    assert max(len(value.replace(".", "")) for value in rows[0].values()) <= 12, "a float32's digits, and an exponent"


def test_train_loss_is_the_mean_since_the_row_before(run, monkeypatch):
    step = Run.step

    def counted(self):
        _, norm, own = step(self)
        return torch.tensor(float(self.steps_done)), norm, own

    monkeypatch.setattr(Run, "step", counted)
    run(max_iters=5, eval_interval=2)
    assert [float(row["train_loss"]) for row in metrics(run.out)] == [1.5, 3.5, 5.0]


def test_val_loss_is_the_mean_over_all_windows(run, text):
    """14 windows are as many as the validation tokens hold, and no whole number of batches."""
    model = run(eval_iters=100)
    tokens = data.load_corpus(text, BYTE, 16).val
    assert (len(tokens) - 1) // 16 == 14
    starts = np.linspace(0, len(tokens) - 17, 14).astype(int)
    with torch.no_grad():
        expected = model(*data.windows(tokens, starts, 16, torch.device("cpu"))).item()
    assert float(metrics(run.out)[-1]["val_loss"]) == pytest.approx(expected, rel=1e-6)


def test_progress_reaches_a_pipe_at_once(run, monkeypatch):
    pipe = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(pipe))
    after(2, RuntimeError, monkeypatch)
    with pytest.raises(RuntimeError):
        run(eval_interval=2)
    assert b"step 2: train 5." in pipe.getvalue()


def test_the_same_seed_gives_the_same_bits(run):
    first, again, other = run("a", seed=3), run("b", seed=3), run("c", seed=4)
    assert equal(first, again)
    assert not equal(first, other)


def test_evaluations_leave_the_training_alone(run):
    model = dataclasses.replace(MODEL, dropout=0.3)
    assert equal(run("often", model=model, eval_interval=1), run("once", model=model))


def test_evaluations_repeat(run):
    """The windows are the same ones each time, and dropout is off: where nothing is learned, nothing changes."""
    run(model=dataclasses.replace(MODEL, dropout=0.3), learning_rate=0.0, min_lr=0.0, eval_interval=1)
    assert len({row["val_loss"] for row in metrics(run.out)}) == 1


def test_the_optimizer_follows_the_learning_rate(run):
    frozen = run(learning_rate=1.0, warmup_iters=10**12)  # a rate of 1e-12
    torch.manual_seed(FEW.seed)
    assert all(
        torch.allclose(a, b, atol=1e-9) for a, b in zip(frozen.parameters(), GPT(MODEL).parameters(), strict=True)
    )


def test_grad_clip_bounds_the_gradient(run):
    """AdamW divides by the gradient's size plus 1e-8, so a gradient far below that moves nothing."""
    clipped = run(grad_clip=1e-16, weight_decay=0.0)
    torch.manual_seed(FEW.seed)
    assert all(
        torch.allclose(a, b, atol=1e-6) for a, b in zip(clipped.parameters(), GPT(MODEL).parameters(), strict=True)
    )


def test_without_data_the_builtin_corpus_is_used(run, monkeypatch, capsys):
    monkeypatch.setattr(corpora, "builtin_documents", lambda: (["x" * 999_999], ["y" * 199_999]))
    run(source=None)
    assert "the standard library's source: 1,000,000 tokens to train on, 200,000 to validate" in capsys.readouterr().out


def test_a_folder_that_holds_a_model_or_checkpoints_is_refused_and_left_alone(run):
    run()
    before = contents(run.out)
    with pytest.raises(FileExistsError, match=r"model.safetensors holds a trained model"):
        run(seed=4)
    assert contents(run.out) == before
    (run.out / "model.safetensors").unlink()
    with pytest.raises(
        FileExistsError, match=r"checkpoints holds checkpoints: --resume goes on, --overwrite starts anew"
    ):
        run(seed=4)
    assert [path.name for path in (run.out / "checkpoints").iterdir()] == ["step-00000004"]


def test_overwrite_replaces_the_model(run):
    run()
    model = run(seed=4, max_iters=2, overwrite=True)
    assert equal(load_model(run.out)[0], model)
    assert [path.name for path in (run.out / "checkpoints").iterdir()] == ["step-00000002"], "no old run to resume"


@pytest.mark.parametrize("out", ["file", "file/out"])
def test_an_unwritable_folder_is_found_before_the_first_step(run, no_step, tmp_path, out):
    (tmp_path / "file").write_text("content")
    with pytest.raises(OSError, match="file"):
        run(out)
    assert (tmp_path / "file").read_text() == "content"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(source="gone.txt"), "no file or folder gone.txt"),
        (dict(device="abacus"), "no device 'abacus' here; there is cpu"),
        (dict(device="cuda:99"), "no device 'cuda:99' here; there is cpu"),
        (dict(device="meta"), "no device 'meta' here; there is cpu"),
        (dict(model=dataclasses.replace(MODEL, vocab_size=256)), "vocab_size = 256, the encoding 'byte' has 257 ids"),
        (
            dict(model=dataclasses.replace(MODEL, block_size=999)),
            "225 validation tokens are too few for a window of 999",
        ),
    ],
    ids=["data", "device", "gpu", "meta", "vocabulary", "window"],
)
def test_what_would_stop_a_later_step_stops_before_the_first(run, no_step, changes, message):
    with pytest.raises((ValueError, OSError), match=message):
        run(**changes)
    assert not run.out.exists()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("log_interval", [1, 100], ids=["seen at once", "seen later"])
def test_a_loss_that_is_not_finite_stops_without_an_update(run, monkeypatch, bad, log_interval):
    """Steps after it may run before anyone looks; they change nothing either."""
    seen = []

    class Diverging(GPT):
        def forward(self, idx, targets=None, documents=None):
            loss = super().forward(idx, targets, documents)
            seen.append((self, {name: tensor.clone() for name, tensor in self.state_dict().items()}))
            return loss * bad if len(seen) == 3 else loss

    monkeypatch.setattr(training.fitting, "GPT", Diverging)
    with pytest.raises(
        FloatingPointError, match=f"loss of step 3 is {bad} on rank 0; the first bad tensor is nothing "
    ):
        run(log_interval=log_interval)
    model, before = seen[2]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not torch.equal(before["wte.weight"], seen[1][1]["wte.weight"]), "the steps before did update"


@pytest.mark.skipif(sys.platform == "win32", reason="Windows does not deliver these signals so")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_after_its_step_and_saves(run, monkeypatch, capsys, number):
    expected, handler = run("two-steps", max_iters=2, **STEADY), signal.getsignal(number)
    step = Run.step

    def signalled(self):
        if self.steps_done == 1:
            signal.raise_signal(number)
        return step(self)

    monkeypatch.setattr(Run, "step", signalled)
    with pytest.raises(KeyboardInterrupt if number == signal.SIGINT else SystemExit) as end:
        run(max_iters=10, **STEADY)
    assert number == signal.SIGINT or end.value.code == 143
    model, config = load_model(run.out)
    assert equal(model, expected)
    assert (config["step"], config["val_loss"]) == (2, None)
    assert f"interrupted after 2 of 10 steps; the model so far is in {run.out}" in capsys.readouterr().out
    assert signal.getsignal(number) == handler, "the handlers are put back"


def test_every_evaluation_saves_the_model(run, monkeypatch):
    expected = run("two-steps", max_iters=2, **STEADY)
    after(3, RuntimeError("the power is gone"), monkeypatch)
    with pytest.raises(RuntimeError, match="power"):
        run(max_iters=10, eval_interval=2, **STEADY)
    assert equal(load_model(run.out)[0], expected)
    assert json.loads((run.out / "config.json").read_text())["step"] == 2
    assert len(metrics(run.out)) == 1


def test_matplotlib_is_no_need(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    run()
    assert sorted(contents(run.out)) == [name for name in FILES if name != "loss.png"]


def test_a_model_without_a_checkpoint_can_not_be_resumed(run, text):
    run(max_iters=1)
    shutil.rmtree(run.out / training.CHECKPOINTS)
    with pytest.raises(ValueError, match="holds a model and no checkpoint to resume from"):
        fit(MODEL, FEW, BYTE, text, run.out, resume=True)
