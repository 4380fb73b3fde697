"""Processes that train together on this machine, as torchrun starts them; forked from one that has imported torch."""

import dataclasses
import datetime
import gc
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
import torch._dynamo  # as every optimizer does at its first step: imported once, before processes are forked
import torch.distributed.fsdp

from fastgpt import GPT, GPTConfig, cli, training
from fastgpt.data.tokenizer import encoding
from fastgpt.training import distributed, monitor, sharded, state
from fastgpt.training.checkpoint import Checkpoints
from fastgpt.training.optimizer import adamw
from fastgpt.training.run import Run
from fastgpt.training.saving import BackgroundSaver
from fastgpt.training.settings import TrainConfig

MODEL = dict(vocab_size=257, block_size=16, n_layer=2, n_head=2, n_embd=16)
SHORT = dict(max_iters=6, batch_size=2, gradient_accumulation_steps=4, eval_interval=3, eval_iters=3, log_interval=2)


CRASHES = {-signal.SIGSEGV, -signal.SIGABRT}


def launch(size: int, text: Path, out: Path, fault: str = "", resume: bool = False, model=None, **changes) -> list[int]:
    """Their exit codes; what each printed is in out.rank. `fault` is one of those below.

    A thread of gloo's (pt_gloo_runloop) crashes in one of some hundred launches, on PyTorch 2.13: once more, then.
    """
    given = size, text, out, fault, resume, model, changes
    with tempfile.TemporaryDirectory() as kept:
        if out.exists():
            shutil.copytree(out, kept, dirs_exist_ok=True)
        codes = _launch(*given)
        if not CRASHES & set(codes):
            return codes
        warnings.warn(f"{codes}: launched once more", stacklevel=2)
        shutil.rmtree(out, ignore_errors=True)
        if os.listdir(kept):
            shutil.copytree(kept, out)
    return _launch(*given)


def _launch(size, text, out, fault, resume, model, changes) -> list[int]:
    given = text, out, fault, resume, {**MODEL, **(model or {})}, {**SHORT, **changes}
    processes = started(size, _rank, *given)
    for process in processes:
        process.join(120)
        if process.is_alive():
            process.kill()
            process.join()
            raise AssertionError("a process hangs")
    return [process.exitcode for process in processes]


def started(size, act, *given) -> list:
    """Processes that run act(rank, size, port, *given), with a port for them to meet at."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.training.ranks"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [context.Process(target=act, args=(rank, size, port, *given)) for rank in range(size)]
    for process in processes:
        process.start()
    return processes


def said(out: Path, rank: int) -> str:
    return out.with_name(f"{out.name}.{rank}").read_text()


def _rank(rank, size, port, text, out, fault, resume, model, changes) -> None:
    sys.stdout = sys.stderr = open(out.with_name(f"{out.name}.{rank}"), "w", buffering=1)  # noqa: SIM115
    torch.set_num_threads(1)
    _as_torchrun_starts(rank, size, port)
    monitor.plot_losses = lambda rows, path: None
    if fault:
        FAULTS[fault](rank)
    config = TrainConfig(**{"device": "cpu", "sample_tokens": 0, **changes})

    def fit(options):
        training.fit(GPTConfig(**model), config, encoding("byte"), text, out, resume=resume)

    cli.train.run = fit
    try:
        code = cli.main(["train"])
    except SystemExit as end:
        code = end.code
    os._exit(code)


def _at_step(done: int, act) -> None:
    """In this process, act(run) before the step after `done` steps."""
    step = Run.step

    def acting(self):
        if self.steps_done == done:
            act(self)
        return step(self)

    Run.step = acting


def _die(rank):
    """Rank 1 is killed in step 5, once what was saved after step 3 is on the disk."""

    def die(run):
        run.saver.wait()
        os.kill(os.getpid(), signal.SIGKILL)

    if rank == 1:
        _at_step(4, die)


def _terminate(rank):
    if rank == 1:
        _at_step(1, lambda run: signal.raise_signal(signal.SIGTERM))


def _nan(rank):
    """Rank 1's loss of step 3, from its last block on."""

    def spoil(run):
        block = run.model.h[1].mlp
        block.register_forward_hook(lambda module, inputs, output: output * torch.nan if module.training else None)

    if rank == 1:
        _at_step(2, spoil)


