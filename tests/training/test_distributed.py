"""Two processes train what one trains: copied or sharded, stopped and resumed; and none waits for one that is gone."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import fastgpt
from fastgpt import GPT, GPTConfig
from fastgpt.training import distributed
from fastgpt.training import run as running
from fastgpt.training.checkpoint import Checkpoint
from fastgpt.training.distributed import World, join
from fastgpt.training.settings import TrainConfig
from tests.training.ranks import MODEL, launch, said

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows can't fork")
ROOT = Path(fastgpt.__file__).parents[1]
DROPOUT = dict(dropout=0.2)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "fox.txt"
    path.write_text("the quick brown fox jumps over the lazy dog. " * 50)
    return path


@pytest.fixture(scope="module")
def one(text, tmp_path_factory):
    """What one process makes of the same global batch."""
    out = tmp_path_factory.mktemp("one") / "out"
    assert launch(1, text, out) == [0], said(out, 0)
    return out


@pytest.fixture(scope="module")
def two(text, tmp_path_factory):
    """Two processes with dropout, undisturbed."""
    out = tmp_path_factory.mktemp("two") / "out"
    assert launch(2, text, out, model=DROPOUT) == [0, 0], said(out, 0)
    return out


@pytest.fixture(scope="module")
def sharded(text, tmp_path_factory):
    """Two processes with a shard of the weights each."""
    out = tmp_path_factory.mktemp("sharded") / "out"
    assert launch(2, text, out, fsdp=True) == [0, 0], said(out, 1)
    return out


def tensors(out, step=6):
    """Weights by transformers' names and moments, of one process's checkpoint or put together from shards."""
    folder = out / f"checkpoints/step-{step:08d}"
    found = load_file(folder / "model/model.safetensors")
    if (folder / "optimizer.safetensors").exists():
        return {**found, **load_file(folder / "optimizer.safetensors")}
    return {**found, **{name: tensor for name, tensor in of_shards(folder).items() if "/" in name}}


def of_shards(folder):
    """By their names, put together as the headers say."""
    parts = {}
    for path in sorted((folder / "shards").iterdir()):
        with safe_open(path, "pt") as file:
            places = json.loads(file.metadata()["DCP_SHARDING_INFO"])
            for name in file.keys():  # noqa: SIM118
                parts.setdefault(name, []).append((places[name]["saved_offsets"], file.get_tensor(name)))
    found = {}
    for name, pieces in parts.items():
        pieces.sort(key=lambda piece: piece[0])
        whole = pieces[0][1] if len(pieces) == 1 else torch.cat([piece for _, piece in pieces])
        starts = [0, *itertools.accumulate(len(piece) for _, piece in pieces)] if whole.dim() else [0]
        for start, (offset, _) in zip(starts, pieces, strict=False):
            assert offset == [start, *[0] * (whole.dim() - 1)][: whole.dim()]
        found[name] = whole
    return found


def digests(out, step=6):
    files = Checkpoint(out / f"checkpoints/step-{step:08d}", step).verify()["files"]
    return {name: file["sha256"] for name, file in files.items() if not name.endswith("state.json")}


def rows(out):
    return [[float(x) for x in line.split(",")] for line in (out / "metrics.csv").read_text().splitlines()[1:]]


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_train_what_one_does(text, tmp_path, one, sharded, kind):
    """The same windows, 2 batches for each process where one had 4; weights, moments, losses, the clipped norm."""
    out = sharded if kind == "fsdp" else tmp_path / "out"
    assert kind == "fsdp" or launch(2, text, out) == [0, 0], said(out, 1)
    expected = tensors(one)
    for name, tensor in tensors(out).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-6, msg=name)
    for ours, theirs in zip(rows(out), rows(one), strict=True):
        assert ours[1:4] == pytest.approx(theirs[1:4], rel=1e-5)
        assert ours[6] == pytest.approx(theirs[6], rel=1e-4)
    assert "8 x 16 tokens in 2 x 2 batches" in said(out, 0)
    assert said(out, 1) == "", "rank 0 alone speaks"


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_resumed_is_uninterrupted_to_the_bit(text, tmp_path, two, sharded, kind):
    out, whole = tmp_path / "out", {"ddp": two, "fsdp": sharded}[kind]
    changes = dict(fsdp=True) if kind == "fsdp" else dict(model=DROPOUT)
    assert launch(2, text, out, fault="SIGTERM to one", **changes) == [143, 143], said(out, 1)
    assert os.listdir(out / "checkpoints") == ["step-00000002"], "all stop after the same step"
    assert launch(2, text, out, resume=True, **changes) == [0, 0], said(out, 0)
    assert "not to the bit" not in said(out, 0)
    assert digests(out) == digests(whole)


def test_a_process_that_dies_ends_all_and_a_relaunch_goes_on_to_the_bit(text, tmp_path, two):
    out = tmp_path / "out"
    first, second = launch(2, text, out, model=DROPOUT, fault="death of one")
    assert second == -9 and first != 0
    assert os.listdir(out / "checkpoints") == ["step-00000003"]
    assert launch(2, text, out, model=DROPOUT, resume=True) == [0, 0]
    assert digests(out) == digests(two)


def test_dropout_differs_by_rank(two):
    random = load_file(two / "checkpoints/step-00000006/random.safetensors")
    assert sorted(random) == ["cpu.0", "cpu.1"]
    assert not torch.equal(random["cpu.0"], random["cpu.1"])


def test_another_number_of_processes_may_go_on(text, tmp_path, one):
    """Without dropout it computes the same; that bits may differ is told."""
    out = tmp_path / "out"
    assert launch(2, text, out, max_iters=3, lr_decay_iters=6) == [0, 0]
    assert launch(1, text, out, resume=True) == [0], said(out, 0)
    assert "processes were 2, are 1" in said(out, 0) and "dropout" not in said(out, 0)
    expected = tensors(one)
    for name, tensor in tensors(out).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("changes", [dict(), dict(fsdp=True)], ids=["ddp", "fsdp"])
def test_nan_on_one_stops_all(text, tmp_path, changes):
    out = tmp_path / "out"
    assert launch(2, text, out, fault="NaN on one", eval_interval=2, **changes) == [2, 2], said(out, 0)
    for rank in (0, 1):
        assert "the loss of step 3 is nan on rank 1; the first bad tensor is" in said(out, rank)
    assert "is the output of h.1.mlp" in said(out, 1)
    assert os.listdir(out / "checkpoints") == ["step-00000002"]


def test_a_stall_shows_the_stacks(text, tmp_path):
    """Rank 0's tells that it waits for the others; then all go on."""
    out = tmp_path / "out"
    assert launch(2, text, out, fault="one that stalls") == [0, 0], said(out, 0)
    assert "Timeout (0:00:01)!" in said(out, 0) and "in step" in said(out, 0)
    assert "in _at_step" in said(out, 1) or "in acting" in said(out, 1)


