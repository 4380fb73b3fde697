"""A run that is stopped goes on to the bit, from the newest checkpoint that is whole; and what may have changed."""

import dataclasses
import json
import shutil
import signal

import pytest
import tiktoken
import torch

from fastgpt import GPT
from fastgpt.cli import main
from fastgpt.data.tokenizer import END_OF_TEXT
from fastgpt.training import state
from fastgpt.training.checkpoint import Checkpoints
from fastgpt.training.run import Run
from fastgpt.weights import save_model
from tests.training.runs import MODEL, Runs, digests


@pytest.fixture
def run(tmp_path, monkeypatch):
    return Runs(tmp_path, monkeypatch)


def stop_after(steps, monkeypatch):
    """The run ends there by SIGTERM, once."""
    step = Run.step

    def signalled(self):
        if self.steps_done == steps - 1:
            signal.raise_signal(signal.SIGTERM)
        return step(self)

    monkeypatch.setattr(Run, "step", signalled)


def last_row(folder):
    return (folder / "metrics.csv").read_text().splitlines()[-1].split(",")


@pytest.mark.parametrize(
    "changes",
    [dict(), dict(order="epoch"), dict(dtype="bfloat16"), dict(dtype="float16"), dict(schedule="wsd")],
    ids=["random", "epoch", "bfloat16", "float16", "wsd"],
)
def test_resumed_is_uninterrupted_to_the_bit(run, monkeypatch, changes):
    """Weights, moments and generators, by SHA-256; with dropout, accumulation and a stop between two looks."""
    run("whole", **changes)
    with monkeypatch.context() as patch:
        stop_after(3, patch)
        with pytest.raises(SystemExit, match="143"):
            run(**changes)
    assert (run.out / "checkpoints/step-00000003").is_dir()
    run(resume=True, **changes)
    assert digests(run.out) == digests(run.out.parent / "whole")
    ours, theirs = (last_row(folder) for folder in (run.out, run.out.parent / "whole"))
    assert ours[:4] == theirs[:4], "step, losses and learning rate"


def test_it_matters_what_is_restored(run, monkeypatch):
    """The digests of the test above can tell."""
    run("whole")
    state_restore = state.restore

    def check(name):
        run(overwrite=True, max_iters=3)
        run(resume=True)
        assert digests(run.out) != digests(run.out.parent / "whole"), name

    with monkeypatch.context() as patch:
        patch.setattr(state, "restore_generators", lambda *a: True)
        check("generators")
    with monkeypatch.context() as patch:
        batches = Run.batches
        patch.setattr(Run, "batches", lambda self, seen: batches(self, seen % 12))
        check("position")
    with monkeypatch.context() as patch:
        patch.setattr(state, "restore", lambda s, m, o, *a: (state_restore(s, m, o, *a), o.state.clear()))
        check("moments")


def test_epochs_go_on_where_they_stopped(run, monkeypatch):
    seen = []
    batches = Run.batches
    monkeypatch.setattr(Run, "batches", lambda self, at: (seen.append(at), batches(self, at))[1])
    run(order="epoch", max_iters=3)
    run(order="epoch", resume=True)
    assert seen == [0, 4, 8, 12, 16, 20]


def test_metrics_and_seconds_go_on(run):
    run(eval_interval=2, max_iters=4)
    before = json.loads((run.out / "checkpoints/step-00000004/state.json").read_text())
    run(eval_interval=2, resume=True)
    rows = (run.out / "metrics.csv").read_text().splitlines()[1:]
    assert [row.split(",")[0] for row in rows] == ["2", "4", "6"]
    assert float(rows[-1].split(",")[5]) > before["seconds"] > 0


def test_resume_of_a_finished_run_changes_nothing(run):
    run()
    before = digests(run.out)
    run(resume=True)
    assert digests(run.out) == before


def test_resume_starts_where_nothing_was_saved(run, capsys):
    run(resume=True, max_iters=1)
    assert "nothing to resume yet" in capsys.readouterr().out
    assert (run.out / "checkpoints/step-00000001").is_dir()


def test_the_newest_valid_one_is_taken_and_the_others_are_named(run, capsys):
    run("whole")
    run(max_iters=4)
    newest, before = run.out / "checkpoints/step-00000004", run.out / "checkpoints/step-00000003"
    path = newest / "optimizer.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1]))
    run(resume=True)
    told = capsys.readouterr().out
    assert f"passed over {newest}: optimizer.safetensors is not what was written: its SHA-256 differs" in told
    assert f"resuming from {before}" in told
    assert digests(run.out) == digests(run.out.parent / "whole")


def test_strict_resume_takes_no_older_one(run):
    run(max_iters=4)
    newest = run.out / "checkpoints/step-00000004"
    (newest / "random.safetensors").write_bytes(b"")
    with pytest.raises(
        ValueError, match=r"strict_resume: .*step-00000004 is not whole: random.safetensors has 0 bytes"
    ):
        run(resume=True, strict_resume=True)
    assert newest.is_dir()


