"""The command `fastgpt train`."""

import argparse
import dataclasses
import os
import shlex
import types
import typing
from pathlib import Path
from typing import Any

from fastgpt import memory, training
from fastgpt.cli import text
from fastgpt.data.tokenizer import Named
from fastgpt.fields import fields_of
from fastgpt.model import PRESETS, GPTConfig
from fastgpt.training import TrainConfig
from fastgpt.training.monitor import in_a_line
from fastgpt.training.plan import PRESET
from fastgpt.training.settings import SETTINGS

_MODEL = {
    "vocab_size": "ids that it can read and write",
    "block_size": "tokens of its context",
    "n_layer": "blocks",
    "n_head": "attention heads",
    "n_embd": "channels",
    "n_inner": "hidden units of the MLP (default: 4 n_embd)",
    "dropout": "share of activations that training drops",
    "bias": "in the linear layers and the norms",
    "gelu": "tanh is GPT-2's, none the exact one",
    "layer_norm_eps": "added to the variance in a LayerNorm",
    "residual": "dtype of the sum that runs through the blocks; compute is that of matmuls",
    "activation_checkpointing": "what the backward computes again to save memory",
    "tie": "the head shares the token embedding's weight",
    "window": "tokens that a token sees in a windowed layer (default: none has one)",
    "window_pattern": "of layers, over and over: S has the window, L and the last see all",
    "backend": "of fastgpt's functions: Triton's kernels or PyTorch",
    "fp8": "matmuls of 8-bit floats in training; forward adds the blocks' forward to head, all their gradients",
    "fp8_simulate": "the same numbers without the hardware for it, slowly",
}
_TRAINING = {
    "init_from": "a file, folder or hub's name of weights to start from, or scratch, or resume",
    "max_iters": "steps",
    "batch_size": "windows of one forward pass on one device, at most",
    "gradient_accumulation_steps": "batches a step, on all devices together",
    "total_batch_size": "tokens a step, in place of gradient_accumulation_steps",
    "order": "windows anywhere, or each window once an epoch",
    "document_mask": "attention ends where a document ends",
    "optimizer": "adamw, or muon for the blocks' matrices and AdamW for all else",
    "learning_rate": "at its highest",
    "min_lr": "where the decay ends",
    "warmup_iters": "steps in which the learning rate rises from 0",
    "decay_lr": "false stays at learning_rate",
    "schedule": "cosine, or wsd: stay, then go down in a line",
    "decay_share": "of max_iters, in which wsd goes down",
    "lr_decay_iters": "step at which the decay ends (default: max_iters)",
    "weight_decay": "of matrices",
    "beta1": "AdamW's, of the mean of gradients",
    "beta2": "AdamW's, of the mean of their squares",
    "grad_clip": "largest norm of all gradients together; 0 is none",
    "skip_nonfinite": "steps that may be passed over for a loss or gradient that is not finite",
    "eval_interval": "steps between evaluations",
    "eval_iters": "batches of an evaluation",
    "log_interval": "steps between looks at the loss",
    "checkpoint_interval": "steps between checkpoints (default: eval_interval)",
    "sample_tokens": "tokens of text that each evaluation writes; 0 is none",
    "sample_prompt": "what a sample continues (default: a new document, or def for the built-in corpus)",
    "seed": "of weights, data and dropout",
    "device": "cpu, cuda, mps, …; auto is an NVIDIA GPU if there is one",
    "dtype": "of matmuls; auto is bfloat16 on a GPU that has it",
    "compile": "by torch.compile",
    "cuda_graph": "the whole step as one CUDA graph; auto is on one GPU, where it can be",
    "fsdp": "shard weights and moments over the processes",
    "fsdp_shard": "processes that share a copy of the model, as a node's do (default: all)",
    "fsdp_reshard": "let go of a layer's weights after its forward: less memory, and gathered twice a step",
    "timeout": "seconds after which a process that waits for others gives up",
    "tensorboard": "write its events beside metrics.csv",
    "wandb": "tell Weights & Biases, which sends it over the network unless WANDB_MODE is offline",
}
_PRESET_SAYS = ("vocab_size", "block_size", "n_layer", "n_head", "n_embd")  # in place of GPTConfig's own defaults