def test_kernels_are_compiled_before_the_first_collective(monkeypatch):
    """DDP's first act is to compare shapes over all processes."""
    calls = []

    class Watched(GPT):
        def forward(self, idx, targets=None, documents=None):
            calls.append(tuple(idx.shape))
            return super().forward(idx, targets, documents)

    def replicate(model, world):
        assert calls == [(1, 16)]
        assert all(p.grad is None for p in model.parameters())
        return model

    monkeypatch.setattr(running, "replicate", replicate)
    running._distributed(Watched(GPTConfig(**MODEL)), TrainConfig(), World(0, 2, torch.device("cpu")))


def test_each_process_of_a_machine_has_its_own_gpu(monkeypatch):
    for name, value in dict(RANK="5", LOCAL_RANK="1", WORLD_SIZE="8", MASTER_ADDR="127.0.0.1").items():
        monkeypatch.setenv(name, value)
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(distributed, "device_named", torch.device)
    monkeypatch.setattr(distributed.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed.dist, "get_rank", lambda: 5)
    for device in ("auto", "cuda"):
        assert join(device) == World(5, 8, torch.device("cuda:1"))
    assert chosen == [torch.device("cuda:1")] * 2


def test_a_sharded_model_is_compiled_after_it_is_sharded(monkeypatch):
    done = []
    monkeypatch.setattr(running, "shard", lambda model, world, *how: done.append("sharded"))
    monkeypatch.setattr(GPT, "compile", lambda self: done.append("compiled"))
    model = GPT(GPTConfig(**MODEL))
    assert running._distributed(model, TrainConfig(fsdp=True, compile=True), World(0, 1, torch.device("cpu"))) is model
    assert done == ["sharded", "compiled"]


def test_without_torchrun_there_is_one_process(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")  # of some other launcher's: nothing says where the others are
    assert join("cpu") == World(0, 1, torch.device("cpu"))


def test_torchrun_the_command(text, tmp_path):
    """README's line, twice: the second resumes, and only one process speaks."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "fastgpt"]
    command += ["train", "--data", str(text), "--out", str(tmp_path / "out"), "--resume", "--device", "cpu"]
    command += ["--preset", "byte-0.1M", "--block_size", "16", "--n_layer", "1", "--n_embd", "16", "--eval_iters", "1"]
    command += ["--batch_size", "4", "--max_iters", "2", "--sample_tokens", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("step 2: train 5.") == 1
    assert result.stdout.count("saved in") == 1
    state = json.loads((tmp_path / "out/checkpoints/step-00000002/state.json").read_text())
    assert (state["processes"], state["windows"]) == (2, 8)
