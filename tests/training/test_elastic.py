"""torchrun's elastic way, on one machine: a process comes, one is killed, one stalls, and the run is what it would have
been."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

import fastgpt
from tests.training.ranks import launch

ROOT = Path(fastgpt.__file__).parents[1]
pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform == "win32", reason="Windows can't stop a process")]
STEPS = 12


class Nodes:
    """torchrun's agents, each with one process that trains."""

    def __init__(self, folder, text):
        self.folder, self.out, self.agents = folder, folder / "out", []
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.train = ["train", "--data", text, "--out", self.out, "--resume", "--device", "cpu", "--sample_tokens", "0"]
        self.train += ["--preset", "byte-0.1M", "--block_size", "16", "--n_layer", "1", "--n_embd", "16"]
        self.train += ["--batch_size", "2", "--gradient_accumulation_steps", "4", "--max_iters", str(STEPS)]
        self.train += ["--eval_interval", "1", "--eval_iters", "2", "--timeout", "10"]

    def add(self):
        elastic = ["--nnodes", "1:2", "--nproc-per-node", "1", "--max-restarts", "3", "--rdzv-backend", "c10d"]
        elastic += [
            "--rdzv-endpoint",
            f"127.0.0.1:{self.port}",
            "--rdzv-id",
            "run",
            "--rdzv-conf",
            "last_call_timeout=1",
        ]
        command = [sys.executable, "-m", "torch.distributed.run", *elastic, "-m", "tests.training.elastic"]
        log = (self.folder / f"agent.{len(self.agents)}").open("w")
        # Without it PyTorch 2.13's first node tells one that comes later no address, and both wait until they fail.
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        command += [str(word) for word in (self.folder, *self.train)]
        self.agents.append(subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, env=environment))

    def allow(self, first, second):
        """Steps to the given one in rank 0 and in rank 1."""
        (self.folder / "new").write_text(f"{first} {second}")
        os.replace(self.folder / "new", self.folder / "allowed")

    def until(self, what, condition):
        end = time.monotonic() + 120
        while not condition():
            assert time.monotonic() < end, (what, *(path.read_text()[-3000:] for path in self.folder.glob("agent.*")))
            time.sleep(0.05)

    def saved(self, step):
        self.until(f"step {step} is saved", (self.out / f"checkpoints/step-{step:08d}").is_dir)

    def pid(self, rank, size, other_than=0):
        """Of that rank's process, once it is one of `size`."""
        file, found = self.folder / f"pid.{rank}", []

        def there():
            found[:] = [int(word) for word in file.read_text().split()] if file.exists() else []
            return found[1:] == [size] and found[0] != other_than

        self.until(f"rank {rank} of {size}", there)
        return found[0]

    def stop(self):
        for agent in self.agents:
            agent.terminate()
        for agent in self.agents:
            try:
                agent.wait(40)
            except subprocess.TimeoutExpired:
                agent.kill()


@pytest.fixture
def nodes(tmp_path):
    (tmp_path / "fox.txt").write_text("the quick brown fox jumps over the lazy dog. " * 50)
    found = Nodes(tmp_path, tmp_path / "fox.txt")
    yield found
    found.stop()


def rows(out):
    return json.loads((out / f"checkpoints/step-{STEPS:08d}/state.json").read_text())["rows"]


def test_one_comes_one_is_killed_one_stalls(nodes, tmp_path):
    nodes.allow(3, 3)
    nodes.add()
    nodes.pid(0, 1)
    nodes.saved(3)
    nodes.add()
    nodes.pid(1, 2)
    nodes.allow(6, 6)
    nodes.saved(6)
    killed, waits = nodes.pid(1, 2), nodes.pid(0, 2)
    nodes.allow(7, 6)  # rank 0 waits in the middle of step 7
    time.sleep(0.3)
    os.kill(killed, signal.SIGKILL)
    nodes.pid(1, 2, other_than=killed)
    nodes.allow(9, 9)
    nodes.saved(9)
    stalled, waits = nodes.pid(1, 2), nodes.pid(0, 2)
    nodes.allow(10, 9)
    os.kill(stalled, signal.SIGSTOP)
    nodes.until("rank 0 gives up", lambda: not Path(f"/proc/{waits}").exists())
    os.kill(stalled, signal.SIGCONT)
    nodes.pid(1, 2, other_than=stalled)
    nodes.allow(STEPS, STEPS)
    nodes.saved(STEPS)
    assert [agent.wait(60) for agent in nodes.agents] == [0, 0], (tmp_path / "agent.0").read_text()[-3000:]
    shape = dict(n_layer=1, block_size=16, n_embd=16, n_head=2)
    how = dict(batch_size=2, max_iters=STEPS, eval_interval=1, eval_iters=2, learning_rate=4e-3)
    assert launch(1, tmp_path / "fox.txt", tmp_path / "whole", model=shape, **how) == [0]
    for ours, theirs in zip(rows(nodes.out), rows(tmp_path / "whole"), strict=True):
        assert ours["step"] == theirs["step"]
        assert (ours["train_loss"], ours["val_loss"]) == pytest.approx(
            (theirs["train_loss"], theirs["val_loss"]), rel=1e-6
        )
