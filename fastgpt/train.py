"""The training loop: a GPT from a corpus, with a live line, metrics, a loss plot and a saved model."""

import csv
import dataclasses
import math
import sys
import time
from pathlib import Path

import numpy as np
import tiktoken
import torch
from tqdm import tqdm

from fastgpt import data, ops
from fastgpt.checkpoint import replacing, writable_folder
from fastgpt.model import GPT, GPTConfig
from fastgpt.optimizer import adamw, clipped_step, set_learning_rate
from fastgpt.weights import WEIGHTS, save_model

METRICS, PLOT = "metrics.csv", "loss.png"


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How to train, in nanoGPT's names. The defaults take a byte-0.8M model about two minutes on two CPU cores."""

    max_iters: int = 1200
    batch_size: int = 16  # windows of block_size tokens a step
    learning_rate: float = 3e-3
    min_lr: float | None = None  # where the cosine ends; None is a tenth of learning_rate
    warmup_iters: int = 50
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    grad_clip: float = 1.0  # largest norm of all gradients together; 0 is none
    eval_interval: int = 200
    eval_iters: int = 20  # batches of validation windows, the same ones each time
    seed: int = 1337
    device: str = "auto"  # "auto" is the GPU if there is one

    def __post_init__(self):
        for name in ("max_iters", "batch_size", "eval_interval", "eval_iters"):
            if getattr(self, name) < 1:
                raise ValueError(f"TrainConfig: {name} is {getattr(self, name)}, not at least 1")
        for name in ("learning_rate", "min_lr", "warmup_iters", "weight_decay", "grad_clip"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"TrainConfig: {name} is {value}, not a finite number of at least 0")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"TrainConfig: {name} is {getattr(self, name)}, not in [0, 1)")
        if self.min_lr is not None and self.min_lr > self.learning_rate:
            raise ValueError(f"TrainConfig: min_lr = {self.min_lr} is above learning_rate = {self.learning_rate}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"TrainConfig: seed is {self.seed}, not in [0, 2**63)")

    def learning_rate_at(self, step: int) -> float:
        """Linear warmup, then half a cosine from learning_rate to min_lr at the last step."""
        if step < self.warmup_iters:
            return self.learning_rate * (step + 1) / self.warmup_iters
        progress = (step - self.warmup_iters) / max(1, self.max_iters - 1 - self.warmup_iters)
        lowest = self.learning_rate / 10 if self.min_lr is None else self.min_lr
        return lowest + (self.learning_rate - lowest) * (1 + math.cos(math.pi * min(1.0, progress))) / 2


def fit(
    model_config: GPTConfig,
    config: TrainConfig,
    encoding: tiktoken.Encoding,
    source: str | Path | None,
    out: str | Path,
    overwrite: bool = False,
) -> GPT:
    """Train a GPT on `source` (see data.load_corpus) and leave it, metrics.csv and loss.png in the folder `out`.

    The model is saved at every evaluation and, on Ctrl-C, once more before KeyboardInterrupt goes on its way.
    ValueError or OSError before the first step for anything that would stop a later one, an `out` that holds a
    model (without `overwrite`) included; FloatingPointError for a loss that is not finite.
    """
    folder = Path(out)
    if (folder / WEIGHTS).exists() and not overwrite:
        raise FileExistsError(
            f"{folder / WEIGHTS} holds a trained model: choose another folder (--out) or --overwrite it"
        )
    if model_config.vocab_size < encoding.n_vocab:
        sizes = f"vocab_size = {model_config.vocab_size}, the encoding {encoding.name!r} has {encoding.n_vocab} ids"
        raise ValueError(f"the model can't hold every token: {sizes}")
    device = _device(config.device)
    corpus = data.load_corpus(source, encoding, model_config.block_size)
    writable_folder(folder)

    torch.manual_seed(config.seed)
    model = GPT(model_config).to(device)
    run = _Run(model, config, encoding.name, corpus, folder, device)
    print(run.description(), flush=True)
    try:
        run.loop()
    except KeyboardInterrupt:
        run.save()
        print(f"interrupted after {run.steps_done} of {config.max_iters} steps; the model so far is in {folder}")
        raise
    return model


class _Run:
    """The state of one training run."""

    def __init__(self, model: GPT, config: TrainConfig, encoding: str, corpus: data.Corpus, folder: Path, device):
        self.model, self.config, self.encoding, self.corpus = model, config, encoding, corpus
        self.folder, self.device = folder, device
        self.optimizer = adamw(model, config.learning_rate, config.weight_decay, (config.beta1, config.beta2))
        self.draw = np.random.default_rng(config.seed)
        self.steps_done = 0
        self.rows: list[dict] = []  # of metrics.csv: one an evaluation

    def description(self) -> str:
        block, train, val = self.model.config.block_size, self.corpus.train, self.corpus.val
        x = torch.empty(1, self.model.config.n_embd, device=self.device)
        norm = ops.explain(ops.layer_norm, x, self.model.ln_f.weight, backend=self.model.config.backend)
        return (
            f"{self.model.num_parameters():,} parameters, {self.config.max_iters} steps of "
            f"{self.config.batch_size} x {block} tokens on {self.device}; {norm}\n"
            f"{self.corpus.name}: {len(train):,} tokens to train on, {len(val):,} to validate"
        )

    def loop(self) -> None:
        config = self.config
        tokens_a_step = config.batch_size * self.model.config.block_size
        started, recent = time.perf_counter(), []
        with tqdm(total=config.max_iters, unit="step", dynamic_ncols=True, disable=None) as line:
            while self.steps_done < config.max_iters:
                recent.append(self.step())
                seconds = time.perf_counter() - started
                speed = self.steps_done * tokens_a_step / seconds
                line.set_postfix_str(f"loss {recent[-1]:.3f}, {speed:,.0f} tokens/s", refresh=False)
                line.update()
                if self.steps_done % config.eval_interval == 0 or self.steps_done == config.max_iters:
                    row = {
                        "step": self.steps_done,
                        "train_loss": sum(recent) / len(recent),
                        "val_loss": self.evaluate(),
                        "learning_rate": config.learning_rate_at(self.steps_done - 1),
                        "tokens_per_second": speed,
                        "seconds": time.perf_counter() - started,
                    }
                    self.rows.append(row)
                    recent.clear()
                    self.save()
                    tqdm.write(
                        f"step {row['step']}: train {row['train_loss']:.3f}, validation {row['val_loss']:.3f} nats a "
                        f"token, {speed:,.0f} tokens/s"
                    )
                    sys.stdout.flush()  # into a pipe or a file too

    def step(self) -> float:
        """One optimizer step on a batch of random windows; its loss."""
        config, block = self.config, self.model.config.block_size
        set_learning_rate(self.optimizer, config.learning_rate_at(self.steps_done))
        starts = self.draw.integers(len(self.corpus.train) - block, size=config.batch_size)
        self.model.train()
        with self.autocast():
            loss = self.model(*data.windows(self.corpus.train, starts, block, self.device))
        value = loss.item()
        if not math.isfinite(value):
            raise FloatingPointError(f"the loss of step {self.steps_done + 1} is {value}; nothing was updated from it")
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if config.grad_clip:
            clipped_step(self.optimizer, config.grad_clip)
        else:
            self.optimizer.step()
        self.steps_done += 1
        return value

    @torch.no_grad()
    def evaluate(self) -> float:
        """Mean loss over eval_iters batches of windows spread evenly over the validation tokens."""
        block, tokens = self.model.config.block_size, self.corpus.val
        windows = min(self.config.eval_iters * self.config.batch_size, (len(tokens) - 1) // block)
        starts = np.linspace(0, len(tokens) - block - 1, windows).astype(np.int64)
        self.model.eval()
        total = 0.0
        for part in np.array_split(starts, math.ceil(windows / self.config.batch_size)):
            with self.autocast():
                total += self.model(*data.windows(tokens, part, block, self.device)).item() * len(part)
        return total / windows

    def autocast(self):
        """bfloat16 matmuls where the GPU has them."""
        return torch.autocast(
            self.device.type,
            torch.bfloat16,
            enabled=self.device.type == "cuda" and torch.cuda.get_device_capability(self.device) >= (8, 0),
        )

    def save(self) -> None:
        last = self.rows[-1] if self.rows else {}
        facts = {"step": self.steps_done, "val_loss": last.get("val_loss"), "train": dataclasses.asdict(self.config)}
        save_model(self.model, self.folder, self.encoding, **facts)
        if not self.rows:
            return
        with replacing(self.folder / METRICS) as new, new.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(last))
            writer.writeheader()
            writer.writerows(self.rows)
        plot_losses(self.rows, self.folder / PLOT)


def plot_losses(rows: list[dict], path: Path) -> None:
    """Training and validation loss against steps; nothing where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    steps = [row["step"] for row in rows]
    axes.plot(steps, [row["train_loss"] for row in rows], marker="o", label="training, mean since the last point")
    axes.plot(steps, [row["val_loss"] for row in rows], marker="o", label="validation")
    axes.set(xlabel="step", ylabel="loss (nats a token)", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    with replacing(path) as new:
        figure.savefig(new, format="png", dpi=120)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros((), device=device).item()
    except (RuntimeError, AssertionError) as error:  # torch's CPU builds assert
        raise ValueError(f"no device {name!r} here: {str(error).splitlines()[0]}") from error
    return device
