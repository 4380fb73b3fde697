"""Whole training steps as people run them: nanoGPT's and Hugging Face's model eager, compiled and accelerated, the
book's, and fastgpt's own GPT through its TrainingStep, plain and as one CUDA graph.

Float32 weights, autocast, a fused AdamW, gradients clipped, no dropout, random tokens: what `fastgpt train` does, and
what nanoGPT's train.py and Hugging Face's Trainer do with bf16. A row is timed in turns with fastgpt's step, so a clock
that drifts falls on both and its ratio is of the same minute; a few steps are queued a turn, as a training loop queues
them. Before that its first losses and the norm of its gradients are held to a plain reference at the same weights: a
row that computes something else is WRONG and has no time. Each row is written as soon as it is there.
"""

import argparse
import dataclasses
import functools
import gc
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastgpt
from bench.baselines import Unavailable
from bench.families import BOOK, FAMILIES, HUGGING_FACE, NANOGPT, Family
from bench.machine import Machine, header
from bench.measure import device_is_lost
from bench.models import gpt, with_backend
from bench.step_rows import FILE, StepRow, Steps
from bench.timing import interleaved
from fastgpt.families import nanogpt
from fastgpt.model import GPT, PRESETS, GPTConfig
from fastgpt.training.optimizer import TrainingStep, adamw

BASELINE = "fastgpt.GPT"
GRAPH = f"{BASELINE}, one CUDA graph"
CLIP, LEARNING_RATE, BETAS, WEIGHT_DECAY = 1.0, 1e-4, (0.9, 0.95), 0.1
DEVICE_LOST = 3  # the exit status after which --resume goes on in a new process

# Steps whose losses are compared: a CUDA graph runs two as usual, and its second replay shows what its first updated.
COMPARED = 4

_TINY = dict(vocab_size=65, block_size=16, n_layer=1, n_head=2, n_embd=32)


class Sizes(NamedTuple):
    shape: dict
    batch: int
    time: int
    steps: int  # that are timed
    burst: int  # of them that are queued without waiting


DEFAULTS = {
    "cuda": Sizes(PRESETS["gpt2-124M"], 32, 1024, 20, 4),
    "cpu": Sizes(PRESETS["byte-0.1M"], 4, 64, 6, 2),
    "dry": Sizes(_TINY, 1, 8, 2, 1),
}


class Problem(NamedTuple):
    model: GPT  # float32; every row starts from its weights
    idx: Tensor  # (B, T)
    targets: Tensor  # (B, T); -100 at each row's end, as Hugging Face's own shift leaves it
    autocast: torch.dtype | None


class Expected(NamedTuple):
    """What the reference computes."""

    losses: list[float]  # of the first COMPARED steps
    norm: float  # of all gradients of the first


Step = Callable[[], tuple[Tensor, Tensor]]  # one optimizer step: its loss and its gradients' norm


class Entry(NamedTuple):
    what: str
    build: Callable[[Problem, Machine], Step]
    vocabulary: int
    gelu: str = "tanh"
    ours: bool = True


