"""Saving in the background: what is written is what was there when save returned, one save at a time, and no error is
lost. One process that is a group of its own, for the protocol; two for kills and memory."""

import contextlib
import dataclasses
import json
import multiprocessing
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from fastgpt import GPT, GPTConfig, ops
from fastgpt.training import sharded, state
from fastgpt.training.checkpoint import Checkpoint, Checkpoints
from fastgpt.training.distributed import World
from fastgpt.weights import from_pretrained, load_model
from tests.training import ranks

SMALL = GPTConfig(vocab_size=31, block_size=8, n_layer=1, n_head=2, n_embd=8, bias=False)


@pytest.fixture
def alone():
    """A group of one process, as torchrun makes of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield World(0, 1, torch.device("cpu"))
    dist.destroy_process_group()


class Saved:
    """A model whose numbers are all those of its step, and its saver."""

    def __init__(self, world, folder, shape=SMALL):
        self.shape = shape
        self.model, self.optimizer = ranks.model_and_moments(shape)
        self.said: list[str] = []
        self.saver = ranks.saver(world, folder, self.said.append)
        self.folder = folder

    def save(self, step, needed=False):
        ranks.fill(self.model, self.optimizer, step)
        self.saver.save(self.model, self.optimizer, ranks.facts(self.shape, step), needed)

    def steps(self):
        return [each.step for each in Checkpoints(self.folder / "checkpoints").all()]

    def numbers(self, step):
        """All that stands in the weights and moments of a checkpoint, and in the folder's own model."""
        shards = sharded.Shards(Checkpoint(self.folder / f"checkpoints/step-{step:08d}", step).path / "shards")
        return {number for name in shards.tensors for number in shards.whole(name).flatten().tolist()}


@pytest.fixture
def saved(alone, tmp_path):
    found = Saved(alone, tmp_path)
    yield found
    found.saver.close()


@pytest.fixture
def gate(monkeypatch):
    """While it is not set, nothing is written."""
    opened, write = threading.Event(), sharded.write_shards

    def waits(*given):
        assert opened.wait(60)
        write(*given)

    monkeypatch.setattr(sharded, "write_shards", waits)
    yield opened
    opened.set()


def test_save_returns_before_it_writes_and_later_steps_change_nothing_of_it(saved, gate):
    saved.save(1)
    ranks.fill(saved.model, saved.optimizer, 2)
    assert saved.steps() == []
    gate.set()
    saved.saver.wait()
    assert saved.steps() == [1] and saved.numbers(1) == {1.0}
    saved.save(2, needed=True)
    assert saved.steps() == [1, 2] and saved.numbers(2) == {2.0}
    assert load_model(saved.folder)[1]["step"] == 2


def test_there_is_one_save_at_a_time(saved, gate):
    saved.save(1)
    second = threading.Thread(target=saved.save, args=(2,))
    second.start()
    second.join(0.2)
    assert second.is_alive() and saved.steps() == []
    gate.set()
    second.join(60)
    saved.saver.wait()
    assert saved.steps() == [1, 2] and saved.numbers(1) == {1.0}


def test_what_is_in_it(saved):
    """Every file is in the manifest, none is a pickle, and model/ and the folder's model hold the weights."""
    saved.save(3, needed=True)
    path = saved.folder / "checkpoints/step-00000003"
    files = Checkpoint(path, 3).verify()["files"]
    assert sorted(files) == ["model/config.json", "model/model.safetensors", "random.safetensors",
                             "shards/00000.safetensors", "state.json"]  # fmt: skip
    for model in (from_pretrained(path / "model"), load_model(saved.folder)[0]):
        for name, tensor in model.state_dict().items():
            torch.testing.assert_close(tensor, saved.model.state_dict()[name], rtol=0, atol=0)
    assert sorted(os.listdir(saved.folder / "checkpoints")) == ["step-00000003"]


def failing(monkeypatch, error, calls=1):
    write, left = sharded.write_shards, [calls]

    def fails(*given):
        left[0] -= 1
        if left[0] >= 0:
            raise error
        write(*given)

    monkeypatch.setattr(sharded, "write_shards", fails)


def test_a_full_disk_in_the_background_is_told_and_the_next_save_tries_again(saved, monkeypatch):
    saved.save(1, needed=True)
    failing(monkeypatch, OSError(28, "No space left on device"))
    saved.save(2)
    saved.save(3, needed=True)
    (said,) = saved.said
    assert said.startswith("step 2 could not be saved: [Errno 28] No space left on device; the newest checkpoint is of")
    assert said.endswith("step 1; training goes on")
    assert sorted(os.listdir(saved.folder / "checkpoints")) == ["step-00000001", "step-00000003"]


def test_a_full_disk_under_the_last_save_is_an_error(saved, monkeypatch):
    failing(monkeypatch, OSError(28, "No space left on device"))
    with pytest.raises(OSError, match=r"step 1 could not be saved: .*No space left on device; there is no checkpoint"):
        saved.save(1, needed=True)
    assert os.listdir(saved.folder / "checkpoints") == []


