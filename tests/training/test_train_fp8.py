"""fastgpt train --fp8: what a checkpoint keeps of the scales, and what is refused before the first step."""

import dataclasses

import pytest

from fastgpt.cli import main
from fastgpt.fp8 import Fp8
from fastgpt.training.checkpoint import Checkpoint
from fastgpt.training.settings import SETTINGS
from tests.training.runs import MODEL, Runs, digests
from tests.training.test_resume import stop_after

FP8 = dataclasses.replace(MODEL, fp8="all", fp8_simulate=True)


@pytest.fixture
def run(tmp_path, monkeypatch):
    return Runs(tmp_path, monkeypatch)


@pytest.mark.parametrize("exact", [16, 3], ids=["own scales", "delayed"])
def test_resumed_is_uninterrupted_to_the_bit(run, monkeypatch, exact):
    """Two passes a step, stopped after three of six steps; the scales' magnitudes are in the checkpoint."""
    monkeypatch.setattr(Fp8, "exact_passes", exact)
    run("whole", model=FP8)
    with monkeypatch.context() as patch:
        stop_after(3, patch)
        with pytest.raises(SystemExit, match="143"):
            run(model=FP8)
    run(resume=True, model=FP8)
    whole = digests(run.out.parent / "whole")
    assert "fp8.safetensors" in whole and digests(run.out) == whole


def test_it_matters_what_is_restored(run, monkeypatch):
    """Without the magnitudes the digests of the test above differ."""
    monkeypatch.setattr(Fp8, "exact_passes", 3)
    run("whole", model=FP8)
    run(model=FP8, max_iters=3)
    monkeypatch.setattr(Fp8, "load", lambda self, state, device: None)
    run(resume=True, model=FP8)
    assert digests(run.out) != digests(run.out.parent / "whole")


def test_a_run_goes_on_with_8_bits_and_without(run, capsys):
    """From a checkpoint that knows none of them the scales begin anew; one with them goes on without."""
    run(max_iters=3)
    run(resume=True, model=FP8, max_iters=4)
    assert "fp8 was none, is all" in capsys.readouterr().out
    run(resume=True, model=dataclasses.replace(FP8, fp8="forward"), max_iters=5)
    run(resume=True, max_iters=6)
    files = Checkpoint(run.out / "checkpoints/step-00000006", 6).verify()["files"]
    assert "fp8.safetensors" not in files


def test_what_it_does_not_go_together_with_is_said_before_the_first_step(run):
    with pytest.raises(ValueError, match="fp8 = 'all' does not go together with compile = true yet"):
        run(model=FP8, compile=True)
    with pytest.raises(ValueError, match="matmuls of 8-bit floats need an NVIDIA GPU; fp8_simulate=True"):
        run(model=dataclasses.replace(FP8, fp8_simulate=False))


def test_by_the_command(tmp_path, capsys):
    text = tmp_path / "fox.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 50)
    sizes = ["--n_layer", "1", "--n_embd", "32", "--n_head", "2", "--block_size", "16", "--max_iters", "2"]
    quick = ["--eval_iters", "1", "--sample_tokens", "0", "--batch_size", "2", "--device", "cpu"]
    where = ["--data", str(text), "--out", str(tmp_path / "out")]
    main(["train", *where, *sizes, *quick, "--fp8", "forward", "--fp8_simulate", "true"])
    said = capsys.readouterr().out
    assert "saved in" in said and "matmuls of 8-bit floats (forward) simulated" in said
    assert 'fp8 = "forward"' in (tmp_path / "out" / SETTINGS).read_text(encoding="utf-8")