def entries(shape: GPTConfig) -> list[Entry]:
    """All rows, in the order in which they are measured; the first is what the others are compared with."""
    V = shape.vocab_size
    padded = -(-V // 64) * 64  # nanoGPT's train.py trains 50304 for GPT-2's 50257
    found = [Entry(BASELINE, _own, V), Entry(GRAPH, functools.partial(_own, graph=True), V)]
    for name in (NANOGPT, HUGGING_FACE, BOOK):
        ways = {
            f"{name}, eager": {},
            f"{name}, accelerate": dict(swap={}),
            f"{name}, accelerate(loss=True)": dict(swap=dict(loss=True)),
            f"{name}, compiled": dict(compiles=True),
            f"{name}, accelerate(loss=True), compiled": dict(swap=dict(loss=True), compiles=True),
        }
        if not FAMILIES[name].makes_its_loss:
            ways = {what: how for what, how in ways.items() if "loss" not in what}
        vocabulary = padded if name == NANOGPT else V
        gelu = FAMILIES[name].changes.get("gelu", "tanh")
        for what, how in ways.items():
            build = functools.partial(_theirs, name, vocabulary, **how)
            found.append(Entry(what, build, vocabulary, gelu, "swap" in how))
    return found


def _own(p: Problem, machine: Machine, graph: bool = False) -> Step:
    if graph and machine.device != "cuda":
        raise Unavailable("a CUDA graph needs an NVIDIA GPU")
    model = with_backend(p.model, "auto").train()
    optimizer = adamw(model, LEARNING_RATE, WEIGHT_DECAY, BETAS, graph)
    step = TrainingStep(model, optimizer, CLIP, p.autocast, graph)
    return lambda: step(p.idx, p.targets)


def _theirs(
    name: str, vocabulary: int, p: Problem, machine: Machine, swap: dict | None = None, compiles: bool = False
) -> Step:
    """As its users write it. swap: accelerate's arguments, None leaves the model as it is."""
    if compiles and machine.kind == "cpu" and not machine.compiles_models:
        raise Unavailable("on a CPU with --compiled alone: compiling whole models takes minutes")
    family = FAMILIES[name]
    source = p.model if vocabulary == p.model.config.vocab_size else _padded(p.model, vocabulary)
    model = _build(name, family, source, machine).train()
    del source
    if swap is not None:
        fastgpt.accelerate(model, **swap)
    called = torch.compile(model, backend=machine.compiler, dynamic=False) if compiles else model
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, BETAS, weight_decay=WEIGHT_DECAY, fused=True)

    def step():
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(machine.device, p.autocast, enabled=p.autocast is not None):
            loss = family.loss(called, p.idx, p.targets)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        return loss.detach(), norm

    return step


def _padded(model: GPT, vocabulary: int) -> GPT:
    """The same weights, with rows of zeros for the ids that no token has."""
    return with_backend(model, "torch", vocab_size=vocabulary)


def _build(name: str, family: Family, model: GPT, machine: Machine) -> nn.Module:
    if name != NANOGPT or machine.nanogpt is not None:
        return family.build(model, machine)
    from types import SimpleNamespace

    try:
        from tests.models import NanoGPT  # of a checkout; it needs pytest
    except ModuleNotFoundError as error:
        raise Unavailable(f"no checkout of nanoGPT was given (--nanogpt DIR), and there is no {error.name}") from None
    settings, weights, _ = nanogpt.write_weights(model.config, model.state_dict())
    theirs = NanoGPT(SimpleNamespace(**settings, flash=True))
    theirs.load_state_dict(weights)
    return theirs.to(model.wte.weight.device)


# The reference: GPT-2 in a few plain lines, a row of the batch at a time, that share nothing with what is measured.


def reference(model: GPT, p: Problem, vocabulary: int, gelu: str, dtype: torch.dtype) -> Expected:
    """The first COMPARED steps in `dtype`, without autocast."""
    weights = {name: tensor.detach().to(dtype) for name, tensor in model.state_dict().items()}
    weights["wte.weight"] = F.pad(weights["wte.weight"], (0, 0, 0, vocabulary - model.config.vocab_size))
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in weights.items()}
    optimizer = torch.optim.AdamW(leaves.values(), LEARNING_RATE, BETAS, weight_decay=WEIGHT_DECAY)
    count = int((p.targets >= 0).sum())
    losses, norms = [], []
    for _ in range(COMPARED):
        optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), dtype=dtype, device=p.idx.device)
        for idx, targets in zip(p.idx, p.targets, strict=True):
            loss = _summed_loss(leaves, model.config, gelu, idx, targets) / count
            loss.backward()
            total += loss.detach()
        losses.append(total.item())
        norms.append(nn.utils.clip_grad_norm_(leaves.values(), CLIP).item())
        optimizer.step()
    return Expected(losses, norms[0])


