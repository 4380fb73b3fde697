"""A run that is stopped goes on to the bit; what can go wrong with what it goes on from."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from fastgpt import GPT, GPTConfig, checkpoint, monitor, state, train
from fastgpt.checkpoint import Checkpoint, Checkpoints
from fastgpt.distributed import World
from fastgpt.run import Run
from fastgpt.settings import TrainConfig
from fastgpt.tokenizer import encoding
from fastgpt.train import fit
from fastgpt.weights import load_model

ROOT = Path(__file__).parents[1]
BYTE = encoding("byte")
MODEL = GPTConfig(vocab_size=257, block_size=16, n_layer=2, n_head=2, n_embd=16, dropout=0.2)
SHORT = TrainConfig(
    max_iters=6,
    batch_size=2,
    gradient_accumulation_steps=2,
    eval_interval=100,
    eval_iters=2,
    checkpoint_interval=1,
    log_interval=2,
    sample_tokens=0,
    device="cpu",
)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "fox.txt"
    path.write_text("the quick brown fox jumps over the lazy dog. " * 50)
    return path


@pytest.fixture
def run(text, tmp_path, monkeypatch):
    """Trains on `text` with SHORT as changed; no plot is drawn."""
    monkeypatch.setattr(monitor, "plot_losses", lambda rows, path: None)

    def run(out="out", model=MODEL, source=text, overwrite=False, resume=False, strict_resume=False, **changes):
        config = dataclasses.replace(SHORT, **changes)
        return fit(model, config, BYTE, source, tmp_path / out, overwrite, resume, strict_resume)

    run.out = tmp_path / "out"
    return run


def stop_after(steps, monkeypatch):
    """The run ends there by SIGTERM, once."""
    step = Run.step

    def signalled(self):
        if self.steps_done == steps - 1:
            signal.raise_signal(signal.SIGTERM)
        return step(self)

    monkeypatch.setattr(Run, "step", signalled)


def digests(folder, step=6):
    """SHA-256 of all that a checkpoint holds but for its JSON, which tells times."""
    files = Checkpoint(folder / f"checkpoints/step-{step:08d}", step).verify()["files"]
    return {name: said["sha256"] for name, said in files.items() if not name.endswith("state.json")}


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


def test_the_scale_of_float16_goes_on(run):
    run(dtype="float16", max_iters=2)
    path = run.out / "checkpoints/step-00000002/state.json"
    facts = json.loads(path.read_text())
    assert (facts["scaler"]["scale"], facts["scaler"]["_growth_tracker"]) == (65536.0, 2)
    run(dtype="float16", max_iters=3, resume=True)
    later = json.loads((run.out / "checkpoints/step-00000003/state.json").read_text())
    assert later["scaler"]["_growth_tracker"] == 3


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
        patch.setattr(state, "restore", lambda s, m, o: (state_restore(s, m, o), o.state.clear()))
        check("moments")


def test_epochs_go_on_where_they_stopped(run, monkeypatch):
    seen = []
    batches = Run.batches
    monkeypatch.setattr(Run, "batches", lambda self, at: (seen.append(at), batches(self, at))[1])
    run(order="epoch", max_iters=3)
    run(order="epoch", resume=True)
    assert seen == [0, 4, 8, 12, 16, 20]


def test_a_disk_that_fails_under_the_report_costs_no_training(run, monkeypatch, capsys):
    def fails(self, rows):
        raise OSError(28, "No space left on device", "losses.png")

    monkeypatch.setattr(monitor.Monitor, "evaluated", fails)
    run(eval_interval=6)
    assert "step 6: [Errno 28] No space left on device: 'losses.png'; training goes on" in capsys.readouterr().out


def test_a_disk_that_fails_under_a_checkpoint_is_an_oserror(tmp_path, monkeypatch):
    def fails(tensors, path):
        raise SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr(state, "save_file", fails)
    taken = state.Snapshot(GPT(MODEL).state_dict(), {}, {})
    with pytest.raises(OSError, match="I/O error: No space left on device"):
        state.write(tmp_path, MODEL, taken, {})


def test_a_state_of_another_step_is_refused(run, tmp_path):
    run()
    step = tmp_path / "out/checkpoints/step-00000006"
    facts = json.loads((step / "state.json").read_text())
    (step / "state.json").write_text(json.dumps({**facts, "step": 5}))
    with pytest.raises(ValueError, match=r"state\.json is not the state of a run at step 6"):
        state.read(Checkpoint(step, 6), MODEL)


def test_the_generators_of_a_gpu_are_kept_and_put_back(monkeypatch):
    there = World(0, 1, torch.device("cuda"))
    drawn, put = torch.arange(16, dtype=torch.uint8), []
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: drawn)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: put.append((state, device)))
    kept = state._generators(there)
    assert sorted(kept) == ["cpu.0", "cuda.0"]
    assert state.restore_generators(state.Saved({}, {}, kept, {}), there)
    assert put == [(drawn, there.device)]
    assert not state.restore_generators(state.Saved({}, {}, {"cpu.0": kept["cpu.0"]}, {}), there), "a run of a CPU"


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


def test_a_foreign_pickle_runs_no_code(run, tmp_path):
    """Neither beside the checkpoint's files nor in their place, under a manifest that vouches for it."""

    class Canary:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'sung'}",)

    run(max_iters=1)
    found = run.out / "checkpoints/step-00000001"
    torch.save(Canary(), found / "ckpt.pt")
    torch.save(Canary(), found / "optimizer.safetensors")
    manifest = json.loads((found / "manifest.json").read_text())
    digest = checkpoint.digest(found / "optimizer.safetensors")
    manifest["files"]["optimizer.safetensors"] = {
        "bytes": (found / "optimizer.safetensors").stat().st_size,
        "sha256": digest,
    }
    (found / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="step-00000001"):
        run(resume=True)
    assert not (tmp_path / "sung").exists()
    for path in found.rglob("*"):
        assert path.suffix in ("", ".json", ".safetensors", ".pt"), "and none is written"


