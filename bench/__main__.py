"""What fastgpt is measured with: `python -m bench COMMAND`; the benchmarks themselves are `pytest bench/`."""

import argparse
import importlib
import sys
from types import ModuleType

# A command is a module with add_arguments(parser) and main(options) -> exit code, imported when it is asked for.
COMMANDS = {
    "compile": "registers, spills, shared memory and matrix instructions of every kernel, with no GPU",
    "bytes": "flops, bytes and floor of every part of a training step",
    "launches": "every launch of a training step with its bytes, flops and floor, for each way to train, with no GPU",
    "tokens": "every launch of one token with its bytes, flops and floor, for each way of generation, with no GPU",
    "roofs": "what this machine is, and the copy and matmul rates it reaches",
    "tune": "search tiles for each kernel and propose rows",
    "profile": "the kernels of one training step: time, share, floor",
    "loop": "what the trainer's loop adds to a bare step",
    "steps": "whole training steps as people run them: theirs eager, compiled, accelerated, and fastgpt's",
    "pairs": "two ways to train on a CPU in turns until their ratio is known, with what is promised of it",
    "muon": "Muon beside AdamW, a small GPT trained with each in turns: loss by steps and by seconds",
    "fp8-loss": "what matmuls of 8-bit floats cost in loss, a small GPT over many seeds, with its standard error",
    "smoke": "every kernel once at small shapes",
    "sanitize": "the same under NVIDIA's compute-sanitizer",
    "gpu-day": "all that a GPU should tell, in a few minutes, in one folder and one archive",
    "report": "tables and plots of measured rows",
    "history": "how fastgpt stood over time, and where it fell back",
    "window": "how the time and memory of attention in a window grow with the tokens, on a CPU",
    "sent": "what a few processes here send and hold in a training step, against the plan's arithmetic",
    "plan": "what a training step on many GPUs would take: time, memory and what bounds it, on paper",
}
MODULES = {
    "compile": "gates.compile",
    "sanitize": "gates.sanitize",
    "bytes": "work",
    "roofs": "machine",
    "pairs": "steps.pairs",
    "gpu-day": "gpu_day",
    "fp8-loss": "fp8_loss",
}


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text)
        if arguments[:1] == [name]:
            module = _module(name)
            module.add_arguments(command)
            command.set_defaults(main=module.main)
    options = parser.parse_args(arguments)
    try:
        return options.main(options)
    except (OSError, ValueError) as error:
        print(f"python -m bench {options.command}: {error}", file=sys.stderr)
        return 2


def _module(command: str) -> ModuleType:
    """The module of a command; where it needs Triton and there is none, a line says so and the process ends with 2."""
    try:
        return importlib.import_module("bench." + MODULES.get(command, command))
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "triton":
            raise
        print(f"python -m bench {command}: needs Triton, which is not installed: pip install triton", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    sys.exit(main())