def _summed_loss(weights: dict[str, Tensor], config: GPTConfig, gelu: str, idx: Tensor, targets: Tensor) -> Tensor:
    """Of one row: idx, targets (T,)."""
    T, H = len(idx), config.n_head
    later = torch.ones(T, T, dtype=torch.bool, device=idx.device).triu(1)

    def linear(x, name):
        return x @ weights[f"{name}.weight"].t() + weights[f"{name}.bias"]

    def norm(x, name):
        centred = x - x.mean(-1, keepdim=True)
        deviation = (centred.square().mean(-1, keepdim=True) + config.layer_norm_eps).sqrt()
        return centred / deviation * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    x = weights["wte.weight"][idx] + weights["wpe.weight"][:T]  # (T, C)
    for layer in range(config.n_layer):
        name = f"h.{layer}"
        qkv = linear(norm(x, f"{name}.ln_1"), f"{name}.attn.c_attn")
        q, k, v = qkv.view(T, 3, H, -1).permute(1, 2, 0, 3)  # (H, T, D) each
        scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(later, -math.inf)
        attended = (scores.softmax(-1) @ v).transpose(0, 1).reshape(T, -1)
        x = x + linear(attended, f"{name}.attn.c_proj")
        hidden = F.gelu(linear(norm(x, f"{name}.ln_2"), f"{name}.mlp.c_fc"), approximate=gelu)
        x = x + linear(hidden, f"{name}.mlp.c_proj")
    logits = norm(x, "ln_f") @ weights["wte.weight"].t()
    return F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")


class Allowed(NamedTuple):
    """How far a right row may be from the reference, relatively."""

    loss: float
    norm: float
    descent: float  # of what the loss went down by in the compared steps


# Some ten times what right rows were seen to be off by, at 124M with 512 tokens on a CPU: in bfloat16 5e-5 of the loss,
# 0.13% of the norm and 0.5% of the descent.
ALLOWED = {
    None: Allowed(1e-5, 1e-3, 0.02),
    torch.bfloat16: Allowed(5e-4, 0.02, 0.1),
    torch.float16: Allowed(5e-4, 0.02, 0.1),
}


def wrong(losses: list[float], norm: float, expected: Expected, autocast: torch.dtype | None) -> str:
    """Why a row's first losses and gradients are not the reference's, or ""."""
    allowed = ALLOWED[autocast]
    theirs = expected.losses
    found = []
    if not abs(losses[0] - theirs[0]) <= allowed.loss * abs(theirs[0]):  # NaN is wrong too
        found.append(f"its first loss is {losses[0]:.6g}, the reference's {theirs[0]:.6g}")
    if not abs(norm - expected.norm) <= allowed.norm * expected.norm:
        found.append(f"its gradients have the norm {norm:.6g}, the reference's {expected.norm:.6g}")
    down, should = losses[0] - losses[-1], theirs[0] - theirs[-1]
    if not abs(down - should) <= allowed.descent * abs(should) + allowed.loss * abs(theirs[0]):
        found.append(f"its loss went down by {down:.4g} in {len(losses)} steps, the reference's by {should:.4g}")
    return "; ".join(found)