def rewritten(found, change):
    """The checkpoint with other moments, under a manifest that vouches for them."""
    path = found / "optimizer.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    manifest = json.loads((found / "manifest.json").read_text())
    manifest["files"][path.name] = {"bytes": path.stat().st_size, "sha256": checkpoint.digest(path)}
    (found / "manifest.json").write_text(json.dumps(manifest))


NAME = "ln_f.weight/exp_avg"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(NAME), rf"disagree about 1 tensors, {NAME} first"),
        (lambda t: t.update({NAME: t[NAME][:3].clone()}), rf"{NAME} is torch.float32 of shape \(3,\), not float32 of"),
        (lambda t: t.update({NAME: t[NAME].half()}), rf"{NAME} is torch.float16 of shape \(16,\), not"),
        (lambda t: t[NAME].fill_(torch.nan), rf"{NAME} is not finite"),
    ],
    ids=["missing", "shape", "dtype", "nan"],
)
def test_moments_that_do_not_fit(run, change, message):
    run(max_iters=1)
    rewritten(run.out / "checkpoints/step-00000001", change)
    with pytest.raises(ValueError, match=message):
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


def test_model_folder_loads_in_transformers(run):
    from transformers import GPT2LMHeadModel

    ours = run(max_iters=1).eval()
    theirs = GPT2LMHeadModel.from_pretrained(run.out / "checkpoints/step-00000001/model").eval()
    idx = torch.arange(16)[None]
    with torch.no_grad():
        torch.testing.assert_close(theirs(idx).logits, ours(idx), rtol=1e-4, atol=1e-5)