def add(commands: Any) -> None:
    train = commands.add_parser("train", help="train a GPT and save it", allow_abbrev=False)
    train.set_defaults(run=run)
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
    train.add_argument("--preset", help=f"one of {', '.join(PRESETS)} (default: {PRESET})")
    train.add_argument("--encoding", help="byte, gpt2, … (default: the data's or the preset's)")
    _add_fields(train, "the model, over its preset", GPTConfig, _MODEL)
    _add_fields(train, "the training", TrainConfig, _TRAINING)


def _add_fields(parser: argparse.ArgumentParser, title: str, config: type, words: dict[str, str]) -> None:
    """An option for each field of a configuration; one that is not given stays out of the namespace."""
    group = parser.add_argument_group(title)
    hints = typing.get_type_hints(config)
    for field in dataclasses.fields(config):
        hint = hints[field.name]
        if isinstance(hint, types.UnionType):  # int | None
            hint = typing.get_args(hint)[0]
        choices = typing.get_args(hint) or None  # Literal
        kind: Any = _boolean if hint is bool else hint
        if choices is not None:
            kind = _auto_or_boolean if True in choices else str
        group.add_argument(
            f"--{field.name}",
            type=kind,
            choices=choices,
            default=argparse.SUPPRESS,
            metavar=_spelt(choices) if choices else kind.__name__.strip("_").upper(),
            help=_help(field, words[field.name]),
        )


def _help(field: dataclasses.Field, words: str) -> str:
    """What the option is, and its default, where the words do not tell that themselves."""
    default = field.default
    if field.name in _PRESET_SAYS and field.name in _MODEL:
        default = "the preset's"
    elif isinstance(default, bool):
        default = str(default).lower()
    return words if default is None or default == "" else f"{words} (default: {default})"


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is not true or false")
    return text.lower() == "true"


def _auto_or_boolean(text: str) -> str | bool:
    if text.lower() not in ("auto", "true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is not auto, true or false")
    return "auto" if text.lower() == "auto" else _boolean(text)


def _spelt(choices: tuple) -> str:
    """As they are typed: true is True."""
    return f"{{{','.join(str(each).lower() if isinstance(each, bool) else each for each in choices)}}}"


def run(options: argparse.Namespace) -> None:
    given = {name: value for name, value in vars(options).items() if value is not None}
    model = fields_of(GPTConfig, given)
    if options.preset is not None:
        model["preset"] = options.preset
    plan = training.plan_run(
        model,
        fields_of(TrainConfig, given),
        options.encoding,
        options.data,
        options.out or "out",
        resume=options.resume or options.strict_resume,
        settings=options.config,
    )
    memory.keep_freed()
    trained = training.train(plan, options.overwrite, options.strict_resume)
    config = plan.config
    if config.fsdp or int(os.environ.get("RANK", 0)):  # only a whole model can write, and once is enough
        return
    if isinstance(plan.encoding, Named) or not config.sample_tokens:
        print(f"\nsaved in {plan.out}")
    else:
        print(f"\nsaved in {plan.out}; a sample:\n")
        how: dict[str, Any] = dict(speed=False, temperature=0.8, seed=config.seed, overflow="slide")
        try:
            text.write(trained, plan.encoding, config.sample_prompt, 300, **how)
        except BrokenPipeError:
            raise
        except Exception as error:  # the run is done and saved
            print(f"\nthe sample failed: {in_a_line(error)}")
    place = _quoted(plan.out)
    print()
    if not isinstance(plan.encoding, Named):
        print(f"to write more:  fastgpt generate --checkpoint {place} --prompt TEXT")
    print(f"to train on:    fastgpt train --out {place} --resume --max_iters {2 * config.max_iters}")


def _quoted(path: Path) -> str:
    """As a shell takes it, which reads bytes that are no UTF-8 by their numbers."""
    name = str(path)
    if not any("\ud800" <= character <= "\udfff" for character in name):
        return shlex.quote(name)
    spelt = (chr(each) if 32 <= each < 127 and each not in b"'\\" else f"\\x{each:02x}" for each in os.fsencode(name))
    return f"$'{''.join(spelt)}'"