def _stall(rank):
    """Rank 1 sleeps before step 3, longer than a step may take."""
    distributed.STALL = 1.0
    sys.__stderr__ = sys.stderr
    if rank == 1:
        _at_step(2, lambda run: time.sleep(3))


def _spoil_samples(rank):
    def sample(*arguments):
        raise KeyError(300)

    monitor.sample = sample


FAULTS = {
    "death of one": _die,
    "SIGTERM to one": _terminate,
    "NaN on one": _nan,
    "one that stalls": _stall,
    "samples that fail": _spoil_samples,
}


def _as_torchrun_starts(rank, size, port) -> None:
    if size > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))


def model_and_moments(config):
    """A model, and AdamW after a step."""
    model = GPT(config)
    return model, _stepped(model)


def _stepped(model):
    optimizer = adamw(model, 0.0)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return optimizer


@torch.no_grad()
def fill(model, optimizer, number) -> None:
    for tensor in (*model.parameters(), *state.moments_of(model, optimizer).values()):
        distributed.local_part(tensor).fill_(number)


def saver(world, folder, say):
    timeout = datetime.timedelta(seconds=60)
    return BackgroundSaver(Checkpoints(folder / "checkpoints"), folder, world, say, timeout=timeout)


def facts(config, step) -> dict:
    shape = dataclasses.asdict(config)
    kept = dict(step=step, windows=step, model=shape, rows=[], versions={}, encoding="byte", train={}, data={})
    return kept


def _laid_out(config, layout, rank, size, port):
    torch.set_num_threads(1)
    _as_torchrun_starts(rank, size, port)
    world, model = distributed.join("cpu"), GPT(config)
    if layout == "fsdp":
        distributed.shard(model, world)
    return world, model, _stepped(model)


def save_on(rank, size, port, folder, layout, tell) -> None:
    """Go on from the newest checkpoint, whose numbers must all be those of its step, and save until it is killed. Tells
    of (found, step), then of (begun, step) and (done, step)."""
    config = GPTConfig(**{**MODEL, "n_embd": 128})  # 5 MB, so that most of a save is writing
    world, model, optimizer = _laid_out(config, layout, rank, size, port)
    keeper, step = saver(world, folder, print), 0
    newest, passed = keeper.checkpoints.newest()
    assert not passed, passed
    if newest is not None:
        step = newest.step
        state.restore(state.read(newest, config), model, optimizer, world, keeper.group)
        for tensor in (*model.parameters(), *state.moments_of(model, optimizer).values()):
            assert (distributed.local_part(tensor) == step).all(), step
    tensors = world.agree(1)
    if rank == 0:
        tell.send(("found", step))
    while tensors:
        step += 1
        fill(model, optimizer, step)
        if rank == 0:
            tell.send(("begun", step))
        keeper.save(model, optimizer, facts(config, step), needed=False)
        keeper.wait()
        if rank == 0:
            tell.send(("done", step))


def measure_save(rank, size, port, folder, layout, tell) -> None:
    """Tells of (rank, bytes of memory that a save took at its peak, bytes of the shards that it wrote)."""
    first = GPTConfig(**MODEL)
    world, model, optimizer = _laid_out(first, layout, rank, size, port)
    keeper = saver(world, folder, print)  # once for all that is imported and started then
    keeper.save(model, optimizer, facts(first, 1), needed=True)
    large = GPTConfig(vocab_size=257, block_size=16, n_layer=12, n_head=2, n_embd=384)
    model = GPT(large)
    if layout == "fsdp":
        distributed.shard(model, world)
    optimizer = _stepped(model)
    own = sharded.own_share({**model.state_dict(), **state.moments_of(model, optimizer)}, rank, size)
    bytes_ = sum(distributed.local_part(t).numel() * t.element_size() for t in own.values())
    keeper = saver(world, folder, print)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    keeper.save(model, optimizer, facts(large, 2), needed=True)
    tell.send((rank, _status("VmHWM") - before, bytes_))
    distributed.leave(world)


def _status(what: str) -> int:
    """Bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{what}:"))
