"""What shows a run (samples, plot, metrics, TensorBoard's events) costs it nothing: saved first, told, passed over."""

import contextlib
import os
import signal
import sys
from types import ModuleType

import pytest

from fastgpt import cli
from fastgpt.cli import text as cli_text
from fastgpt.training import monitor
from fastgpt.training.checkpoint import Checkpoints
from fastgpt.training.run import Run
from fastgpt.weights import load_model
from tests.training.ranks import launch, said
from tests.training.runs import Runs, digests

ERRORS = [KeyError(300), RuntimeError("no such font\nand more"), OSError(28, "No space left on device"), MemoryError()]
SAID = ["KeyError: 300", "RuntimeError: no such font", "OSError: [Errno 28] No space left on device", "MemoryError"]


@pytest.fixture
def run(tmp_path, monkeypatch):
    return Runs(tmp_path, monkeypatch)


@contextlib.contextmanager
def costs_nothing():
    """An AssertionError for whatever comes through."""
    try:
        yield
    except Exception as error:
        raise AssertionError(f"it cost the run: {error!r}") from error


def fails(error):
    def fail(*arguments, **options):
        raise error

    return fail


@pytest.mark.parametrize(("error", "words"), list(zip(ERRORS, SAID, strict=True)))
@pytest.mark.parametrize(
    ("part", "what"), [("sample", "the sample"), ("plot_losses", "loss.png"), ("write_metrics", "metrics.csv")]
)
def test_what_it_raises_is_told_in_a_line_and_training_goes_on(run, monkeypatch, capsys, part, what, error, words):
    run("plain", eval_interval=3, sample_tokens=5)
    capsys.readouterr()
    monkeypatch.setattr(monitor, part, fails(error))
    with costs_nothing():
        run(eval_interval=3, sample_tokens=5)
    lines = capsys.readouterr().out.splitlines()
    for step in (3, 6):
        assert f"step {step}: {what} failed: {words}; training goes on" in lines
        assert any(line.startswith(f"step {step}: train") for line in lines)
    assert digests(run.out) == digests(run.folder / "plain"), "the run is the same to the bit"
    assert load_model(run.out)[1]["step"] == 6
    files = {"sample": monitor.SAMPLES, "write_metrics": monitor.METRICS}
    for each, file in files.items():
        assert (run.out / file).exists() == (each != part), "one that fails takes no other along"


def test_all_is_saved_before_anything_is_shown(run, monkeypatch):
    """A sample that ends the process: what a killed one leaves is the step that was just evaluated."""

    class Killed(BaseException):
        pass

    monkeypatch.setattr(monitor, "sample", fails(Killed()))
    with pytest.raises(Killed):
        run(eval_interval=4, sample_tokens=5, checkpoint_interval=4)
    assert [each.step for each in Checkpoints(run.out / "checkpoints").all()] == [4]
    assert load_model(run.out)[1]["step"] == 4


def test_an_error_of_the_training_itself_ends_it(run, monkeypatch):
    for method in ("evaluate", "step"):
        monkeypatch.setattr(Run, method, fails(KeyError("a bug")))
        with pytest.raises(KeyError, match="a bug"):
            run(method, eval_interval=3)
        monkeypatch.undo()


@pytest.mark.skipif(os.name == "nt", reason="a process can't be sent Ctrl-C on Windows")
def test_ctrl_c_in_a_sample_ends_the_run_as_ever(run, monkeypatch, capsys):
    monkeypatch.setattr(monitor, "sample", lambda *a: os.kill(os.getpid(), signal.SIGINT) or "text")
    with pytest.raises(KeyboardInterrupt):
        run(eval_interval=2, sample_tokens=5, log_interval=1)
    assert "interrupted after 3 of 6 steps" in capsys.readouterr().out


@pytest.mark.slow
def test_a_sample_that_fails_leaves_no_other_process_waiting(tmp_path):
    (tmp_path / "fox.txt").write_text("the quick brown fox jumps over the lazy dog. " * 50)
    assert launch(2, tmp_path / "fox.txt", tmp_path / "out", "samples that fail", sample_tokens=5) == [0, 0]
    assert said(tmp_path / "out", 0).count("the sample failed: KeyError: 300; training goes on") == 2
    assert said(tmp_path / "out", 1) == "" and load_model(tmp_path / "out")[1]["step"] == 6


@pytest.mark.parametrize("method", ["add_scalar", "flush", "close"])
def test_tensorboard_that_fails_is_told_once(run, monkeypatch, capsys, method):
    class SummaryWriter:
        def __init__(self, folder):
            pass

        def add_scalar(self, name, value, step):
            pass

        def flush(self):
            pass

        def close(self):
            pass

    setattr(SummaryWriter, method, fails(OSError(28, "No space left on device")))
    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    run(eval_interval=2, tensorboard=True)
    assert capsys.readouterr().out.count("TensorBoard failed: OSError: [Errno 28] No space left on device") == 1
    assert load_model(run.out)[1]["step"] == 6


def test_the_last_sample_fails_behind_a_run_that_is_saved(tmp_path, monkeypatch, capsys):
    (tmp_path / "fox.txt").write_text("the quick brown fox " * 90)
    shape = ["--preset=byte-0.1M", "--block_size=16", "--n_layer=1", "--n_embd=16", "--device=cpu"]
    arguments = ["train", "--data", str(tmp_path / "fox.txt"), *shape, "--max_iters=2", "--eval_iters=1"]
    monkeypatch.setattr(cli_text, "stream", fails(KeyError(300)))
    with costs_nothing():
        assert cli.main([*arguments, "--out", str(tmp_path / "out")]) == 0
    assert "the sample failed: KeyError: 300" in capsys.readouterr().out
    assert load_model(tmp_path / "out")[1]["step"] == 2
    assert cli.main([*arguments, "--out", str(tmp_path / "no sample"), "--sample_tokens=0"]) == 0
    said = capsys.readouterr().out
    assert f"\nsaved in {tmp_path / 'no sample'}\n" in said and "sample:" not in said
