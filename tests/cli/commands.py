"""Commands in this process and in one of their own."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import fastgpt
from fastgpt import cli

ROOT = Path(fastgpt.__file__).parents[1]

TINY = ["--preset=byte-0.1M", "--block_size=16", "--n_layer=1", "--n_embd=16", "--device=cpu"]
TINY += ["--batch_size=4", "--max_iters=3", "--eval_iters=2"]


def start(*arguments):
    """`python -m fastgpt` with these arguments, as a shell starts it in the foreground."""
    return subprocess.Popen(
        [sys.executable, "-m", "fastgpt", *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=None if os.name == "nt" else lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def finish(process):
    """Exit code, standard output, standard error."""
    out, err = process.communicate(timeout=120)
    return process.returncode, out.decode(), err.decode()


def main(capsys, *arguments):
    capsys.readouterr()
    try:
        code = cli.main(list(arguments))
    except SystemExit as exit:  # argparse's
        code = exit.code
    return code, *capsys.readouterr()
