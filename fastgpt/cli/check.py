"""The commands that look: `fastgpt verify` at what this machine computes, `fastgpt doctor` at the machine."""

import argparse
from pathlib import Path
from typing import Any

import torch

from fastgpt.data.tokenizer import encoding
from fastgpt.doctor import examine
from fastgpt.training.distributed import device_named
from fastgpt.training.monitor import in_a_line
from fastgpt.verify import TOLERANCE, load, random_ids, verify_functions, verify_model


def add_verify(commands: Any) -> None:
    check = commands.add_parser("verify", help="compare with float64 what this machine computes", allow_abbrev=False)
    check.set_defaults(run=_verify)
    model = "a folder, or MODULE:FACTORY, whose call makes the model to accelerate (default: fastgpt's own functions)"
    check.add_argument("source", nargs="?", metavar="MODEL", help=model)
    check.add_argument("--text", metavar="FILE", help="a text to read (default: random tokens)")
    check.add_argument("--encoding", default="gpt2", help="of the text (default: gpt2)")
    check.add_argument("--rows", type=int, default=2, metavar="N", help="sequences (default: 2)")
    check.add_argument("--tokens", type=int, default=33, metavar="N", help="tokens of each (default: 33)")
    check.add_argument("--seed", type=int, default=0, help="of the random tokens")
    check.add_argument("--device", default="auto", help="cpu, cuda, … (default: cuda where there is one)")
    check.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="(default: the model's)")
    check.add_argument("--tolerance", type=float, default=TOLERANCE, help=f"the largest ratio (default: {TOLERANCE:g})")


def add_doctor(commands: Any) -> None:
    health = commands.add_parser("doctor", help="what this machine runs, why, and what to mend", allow_abbrev=False)
    health.set_defaults(run=_doctor)
    health.add_argument("--json", action="store_true", help="for a program to read")


def _verify(options: argparse.Namespace) -> int:
    """0 if the model, or fastgpt.ops, passes; 1 if not."""
    if options.source is None:
        if options.text or options.dtype:
            raise ValueError("--text and --dtype are of a MODEL, and none was given")
        found = verify_functions(options.device, tolerance=options.tolerance, write=_at_once)
        print(found.verdict)
        return int(not found.passed)
    device = device_named(options.device)
    try:
        model = load(options.source)
    except (ValueError, OSError):
        raise
    except Exception as error:  # of a factory that is not ours; 1 is the exit code of a model that does not pass
        raise ValueError(f"{options.source} makes no model: {in_a_line(error)}") from error
    model.to(device, None if options.dtype is None else getattr(torch, options.dtype))
    ids = random_ids(model, options.rows, options.tokens, options.seed)
    if options.text is not None:
        written = Path(options.text).read_text("utf-8-sig")
        tokens = encoding(options.encoding).encode(written, disallowed_special=())
        if len(tokens) < ids.numel():
            raise ValueError(f"{options.text} holds {len(tokens)} tokens, fewer than the {ids.numel()} to compare")
        ids = torch.tensor(tokens[: ids.numel()], dtype=torch.int64, device=device).view_as(ids)
    found = verify_model(model, ids, tolerance=options.tolerance, write=_at_once)
    print(found)
    return 0 if found.passed else 1


def _at_once(text: str) -> None:
    print(text, end="", flush=True)


def _doctor(options) -> int:
    diagnosis = examine()
    print(diagnosis.json() if options.json else diagnosis)
    return int(not diagnosis.healthy)
