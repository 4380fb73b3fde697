"""The cases above a function: a block and a training step, at the weights of one fastgpt.GPT."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import baselines, work
from bench.cases import COMPILED, EAGER, SUBJECT, Case, Subject
from bench.machine import Machine
from bench.work import Work
from fastgpt.model import GPT, GPTConfig

HUGGING_FACE, NANOGPT, BOOK = "Hugging Face", "nanoGPT", "the book, fast"
_CHECKED = ("h.0.attn.c_attn.weight", "h.0.mlp.c_fc.weight", "h.0.ln_2.weight")  # a model's gradients that are compared


def gpt(machine: Machine, shape: dict, **changes) -> GPT:
    """A model of random weights, the same for every variant, larger than GPT-2's first ones so that all parts count."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**shape, **changes}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "c_proj" not in name:
                parameter.mul_(2)
    return model.to(machine.device, machine.dtype)


def with_backend(model: GPT, backend: str, **changes) -> GPT:
    """The same weights on another road."""
    twin = GPT(GPTConfig(**{**vars(model.config), "backend": backend, **changes}))
    twin.load_state_dict(model.state_dict())
    parameter = next(model.parameters())
    return twin.to(parameter.device, parameter.dtype).train(model.training)


class BlockProblem(NamedTuple):
    model: GPT
    x: Tensor
    branch: Tensor
    dout: Tensor


def block(machine: Machine, B: int, T: int, config: dict, tier: int) -> list[Case]:
    """A block forward and backward. fastgpt's takes the stream and the branch that is still to be added to it, and
    hands the like on; Hugging Face's takes and gives their sum."""
    shape = GPTConfig(**{**config, "n_layer": 1, "vocab_size": 64})
    C, H, e = shape.n_embd, shape.n_head, machine.dtype.itemsize

    def problem():
        model = gpt(machine, vars(shape))
        x, branch, dout = (torch.randn(B, T, C, device=machine.device).to(machine.dtype) for _ in range(3))
        return BlockProblem(model, x, branch, dout)

    def of(model: GPT, call: Callable | None, p: BlockProblem) -> Subject:
        layer, bias = model.h[0], model.h[0].mlp.c_proj.bias
        run_layer = layer if call is None else call
        x, branch, dout = (t.to(bias.dtype) for t in (p.x, p.branch, p.dout))
        x.requires_grad_()
        wanted = [x, *(q for name, q in layer.named_parameters() if name != "mlp.c_proj.bias")]
        checked = [0, *(1 + i for i, (name, _) in enumerate(layer.named_parameters()) if "h.0." + name in _CHECKED)]

        def run():
            stream, out = run_layer(x, branch, None)
            return stream + out + bias, torch.autograd.grad((stream, out), wanted, (dout, dout))

        def timed():
            stream, out = run_layer(x, branch, None)
            return torch.autograd.grad((stream, out), wanted, (dout, dout))

        def results():
            total, grads = run()
            return total, *(grads[i] for i in checked)

        return Subject(timed, results)

    def theirs(p: BlockProblem) -> Subject:
        layer = baselines.hugging_face(p.model).transformer.h[0]
        x = (p.x + p.branch).requires_grad_()
        parameters = dict(layer.named_parameters())
        checked = [name.removeprefix("h.0.") for name in _CHECKED]

        def run():
            out = layer(x)
            out = out[0] if isinstance(out, tuple) else out
            return out, torch.autograd.grad(out, [x, *parameters.values()], p.dout)

        def results():
            out, (dx, *grads) = run()
            named = dict(zip(parameters, grads, strict=True))
            order = [name for name in named if name in checked]
            return out, dx, *(baselines.as_conv1d(name, named[name]) for name in order)

        return Subject(lambda: run()[1], results)

    variants = {SUBJECT: lambda p: of(p.model, None, p)}
    if machine.kind != "cpu":
        variants[EAGER] = lambda p: of(with_backend(p.model, "torch"), None, p)

    def compiled(p):
        twin = with_backend(p.model, "torch")
        return of(twin, baselines.compiled(machine, twin.h[0]), p)

    variants |= {COMPILED: compiled, HUGGING_FACE: theirs}
    floor = _block_work(B, T, C, H, e)

    def oracle(p):
        return of(with_backend(p.model, "torch").double(), None, p).results()

    return [Case("block fwd+bwd", dict(B=B, T=T, C=C, H=H), tier, floor, problem, variants, oracle)]


def _block_work(B: int, T: int, C: int, H: int, e: int) -> Work:
    M, F, D = B * T, 4 * C, C // H
    linears = work.matmul(M, 3 * C, C, e) + work.matmul(M, C, C, e)
    total = work.attention_fwd(B, H, T, D, e) + work.attention_bwd(B, H, T, D, e)
    total += work.gelu_mlp_fwd(M, C, F, e) + work.gelu_mlp_bwd(M, C, F, e)
    for part in (linears, linears, linears, work.add_layer_norm_fwd(M, C, e), work.add_layer_norm_fwd(M, C, e)):
        total += part
    return total + work.add_layer_norm_bwd(M, C, e) + work.add_layer_norm_bwd(M, C, e)


