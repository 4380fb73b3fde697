"""TrainConfig, the settings of a training run, and the TOML file that keeps them."""

import dataclasses
import math
import os
import sys
import urllib.parse
from pathlib import Path
from typing import Any, Literal

import torch

from fastgpt.fields import check_fields, nearest
from fastgpt.model import GPTConfig

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SETTINGS = "train.toml"
_QUOTED = "_percent_encoded"  # ends the name of an option whose text TOML can't hold
OTHERS = ("preset", "data", "encoding")  # what a settings file may say beside the fields of the two configurations


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How to train, in nanoGPT's names. The defaults take a byte-0.8M model about two minutes on two CPU cores.

    A step sees batch_size x gradient_accumulation_steps windows of block_size tokens, however many devices share them.
    """

    init_from: str = "scratch"  # or a file, folder or hub's name of weights to start from
    max_iters: int = 1400
    batch_size: int = 8  # windows of one forward pass on one device, at most
    gradient_accumulation_steps: int = 1  # batches a step, on all devices together
    total_batch_size: int | None = None  # tokens a step, in place of gradient_accumulation_steps
    order: Literal["random", "epoch"] = "random"  # windows anywhere, or each window of the tokens once an epoch
    document_mask: bool = False  # attention ends where a document ends
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: for the blocks' matrices, and AdamW for all else
    learning_rate: float = 4e-3
    min_lr: float = 0.0  # where the decay ends
    warmup_iters: int = 100
    decay_lr: bool = True
    schedule: Literal["cosine", "wsd"] = "cosine"  # wsd: warm up, stay, go down in a line over the last decay_share
    decay_share: float = 0.2
    lr_decay_iters: int | None = None  # steps at which the decay ends; None is max_iters
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.99
    grad_clip: float = 1.0  # largest norm of all gradients together; 0 is none
    skip_nonfinite: int = 0  # steps of the run that may be passed over for a loss or gradient that is not finite
    eval_interval: int = 350
    eval_iters: int = 40  # batches of validation windows, the same ones each time
    log_interval: int = 10  # steps between looks at the loss, each of which waits for a GPU
    checkpoint_interval: int | None = None  # steps between checkpoints; None is eval_interval
    sample_tokens: int = 200  # of text written at each evaluation; 0 is none
    sample_prompt: str = ""
    seed: int = 1337
    device: str = "auto"  # "auto" is the GPU if there is one
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of matmuls
    compile: bool = False  # by torch.compile
    cuda_graph: Literal["auto", True, False] = "auto"  # the whole step as one CUDA graph; "auto" is where it can be
    fsdp: bool = False  # shard weights and moments over the processes, instead of a copy in each
    fsdp_shard: int | None = None  # processes that share a copy of the model, as a node's do; None is all
    fsdp_reshard: bool = False  # let go of a layer's weights after its forward: less memory, gathered twice a step
    timeout: float = 1800.0  # seconds after which a process that waits for others gives up
    tensorboard: bool = False
    wandb: bool = False

    def __post_init__(self):
        check_fields(self)
        whole = ("max_iters", "batch_size", "gradient_accumulation_steps", "total_batch_size", "lr_decay_iters")
        for name in (*whole, "eval_interval", "eval_iters", "log_interval", "checkpoint_interval", "fsdp_shard"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"TrainConfig: {name} is {value}, not at least 1")
        rates = ("learning_rate", "min_lr", "weight_decay", "grad_clip")
        for name in (*rates, "warmup_iters", "sample_tokens", "skip_nonfinite"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"TrainConfig: {name} is {value}, not a finite number of at least 0")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"TrainConfig: {name} is {getattr(self, name)}, not in [0, 1)")
        if not 0 < self.decay_share <= 1:
            raise ValueError(f"TrainConfig: decay_share is {self.decay_share}, not in (0, 1]")
        if not 0 < self.timeout < 1e9:
            raise ValueError(f"TrainConfig: timeout is {self.timeout}, not a number of seconds above 0 and below 1e9")
        if not self.fsdp and (self.fsdp_shard is not None or self.fsdp_reshard):
            given = f"fsdp_shard = {self.fsdp_shard}" if self.fsdp_shard is not None else "fsdp_reshard"
            raise ValueError(f"TrainConfig: {given} says how fsdp is to shard, and fsdp is false")
        if self.min_lr > self.learning_rate:
            raise ValueError(f"TrainConfig: min_lr = {self.min_lr} is above learning_rate = {self.learning_rate}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"TrainConfig: seed is {self.seed}, not in [0, 2**63)")
        if self.total_batch_size is not None and self.gradient_accumulation_steps != 1:
            both = f"{self.total_batch_size} and gradient_accumulation_steps = {self.gradient_accumulation_steps}"
            raise ValueError(f"TrainConfig: total_batch_size = {both} say the same thing; give one of them")

    def windows(self, block: int) -> int:
        """Windows of `block` tokens a step, on all devices together; ValueError if total_batch_size is no number of
        them."""
        if self.total_batch_size is None:
            return self.batch_size * self.gradient_accumulation_steps
        if self.total_batch_size % block:
            raise ValueError(
                f"TrainConfig: total_batch_size = {self.total_batch_size} tokens are no whole number of windows of "
                f"{block}"
            )
        return self.total_batch_size // block

    def learning_rate_at(self, step: int) -> float:
        """Linear warmup, then the schedule's way from learning_rate to min_lr, which it reaches at the last step."""
        if step < self.warmup_iters:
            return self.learning_rate * (step + 1) / self.warmup_iters
        if not self.decay_lr:
            return self.learning_rate
        last = (self.max_iters if self.lr_decay_iters is None else self.lr_decay_iters) - 1
        first = self.warmup_iters
        if self.schedule == "wsd":
            first = max(first, math.floor(last - self.decay_share * (last + 1)))
        progress = min(1.0, max(0.0, (step - first) / max(1, last - first)))
        share = (1 + math.cos(math.pi * progress)) / 2 if self.schedule == "cosine" else 1 - progress
        return self.min_lr + (self.learning_rate - self.min_lr) * share


