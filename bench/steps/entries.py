"""The rows of `python -m bench steps`: each way to train a GPT-2, as its users write it."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

import fastgpt
from bench.baselines import Unavailable
from bench.families import BOOK, FAMILIES, HUGGING_FACE, NANOGPT, Family
from bench.machine import Machine
from bench.models import with_backend
from fastgpt import ops
from fastgpt.families import nanogpt
from fastgpt.model import GPT, GPTConfig
from fastgpt.training.optimizer import TrainingStep, adamw

BASELINE = "fastgpt.GPT"
GRAPH = f"{BASELINE}, one CUDA graph"
CLIP, LEARNING_RATE, BETAS, WEIGHT_DECAY = 1.0, 1e-4, (0.9, 0.95), 0.1


class Problem(NamedTuple):
    model: GPT  # float32; every row starts from its weights
    idx: Tensor  # (B, T)
    targets: Tensor  # (B, T); -100 at each row's end, as Hugging Face's own shift leaves it
    autocast: torch.dtype | None


Step = Callable[[], tuple[Tensor, Tensor]]  # one optimizer step: its loss and its gradients' norm


class Entry(NamedTuple):
    what: str
    build: Callable[[Problem, Machine], Step]
    vocabulary: int
    whose: str  # who trains so
    gelu: str = "tanh"
    tied: bool = True  # whether the head's weight is the embedding's
    ours: bool = True
    eight_bits: bool = False  # whether its matmuls are of 8-bit floats


_LOOPS = {  # whose loop it is, and what it is called with where it compiles
    NANOGPT: ("nanoGPT's train.py --compile=False", "nanoGPT's train.py"),
    HUGGING_FACE: ("Hugging Face's Trainer", "Hugging Face's Trainer with torch_compile"),
    BOOK: ("the book's loop, with autocast and a fused AdamW", "the same, compiled"),
}


def entries(shape: GPTConfig) -> list[Entry]:
    """All rows, in the order in which they are measured; the first is what the others are compared with."""
    V = shape.vocab_size
    padded = -(-V // 64) * 64  # nanoGPT's train.py trains 50304 for GPT-2's 50257
    found = [
        Entry(BASELINE, _own, V, "fastgpt train --cuda_graph false"),
        Entry(GRAPH, functools.partial(_own, graph=True), V, "fastgpt train on one GPU"),
    ]
    for mode in ("head", "forward", "all"):
        build = functools.partial(_own, graph=True, fp8=mode)
        found.append(Entry(f"{GRAPH}, fp8 {mode}", build, V, f"fastgpt train --fp8 {mode}", eight_bits=True))
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
            whose = _LOOPS[name][bool(how.get("compiles"))]
            found.append(Entry(what, build, vocabulary, whose, gelu, name != BOOK, "swap" in how))
    return found


def _own(p: Problem, machine: Machine, graph: bool = False, fp8: str = "none") -> Step:
    if graph and machine.device != "cuda":
        raise Unavailable("a CUDA graph needs an NVIDIA GPU")
    if fp8 != "none" and (obstacle := ops.fp8_obstacle(p.idx.device)):
        raise Unavailable(obstacle)
    model = with_backend(p.model, "auto", fp8=fp8).train()
    if model.fp8 is not None:
        model.fp8.exact_passes = 1  # and not sixteen, so that the third is captured as without: the steps are alike
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
    model = built(name, family, source, machine).train()
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


def built(name: str, family: Family, model: GPT, machine: Machine) -> nn.Module:
    """The family's model at the weights of ours; for nanoGPT without a checkout one of its form."""
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
