"""A bounded search for tiles, kernel by kernel and shape by shape, that proposes rows for each file's `_tiles`.

Trials nearest to what is shipped come first, and each kernel gets an equal part of the time. A trial is launched with
its tiles patched in, held to the result of the shipped ones, and sampled in turns with them; registers and spills are
read off the kernel that Triton compiled. Nothing is changed: a proposal is a line to be read and typed in.
"""

import argparse
import contextlib
import itertools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from triton.runtime.jit import JITFunction

from bench.case import SUBJECT, Case, Subject
from bench.catalogue import catalogue
from bench.check import judge
from bench.gates.record import afresh
from bench.machine import Machine
from bench.measure import device_is_lost
from bench.timing import interleaved
from fastgpt.kernels import attention_tiles, cross_entropy, decode, layernorm, mlp

WORTH = 1.03  # a gain below 3 % is noise's

Trial = dict[str, int]


class Tunable(NamedTuple):
    """A kernel whose tiles can be replaced: the only thing here that knows the form of its `_tiles`."""

    name: str
    kernel: str  # a part of its name
    op: str  # the cases it is timed in; "" for one of its own
    trials: dict[str, tuple[int, ...]]  # every value of each field
    shipped: Callable[[dict, Machine], Trial]  # the tiles of a case's shape
    patched: Callable[[Trial], Any]  # a context in which launches take these


def _attention(kind: str, op: str, blocks_m: tuple, blocks_n: tuple) -> Tunable:
    original = attention_tiles._tiles

    def patched(trial):
        def tiles(kernel, *arguments):
            found = original(kernel, *arguments)
            return found._replace(**trial) if kernel == kind else found

        return mock.patch.object(attention_tiles, "_tiles", tiles)

    def shipped(shape, machine):
        card = attention_tiles.card_of(torch.empty(0, device=machine.device))
        return original(kind, shape["D"], machine.dtype, card, False)._asdict()

    values = dict(block_m=blocks_m, block_n=blocks_n, num_warps=(4, 8), num_stages=(1, 2, 3, 4))
    return Tunable(f"attention {kind}", f"attention_{kind}", op, values, shipped, patched)


def _layer_norm(phase: str) -> Tunable:
    original, of_backward = layernorm._tiles, phase == "bwd"

    def patched(trial):
        def tiles(columns, dtype, backward):
            found = original(columns, dtype, backward)
            return found._replace(**trial) if backward == of_backward else found

        return mock.patch.object(layernorm, "_tiles", tiles)

    def shipped(shape, machine):
        found = original(shape["C"], machine.dtype, of_backward)._asdict()
        return {field: found[field] for field in values}

    values = dict(block_m=(1, 2, 4, 8), num_warps=(1, 2, 4, 8))
    if of_backward:
        values["stages"] = (1, 2, 3, 4)
    name = f"layer_norm_{phase}"
    return Tunable(name, name, f"add_layer_norm {phase}", values, shipped, patched)


def _decode() -> Tunable:
    original = decode._tiles

    def patched(trial):
        return mock.patch.object(decode, "_tiles", lambda *arguments: original(*arguments)._replace(**trial))

    def shipped(shape, machine):
        found = original(1, shape["D"], machine.dtype, shape["T"], machine.kind == "cuda")._asdict()
        return {field: found[field] for field in values}

    values = dict(block_n=(32, 64, 128), split=(64, 128, 256, 512), num_warps=(1, 2, 4, 8), num_stages=(1, 2, 3))
    return Tunable("decode", "_decode_kernel", "decode_attention", values, shipped, patched)


def _gelu(phase: str, op: str) -> Tunable:
    original, of_backward = mlp._tiles, phase == "bwd"

    def patched(trial):
        def tiles(rows, hidden, multiprocessors, backward):
            found = original(rows, hidden, multiprocessors, backward)
            return found._replace(**trial) if backward == of_backward else found

        return mock.patch.object(mlp, "_tiles", tiles)

    def shipped(shape, machine):
        found = original(shape["M"], shape["F"], 132 if machine.kind == "cuda" else None, of_backward)._asdict()
        return {field: found[field] for field in values}

    values = dict(block_m=(1, 2, 4, 8, 16, 32), block_f=(128, 256, 512, 1024), num_warps=(2, 4, 8))
    return Tunable(f"gelu_{phase}", f"_gelu_{phase}", op, values, shipped, patched)


