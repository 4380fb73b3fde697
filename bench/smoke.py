"""Every function of the catalogue once, at small shapes, timed by nobody: what a sanitizer is run over."""

import argparse

from bench.cases import SUBJECT
from bench.catalogue import small
from bench.machine import Machine

_REPEATS = (
    "generate",
    "block fwd+bwd",
    "linear + GELU",
    "dgrad + dGELU",
)  # kernels that the training step launches too


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dry-run", action="store_true", help="in Triton's interpreter")


def main(options: argparse.Namespace) -> int:
    """Call fastgpt's variant of every small case."""
    machine = Machine.of("dry" if options.dry_run else "cuda")
    for case in small(machine):
        if case.op in _REPEATS:
            continue
        with machine.clock.session():
            case.variants[SUBJECT](case.problem()).run()
            machine.cuda.synchronize()
        print(case.name, flush=True)
    return 0