def test_it_never_starts_anew_where_checkpoints_are_broken(run):
    run(max_iters=2)
    for each in Checkpoints(run.out / "checkpoints").all():
        (each.path / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"none of the 2 checkpoints in .*checkpoints is whole"):
        run(resume=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            dict(model=dataclasses.replace(MODEL, n_layer=1, gelu="none")),
            "n_layer = 2 there, 1 now; gelu = 'tanh' there",
        ),
        (dict(source="other"), "the data changed since .* was trained on it"),
    ],
    ids=["shape", "data"],
)
def test_another_run_is_refused(run, tmp_path, changes, message):
    run(max_iters=1)
    if "source" in changes:
        changes = dict(source=tmp_path / "other.txt")
        changes["source"].write_text("the quick brown fox jumps over the lazy cat. " * 50)
    before = digests(run.out, 1)
    with pytest.raises(ValueError, match=message):
        run(resume=True, **changes)
    assert digests(run.out, 1) == before


def test_what_may_change_on_resume(run):
    run(max_iters=1)
    free = dataclasses.replace(
        MODEL, dropout=0.0, activation_checkpointing="block", residual="float32", backend="torch"
    )
    run(resume=True, model=free, max_iters=2, batch_size=4, learning_rate=1e-4)


def test_other_threads_are_told_of(run, capsys, monkeypatch):
    run(max_iters=1)
    monkeypatch.setattr(state.torch, "get_num_threads", lambda: 5)
    run(resume=True)
    assert "not to the bit as an uninterrupted run: threads was 1, is 5" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (dict(seed=5), "seed was 1337, is 5"),
        (dict(order="epoch"), "order was random, is epoch"),
        (dict(batch_size=4, beta1=0.8), "batch_size was 2, is 4; beta1 was 0.9, is 0.8"),
        (dict(model=dataclasses.replace(MODEL, dropout=0.25)), "dropout was 0.2, is 0.25"),
    ],
    ids=["seed", "order", "batch", "dropout"],
)
def test_settings_that_another_run_would_have_are_told(run, capsys, changes, told):
    run(max_iters=1)
    capsys.readouterr()
    run(resume=True, max_iters=2, **changes)
    assert f"not to the bit as an uninterrupted run: {told}\n" in capsys.readouterr().out


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_dropout_that_draws_anew_is_told_where_there_is_dropout(run, capsys, monkeypatch, dropout):
    model = dataclasses.replace(MODEL, dropout=dropout)
    run(max_iters=1, model=model)
    monkeypatch.setattr(state, "restore_generators", lambda saved, world: False)
    run(resume=True, model=model, max_iters=2)
    assert ("dropout draws anew" in capsys.readouterr().out) == bool(dropout)


def test_settings_that_change_no_bit_are_not_told(run, capsys):
    run(max_iters=1)
    free = dataclasses.replace(MODEL, activation_checkpointing="block", backend="torch")
    run(resume=True, model=free, max_iters=3, eval_interval=2, eval_iters=2, log_interval=3, sample_tokens=4)
    assert "not to the bit" not in capsys.readouterr().out


def test_model_folder_loads_in_transformers(run):
    from transformers import GPT2LMHeadModel

    ours = run(max_iters=1).eval()
    theirs = GPT2LMHeadModel.from_pretrained(run.out / "checkpoints/step-00000001/model").eval()
    idx = torch.arange(16)[None]
    with torch.no_grad():
        torch.testing.assert_close(theirs(idx).logits, ours(idx), rtol=1e-4, atol=1e-5)


def test_tokens_of_another_encoding(run, monkeypatch):
    run(max_iters=1)
    other = tiktoken.Encoding("other", pat_str="(?s:.)", mergeable_ranks={bytes([i]): i for i in range(256)},
                              special_tokens={END_OF_TEXT: 256})  # fmt: skip
    monkeypatch.setattr("tests.training.runs.encoding", lambda name: other)
    with pytest.raises(ValueError, match="was trained on tokens of the encoding 'byte', not of 'other'"):
        run(resume=True)


def test_a_fine_tuned_run_goes_on_without_its_base(tmp_path, capsys):
    base, out, text = tmp_path / "base", tmp_path / "out", tmp_path / "fox.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 50)
    base.mkdir()
    save_model(GPT(MODEL).eval(), base, "byte")
    how = ["train", "--data", str(text), "--out", str(out), "--batch_size", "2", "--eval_iters", "1"]
    assert main([*how, "--init_from", str(base), "--encoding", "byte", "--max_iters", "1"]) == 0
    shutil.rmtree(base)
    assert main(["train", "--out", str(out), "--resume", "--max_iters", "2"]) == 0, capsys.readouterr().err
    toml = tmp_path / "run.toml"
    toml.write_text(f'data = "{text}"\nencoding = "byte"\ninit_from = "{base}"\nbatch_size = 2\neval_iters = 1\n')
    assert main(["train", "--out", str(out), "--resume", "--config", str(toml), "--max_iters", "3"]) == 0
    assert Checkpoints(out / "checkpoints").all()[-1].step == 3
