"""What can be seen of a run: the live line, metrics.csv, the loss plot, samples of text, and what trackers are told."""

import csv
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tiktoken
import torch
from tqdm import tqdm

from fastgpt.atomic import replacing
from fastgpt.data.tokenizer import beginning, end_of_text, has_end_of_text
from fastgpt.generation import generate
from fastgpt.model import GPT, GPTConfig
from fastgpt.training.tracking import Tracker

METRICS, PLOT, SAMPLES = "metrics.csv", "loss.png", "samples.txt"

# Dense matmuls in bfloat16 with float32 sums, or in float16 before bfloat16 was there, from NVIDIA's data sheets; the
# longest name that a card's own holds decides.
PEAK_FLOPS = {
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "A10": 125e12,
    "A30": 165e12,
    "A40": 150e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 3090": 71e12,
    "RTX 4090": 165e12,
    "V100": 125e12,
    "T4": 65e12,
}


def peak_flops(device: torch.device) -> float | None:
    """Of the card, a second; None where it is not known, and for a CPU."""
    if device.type != "cuda":
        return None
    words = torch.cuda.get_device_name(device).replace("-", " ").split()
    known = [name for name in PEAK_FLOPS if all(word in words for word in name.split())]
    return PEAK_FLOPS[max(known, key=len)] if known else None


def flops_per_token(config: GPTConfig) -> int:
    """Of the matmuls of a forward and a backward, as Chowdhery et al. (PaLM, 2022), appendix B, count them: 6 a weight
    that takes part in one, and 12 L T C for attention without regard to its mask."""
    hidden = 4 * config.n_embd if config.n_inner is None else config.n_inner
    layer = 4 * config.n_embd**2 + 2 * config.n_embd * hidden
    weights = config.n_layer * layer + config.vocab_size * config.n_embd
    return 6 * weights + 12 * config.n_layer * config.block_size * config.n_embd


class Monitor:
    """Of rank 0; on other ranks it is not made. Nothing that it shows is worth a run: once training has begun, what a
    file, a plot or a sample raises is told in a line."""

    def __init__(
        self, folder: Path, config: GPTConfig, device: torch.device, processes: int, told: Sequence[Tracker] = ()
    ):
        """told: who else is told of each number."""
        self.folder, self.config = folder, config
        self.flops, self.peak = flops_per_token(config), peak_flops(device)
        self.processes = processes
        self.told = list(told)
        self.line: tqdm | None = None

    def start(self, done: int, steps: int) -> None:
        for tracker in self.told:
            tracker.open(self.folder, self.config)
        # disable=None: off a terminal there is no line that rewrites itself, but the lines of `say` alone
        self.line = tqdm(initial=done, total=steps, unit="step", dynamic_ncols=True, disable=None)

    def say(self, text: str) -> None:
        tqdm.write(text)
        sys.stdout.flush()  # into a pipe or a file too

    def attempt(self, step: int, what: str, show: Callable[..., Any], *args) -> bool:
        """Whether show(*args) did what it should; if not, that is told. Ctrl-C passes through."""
        try:
            show(*args)
        except Exception as error:  # a disk, a plotting library, a model that writes nonsense: anything
            self.say(f"step {step}: {what} failed: {in_a_line(error)}; training goes on")
            return False
        return True

    def stepped(self, step: int, steps: int, loss: float, norm: float, rate: float, speed: float) -> None:
        """`steps` more steps are done, `step` in all; the last one's loss, and tokens a second."""
        assert self.line is not None
        self.line.set_postfix_str(f"loss {loss:.3f}, {speed:,.0f} tokens/s{self.use(speed)}", refresh=False)
        self.line.update(steps)
        scalars = dict(loss=loss, grad_norm=norm, learning_rate=rate, tokens_per_second=speed)
        self._record({f"train/{name}": value for name, value in scalars.items()}, step)

    def _record(self, scalars: dict[str, float], step: int, flush: bool = False) -> None:
        """To every tracker; to one that failed no more, which would fail again at every look."""

        def record(tracker: Tracker) -> None:
            tracker.log(scalars, step)
            if flush:
                tracker.flush()

        self.told = [each for each in self.told if self.attempt(step, each.name, record, each)]

    def use(self, speed: float) -> str:
        """Of the card's matmuls, where its peak is known."""
        flops = speed * self.flops
        if self.peak is None:
            return ""
        return f", {flops / 1e12:.1f} TFLOP/s, MFU {100 * flops / (self.peak * self.processes):.1f}%"

    def evaluated(self, rows: list[dict]) -> None:
        """Tell of the last row, and write metrics.csv and the plot anew."""
        row, step = rows[-1], rows[-1]["step"]
        speed = row["tokens_per_second"]
        self.say(
            f"step {row['step']}: train {row['train_loss']:.3f}, validation {row['val_loss']:.3f} nats a token, "
            f"{speed:,.0f} tokens/s{self.use(speed)}"
        )
        self.attempt(step, METRICS, write_metrics, rows, self.folder / METRICS)
        self.attempt(step, PLOT, plot_losses, rows, self.folder / PLOT)
        self._record({"val/loss": row["val_loss"]}, step, flush=True)

    def sampled(self, step: int, write: Callable[[], str]) -> None:
        """Keep the text that `write` gives."""
        self.attempt(step, "the sample", lambda: keep_sample(self.folder, step, write()))

    def close(self) -> None:
        if self.line is not None:
            self.line.close()
        told, self.told = self.told, []
        for tracker in told:
            try:
                tracker.close()
            except Exception as error:  # the run is saved, or its own error is on its way
                self.say(f"{tracker.name} failed: {in_a_line(error)}")