@pytest.mark.parametrize("late", ["save", "wait"])
def test_another_error_in_the_background_is_raised_by_the_next_call(saved, monkeypatch, late):
    failing(monkeypatch, LookupError("a bug"))
    saved.save(1)
    with pytest.raises(RuntimeError, match=r"step 1 could not be saved: (?s:.*)a bug"):
        saved.save(2) if late == "save" else saved.saver.wait()


def test_an_error_that_comes_with_the_end_is_told(saved, monkeypatch):
    failing(monkeypatch, LookupError("a bug"))
    saved.save(1)
    saved.saver.close()
    assert len(saved.said) == 1 and "step 1 could not be saved" in saved.said[0] and "a bug" in saved.said[0]


def test_a_model_with_windows_keeps_them(alone, tmp_path):
    """As fastgpt's own folder, for Hugging Face's GPT-2 has none."""
    shape = dataclasses.replace(SMALL, n_layer=2, window=3, window_pattern="SL")
    saved = Saved(alone, tmp_path, shape)
    saved.save(1, needed=True)
    saved.saver.close()
    for folder in (tmp_path / "checkpoints/step-00000001/model", tmp_path):
        assert load_model(folder)[0].config.windows == shape.windows == (3, None)


def test_a_checkpoint_is_not_there_before_all_have_written(saved, monkeypatch):
    """The model for transformers comes last, and a kill there leaves none of it."""
    seen = []
    beside = state.write_beside_shards
    monkeypatch.setattr(
        state, "write_beside_shards", lambda folder, *given: (seen.append(saved.steps()), beside(folder, *given))
    )
    saved.save(1, needed=True)
    assert seen == [[]]


def test_a_valid_checkpoint_of_the_same_step_stays(saved):
    saved.save(1, needed=True)
    ranks.fill(saved.model, saved.optimizer, 5)
    saved.saver.save(saved.model, saved.optimizer, ranks.facts(SMALL, 1), needed=True)
    assert saved.numbers(1) == {1.0} and os.listdir(saved.folder / "checkpoints") == ["step-00000001"]


def test_a_shard_that_another_process_wrote_elsewhere_is_missed(saved):
    """As where the processes' machines do not share the folder."""
    store = Checkpoints(saved.folder / "checkpoints")
    new = store.begin(1, 0)
    (new / "state.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"it is not there: 'shards/00001.safetensors'"):
        store.commit(1, new, {}, {"shards/00001.safetensors": "00"})
    assert saved.steps() == []


def test_shards_are_on_the_disk_before_the_rename(saved, monkeypatch):
    """Each file is flushed, by whoever wrote it, and the manifest last."""
    calls, names = [], {}
    real_open, real_fsync, real_rename = os.open, os.fsync, os.rename
    monkeypatch.setattr(os, "open", lambda path, *a, **k: names.setdefault(fd := real_open(path, *a, **k), path) and fd)
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append(names.pop(fd, None)), real_fsync(fd))[1])
    monkeypatch.setattr(os, "rename", lambda a, b: (calls.append("rename"), real_rename(a, b))[1])
    saved.save(1, needed=True)
    before = [Path(call).name for call in calls[: calls.index("rename")] if call is not None]
    assert before[0] == "00000.safetensors"
    files = [name for name in before if name.endswith((".json", ".safetensors"))]
    assert {"model.safetensors", "random.safetensors", "state.json"} < {*files} and files[-1] == "manifest.json"


def rewritten(folder, change):
    """Shards as a stranger may have made them, under a manifest that vouches for them."""
    path = folder / "shards/00000.safetensors"
    shards = sharded.Shards(folder / "shards")
    content = {name: (shards.whole(name), None) for name in shards.tensors}
    change(content)
    sharded.write_shards(content, path)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["shards/00000.safetensors"] = {"bytes": path.stat().st_size, "sha256": sharded.digest(path)}
    (folder / "manifest.json").write_text(json.dumps(manifest))


NAME = "ln_f.weight/exp_avg"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(NAME), rf"disagree about 1 tensors, {NAME} first"),
        (
            lambda t: t.update({NAME: (torch.zeros(3), None)}),
            rf"{NAME} is torch.float32 of shape \(3,\), not float32 of",
        ),
        (lambda t: t.update({NAME: (torch.zeros(8).half(), None)}), rf"{NAME} is torch.float16 of shape \(8,\), not"),
        (lambda t: t.update({NAME: (torch.zeros(4), [4])}), rf"{NAME} has 4 of the 8 numbers in \(8,\)"),
        (lambda t: t.update({NAME: (torch.zeros(8), ["x"])}), "does not hold the shards of a checkpoint"),
    ],
    ids=["missing", "shape", "dtype", "hole", "offset"],
)
def test_shards_that_do_not_fit_are_refused(saved, change, message):
    saved.save(1, needed=True)
    path = saved.folder / "checkpoints/step-00000001"
    rewritten(path, change)
    with pytest.raises(ValueError, match=message):
        state.read(Checkpoint(path, 1), SMALL)


