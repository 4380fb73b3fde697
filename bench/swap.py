"""The families' own models before and after fastgpt.accelerate, run by Python and by torch.compile."""

import functools
from collections.abc import Callable

import torch
from torch import nn

import fastgpt
from bench import baselines, work
from bench.case import SUBJECT, Case, Subject
from bench.families import FAMILIES, Family
from bench.machine import Machine
from bench.models import StepProblem, own_loss, step, step_problem, step_work, with_backend
from fastgpt.model import GPTConfig
from fastgpt.testing import on_reference

AS_IT_WAS, LOSS_TOO = "as it was", f"{SUBJECT}, loss=True"


def swap(machine: Machine, B: int, T: int, config: dict, tier: int) -> list[Case]:
    """A forward of all logits, and a training step, of each family. Checked as the training step of fastgpt's own GPT
    is; of the logits, the last position's."""
    return [case for name in FAMILIES for case in _of(machine, name, B, T, config, tier)]


def _of(machine: Machine, name: str, B: int, T: int, config: dict, tier: int) -> list[Case]:
    family, shape, e = FAMILIES[name], GPTConfig(**config), machine.dtype.itemsize
    problem = functools.partial(step_problem, machine, B, T, config)

    def exact(p):
        return on_reference(with_backend(p.model, "torch", **family.changes)).double()

    def forward(model: nn.Module, call: Callable, p: StepProblem) -> Subject:
        @torch.no_grad()
        def run():
            return call(model, p.idx)

        return Subject(run, lambda: (run()[: p.checked, -1],))

    def last_logits(p):
        with torch.no_grad():
            return (exact(p)(p.idx[: p.checked])[:, -1],)

    def loss_and_gradients(p):
        return step(exact(p), own_loss, p).results()

    kinds = {
        "forward": (family.logits, forward, last_logits, work.forward(shape, B, T, e)),
        "training step": (family.loss, step, loss_and_gradients, step_work(shape, B, T, e)),
    }
    cases = []
    for kind, (call, subject, expected, floor) in kinds.items():
        make = functools.partial(_variant, machine, family, call, subject)
        variants = {
            SUBJECT: functools.partial(make, swapped=True),
            AS_IT_WAS: make,
            f"{SUBJECT}, compiled": functools.partial(make, swapped=True, compiled=True),
            f"{AS_IT_WAS}, compiled": functools.partial(make, compiled=True),
        }
        if kind == "training step":
            variants[LOSS_TOO] = functools.partial(make, swapped=True, loss=True)
        numbers = dict(B=B, T=T, L=shape.n_layer, C=shape.n_embd)
        label = f"{name}: {kind}"
        cases.append(Case(label, numbers, tier, floor, problem, variants, expected, capture=False, eager=AS_IT_WAS))
    return cases


def _variant(
    machine: Machine,
    family: Family,
    call: Callable,
    subject: Callable,
    p: StepProblem,
    swapped: bool = False,
    loss: bool = False,
    compiled: bool = False,
) -> Subject:
    if compiled:
        baselines.compiles_models(machine)
    model = family.build(p.model, machine)
    if loss and not family.makes_its_loss:
        raise baselines.Unavailable("it leaves the loss to its caller")
    if swapped:
        fastgpt.accelerate(model, loss=loss)
    run = torch.compile(model, backend=machine.compiler, dynamic=False) if compiled else model
    return subject(model, lambda _, *arguments: call(run, *arguments), p)
