"""What a case is: a function at a shape, its variants, its work, and the naive reference that all of them are held to.

A case is made from numbers alone; its tensors exist from `problem()` until it has been measured.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench import baselines
from bench.work import Work

SUBJECT, EAGER, COMPILED = "fastgpt", "PyTorch eager", "torch.compile"


class Subject(NamedTuple):
    run: Callable[[], Any]  # what is timed
    results: Callable[[], tuple] | None = None  # what is checked; None: what run returns
    expected: Callable[[], tuple] | None = None  # in float64, of a variant that computes something else than the case
    capture: bool = False  # as a CUDA graph, though the case's others are not

    def judged_as(self, dtype: torch.dtype, exact: Callable[[], tuple]) -> "Subject":
        """Its results rounded to dtype and held to what that allows, not to the error of the case's own dtype."""

        def rounded():
            return tuple(result.to(dtype) for result in (self.results or self.run)())

        return self._replace(results=rounded, expected=self.expected or exact)


@dataclasses.dataclass(frozen=True)
class Case:
    op: str
    shape: dict[str, int]
    tier: int
    work: Work
    problem: Callable[[], Any]
    variants: dict[str, Callable[[Any], Subject]]
    exact: Callable[[Any], tuple]
    capture: bool = True  # as a CUDA graph, where the device has them
    memory: float = 0.0  # bytes that it takes, about, where that is much
    peak: bool = True  # whether its peak memory is measured, which on a CPU takes longer than many small calls
    rounded: Callable[[Any], tuple] | None = None  # the naive reference in the operands' dtype, by whose error to judge
    eager: str = EAGER  # without it, the variant by whose error the others are; or else fastgpt's is PyTorch's own
    setting: str = ""  # whose it is: the dtype of weights, autocast; "": all in the machine's dtype

    @property
    def name(self) -> str:
        return f"{self.op} {' '.join(f'{key} {value}' for key, value in self.shape.items())}"


class Problem(NamedTuple):
    inputs: dict[str, Tensor]
    wanted: tuple[str, ...] = ()  # the inputs whose gradients are asked for
    douts: tuple[Tensor, ...] = ()  # what reaches each output from above


Builder = Callable[[Problem], Callable]  # of a function of the problem's inputs


def runner(function: Callable, problem: Problem, phase: str) -> Callable[[], tuple]:
    """A call of one phase, "fwd", "bwd" or "fwd+bwd": outputs, gradients, or both."""
    wanted = [problem.inputs[name] for name in problem.wanted]

    def forward():
        outs = function(**problem.inputs)
        return outs if isinstance(outs, tuple) else (outs,)

    def both():
        outs = forward()
        return *outs, *torch.autograd.grad(outs, wanted, problem.douts)

    if phase != "bwd":
        return {"fwd": forward, "fwd+bwd": both}[phase]
    outs = forward()
    return lambda: torch.autograd.grad(outs, wanted, problem.douts, retain_graph=True)


def _whole(tensor: Tensor) -> Tensor:
    return tensor


def function_cases(
    op: str,
    shape: dict[str, int],
    tier: int,
    phases: dict[str, Work],
    problem: Callable[[], Problem],
    functions: dict[str, Builder],
    naive: Callable,
    pick: Callable[[Tensor], Tensor] = _whole,
    products: dict[str, Callable[[Problem], list[tuple[Tensor, Tensor, int]]]] | None = None,
) -> list[Case]:
    """A case for each phase. naive: of fastgpt.ops.reference, what all results are held to. `pick` takes the part of
    every tensor that is checked, for float64 takes memory.
    products: by phase, the matmuls inside, (a, b, how often), timed alone as a baseline."""

    def expected(problem, phase, dtype):
        def checked(t):
            return pick(t.detach()).to(dtype or t.dtype) if t.is_floating_point() else pick(t)

        inputs = {name: checked(t) for name, t in problem.inputs.items()}
        for name in problem.wanted:
            inputs[name].requires_grad_()
        return runner(naive, Problem(inputs, problem.wanted, tuple(checked(d) for d in problem.douts)), phase)()

    def subject(build, phase):
        def make(problem):
            run = runner(build(problem), problem, phase)
            return Subject(run, lambda: tuple(t if t is None else pick(t.detach()) for t in run()))

        return make

    def alone(pairs):
        def make(problem):
            runs = [(baselines.product(a, b, times), a, b) for a, b, times in pairs(problem)]
            return Subject(
                lambda: tuple(run()[0] for run, _, _ in runs),
                lambda: tuple(run()[0][-64:] for run, _, _ in runs),  # in float64 all of them would fill a card
                lambda: tuple(a[-64:].detach().double() @ b.detach().double() for _, a, b in runs),
            )

        return make

    cases = []
    for phase, floor in phases.items():
        label = op if len(phases) == 1 else f"{op} {phase}"
        variants = {name: subject(build, phase) for name, build in functions.items()}
        if products and phase in products:
            variants["its matmuls alone"] = alone(products[phase])
        exact, rounded = (functools.partial(expected, phase=phase, dtype=dtype) for dtype in (torch.float64, None))
        cases.append(Case(label, shape, tier, floor, problem, variants, exact, rounded=rounded))
    return cases