class Bench:
    """One run: the problem, the references, the baseline that stays ready, and the rows so far."""

    def __init__(self, machine: Machine, sizes: Sizes, autocast: torch.dtype | None, folder: Path, steps: Steps):
        self.machine, self.sizes, self.folder, self.steps = machine, sizes, folder, steps
        config = GPTConfig(**{**sizes.shape, "block_size": sizes.time})
        model = gpt(dataclasses.replace(machine, dtype=torch.float32), vars(config))
        idx = torch.randint(config.vocab_size, (sizes.batch, sizes.time), device=machine.device)
        targets = idx.roll(-1, dims=1)
        targets[:, -1] = -100
        self.problem = Problem(model, idx, targets, autocast)
        self.entries = entries(config)
        self.baseline: Step | None = None
        self._expected: dict[tuple[int, str], Expected] = {}

    def expected(self, entry: Entry) -> Expected:
        key = (entry.vocabulary, entry.gelu)
        if key not in self._expected:
            # in float32 on a GPU, for few have float64 worth waiting for: a thousandth of what a half is off by
            dtype = torch.float32 if self.machine.kind == "cuda" else torch.float64
            self._expected[key] = reference(self.problem.model, self.problem, *key, dtype)
        return self._expected[key]

    def run(self, wanted: list[Entry], end: float) -> None:
        """Measure what is wanted until the clock says `end`; DeviceLost's reason is raised as RuntimeError."""
        for number, entry in enumerate(wanted):
            if time.monotonic() > end:
                print(f"no time left for {len(wanted) - number} rows", flush=True)
                return
            started = StepRow(entry.what, "FAILED", "the process was stopped while it was measured", entry.ours)
            self.keep(dataclasses.replace(started, ended=False))
            row = self.measured(entry)
            self.keep(row)
            said = f"{row.status}: {row.note}" if row.median is None else f"{1e3 * row.median:.4g} ms"
            print(f"{row.what}: {said}", flush=True)
            if device_is_lost(RuntimeError(row.note)):
                raise RuntimeError(row.note)

    def keep(self, row: StepRow) -> None:
        self.steps.put(row)
        order = [entry.what for entry in self.entries]
        self.steps.rows.sort(key=lambda row: order.index(row.what))
        self.steps.write(self.folder)

    def measured(self, entry: Entry) -> StepRow:
        if entry.what == BASELINE:
            row, self.baseline = self._tried(entry, None)
            return row
        if self.baseline is None and self._baseline_works():
            _, self.baseline = self._tried(self.entries[0], None, timed=False)
        row, _ = self._tried(entry, self.baseline)
        if not row.note.startswith("out of memory") or self.baseline is None:
            return row
        self.baseline = None  # both did not fit at once: one after the other
        self._tidy()
        row, _ = self._tried(entry, None)
        if row.median is None:
            return row
        after, self.baseline = self._tried(self.entries[0], None)
        if after.median is not None:
            row.baseline, row.ratio = after.median, row.median / after.median
            row.note = "fastgpt's step after it, for both did not fit at once"
        return row

    def _baseline_works(self) -> bool:
        return any(row.what == BASELINE and row.status == "ok" for row in self.steps.rows)

    def _tried(self, entry: Entry, baseline: Step | None, timed: bool = True) -> tuple[StepRow, Step | None]:
        """Its row, and its step where that is right. One row's failure costs the others nothing."""
        row = StepRow(entry.what, "FAILED", ours=entry.ours)
        step = None
        try:
            expected = self.expected(entry)
            self._tidy()
            step = self._prepared(entry, row, expected)
            if step is not None and timed:
                self._timed(row, step, baseline)
            return row, step
        except Unavailable as reason:
            row.status, row.note = "skipped", str(reason)
        except torch.OutOfMemoryError as error:
            row.note = f"out of memory: {str(error).splitlines()[0][:200]}"
        except Exception as error:
            row.note = f"{type(error).__name__}: {' '.join(str(error).split()[:60])}"[:400]
        row = StepRow(row.what, row.status, row.note, row.ours)  # without what it had measured until then
        step = None
        self._tidy()
        return row, step

    def _prepared(self, entry: Entry, row: StepRow, expected: Expected) -> Step | None:
        """Its step after the first ones, None if these are wrong."""
        machine = self.machine
        held = 0
        if machine.kind != "cpu":
            held = machine.cuda.memory_allocated()
            machine.cuda.reset_peak_memory_stats()
        made: list[Step] = []
        found: list[tuple[float, float]] = []

        def one():  # read at once: a graph's next replay writes over them
            loss, norm = made[0]()
            found.append((loss.item(), norm.item()))

        def first():
            made.append(entry.build(self.problem, machine))
            one()

        row.first_call = machine.clock.once(first)
        for _ in range(COMPARED - 1):
            one()
        losses, norms = zip(*found, strict=True)
        row.loss, row.expected_loss = losses[0], expected.losses[0]
        reason = wrong(list(losses), norms[0], expected, self.problem.autocast)
        if reason:
            row.status, row.note, row.first_call = "WRONG", reason, None
            return None
        if machine.kind != "cpu":
            row.peak_bytes = machine.cuda.max_memory_allocated() - held
        row.status = "ok"
        return made[0]

    def _timed(self, row: StepRow, step: Step, baseline: Step | None) -> None:
        burst = self.sizes.burst

        def queued(one: Step):
            def call():
                for _ in range(burst):
                    last = one()
                return last

            return call

        calls = {"row": queued(step)} | ({} if baseline is None else {"baseline": queued(baseline)})
        turns = max(2, self.sizes.steps // burst)
        timings = interleaved(calls, self.machine.clock, 0.0, (turns, turns))
        last, _ = step()
        if not last.isfinite():
            row.status, row.note = "WRONG", f"after the timed steps its loss is {last.item()}"
            return
        mine = timings["row"]
        row.median, row.low, row.high = mine.median / burst, mine.low / burst, mine.high / burst
        row.tokens_per_second = self.sizes.batch * self.sizes.time / row.median
        if row.what == BASELINE:
            row.baseline, row.ratio = row.median, 1.0
        elif baseline is not None:
            row.baseline = timings["baseline"].median / burst
            row.ratio = row.median / row.baseline

    def _tidy(self) -> None:
        """No row finds what an earlier one left, in memory or in the compiler's caches."""
        torch._dynamo.reset()
        gc.collect()
        if self.machine.kind != "cpu":
            self.machine.cuda.empty_cache()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", choices=PRESETS, help="default: gpt2-124M on a GPU, byte-0.1M on a CPU")
    parser.add_argument("--layers", type=int, help="instead of the preset's")
    parser.add_argument("--batch", type=int, help="rows of a step; default: 32 on a GPU, 4 on a CPU")
    parser.add_argument("--time", type=int, help="tokens of a row; default: 1024 on a GPU, 64 on a CPU")
    parser.add_argument("--steps", type=int, help="timed steps of a row; default: 20 on a GPU, 6 on a CPU")
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="of autocast; auto: bfloat16 on a GPU, float32 (no autocast) on a CPU, as fastgpt train",
    )
    parser.add_argument("--nanogpt", type=Path, metavar="DIR", help="nanoGPT's checkout, for its own model.py")
    parser.add_argument("--only", action="append", default=[], metavar="WORDS", help="rows whose names hold WORDS")
    parser.add_argument("--compiled", action="store_true", help="on a CPU too, whole models by torch.compile")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no row after that")
    parser.add_argument("--resume", action="store_true", help="keep the rows that are in that folder already")
    parser.add_argument("--out", type=Path, default=Path("out/steps"), help="default: out/steps")
    parser.add_argument("--dry-run", action="store_true", help="tiny, in Triton's interpreter, with a fake clock")


