"""The cases above a function: a block and a training step, at the weights of one fastgpt.GPT."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bench import baselines, families, work
from bench.case import COMPILED, EAGER, SUBJECT, Case, Subject
from bench.families import HUGGING_FACE
from bench.machine import Machine
from bench.work import Work
from fastgpt.model import GPT, GPTConfig
from fastgpt.testing import on_reference

PADDED = f"{COMPILED}, vocabulary padded"
GRAPH = ", one CUDA graph"  # a whole step captured, so that the host's part of it does not count
AUTOCAST = "float32 weights, autocast {}, as `fastgpt train{}`"
LARGE = (SUBJECT, COMPILED, HUGGING_FACE)  # what larger models are compared with: each variant holds all its weights
# a model's gradients that are compared
_CHECKED = (
    *("h.0.ln_1.weight", "h.0.ln_1.bias", "h.0.attn.c_attn.weight"),
    *("h.0.ln_2.weight", "h.0.mlp.c_fc.weight", "wpe.weight"),
)


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
    """The same weights on another backend; a larger vocab_size gets rows of zeros."""
    twin = GPT(GPTConfig(**{**vars(model.config), "backend": backend, **changes}))
    weights = model.state_dict()
    more = twin.config.vocab_size - model.config.vocab_size
    if more:
        weights["wte.weight"] = nn.functional.pad(weights["wte.weight"], (0, 0, 0, more))
    twin.load_state_dict(weights)
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
        layer = families.hugging_face(p.model).transformer.h[0]
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
            return out, dx, *(families.as_conv1d(name, named[name]) for name in order)

        return Subject(lambda: run()[1], results)

    variants = {SUBJECT: lambda p: of(p.model, None, p)}
    if machine.kind != "cpu":
        variants[EAGER] = lambda p: of(with_backend(p.model, "torch"), None, p)

    def compiled(p):
        twin = with_backend(p.model, "torch")
        return of(twin, baselines.compiled(machine, twin.h[0]), p)

    variants |= {COMPILED: compiled, HUGGING_FACE: theirs}
    floor = _block_work(B, T, C, H, e)

    def exact(p):
        return of(on_reference(p.model).double(), None, p).results()

    return [Case("block fwd+bwd", dict(B=B, T=T, C=C, H=H), tier, floor, problem, variants, exact)]


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
    checked: int  # rows that are held to float64, where attention keeps all its probabilities


def checked_rows(shape: GPTConfig, B: int) -> int:
    return min(B, 2 if shape.n_layer <= 12 else 1)


def step_problem(machine: Machine, B: int, T: int, config: dict) -> StepProblem:
    model = gpt(machine, config)
    idx = torch.arange(B * T, device=machine.device).view(B, T) * 7919 % model.config.vocab_size
    targets = idx.roll(-1, dims=1).clone()
    targets[:, -1] = -100  # Hugging Face shifts labels itself and has none for the last place
    return StepProblem(model, idx, targets, checked_rows(model.config, B))


def step(
    model: nn.Module, loss: Callable[[nn.Module, Tensor, Tensor], Tensor], p: StepProblem, graph: bool = False
) -> Subject:
    """Forward, backward and a fused AdamW."""
    rate = torch.tensor(1e-6, device=p.idx.device) if graph else 1e-6
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, fused=True, capturable=graph)

    def run():
        loss(model, p.idx, p.targets).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)  # after it, or a step's peak would be counted from its gradients on

    def results():
        optimizer.zero_grad(set_to_none=True)
        value = loss(model, p.idx[: p.checked], p.targets[: p.checked])
        value.backward()
        grads = [families.named_gradient(model, name).clone() for name in _CHECKED]
        optimizer.zero_grad(set_to_none=True)
        return value.detach(), *grads

    return Subject(run, results, capture=graph)


def step_work(shape: GPTConfig, B: int, T: int, e: int) -> Work:
    lines = work.train_step(shape, B, T, e, adamw_bytes=7 * e)
    return Work(sum(n * w.flops for _, _, n, w in lines), sum(n * w.bytes for _, _, n, w in lines))


def own_loss(model: nn.Module, idx: Tensor, targets: Tensor) -> Tensor:
    return model(idx, targets)


def train_step(
    machine: Machine,
    B: int,
    T: int,
    config: dict,
    tier: int,
    autocast: bool = False,
    only: tuple[str, ...] = (),
) -> list[Case]:
    """Forward, backward and a fused AdamW, all weights in the operands' dtype, or in float32 under an autocast to
    bfloat16. Checked: the loss and some gradients of a row or two, for float64 takes memory. only: these variants, or
    all."""
    shape = GPTConfig(**config)
    problem = functools.partial(step_problem, machine, B, T, config)

    def within(loss):
        return torch.autocast(machine.device, torch.bfloat16)(loss) if autocast else loss

    def fresh(p, backend, graph=False):
        return step(with_backend(p.model, backend), within(own_loss), p, graph)

    def compiled(p, graph=False, **changes):
        """With all of the logits, which a compiler does better by than by chunks that it can't see into."""
        baselines.compiles_models(machine)
        twin = with_backend(p.model, "torch", **changes)

        def all_logits(idx, targets):
            return baselines.all_logits_cross_entropy(
                twin.features(idx).flatten(0, 1), twin.wte.weight, targets.flatten()
            )

        run = baselines.compiled(machine, all_logits)
        subject = step(twin, within(lambda _, idx, targets: run(idx, targets)), p, graph)
        return subject._replace(expected=lambda: exact(p, **changes)) if changes else subject

    def theirs(name, p):
        family = families.ALL[name]
        subject = step(family.build(p.model, machine), within(family.loss), p)
        return subject._replace(expected=lambda: exact(p, **family.changes)) if family.changes else subject

    def judged(build, p):
        return build(p).judged_as(torch.bfloat16, lambda: exact(p))

    variants = {SUBJECT: lambda p: fresh(p, "auto")}
    if machine.kind != "cpu":
        variants[EAGER] = lambda p: fresh(p, "torch")
    variants |= {COMPILED: compiled}
    if machine.kind != "cpu":  # whose matmuls take any width alike
        padded = -(-shape.vocab_size // 64) * 64
        variants[PADDED] = functools.partial(compiled, vocab_size=padded)
        variants[SUBJECT + GRAPH] = functools.partial(fresh, backend="auto", graph=True)
        variants[PADDED + GRAPH] = functools.partial(compiled, graph=True, vocab_size=padded)
    variants |= {name: functools.partial(theirs, name) for name in (families.FAMILIES if autocast else families.ALL)}
    variants = {name: build for name, build in variants.items() if not only or name in (*only, EAGER)}  # the judge

    def exact(p, **changes):
        return step(on_reference(with_backend(p.model, "torch", **changes)).double(), own_loss, p).results()

    e = machine.dtype.itemsize
    floor = step_work(shape, B, T, e)
    op = "training step"
    setting = AUTOCAST.format("bfloat16", " --dtype bfloat16") if autocast else ""
    if machine.kind == "cpu" and not autocast:
        setting = "float32 weights, no autocast, as `fastgpt train`"
    if autocast:
        op, variants = (
            "training step, bfloat16",
            {name: functools.partial(judged, build) for name, build in variants.items()},
        )
        floor = Work(0, floor.bytes)  # the roof that was measured is not this dtype's
    numbers = dict(B=B, T=T, L=shape.n_layer, C=shape.n_embd)
    needs = step_memory(shape, B, T, e, len(variants))  # and what each graph keeps
    needs += sum(name.endswith(GRAPH) for name in variants) * work.kept_activations(shape, B * T, e)
    return [Case(op, numbers, tier, floor, problem, variants, exact, capture=False, memory=needs, setting=setting)]


def step_memory(shape: GPTConfig, B: int, T: int, e: int, variants: int) -> int:
    """Bytes that a case of a training step takes, about: weights, gradients and moments of every variant, and before
    them the same without moments in float64."""
    parameters, rows = work.parameters(shape), checked_rows(shape, B)
    probabilities = 2 * shape.n_layer * shape.n_head * rows * T * T  # with their dropout's or mask's copy
    in_float64 = 16 * parameters + 8 * probabilities + work.kept_activations(shape, rows * T, 8)
    own = variants * 4 * e * parameters + work.kept_activations(shape, B * T, e)
    return e * parameters + max(in_float64, own)
