"""The command `fastgpt`: main, which alone is public, and the parser that the other files add their commands to.

Errors a person can mend are one line and exit code 2; Ctrl-C is 130.
"""

import argparse
import contextlib
import io
import os
import sys

import fastgpt
from fastgpt.cli import check, convert, text, train
from fastgpt.fields import nearest

COMMANDS = ("train", "tokenize", "generate", "eval", "convert", "verify", "doctor")


def main(arguments: list[str] | None = None) -> int:
    given = [_underscored(each) for each in (sys.argv[1:] if arguments is None else arguments)]
    parser = _parser()
    if not given:
        parser.print_help()
        return 0
    if not given[0].startswith("-") and given[0] not in COMMANDS:
        parser.error(f"there is no command {given[0]!r}{nearest(given[0], COMMANDS)}")
    options = parser.parse_args(given)
    if isinstance(sys.stdout, io.TextIOWrapper):  # what a terminal can't show must not end the text
        sys.stdout.reconfigure(errors="replace")
    try:
        return options.run(options) or 0
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output went away, as `head` does
        with contextlib.suppress(OSError):  # what is left to write goes nowhere, or the exit would fail on it
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141 if options.command == "train" else 0  # which is then not done
    except (ValueError, OSError, FloatingPointError) as error:
        said = str(error).removeprefix(f"{options.command}: ")  # a function of the command's name says it too
        print(f"fastgpt {options.command}: {said}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        said = str(error)  # PyTorch has no class of its own for a CPU that is out of memory
        if isinstance(error, RuntimeError) and "out of memory" not in said and "allocate memory" not in said:
            raise
        print(f"fastgpt {options.command}: {said.splitlines()[0] if said else 'out of memory'}", file=sys.stderr)
        return 2


def _underscored(argument: str) -> str:
    """--batch-size is --batch_size."""
    name, equals, value = argument.partition("=")
    return name.replace("-", "_").replace("__", "--", 1) + equals + value if name.startswith("--") else argument


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        """One line, without the usage above it."""
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")

    def parse_known_args(self, args=None, namespace=None):
        """Unknown ones are an error of the command that they were given to, and not of `fastgpt`."""
        options, unknown = super().parse_known_args(args, namespace)
        if unknown:
            name = unknown[0].partition("=")[0]
            option = f"there is no option {name!r}{nearest(name, self._option_string_actions)}"
            self.error(option if name.startswith("-") else f"{name!r} is one word too many")
        return options, unknown


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="fastgpt",
        description="Train, run, evaluate, convert and verify GPTs; examine a machine.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"fastgpt {fastgpt.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar=" | ".join(COMMANDS))
    train.add(commands)
    convert.add_tokenize(commands)
    text.add_generate(commands)
    text.add_eval(commands)
    convert.add_convert(commands)
    check.add_verify(commands)
    check.add_doctor(commands)
    return parser
