"""Every function of the catalogue once, at small shapes, timed by nobody: what a sanitizer is run over.

Then, on a card of compute capability 9.0, every form of Hopper's own kernels, which small shapes would not choose:
`compute-sanitizer --tool racecheck python -m bench smoke --hopper` is them alone.
"""

import argparse

import torch

from bench.case import SUBJECT
from bench.catalogue import small
from bench.machine import Machine

# What ends so launches no kernel that the others do not; the last two are other families' models.
_REPEATS = ("block fwd+bwd", ": forward", ": training step")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dry-run", action="store_true", help="in Triton's interpreter")
    parser.add_argument("--hopper", action="store_true", help="Hopper's own kernels alone")


def main(options: argparse.Namespace) -> int:
    """Call fastgpt's variant of every small case, and Hopper's own kernels; 1 if they alone were asked for and this is
    no card for them."""
    if options.hopper:
        return int(hoppers() == 0)
    machine = Machine.of("dry" if options.dry_run else "cuda")
    for case in small(machine):
        if case.op.endswith(_REPEATS):
            continue
        with machine.clock.session():
            problem = case.problem()
            case.variants[SUBJECT](problem).run()
            machine.cuda.synchronize()
        print(case.name, flush=True)
    if not options.dry_run:
        hoppers()
    return 0


def hoppers() -> int:
    """How many forms were launched."""
    from bench.gates.ways import ways  # needs a Triton

    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        print("Hopper's own kernels: none on this card", flush=True)
        return 0
    found = {name: way for name, way in ways().items() if name.startswith("Hopper's")}
    for name, way in found.items():
        way.run(way.prepare())
        torch.cuda.synchronize()
        print(name, flush=True)
    return len(found)
