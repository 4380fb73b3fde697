"""Every launch of a training step, with no GPU: PyTorch's operators and fastgpt's kernels with their bytes, flops and
floors, for each way to train that `python -m bench steps` measures; and what the step should take by them.

The step runs on a card that isn't there (bench.gates.feign): nothing is computed, shapes, dtypes and autocast are as on
an H100. So an extra cast, copy or transpose shows here before anybody has measured it, and a test holds the lists.
"""

import argparse
import dataclasses
import importlib.metadata
import json
from pathlib import Path

import torch
import triton

from bench.launches import predict, show
from bench.launches.rows import Line, accounts, names
from fastgpt.model import GPTConfig

KEPT = Path(__file__).parent.parent / "results" / "launches"
LINES, PAGE = "launches.json", "launches.md"
CONFIG, BATCH = GPTConfig.preset("gpt2-124M"), 32
COMMAND = "python -m bench launches --keep"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--row", metavar="WORDS", help="the whole list of the rows whose names hold WORDS")
    parser.add_argument("--tflops", type=float, default=predict.RATES[0] / 1e12, help="of bfloat16 matmuls, a second")
    parser.add_argument("--terabytes", type=float, default=predict.RATES[1] / 1e12, help="of memory, a second")
    parser.add_argument("--keep", action="store_true", help=f"write {LINES} and {PAGE} to bench/results/launches")


def main(options: argparse.Namespace) -> int:
    """1 if a row could not be recorded, for a package of its is not installed."""
    for name in ("tflops", "terabytes"):
        if not 0 < getattr(options, name) < float("inf"):
            raise ValueError(f"--{name} is {getattr(options, name)}, not above 0")
    rates = options.tflops * 1e12, options.terabytes * 1e12
    wanted = [name for name in names() if options.row is None or options.row in name]
    if not wanted:
        raise ValueError(f"no row's name holds {options.row!r}; there are: {'; '.join(names())}")
    if options.row is not None and options.keep:
        raise ValueError("--keep writes all rows; leave --row out")
    found: dict[str, list[Line]] = {}
    missing: dict[str, str] = {}
    for name, lines in accounts(wanted, CONFIG, BATCH):
        if isinstance(lines, str):
            missing[name] = lines
            print(f"{name}: {lines}", flush=True)
            continue
        found[name] = lines
        if options.row is not None:
            print(f"{name}\n{show.aligned(show.launches(lines, rates), 0, 4)}\n", flush=True)
    print(conditions(), show.aligned(show.parts(found, rates)), show.aligned(show.rows(found, rates)), sep="\n\n")
    if options.keep:
        write(found, missing, KEPT)
    return int(bool(missing))


def versions() -> dict[str, str]:
    return {
        "torch": torch.__version__.partition("+")[0],
        "triton": triton.__version__,
        "transformers": importlib.metadata.version("transformers"),
    }


def conditions() -> str:
    known = ", ".join(f"{name} {version}" for name, version in versions().items())
    return (
        f"GPT-2 124M, B = {BATCH}, T = {CONFIG.block_size}, dropout 0; float32 weights under autocast in bfloat16, but "
        f"for the row that says otherwise; clipping at 1.0, fused AdamW. Recorded by `{COMMAND}`, without a GPU, as on "
        f"compute capability 9.0, with {known}."
    )


def write(found: dict[str, list[Line]], missing: dict[str, str], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rows = ",\n".join(
        f"{json.dumps(name)}: [\n" + ",\n".join(json.dumps(dataclasses.astuple(line)) for line in lines) + "\n]"
        for name, lines in found.items()
    )
    fields = json.dumps([field.name for field in dataclasses.fields(Line)])
    head = f'"versions": {json.dumps(versions())},\n"fields": {fields}'
    (folder / LINES).write_text(f'{{\n{head},\n"rows": {{\n{rows}\n}}\n}}\n')
    (folder / PAGE).write_text(show.page(found, missing, conditions()))


def kept(folder: Path = KEPT) -> tuple[dict[str, str], dict[str, list[Line]]]:
    """The versions, and each row's lines, of the committed account."""
    record = json.loads((folder / LINES).read_text())
    return record["versions"], {name: [Line(*line) for line in lines] for name, lines in record["rows"].items()}
