"""Every function of the catalogue once, at small shapes, timed by nobody: what a sanitizer is run over."""

import argparse

from bench.case import SUBJECT
from bench.catalogue import small
from bench.machine import Machine

# What ends so launches no kernel that the others do not; the last two are other families' models.
_REPEATS = ("block fwd+bwd", ": forward", ": training step")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dry-run", action="store_true", help="in Triton's interpreter")


def main(options: argparse.Namespace) -> int:
    """Call fastgpt's variant of every small case."""
    machine = Machine.of("dry" if options.dry_run else "cuda")
    for case in small(machine):
        if case.op.endswith(_REPEATS):
            continue
        with machine.clock.session():
            problem = case.problem()
            case.variants[SUBJECT](problem).run()
            machine.cuda.synchronize()
        print(case.name, flush=True)
    return 0