def check_fp8(model: GPTConfig, config: TrainConfig, processes: int) -> None:
    """ValueError for what 8-bit floats do not go together with yet."""
    if model.fp8 == "none":
        return
    if config.compile or processes > 1:
        what = "compile = true" if config.compile else f"{processes} processes"
        raise ValueError(f"fp8 = {model.fp8!r} does not go together with {what} yet; fp8 = 'none' does")


def read_settings(path: str | Path) -> dict[str, Any]:
    """The options in a TOML file, by their names; ValueError for one that is none, with the nearest that is."""
    try:
        with open(path, "rb") as file:
            found = tomllib.load(file)
    except ValueError as error:  # TOML's own error, and UTF-8's
        raise ValueError(f"{path} is not TOML: {error}") from error
    for name in [name for name, value in found.items() if name.endswith(_QUOTED) and isinstance(value, str)]:
        found[name.removesuffix(_QUOTED)] = os.fsdecode(urllib.parse.unquote_to_bytes(found.pop(name)))
    known = [*OTHERS, *(field.name for kind in (GPTConfig, TrainConfig) for field in dataclasses.fields(kind))]
    for name in found:
        if name not in known:
            raise ValueError(f"{path}: there is no option {name!r}{nearest(name, known)}")
    return found


def settings_text(model: GPTConfig, config: TrainConfig, **others: str | None) -> str:
    """All options of a run as TOML. What is None is left out, for None is every such option's default."""
    options = {**others, **dataclasses.asdict(model), **dataclasses.asdict(config)}
    return "".join(_line(name, value) for name, value in options.items() if value is not None)


def _line(name: str, value: str | float | bool) -> str:
    """A path whose bytes are no UTF-8 is percent-encoded, as TOML holds no other text."""
    if isinstance(value, str) and not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value):
        name, value = f"{name}{_QUOTED}", urllib.parse.quote_from_bytes(os.fsencode(value))
    return f"{name} = {_toml(value)}\n"


def _toml(value: str | float | bool) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        plain = value.replace("\\", "\\\\").replace('"', '\\"')
        return '"' + "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in plain) + '"'
    return repr(value)


def autocast_dtype(config: TrainConfig, device: torch.device) -> torch.dtype | None:
    """The dtype of matmuls, None for the weights' own: bfloat16 where the GPU has it, float16 on older ones."""
    if config.dtype != "auto":
        return None if config.dtype == "float32" else getattr(torch, config.dtype)
    if device.type != "cuda":
        return None
    return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