def in_a_line(error: Exception) -> str:
    """The error's class, and the first line of what it says."""
    said = str(error).strip().splitlines()
    return f"{type(error).__name__}: {said[0]}" if said else type(error).__name__


def sample(model: GPT, encoding: tiktoken.Encoding, prompt: str, tokens: int, seed: int) -> str:
    """The prompt and up to `tokens` tokens after it; torch's generators are left alone."""
    device = next(model.parameters()).device
    given = encoding.encode(prompt, disallowed_special=()) or [beginning(encoding)]
    ids = torch.tensor([given], dtype=torch.int64, device=device)
    stop = end_of_text(encoding) if has_end_of_text(encoding) else None
    options: dict = dict(temperature=0.8, seed=seed, encoding=encoding, overflow="slide", stop_ids=stop)
    (written,) = generate(model, ids, tokens, **options).texts or ("",)
    return prompt + written


def write_metrics(rows: list[dict], path: Path) -> None:
    with replacing(path) as new, new.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[-1]))
        writer.writeheader()
        for row in rows:  # no more digits than float32 has
            writer.writerow(
                {name: f"{value:.7g}" if isinstance(value, float) else value for name, value in row.items()}
            )


def keep_sample(folder: Path, step: int, text: str) -> None:
    with open(folder / SAMPLES, "a", encoding="utf-8") as file:
        file.write(f"--- step {step}\n{text}\n")


def plot_losses(rows: list[dict], path: Path) -> None:
    """Losses, learning rate, gradient norm and speed against steps, from the beginning; nothing where matplotlib is not
    installed."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return
    figure = Figure(figsize=(7, 8), layout="constrained")
    losses, rates, norms, speeds = figure.subplots(4, sharex=True, height_ratios=(3, 1, 1, 1))

    def draw(axes: Any, name: str, **look: Any) -> list[float]:
        known = [(row["step"], row[name]) for row in rows if row.get(name) is not None]  # an older run's rows lack some
        steps, values = zip(*known, strict=True) if known else ((), ())
        axes.plot(steps, values, marker=".", **look)
        axes.grid(alpha=0.3)
        return list(values)

    draw(losses, "train_loss", label="training, mean since the last point")
    draw(losses, "val_loss", label="validation")
    losses.set(ylabel="loss (nats a token)", xlim=(0, None))
    losses.legend()
    others = {"learning_rate": "learning rate", "grad_norm": "gradient norm", "tokens_per_second": "tokens/s"}
    for axes, (name, label) in zip((rates, norms, speeds), others.items(), strict=True):
        values = draw(axes, name, color="grey")
        axes.set(ylabel=label)
        if name == "grad_norm" and values and max(values) > 10 * min(values) > 0:  # one spike would flatten the rest
            axes.set(yscale="log")
        else:
            axes.set(ylim=(0, 1.1 * max(values, default=0) or 1))
    speeds.set(xlabel="step")
    with replacing(path) as new:
        figure.savefig(new, format="png", dpi=120)
