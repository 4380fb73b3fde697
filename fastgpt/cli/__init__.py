"""The command `fastgpt`. Errors a person can mend are one line and exit code 2; Ctrl-C is 130."""

import argparse
import dataclasses
import io
import os
import sys
import types
import typing
from pathlib import Path

import tiktoken
import torch

from fastgpt import memory
from fastgpt.cli import text
from fastgpt.data.corpora import holds_tokens
from fastgpt.data.tokenizer import Named, Unavailable, encoding, is_local, named
from fastgpt.data.tokens import meta_beside, meta_of, tokenize
from fastgpt.doctor import examine
from fastgpt.families.book import VARIANTS
from fastgpt.model import PRESETS, GPTConfig, nearest
from fastgpt.training import CHECKPOINTS, fit, pretrained
from fastgpt.training.checkpoint import Checkpoints
from fastgpt.training.distributed import device_named
from fastgpt.training.monitor import in_a_line
from fastgpt.training.settings import SETTINGS, TrainConfig, read_settings
from fastgpt.verify import TOLERANCE, load, random_ids, verify_functions, verify_model
from fastgpt.weights import convert


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args([_underscored(each) for each in (sys.argv[1:] if arguments is None else arguments)])
    if isinstance(sys.stdout, io.TextIOWrapper):  # what a terminal can't show must not end the text
        sys.stdout.reconfigure(errors="replace")
    try:
        return options.run(options) or 0
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output went away, as `head` does
        sys.stderr.close()
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
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="train | tokenize | generate | eval | convert | verify | doctor"
    )

    train = commands.add_parser("train", help="train a GPT and save it", allow_abbrev=False)
    train.set_defaults(run=_train)
    train.add_argument("--data", metavar="PATH", help="a text file, a folder, or tokens (default: Python's own source)")
    train.add_argument("--out", "--out_dir", metavar="DIR", help="where the model goes (default: out)")
    train.add_argument(
        "--resume", action="store_true", help="go on from the newest checkpoint in --out, if there is one"
    )
    train.add_argument(
        "--strict_resume", action="store_true", help="never from an older one where the newest is broken"
    )
    train.add_argument("--overwrite", action="store_true", help="replace a model that is in --out already")
    train.add_argument("--config", metavar="FILE", help=f"a TOML file of options, as --out keeps them in {SETTINGS}")
    train.add_argument("--preset", help=f"one of {', '.join(PRESETS)} (default: byte-0.8M)")
    train.add_argument("--encoding", help="byte, gpt2, … (default: the data's or the preset's)")
    _add_fields(train, "the model, over its preset", GPTConfig)
    _add_fields(train, "the training", TrainConfig)

    read = commands.add_parser("tokenize", help="make files of tokens from text", allow_abbrev=False)
    read.set_defaults(run=_tokenize)
    read.add_argument("sources", nargs="+", metavar="SRC", help="a text or .jsonl file, or a folder of them")
    read.add_argument("-o", "--out", required=True, metavar="DIR", help="where train.bin, val.bin and meta.json go")
    read.add_argument("--encoding", default="gpt2", help="byte, gpt2, … (default: gpt2)")
    read.add_argument("--val_share", type=float, default=0.1, metavar="X", help="for validation (default: 0.1)")
    read.add_argument("--text_field", default="text", metavar="NAME", help="of a .jsonl line (default: text)")
    read.add_argument("--workers", type=int, metavar="N", help="threads (default: one a CPU)")
    read.add_argument("--overwrite", action="store_true", help="replace tokens that are in --out already")

    text.add_generate(commands)
    text.add_eval(commands)

    change = commands.add_parser("convert", help="carry weights from one family to another", allow_abbrev=False)
    change.set_defaults(run=_convert)
    change.add_argument("source", metavar="SRC", help="a folder or file of Hugging Face, nanoGPT, the book or fastgpt")
    change.add_argument("target", metavar="DST", help="the folder to write")
    change.add_argument("--to", required=True, choices=("huggingface", "nanogpt", "book", "fastgpt"))
    change.add_argument("--n_head", type=int, metavar="N", help="heads, where nothing in SRC says how many")
    change.add_argument("--vocab_size", type=int, metavar="N", help="crop the vocabulary, or pad it with zeros")
    change.add_argument("--gelu", choices=("tanh", "none"), help="the GELU, where it is not the family's own")
    change.add_argument("--encoding", help="for fastgpt: byte, gpt2, … (default: what the vocabulary's size tells)")
    change.add_argument("--variant", default="GPTModel", choices=VARIANTS, help="for the book (default: GPTModel)")
    change.add_argument("--overwrite", action="store_true", help="write into a folder that holds something")

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

    health = commands.add_parser("doctor", help="what this machine runs, why, and what to mend", allow_abbrev=False)
    health.set_defaults(run=_doctor)
    health.add_argument("--json", action="store_true", help="for a program to read")
    return parser


