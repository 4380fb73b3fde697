"""Processes that train together on this machine, as torchrun starts them; forked from one that has imported torch."""

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
import torch.distributed.fsdp

from fastgpt import GPTConfig, cli, training
from fastgpt.data.tokenizer import encoding
from fastgpt.training import distributed, monitor, sharded
from fastgpt.training.run import Run
from fastgpt.training.settings import TrainConfig

MODEL = dict(vocab_size=257, block_size=16, n_layer=2, n_head=2, n_embd=16)
SHORT = dict(max_iters=6, batch_size=2, gradient_accumulation_steps=4, eval_interval=3, eval_iters=3, log_interval=2)


assert sharded  # and torch's FSDP: imported once, before processes are forked
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
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.training.ranks"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    given = text, out, fault, resume, {**MODEL, **(model or {})}, {**SHORT, **changes}
    processes = [context.Process(target=_rank, args=(rank, size, port, *given)) for rank in range(size)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        if process.is_alive():
            process.kill()
            process.join()
            raise AssertionError("a process hangs")
    return [process.exitcode for process in processes]


def said(out: Path, rank: int) -> str:
    return out.with_name(f"{out.name}.{rank}").read_text()


def _rank(rank, size, port, text, out, fault, resume, model, changes) -> None:
    sys.stdout = sys.stderr = open(out.with_name(f"{out.name}.{rank}"), "w", buffering=1)  # noqa: SIM115
    torch.set_num_threads(1)
    if size > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
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
