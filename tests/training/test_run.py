"""What may befall a run: a disk that fails, numbers that are not finite, another trainer, signals."""

import errno
import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastgpt import GPT, ops, training
from fastgpt.training import checkpoint
from fastgpt.training.checkpoint import Checkpoints
from fastgpt.training.run import Run
from fastgpt.training.step import _watched
from fastgpt.weights import load_model
from tests.training.runs import MODEL, Runs, digests

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run(tmp_path, monkeypatch):
    return Runs(tmp_path, monkeypatch)


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
def test_a_disk_that_fails_while_writing(run):
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
        cwd=ROOT,
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

    monkeypatch.setattr(training.fitting, "GPT", Diverging)
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

    monkeypatch.setattr(training.fitting, "GPT", Diverging)
    message = r"gradients of step 1 have the norm (nan|inf) on rank 0; .* is the gradient of h.0.mlp.c_fc.weight"
    with pytest.raises(FloatingPointError, match=message):
        run()


def test_the_second_pass_is_the_computation_that_failed(monkeypatch):
    """Looking at outputs has no part called that GPT reads."""
    model, calls = GPT(MODEL), []

    def counted(name, op):
        monkeypatch.setattr(ops, name, lambda *args, **more: calls.append(name) or op(*args, **more))

    for name in ("embedding", "add_layer_norm", "gelu_mlp", "causal_attention_qkv", "linear_cross_entropy"):
        counted(name, getattr(ops, name))
    ids = torch.zeros(2, 16, dtype=torch.int64)
    model(ids, ids)
    before, calls[:] = calls[:], []
    with _watched(model) as found:
        model(ids, ids)
    assert calls == before and found == []
    with torch.no_grad():
        model.h[1].attn.c_attn.bias[3] = torch.nan
    with _watched(model) as found:
        model(ids, ids)
    assert found[0] == "h.1.attn.c_attn"


@pytest.mark.parametrize("allowed", [1, 2])
def test_steps_that_are_not_finite_may_be_skipped(run, monkeypatch, capsys, allowed):
    """Two of them, of which one is too many where one is allowed; the count goes on after a resume."""

    class Diverging(GPT):
        forwards = 0

        def forward(self, idx, targets=None, documents=None):
            loss = super().forward(idx, targets, documents)
            Diverging.forwards += self.training
            return loss * torch.nan if self.training and Diverging.forwards in (2, 5) else loss

    monkeypatch.setattr(training.fitting, "GPT", Diverging)
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
    code = (
        "import time\nfrom fastgpt.training.signals import Signals\n"
        "with Signals():\n    print('in', flush=True); time.sleep(60)"
    )
    command = dict(cwd=ROOT, stdout=subprocess.PIPE, text=True)
    with subprocess.Popen([sys.executable, "-c", code], **command) as process:
        assert process.stdout.readline() == "in\n"
        process.send_signal(number)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.5)
        process.send_signal(number)
        assert process.wait(20) == 128 + number


@pytest.mark.parametrize("fails", ["tensorboard", "weights"])
def test_what_fails_before_the_first_step_overwrites_nothing(run, monkeypatch, fails):
    run(max_iters=2)
    (run.out / "samples.txt").write_text("kept")
    before = digests(run.out, 2)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    options = dict(tensorboard=True) if fails == "tensorboard" else dict(init_from=str(run.out / "gone"))
    with pytest.raises((ValueError, OSError)):
        run(overwrite=True, **options)
    assert (run.out / "checkpoints/step-00000002").is_dir()
    assert digests(run.out, 2) == before and (run.out / "samples.txt").read_text() == "kept"


def test_a_run_may_begin_with_what_it_overwrites(run):
    ours = run(max_iters=2)
    started = run(overwrite=True, init_from=str(run.out / "checkpoints/step-00000002"), max_iters=1, learning_rate=0.0)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), started.parameters(), strict=True))
    assert [each.step for each in Checkpoints(run.out / "checkpoints").all()] == [1]


def test_a_kill_between_the_last_checkpoint_and_the_model(run, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("fastgpt.training.saving.save_model", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(max_iters=1)
    assert not (run.out / "model.safetensors").exists()
    (run.out / ".model.safetensors.abcdefgh.tmp").write_text("half")
    (run.out / ".mine.tmp").write_text("mine")
    ours = run(max_iters=1, resume=True)
    assert (run.out / "model.safetensors").exists()
    left, facts = load_model(run.out)
    assert facts["step"] == 1 and all(map(torch.equal, left.parameters(), ours.parameters()))
    assert [path.name for path in run.out.glob(".*.tmp")] == [".mine.tmp"]


def test_a_file_system_without_locks_is_no_other_trainer(run, monkeypatch):
    def fails(file):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(checkpoint, "_lock", fails)
    with pytest.raises(OSError, match="this file system can't lock a file: Function not implemented"):
        run(max_iters=1)


def test_folders_that_can_not_be_flushed(run, monkeypatch):
    flush = os.fsync

    def refuses_folders(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", refuses_folders)
    run(max_iters=1)
    assert load_model(run.out)[1]["step"] == 1