class StepProblem(NamedTuple):
    model: GPT
    idx: Tensor
    targets: Tensor


def step_problem(machine: Machine, B: int, T: int, config: dict) -> StepProblem:
    model = gpt(machine, config)
    idx = torch.arange(B * T, device=machine.device).view(B, T) * 7919 % model.config.vocab_size
    targets = idx.roll(-1, dims=1).clone()
    targets[:, -1] = -100  # Hugging Face shifts labels itself and has none for the last place
    return StepProblem(model, idx, targets)


def step(model: nn.Module, loss: Callable[[nn.Module, Tensor, Tensor], Tensor], p: StepProblem) -> Subject:
    """Forward, backward and a fused AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)

    def run():
        optimizer.zero_grad(set_to_none=True)
        loss(model, p.idx, p.targets).backward()
        optimizer.step()

    def results():
        optimizer.zero_grad(set_to_none=True)
        value = loss(model, p.idx[:2], p.targets[:2])
        value.backward()
        grads = [baselines.named_gradient(model, name).clone() for name in _CHECKED]
        optimizer.zero_grad(set_to_none=True)
        return value.detach(), *grads

    return Subject(run, results)


def step_work(shape: GPTConfig, B: int, T: int, e: int) -> Work:
    lines = work.train_step(shape, B, T, e, adamw_bytes=7 * e)
    return Work(sum(n * w.flops for _, _, n, w in lines), sum(n * w.bytes for _, _, n, w in lines))


def own_loss(model: nn.Module, idx: Tensor, targets: Tensor) -> Tensor:
    return model(idx, targets)


class Family(NamedTuple):
    """Another's model at the weights of one of ours."""

    build: Callable[[GPT, Machine], nn.Module]
    logits: Callable[[nn.Module, Tensor], Tensor]  # (B, T, V), of idx
    loss: Callable[[nn.Module, Tensor, Tensor], Tensor]  # of idx and targets, where -100 stands for none
    makes_its_loss: bool  # or leaves it to its caller
    changes: dict  # to our config, for the function that it computes


FAMILIES = {
    HUGGING_FACE: Family(
        lambda model, machine: baselines.hugging_face(model),
        lambda model, idx: model(idx).logits,
        lambda model, idx, targets: model(idx, labels=idx).loss,
        True,
        {},
    ),
    NANOGPT: Family(
        lambda model, machine: baselines.nanogpt(model, machine.nanogpt),
        lambda model, idx: model(idx, idx)[0],
        lambda model, idx, targets: model(idx, targets.where(targets >= 0, -1))[1],
        True,
        {"gelu": "none"},
    ),
    BOOK: Family(
        lambda model, machine: baselines.book(model),
        lambda model, idx: model(idx),
        lambda model, idx, targets: F.cross_entropy(model(idx).flatten(0, 1), targets.flatten()),
        False,
        {},
    ),
}


def train_step(machine: Machine, B: int, T: int, config: dict, tier: int, autocast: bool = False) -> list[Case]:
    """Forward, backward and a fused AdamW, all weights in the operands' dtype, or in float32 under an autocast to
    bfloat16. Checked: the loss and some gradients of up to two rows, for float64 takes memory."""
    shape = GPTConfig(**config)
    problem = functools.partial(step_problem, machine, B, T, config)

    def within(loss):
        return torch.autocast(machine.device, torch.bfloat16)(loss) if autocast else loss

    def fresh(p, backend):
        return step(with_backend(p.model, backend), within(own_loss), p)

    def compiled(p):
        baselines.compiles_models(machine)
        twin = with_backend(p.model, "torch")
        run = baselines.compiled(machine, twin)
        return step(twin, within(lambda _, idx, targets: run(idx, targets)), p)

    def theirs(name, p):
        family = FAMILIES[name]
        subject = step(family.build(p.model, machine), within(family.loss), p)
        return subject._replace(expected=lambda: oracle(p, **family.changes)) if family.changes else subject

    def judged(build, p):
        return build(p).judged_as(torch.bfloat16, lambda: oracle(p))

    variants = {SUBJECT: lambda p: fresh(p, "auto")}
    if machine.kind != "cpu":
        variants[EAGER] = lambda p: fresh(p, "torch")
    variants |= {COMPILED: compiled, **{name: functools.partial(theirs, name) for name in FAMILIES}}

    def oracle(p, **changes):
        return step(with_backend(p.model, "torch", **changes).double(), own_loss, p).results()

    numbers = dict(B=B, T=T, L=shape.n_layer, C=shape.n_embd)
    floor = step_work(shape, B, T, machine.dtype.itemsize)
    op = "training step"
    if autocast:
        op, variants = (
            "training step, bfloat16",
            {name: functools.partial(judged, build) for name, build in variants.items()},
        )
        floor = Work(0, floor.bytes)  # the roof that was measured is not this dtype's
    return [Case(op, numbers, tier, floor, problem, variants, oracle, capture=False)]