def _cross_entropy() -> Tunable:
    original = cross_entropy._tiles

    def patched(trial):
        return mock.patch.object(cross_entropy, "_tiles", lambda vocab: (trial["block_v"], trial["num_warps"]))

    def shipped(shape, machine):
        block_v, num_warps = original(shape["V"])
        return dict(block_v=block_v, num_warps=num_warps)

    values = dict(block_v=(512, 1024, 2048, 4096, 8192, 16384), num_warps=(1, 2, 4, 8, 16))
    return Tunable("cross_entropy", "cross_entropy", "", values, shipped, patched)


def tunables() -> list[Tunable]:
    """Those with the largest part of a training step first."""
    return [
        _attention("dkdv", "attention bwd", (32, 64, 128), (32, 64, 128)),
        _attention("dq", "attention bwd", (32, 64, 128), (32, 64, 128)),
        _attention("fwd", "attention fwd", (64, 128), (32, 64, 128)),
        _gelu("fwd", "linear + GELU"),
        _gelu("bwd", "dgrad + dGELU"),
        _cross_entropy(),
        _layer_norm("fwd"),
        _layer_norm("bwd"),
        _decode(),
    ]


class Target(NamedTuple):
    tunable: Tunable
    shape: dict[str, int]
    subject: Callable[[], Subject]

    @property
    def name(self) -> str:
        return f"{self.tunable.name} {' '.join(f'{key} {value}' for key, value in self.shape.items())}"


