"""`fastgpt` as torchrun starts it in test_elastic.py: each process takes no step that the test has not allowed it.

Its first argument is a folder: `allowed` there holds the last step of rank 0 and of rank 1, and each process writes its
id and its world's size into `pid.RANK`.
"""

import os
import sys
import time
from pathlib import Path

import torch

from fastgpt import cli
from fastgpt.training import monitor
from fastgpt.training.run import Run


def main() -> int:
    folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    torch.set_num_threads(1)
    monitor.plot_losses = lambda rows, path: None
    step = Run.step

    def allowed(self):
        said = folder / f"pid.{rank}"
        said.with_suffix(".new").write_text(f"{os.getpid()} {self.world.size}")
        os.replace(said.with_suffix(".new"), said)
        while self.steps_done >= int((folder / "allowed").read_text().split()[rank]) and not self.signals.got:
            time.sleep(0.02)
        return step(self)

    Run.step = allowed
    return cli.main(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