def main(options: argparse.Namespace) -> int:
    """0 if no row with fastgpt in it failed or was wrong and none is missing; 3 if the device was lost."""
    end = time.monotonic() + options.seconds
    machine = Machine.of("dry" if options.dry_run else None)
    machine = dataclasses.replace(machine, nanogpt=options.nanogpt, compiles_models=options.compiled)
    sizes = _sizes(options, machine)
    autocast = _autocast(options.dtype, machine)
    facts = header(dataclasses.replace(machine, dtype=autocast or torch.float32)) | _versions()
    settings = _settings(options, machine, sizes, autocast)
    steps = Steps(facts, settings, _kept(options, facts, settings))
    bench = Bench(machine, sizes, autocast, options.out, steps)
    stopped = {row.what for row in steps.rows if not row.ended}
    done = {row.what for row in steps.rows} - stopped
    wanted = [entry for entry in bench.entries if not options.only or any(w in entry.what for w in options.only)]
    missing = [entry for entry in wanted if entry.what not in done]
    if not missing and not steps.rows:
        raise ValueError(f"steps: no row's name holds {' or '.join(options.only)}")
    if missing and BASELINE not in done and missing[0].what != BASELINE:
        missing.insert(0, bench.entries[0])  # what the others are compared with
    missing.sort(key=lambda entry: entry.what in stopped)  # what did not end before comes last
    print(steps.conditions(), flush=True)
    steps.write(options.out)
    try:
        bench.run(missing, end)
    except RuntimeError as error:
        if not device_is_lost(error):
            raise
        print(f"the device is lost; --resume goes on after this row: {error}", flush=True)
        return DEVICE_LOST
    print("", steps.table(), "", f"written: {options.out / FILE}", sep="\n")
    there = {row.what: row for row in steps.rows}
    bad = [row for row in steps.rows if row.ours and row.status in ("FAILED", "WRONG")]
    return int(bool(bad) or any(entry.what not in there for entry in wanted))