def test_a_file_that_no_manifest_names_is_not_read(saved):
    saved.save(1, needed=True)
    path = saved.folder / "checkpoints/step-00000001"
    sharded.write_shards({"more": (torch.zeros(2), None)}, path / "shards/more.safetensors")
    with pytest.raises(ValueError, match=r"its manifest disagree about more.safetensors"):
        state.read(Checkpoint(path, 1), SMALL)


def test_numbers_that_are_not_finite_are_refused(saved, alone):
    saved.save(1, needed=True)
    path = saved.folder / "checkpoints/step-00000001"
    rewritten(path, lambda t: t[NAME][0].fill_(torch.nan))
    with pytest.raises(ValueError, match=f"{NAME} is not finite"):
        state.restore(state.read(Checkpoint(path, 1), SMALL), saved.model, saved.optimizer, alone, saved.saver.group)


def test_every_tensor_is_written_by_one_process_and_each_writes_its_part():
    tensors = GPT(GPTConfig(**ranks.MODEL)).state_dict()
    shares = [sharded.own_share(tensors, rank, 3) for rank in range(3)]
    assert sorted(name for share in shares for name in share) == sorted(tensors)
    bytes_ = [state.size(share.values()) for share in shares]
    largest = max(state.size([tensor]) for tensor in tensors.values())
    assert max(bytes_) - min(bytes_) <= largest


def test_a_head_that_is_spread_over_processes_is_refused_by_name(alone):
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    weight = distribute_tensor(torch.randn(11, 8), init_device_mesh("cpu", (1,)), [Shard(0)])
    with pytest.raises(TypeError, match=r"weight is a DTensor of shape \(11, 8\) over processes; call the model that"):
        ops.linear_cross_entropy(torch.randn(4, 8), weight, torch.arange(4))
    ops.linear_cross_entropy(torch.randn(4, 8), weight.full_tensor(), torch.arange(4))


needs_fork = pytest.mark.skipif(sys.platform == "win32", reason="Windows can't fork")


def kill_while_saving(folder, layout, draw):
    """Kill two processes, one a little after the other, at a random moment of a series of saves; all that they told."""
    told, tell = multiprocessing.Pipe(duplex=False)
    processes = ranks.started(2, ranks.save_on, folder, layout, tell)
    tell.close()
    said = [told.recv()]
    for _ in range(1 + 2 * draw.randrange(3)):  # begun, done, begun, …
        said.append(told.recv())
    if draw.random() < 0.7:  # while it writes; else while it copies and plans
        end = time.monotonic() + 20
        while not any((folder / "checkpoints").glob(".step-*")) and time.monotonic() < end:
            time.sleep(0.001)
    time.sleep(draw.random() * 0.02)
    for process in draw.sample(processes, 2):
        os.kill(process.pid, signal.SIGKILL)
        time.sleep(draw.random() * 0.02)
    for process in processes:
        process.join(60)
    with contextlib.suppress(EOFError):
        while True:
            said.append(told.recv())
    return said


@needs_fork
@pytest.mark.parametrize("kills", [3, pytest.param(60, marks=pytest.mark.slow)])
def test_kills_while_it_saves_lose_nothing(tmp_path, kills):
    """Whatever was told as done is there or a newer one is; each start finds the newest whole, to the number."""
    draw, store, caught = random.Random(2), Checkpoints(tmp_path / "checkpoints"), 0
    for number in range(kills):
        said = kill_while_saving(tmp_path, ("fsdp", "ddp")[number % 2], draw)
        assert said[0][0] == "found", said
        done = max(step for what, step in said if what in ("found", "done"))
        begun = max(step for what, step in said if what in ("found", "begun"))
        newest, passed = store.newest()
        assert not passed and (newest.step if newest else 0) in (done, begun), said
        caught += len(list(store.folder.glob(".step-*"))) > 0
        store.tidy()
    assert done >= kills // 2 and caught >= kills // 10, "it got on, and kills came while it wrote"


@needs_fork
@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells the peak of a process's memory, and forgets it")
@pytest.mark.parametrize("layout", ["fsdp", "ddp"])
def test_a_save_takes_a_copy_of_the_shards_and_no_more(tmp_path, layout):
    """Of resident memory, all that a save takes at its peak, against what a process writes."""
    told, tell = multiprocessing.Pipe(duplex=False)
    processes = ranks.started(2, ranks.measure_save, tmp_path, layout, tell)
    tell.close()
    for process in processes:
        process.join(240)
        assert process.exitcode == 0
    for _ in processes:
        rank, taken, own = told.recv()
        assert 0.7 * own < taken <= 1.1 * own, (rank, taken / own)