def test_a_full_disk_between_keeps_training_and_at_the_end_is_an_error(run, monkeypatch, capsys):
    """The disk is full from step 2 to 4, then to the end; what was saved before stays."""
    full = [2, 3, 4]
    usage = checkpoint.shutil.disk_usage
    step_of = {}

    def disk_usage(path):
        return usage(path)._replace(free=0) if step_of["run"].steps_done in full else usage(path)

    monkeypatch.setattr(checkpoint.shutil, "disk_usage", disk_usage)
    save = Run.save
    monkeypatch.setattr(Run, "save", lambda self, needed: (step_of.update(run=self), save(self, needed))[1])
    run(max_iters=5)
    told = capsys.readouterr().out
    assert "step 3 could not be saved: [Errno 28] no space left" in told
    assert "the newest checkpoint is of step 1; training goes on" in told
    assert [each.step for each in Checkpoints(run.out / "checkpoints").all()] == [1, 5]
    full += [6]
    with pytest.raises(
        OSError, match=r"step 6 could not be saved: .*no space left.*the newest checkpoint is of step 5"
    ):
        run(resume=True)
    assert load_model(run.out)[1]["step"] == 5


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limits on the size of files")
def test_a_disk_that_fails_while_writing(run, tmp_path, text):
    """A real failure of write(), by a limit on the size of files: told in one line, and the old checkpoint is whole."""
    run(max_iters=1)
    script = f"""
import resource, signal, sys
sys.argv[0] = "fastgpt"
from fastgpt import cli
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
sys.exit(cli.main(["train", "--resume", "--max_iters", "2", "--out", {str(run.out)!r}]))
"""
    result = subprocess.run(
        [sys.executable, "-c", script],
        cwd=checkpoint.Path(train.__file__).parents[1],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 2, result.stderr
    assert "step 2 could not be saved" in result.stderr and "File too large" in result.stderr
    assert [each.step for each in Checkpoints(run.out / "checkpoints").all()] == [1]
    assert os.listdir(run.out / "checkpoints") == ["step-00000001"]
    assert load_model(run.out)[1]["step"] == 1


def test_the_first_bad_tensor_is_named(run, monkeypatch):
    """An output, once the weights are looked at; with the rank and the step."""

    class Diverging(GPT):
        def __init__(self, config):
            super().__init__(config)
            self.h[1].attn.register_forward_hook(self.spoil)

        def spoil(self, module, inputs, output):
            self.forwards = getattr(self, "forwards", 0) + 1
            return output * torch.nan if self.forwards > 4 and self.training else None  # from step 3 on

    monkeypatch.setattr(train, "GPT", Diverging)
    message = r"loss of step 3 is nan on rank 0; the first bad tensor is the output of h.1.attn"
    with pytest.raises(FloatingPointError, match=message):
        run(checkpoint_interval=2)
    assert [each.step for each in Checkpoints(run.out / "checkpoints").all()] == [2]
    with torch.no_grad():
        assert all(p.isfinite().all() for p in load_model(run.out)[0].parameters())


def test_a_gradient_that_is_not_finite_is_named(run, monkeypatch):
    class Diverging(GPT):
        def __init__(self, config):
            super().__init__(config)
            self.h[0].mlp.c_fc.weight.register_hook(lambda grad: grad * torch.inf)

    monkeypatch.setattr(train, "GPT", Diverging)
    message = r"gradients of step 1 have the norm (nan|inf) on rank 0; .* is the gradient of h.0.mlp.c_fc.weight"
    with pytest.raises(FloatingPointError, match=message):
        run()


@pytest.mark.parametrize("allowed", [1, 2])
def test_steps_that_are_not_finite_may_be_skipped(run, monkeypatch, capsys, allowed):
    """Two of them, of which one is too many where one is allowed; the count goes on after a resume."""

    class Diverging(GPT):
        forwards = 0

        def forward(self, idx, targets=None, documents=None):
            loss = super().forward(idx, targets, documents)
            Diverging.forwards += self.training
            return loss * torch.nan if self.training and Diverging.forwards in (2, 5) else loss

    monkeypatch.setattr(train, "GPT", Diverging)
    options = dict(gradient_accumulation_steps=1, log_interval=1, eval_interval=3, skip_nonfinite=allowed)
    run(max_iters=3, **options)
    assert (
        f"step 2 was skipped: its loss is nan, its gradients' norm nan; 1 of skip_nonfinite = {allowed}"
        in capsys.readouterr().out
    )
    assert json.loads((run.out / "checkpoints/step-00000003/state.json").read_text())["skipped"] == 1
    second, third = (load_file(run.out / f"checkpoints/step-0000000{n}/model/model.safetensors") for n in (2, 3))
    assert any(not torch.equal(second[name], third[name]) for name in second), "the step after it counts"
    if allowed == 1:
        with pytest.raises(FloatingPointError, match="the loss of step 5 is nan"):
            run(resume=True, max_iters=6, **options)
    else:
        model = run(resume=True, max_iters=6, **options)
        assert all(p.isfinite().all() for p in model.parameters())
        (row,) = json.loads((run.out / "checkpoints/step-00000006/state.json").read_text())["rows"][-1:]
        assert 0 < row["train_loss"] < 10


def test_two_trainers_on_one_folder(run):
    run(max_iters=1)
    with checkpoint.locked(run.out), pytest.raises(BlockingIOError, match=f"process {os.getpid()} on "):
        run(resume=True)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_what_the_first_could_not(number):
    """As where a step hangs, and never comes to look."""
    code = "import time; from fastgpt.run import Signals\nwith Signals():\n    print('in', flush=True); time.sleep(60)"
    command = dict(cwd=ROOT, stdout=subprocess.PIPE, text=True)
    with subprocess.Popen([sys.executable, "-c", code], **command) as process:
        assert process.stdout.readline() == "in\n"
        process.send_signal(number)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.5)
        process.send_signal(number)
        assert process.wait(20) == 128 + number
