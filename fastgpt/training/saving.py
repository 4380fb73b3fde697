"""Saving a run: at once where one process trains, in the background where several do."""

import datetime
import json
import shutil
import uuid
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fastgpt.model import GPT
from fastgpt.training import state
from fastgpt.training.checkpoint import Checkpoints
from fastgpt.training.distributed import SHARDS, World, whole
from fastgpt.weights import save_model, stream_model


class Saver:
    """Of one process: save returns once the checkpoint and the model in `folder` are on the disk."""

    group: Any = None  # of processes that save together

    def __init__(self, checkpoints: Checkpoints, folder: Path, world: World, say: Callable[[str], None]):
        self.checkpoints, self.folder, self.world, self.say = checkpoints, folder, world, say

    def save(self, model: GPT, optimizer: torch.optim.Optimizer, facts: dict, needed: bool) -> None:
        """A checkpoint, and the model in the folder itself. A disk that is full is told of and left for the next time,
        unless this save is `needed`: then OSError."""
        taken = state.snapshot(model, optimizer, self.world)
        try:
            self.checkpoints.save(
                facts["step"],
                lambda folder: state.write(folder, model.config, taken, facts),
                taken.size(),
                **_of_the_manifest(facts),
            )
            save_model(state.assembled(model.config, taken.weights), self.folder, facts["encoding"], **_told(facts))
        except OSError as error:
            self.failed(facts["step"], error, needed)

    def leave_model(self, model: GPT, facts: dict) -> None:
        """In the folder itself, for whoever generates from it. Every process calls it."""
        weights = whole(model.state_dict().items(), self.world.rank == 0)
        if self.world.rank == 0:
            save_model(state.assembled(model.config, weights), self.folder, facts["encoding"], **_told(facts))

    def failed(self, step: int, error: OSError, needed: bool) -> None:
        whole = self.checkpoints.all()
        newest = f"the newest checkpoint is of step {whole[-1].step}" if whole else "there is no checkpoint"
        said = f"step {step} could not be saved: {error}; {newest}"
        if needed:
            raise OSError(said) from error
        self.say(f"{said}; training goes on")

    def close(self) -> None:
        """Before the run ends, however it ends."""


class BackgroundSaver(Saver):
    """Of several processes: save returns once each has copied what it is to write, and a thread in each writes it,
    while training goes on. They agree through a group of their own, over the hosts. One save at a time; what goes wrong
    in one is raised or told by the next call here."""

    def __init__(self, *given, timeout: datetime.timedelta):
        super().__init__(*given)
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

        self.group = dist.new_group(backend="gloo", timeout=timeout)
        gpu = self.world.device.type == "cuda"
        how = StagingOptions(
            use_pinned_memory=gpu, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=gpu
        )
        self.stager = DefaultStager(how)
        self.under_way: tuple[Future, _Job] | None = None

    def save(self, model: GPT, optimizer: torch.optim.Optimizer, facts: dict, needed: bool) -> None:
        from torch.distributed.checkpoint import async_save

        from fastgpt.training.sharded import Writer, own_share

        self.wait()
        tensors = {**model.state_dict(), **state.moments_of(model, optimizer)}
        random = state.generators(self.world)
        size = state.size(tensors.values()) + state.size(model.state_dict().values())  # these once more in model/
        job = _Job(self, model, random, facts, size)
        under_way: Any = async_save(
            own_share(tensors, self.world.rank, self.world.size),
            storage_writer=Writer(job.begin, job.finish),
            process_group=self.group,
            async_stager=self.stager,
        )
        self.under_way = under_way, job
        if needed:
            self.wait(needed=True)

    def wait(self, needed: bool = False) -> None:
        """Until the save that is under way is done, and its error is told, or raised where it was `needed` or is none
        of the disk's. Every process calls it."""
        if self.under_way is None:
            return
        (future, job), self.under_way = self.under_way, None
        error = future.exception()
        if error is None:
            return
        if job.new is not None:
            shutil.rmtree(job.new, ignore_errors=True)
        failures = [found for found, _ in getattr(error, "failures", {}).values()]
        if not failures or not all(isinstance(each, OSError) for each in failures):
            raise RuntimeError(f"step {job.step} could not be saved: {error}") from error
        self.failed(job.step, failures[0], needed)

    def close(self) -> None:
        """A save that is under way ends; training may have ended by an error, which its own must not hide."""
        try:
            self.wait()
        except RuntimeError as error:
            self.say(str(error))


class _Job:
    """What rank 0 does for one checkpoint before and after all write their shards, in the background."""

    def __init__(self, saver: Saver, model: GPT, random: dict, facts: dict, size: int):
        self.saver, self.config, self.random, self.size = saver, model.config, random, size
        self.dtype = model.wte.weight.dtype
        self.step, self.told, self.in_manifest = facts["step"], _told(facts), _of_the_manifest(facts)
        self.encoding, self.text = facts["encoding"], json.dumps(facts, indent=2) + "\n"  # lists in it grow later
        self.new: Path | None = None

    def begin(self) -> Path | None:
        self.new = self.saver.checkpoints.begin(self.step, self.size, f"{uuid.uuid4().hex}.")
        if self.new is None:
            return None
        (self.new / SHARDS).mkdir()
        return self.new / SHARDS

    def finish(self, flushed: dict[str, str]) -> None:
        from fastgpt.training.sharded import Shards

        if self.new is None:
            return
        load = Shards(self.new / SHARDS).whole
        state.write_beside_shards(self.new, self.config, self.dtype, load, self.encoding, self.random, self.text)
        self.saver.checkpoints.commit(self.step, self.new, self.in_manifest, flushed)
        load = Shards(self.saver.checkpoints.of(self.step).path / SHARDS).whole
        stream_model(self.config, self.dtype, load, self.saver.folder, self.encoding, **self.told)


def _of_the_manifest(facts: dict) -> dict:
    return {"val_loss": _val_loss(facts), "versions": facts["versions"]}


def _val_loss(facts: dict) -> float | None:
    """Of these weights; None where they were not evaluated."""
    last = facts["rows"][-1] if facts["rows"] else {}
    return last.get("val_loss") if last.get("step") == facts["step"] else None


def _told(facts: dict) -> dict:
    """What stands in the model's config.json beside its shape."""
    return {"step": facts["step"], "val_loss": _val_loss(facts), "train": facts["train"], "data": facts["data"]}