def targets(machine: Machine) -> list[Target]:
    """Every kernel at the shapes of the catalogue, its sweeps apart."""
    found = []
    cases = [case for case in catalogue(machine) if case.tier <= 2]
    for tunable in tunables():
        for case in cases:
            if case.op == tunable.op:
                found.append(Target(tunable, case.shape, lambda case=case: _of_case(case)))
            elif tunable.op == "" and case.op == "linear_cross_entropy":
                rows = max(1, case.shape["M"] // 12)  # as many as a chunk has
                shape = dict(N=rows, V=case.shape["V"])
                found.append(Target(tunable, shape, lambda shape=shape: _rows_of_logits(machine, **shape)))
    return found


def _of_case(case: Case) -> Subject:
    return case.variants[SUBJECT](case.problem())


def _rows_of_logits(machine: Machine, N: int, V: int) -> Subject:
    """The pass over a chunk's logits alone. It overwrites them, which changes its time in nothing."""
    buffer = torch.randn(N, -(-V // 64) * 64, device=machine.device).to(machine.dtype)
    logits, kept = buffer[:, :V], buffer[:, :V].clone()
    targets = torch.arange(N, device=machine.device) * 7919 % V
    ones, losses = torch.ones(N, device=machine.device), torch.empty(N, device=machine.device)

    def run():
        cross_entropy.cross_entropy_rows(buffer, V, targets, ones, -100, 0.0, 0.0, losses)

    def results():
        logits.copy_(kept)
        run()
        return losses.clone(), logits.clone()

    return Subject(run, results)


def trials(tunable: Tunable, shipped: Trial) -> list[Trial]:
    """Every combination but the shipped one, those that change the fewest fields first."""
    fields = list(tunable.trials)
    every = [dict(zip(fields, values, strict=True)) for values in itertools.product(*tunable.trials.values())]
    changed = {tuple(trial.items()): sum(trial[f] != shipped[f] for f in fields) for trial in every}
    return [dict(items) for items, changes in sorted(changed.items(), key=lambda item: item[1]) if changes]


@contextlib.contextmanager
def launched(part: str) -> Iterator[list]:
    """The kernels that Triton launches meanwhile whose name contains `part`, as it compiled them."""
    kernels: list = []
    run = JITFunction.run

    def note(function, *args, **kwargs):
        kernel = run(function, *args, **kwargs)
        if part in function.__name__:
            kernels.append(kernel)
        return kernel

    with mock.patch.object(JITFunction, "run", note), afresh():
        yield kernels


def search(target: Target, machine: Machine, deadline: float, most: int, known: dict[str, dict]) -> Iterator[dict]:
    """A record of each trial. `known`: those of an earlier run, by trial, which are not tried again."""
    shipped = target.tunable.shipped(target.shape, machine)
    with machine.clock.session():
        subject = target.subject()
        results = subject.results or subject.run
        expected = [t if t is None else t.detach().clone() for t in results()]
        exact = [t if t is None else t.double() for t in expected]
        subject.run()
        current, _ = machine.clock.ready(subject.run, True)
        for trial in trials(target.tunable, shipped)[:most]:
            if json.dumps(trial) in known:
                continue
            if time.monotonic() > deadline:
                break
            record = {"target": target.name, "trial": trial, "shipped": shipped, "status": "ok"}
            try:
                record |= _try(target, machine, subject, exact, expected, current, trial)
            except Exception as error:  # too much shared memory, a compiler's crash: a trial's right
                record |= {"status": "failed", "note": f"{type(error).__name__}: {str(error).strip()[:200]}"}
                if device_is_lost(error):
                    yield record
                    raise
            yield record


def _try(target, machine, subject, exact, expected, current, trial):
    """Registers, spills, and the gain over the shipped tiles."""

    def with_its_tiles():
        with target.tunable.patched(trial):
            subject.run()

    with launched(target.tunable.kernel) as kernels, target.tunable.patched(trial):
        verdict = judge((subject.results or subject.run)(), exact, expected)
    resources = {
        "registers": max((getattr(kernel, "n_regs", 0) or 0 for kernel in kernels), default=None),
        "spills": max((getattr(kernel, "n_spills", 0) or 0 for kernel in kernels), default=None),
    }
    if verdict.reason:
        return resources | {"status": "WRONG", "note": verdict.reason}
    call, _ = machine.clock.ready(with_its_tiles, True)
    timed = interleaved({"shipped": current, "trial": call}, machine.clock, 2 * machine.seconds / 8, machine.rounds)
    medians = {name: timing.median for name, timing in timed.items()}
    return resources | {"seconds": medians["trial"], "gain": medians["shipped"] / medians["trial"]}


def proposals(records: list[dict]) -> list[dict]:
    """The best trial of each target that spills nothing and gains more than noise."""
    best: dict[str, dict] = {}
    for record in records:
        if record["status"] == "ok" and not record.get("spills") and record["gain"] >= WORTH:
            kept = best.get(record["target"])
            if kept is None or record["gain"] > kept["gain"]:
                best[record["target"]] = record
    return list(best.values())


def line(record: dict) -> str:
    tiles = " ".join(f"{field} {value}" for field, value in record["trial"].items())
    if record["status"] != "ok":
        return f"{record['target']}: {tiles}: {record['status']}: {record['note'].splitlines()[0]}"
    numbers = f"{record['gain']:.2f}x, {1e6 * record['seconds']:.1f} µs"
    return f"{record['target']}: {tiles}: {numbers}, registers {record['registers']}, spills {record['spills']}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--out", type=Path, default=Path("out/tune.jsonl"), help="a record a line; read to resume")
    parser.add_argument("--dry-run", action="store_true", help="one trial a kernel, in Triton's interpreter")


def main(options: argparse.Namespace) -> int:
    """Search within the time given; print every trial, then the rows that are worth typing in."""
    machine = Machine.of("dry" if options.dry_run else "cuda")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    records = [json.loads(text) for text in options.out.read_text().splitlines()] if options.out.exists() else []
    end = time.monotonic() + 60 * options.minutes
    left = targets(machine)
    with options.out.open("a") as file:
        while left and time.monotonic() < end:
            target = left.pop(0)
            known = {json.dumps(r["trial"]): r for r in records if r["target"] == target.name}
            deadline = time.monotonic() + (end - time.monotonic()) / (len(left) + 1)
            for record in search(target, machine, deadline, 1 if options.dry_run else 64, known):
                records.append(record)
                file.write(json.dumps(record) + "\n")
                file.flush()
                print(line(record), flush=True)
    print("\nproposed rows" if proposals(records) else "\nno row is worth changing")
    for record in proposals(records):
        print(f"{line(record)}  (shipped: {record['shipped']})")
    return 0