def _sizes(options: argparse.Namespace, machine: Machine) -> Sizes:
    sizes = DEFAULTS[machine.kind]
    shape = dict(PRESETS[options.preset]) if options.preset else dict(sizes.shape)
    shape.setdefault("vocab_size", 50257)
    if options.layers is not None:
        shape["n_layer"] = options.layers
    given = {name: getattr(options, name) for name in ("batch", "time", "steps")}
    for name, value in {**given, "layers": options.layers}.items():
        if value is not None and value < 1:
            raise ValueError(f"steps: {name} is {value}, not at least 1")
    return sizes._replace(shape=shape, **{name: value for name, value in given.items() if value is not None})


def _autocast(dtype: str, machine: Machine) -> torch.dtype | None:
    if dtype == "auto":
        return torch.bfloat16 if machine.kind == "cuda" else None
    return None if dtype == "float32" else getattr(torch, dtype)


def _settings(
    options: argparse.Namespace, machine: Machine, sizes: Sizes, autocast: torch.dtype | None
) -> dict[str, object]:
    shape = sizes.shape
    preset = next((name for name, fields in PRESETS.items() if {"vocab_size": 50257, **fields} == shape), None)
    layers = f"{shape['n_layer']} layers of {shape['n_embd']}, vocabulary {shape['vocab_size']}"
    turns = max(2, sizes.steps // sizes.burst)
    theirs = "its own model.py" if options.nanogpt else "a model of its form, written for fastgpt's tests"
    return {
        "model": preset or layers,
        "shape": shape,
        "batch": sizes.batch,
        "time": sizes.time,
        "weights": "float32",
        "autocast": None if autocast is None else str(autocast).removeprefix("torch."),
        "clip": CLIP,
        "learning_rate": LEARNING_RATE,
        "turns": turns,
        "steps_a_turn": sizes.burst,
        "nanogpt": theirs,
        "how": (
            f"Medians of {turns} turns of {sizes.burst} steps, each row in turns with fastgpt's step, and the last "
            f"column is of the same turns; first losses and gradients held to a plain reference. nanoGPT is {theirs}, "
            f"with a padded vocabulary as its train.py has it."
        ),
    }


def _versions() -> dict[str, str | None]:
    found = {}
    for package in ("transformers", "llms_from_scratch"):
        try:
            found[package] = __import__(package).__version__
        except (ModuleNotFoundError, AttributeError):
            found[package] = None
    return found


def _kept(options: argparse.Namespace, facts: dict, settings: dict) -> list[StepRow]:
    """The rows of an earlier start of the same measurement."""
    file = options.out / FILE
    if not options.resume or not file.exists():
        return []
    before = Steps.load(file)
    for name in ("device", "commit", "torch", "triton"):
        if before.machine[name] != facts[name]:
            raise ValueError(f"steps: {file} is of {name} {before.machine[name]}, this is {facts[name]}")
    for name, value in settings.items():
        if name != "how" and before.settings.get(name) != value:
            raise ValueError(f"steps: {file} has {name} = {before.settings.get(name)}, not {value}")
    return before.rows
