"""What a checkpoint holds: kept, put back, and refused where it does not fit; no file of it can run code."""

import json
import os

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from fastgpt import GPT, weights
from fastgpt.training import checkpoint, state
from fastgpt.training.checkpoint import Checkpoint
from fastgpt.training.distributed import World
from fastgpt.weights import files
from tests.training.runs import MODEL, Runs


@pytest.fixture
def run(tmp_path, monkeypatch):
    return Runs(tmp_path, monkeypatch)


def test_the_scale_of_float16_goes_on(run):
    run(dtype="float16", max_iters=2)
    path = run.out / "checkpoints/step-00000002/state.json"
    facts = json.loads(path.read_text())
    assert (facts["scaler"]["scale"], facts["scaler"]["_growth_tracker"]) == (65536.0, 2)
    run(dtype="float16", max_iters=3, resume=True)
    later = json.loads((run.out / "checkpoints/step-00000003/state.json").read_text())
    assert later["scaler"]["_growth_tracker"] == 3


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
    kept = state.generators(there)
    assert sorted(kept) == ["cpu.0", "cuda.0"]
    assert state.restore_generators(state.Saved({}, {}, kept, {}), there)
    assert put == [(drawn, there.device)]
    assert not state.restore_generators(state.Saved({}, {}, {"cpu.0": kept["cpu.0"]}, {}), there), "a run of a CPU"


def test_the_generator_of_a_mac_is_kept_and_put_back(monkeypatch):
    """By a stand-in for torch.mps: untried on a Mac."""
    there = World(0, 1, torch.device("mps"))
    drawn, put = torch.arange(44, dtype=torch.uint8), []
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda: drawn)
    monkeypatch.setattr(torch.mps, "set_rng_state", put.append)
    kept = state.generators(there)
    assert state.restore_generators(state.Saved({}, {}, kept, {}), there)
    assert len(put) == 1 and put[0] is drawn
    assert not state.restore_generators(state.Saved({}, {}, {"cpu.0": kept["cpu.0"]}, {}), there), "a run of a CPU"


def test_a_disk_that_fails_under_a_checkpoint_is_an_oserror(tmp_path, monkeypatch):
    def fails(tensors, path, metadata):
        raise SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr(files, "save_file", fails)
    taken = state.Snapshot(GPT(MODEL).state_dict(), {}, {})
    with pytest.raises(OSError, match="I/O error: No space left on device"):
        state.write(tmp_path, MODEL, taken, {})
    with pytest.raises(OSError, match="No space left on device"):
        weights.save_model(GPT(MODEL), tmp_path, "byte")


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