def _add_fields(parser: argparse.ArgumentParser, title: str, config: type) -> None:
    """An option for each field of a configuration; one that is not given stays out of the namespace."""
    group = parser.add_argument_group(title)
    hints = typing.get_type_hints(config)
    for field in dataclasses.fields(config):
        hint = hints[field.name]
        if isinstance(hint, types.UnionType):  # int | None
            hint = typing.get_args(hint)[0]
        choices = typing.get_args(hint) or None  # Literal
        kind = _boolean if hint is bool else hint if choices is None else str
        group.add_argument(
            f"--{field.name}",
            type=kind,
            choices=choices,
            default=argparse.SUPPRESS,
            metavar=None if choices else kind.__name__.strip("_").upper(),
            help=f"default: {field.default}",
        )


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is not true or false")
    return text.lower() == "true"


def _fields(options: dict, config: type) -> dict:
    names = [field.name for field in dataclasses.fields(config)]
    return {name: value for name, value in options.items() if name in names}


def _train(options: argparse.Namespace) -> None:
    out = options.out or "out"
    options.resume |= options.strict_resume
    if getattr(options, "init_from", None) == "resume":  # nanoGPT's way to say it
        options.resume = True
        del options.init_from
    chosen, goes_on = {}, False
    if options.resume and Path(out, SETTINGS).is_file():
        goes_on = bool(Checkpoints(Path(out, CHECKPOINTS)).all())
    if options.config is not None:
        chosen = read_settings(options.config)
    elif options.resume and Path(out, SETTINGS).is_file():  # the run's own; what is given here goes over it
        chosen = read_settings(Path(out, SETTINGS))
    chosen.update((name, value) for name, value in vars(options).items() if value is not None)
    source = chosen.get("data")
    preset = chosen.get("preset", "byte-0.8M")
    train_config = TrainConfig(**_fields(chosen, TrainConfig))
    meta = {} if source is None else _meta(Path(source))
    name = chosen.get("encoding") or meta.get("encoding") or ("byte" if preset.startswith("byte") else "gpt2")
    # Asked for here and now: in a settings file that an earlier run left, everything stands.
    asked = any(vars(options).get(option) for option in ("encoding", "sample_prompt", "sample_tokens"))
    tokens = _encoding(name, None if asked or not holds_tokens(source) else meta, train_config.sample_tokens > 0)
    if goes_on and train_config.init_from != "scratch":  # what it began with may be gone, and its own settings know it
        before = _fields(read_settings(Path(out, SETTINGS)), GPTConfig)
        model_config = GPTConfig.from_dict({**before, **_fields(chosen, GPTConfig)})
    elif train_config.init_from == "scratch":
        model_config = GPTConfig.preset(preset, **_fields(chosen, GPTConfig))
    else:
        model_config = pretrained(train_config.init_from, **_fields(chosen, GPTConfig)).config
    memory.keep_freed()
    how = (options.overwrite, options.resume, options.strict_resume)
    model = fit(model_config, train_config, tokens, source, out, *how)
    if train_config.fsdp or int(os.environ.get("RANK", 0)):  # only a whole model can write, and once is enough
        return
    if isinstance(tokens, Named) or not train_config.sample_tokens:
        print(f"\nsaved in {out}")
        return
    print(f"\nsaved in {out}; a sample:\n")
    prompt, seed = train_config.sample_prompt, train_config.seed
    try:
        text.write(model, tokens, prompt, 300, speed=False, temperature=0.8, seed=seed, overflow="slide")
    except BrokenPipeError:
        raise
    except Exception as error:  # the run is done and saved
        print(f"\nthe sample failed: {in_a_line(error)}")


def _encoding(name: str, meta: dict | None, wanted: bool) -> tiktoken.Encoding | Named:
    """The encoding, or what can be known of it without its files, where the data are tokens.

    meta: what is told of the tokens, or None where text is needed. wanted: its files are looked for; else only an
    encoding that is here already is made.
    """
    if meta is None:
        return encoding(name)
    without = named(name, meta, f"the files of the encoding {name!r} were not asked for, nothing needs text")
    if not wanted and without is not None and not is_local(name):
        return without
    try:
        return encoding(name)
    except Unavailable as error:
        if without is None:
            raise
        return without._replace(why=str(error))


def _meta(source: Path) -> dict:
    """What is told of a folder of tokens, or of one file in it."""
    return meta_beside(source) if source.suffix == ".bin" else meta_of(source)


def _tokenize(options: argparse.Namespace) -> None:
    meta = tokenize(
        options.sources,
        encoding(options.encoding),
        options.out,
        val_share=options.val_share,
        text_field=options.text_field,
        workers=options.workers,
        overwrite=options.overwrite,
    )
    print(
        f"{meta['documents']:,} documents, {meta['text_bytes']:,} bytes; in {options.out} are "
        f"{meta['train']['tokens']:,} tokens to train on and {meta['val']['tokens']:,} to validate"
    )


def _convert(options: argparse.Namespace) -> None:
    notes = convert(
        options.source,
        options.target,
        options.to,
        n_head=options.n_head,
        vocab_size=options.vocab_size,
        gelu=options.gelu,
        encoding=options.encoding,
        variant=options.variant,
        overwrite=options.overwrite,
    )
    for note in notes:
        print(f"note: {note}")
    print(f"saved in {options.target}")


def _verify(options: argparse.Namespace) -> int:
    """0 if the model, or fastgpt.ops, passes; 1 if not."""
    if options.source is None:
        if options.text or options.dtype:
            raise ValueError("--text and --dtype are of a MODEL, and none was given")
        found = verify_functions(options.device, tolerance=options.tolerance, write=_at_once)
        print(found.verdict)
        return int(not found.passed)
    model, device = load(options.source), device_named(options.device)
    model.to(device, None if options.dtype is None else getattr(torch, options.dtype))
    ids = random_ids(model, options.rows, options.tokens, options.seed)
    if options.text is not None:
        with open(options.text, encoding="utf-8") as file:
            tokens = encoding(options.encoding).encode(file.read(), disallowed_special=())
        if len(tokens) < ids.numel():
            raise ValueError(f"{options.text} holds {len(tokens)} tokens, fewer than the {ids.numel()} to compare")
        ids = torch.tensor(tokens[: ids.numel()], device=device).view_as(ids)
    found = verify_model(model, ids, tolerance=options.tolerance, write=_at_once)
    print(found)
    return 0 if found.passed else 1


def _at_once(text: str) -> None:
    print(text, end="", flush=True)


def _doctor(options) -> int:
    diagnosis = examine()
    print(diagnosis.json() if options.json else diagnosis)
    return int(not diagnosis.healthy)
