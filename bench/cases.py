"""What is benchmarked: fastgpt's functions at GPT-2's shapes, each with its baselines and its work, and held to the
naive reference in float64.

The first variant is fastgpt's. Shapes are a card's, scaled down for a CPU, and tiny for a dry run. Tier 0 is measured
first: with little time it is what must be known.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from bench import baselines, work
from bench.case import COMPILED, EAGER, SUBJECT, Builder, Case, Problem, function_cases
from bench.machine import Machine
from fastgpt import ops
from fastgpt.ops import pytorch, reference
from fastgpt.ops.loss import padded


def _standard(machine: Machine, function: Callable, fallback: Callable) -> dict[str, Builder]:
    """fastgpt, PyTorch's eager fallback (on a CPU that is fastgpt) and torch.compile of it."""
    variants: dict[str, Builder] = {SUBJECT: lambda problem: function}
    if machine.kind != "cpu":
        variants[EAGER] = lambda problem: fallback
    variants[COMPILED] = lambda problem: baselines.compiled(machine, fallback)
    return variants


def _draw(machine: Machine):
    """A function that draws leaf tensors of a shape, the same ones for the same case."""
    generator = torch.Generator(machine.device).manual_seed(0)

    def draw(*shape, scale=1.0, grad=True):
        values = torch.randn(shape, generator=generator, device=machine.device) * scale
        return values.to(machine.dtype).requires_grad_(grad)

    return draw


def attention(machine: Machine, B: int, H: int, T: int, D: int, tier: int) -> list[Case]:
    e = machine.dtype.itemsize

    def problem():
        draw = _draw(machine)
        qkv = draw(B, T, 3, H, D, grad=False).permute(2, 0, 3, 1, 4)  # as a packed projection holds them
        q, k, v = (t.detach().requires_grad_() for t in qkv)
        return Problem(dict(q=q, k=k, v=v), ("q", "k", "v"), (draw(B, T, H, D, grad=False).transpose(1, 2),))

    functions = _standard(machine, ops.causal_attention, pytorch.causal_attention)
    functions |= {name: lambda _, backend=backend: baselines.sdpa(backend) for name, backend in baselines.SDPA.items()}
    if T > 2048 and "SDPA math" in functions:
        del functions["SDPA math"]  # all scores in memory
    functions["flex_attention"] = lambda problem: baselines.flex(machine, T)
    functions["flash-attn 2"] = lambda problem: baselines.flash_attn(machine, 2)
    functions["flash-attn 3"] = lambda problem: baselines.flash_attn(machine, 3)
    phases = {"fwd": work.attention_fwd(B, H, T, D, e), "bwd": work.attention_bwd(B, H, T, D, e)}

    def pick(tensor):  # heads know nothing of each other: the last one of the last row stands for all
        return tensor[-1:, -1:]

    shape = dict(B=B, H=H, T=T, D=D)
    return function_cases("attention", shape, tier, phases, problem, functions, reference.causal_attention, pick)


def add_layer_norm(machine: Machine, M: int, C: int, tier: int) -> list[Case]:
    e = machine.dtype.itemsize

    def problem():
        draw = _draw(machine)
        names = ("x", "residual", "weight", "bias", "x_bias")
        inputs = dict(zip(names, (draw(M, C), draw(M, C), draw(C), draw(C), draw(C)), strict=True))
        return Problem(inputs, names, (draw(M, C, grad=False), draw(M, C, grad=False)))

    functions = _standard(machine, ops.add_layer_norm, pytorch.add_layer_norm)
    functions["Liger"] = lambda problem: baselines.liger_add_layer_norm(machine)
    phases = {"fwd": work.add_layer_norm_fwd(M, C, e), "bwd": work.add_layer_norm_bwd(M, C, e)}
    return function_cases("add_layer_norm", dict(M=M, C=C), tier, phases, problem, functions, reference.add_layer_norm)


def gelu_mlp(machine: Machine, M: int, C: int, F: int, tier: int) -> list[Case]:
    e = machine.dtype.itemsize

    def problem():
        draw = _draw(machine)
        names = ("x", "w_in", "b_in", "w_out", "b_out")
        drawn = (draw(M, C), draw(F, C, scale=C**-0.5), draw(F), draw(C, F, scale=F**-0.5), draw(C))
        return Problem(dict(zip(names, drawn, strict=True)), names, (draw(M, C, grad=False),))

    def forward_products(p):
        x, w_in, _, w_out, _ = (t.detach() for t in p.inputs.values())
        return [(x, w_in.t(), 1), (x.new_zeros(M, F).normal_(), w_out.t(), 1)]

    def backward_products(p):
        (dy,) = p.douts
        x, w_in, _, w_out, _ = (t.detach() for t in p.inputs.values())
        dpre = x.new_zeros(M, F).normal_()
        return [(dy, w_out, 1), (dy.t(), dpre, 1), (dpre, w_in, 1), (dpre.t(), x, 1)]

    return function_cases(
        "gelu_mlp",
        dict(M=M, C=C, F=F),
        tier,
        {"fwd": work.gelu_mlp_fwd(M, C, F, e), "bwd": work.gelu_mlp_bwd(M, C, F, e)},
        problem,
        _standard(machine, ops.gelu_mlp, pytorch.gelu_mlp),
        reference.gelu_mlp,
        products={"fwd": forward_products, "bwd": backward_products},
    )


def mlp_halves(machine: Machine, M: int, C: int, F: int, tier: int) -> list[Case]:
    """Between the MLP's two matmuls each way, with the matmul before: what an epilogue would do."""
    e = machine.dtype.itemsize

    def forward_problem():
        draw = _draw(machine)
        return Problem(dict(x=draw(M, C), w_in=draw(F, C, scale=C**-0.5), b_in=draw(F)))

    def backward_problem():
        draw = _draw(machine)
        return Problem(dict(dy=draw(M, C), w_out=draw(C, F, scale=F**-0.5), pre=draw(M, F)))

    @torch.no_grad()
    def forward(x, w_in, b_in):
        return _linear_gelu(x, w_in, b_in)

    @torch.no_grad()
    def backward(dy, w_out, pre):
        return _dgrad_dgelu(dy, w_out, pre)

    functions = {"linear + GELU": _standard(machine, forward, forward)}
    functions["dgrad + dGELU"] = _standard(machine, backward, backward)
    if machine.kind != "cpu":
        for op, by_kernel in (("linear + GELU", _linear_gelu_by_kernel), ("dgrad + dGELU", _dgrad_dgelu_by_kernel)):
            functions[op][SUBJECT] = lambda _, f=by_kernel: f
    first, second = functions
    shape = dict(M=M, C=C, F=F)
    return function_cases(
        first,
        shape,
        tier,
        {"fwd": work.linear_gelu(M, C, F, e)},
        forward_problem,
        functions[first],
        _naive_linear_gelu,
        products={"fwd": lambda p: [(p.inputs["x"].detach(), p.inputs["w_in"].detach().t(), 1)]},
    ) + function_cases(
        second,
        shape,
        tier,
        {"fwd": work.dgrad_dgelu(M, C, F, e)},
        backward_problem,
        functions[second],
        _naive_dgrad_dgelu,
        products={"fwd": lambda p: [(p.inputs["dy"].detach(), p.inputs["w_out"].detach(), 1)]},
    )


def _linear_gelu(x, w_in, b_in):
    pre = F.linear(x, w_in, b_in)
    return pre, F.gelu(pre, approximate="tanh")


def _dgrad_dgelu(dy, w_out, pre):
    dpre = torch.ops.aten.gelu_backward(dy @ w_out, pre, approximate="tanh")
    return dpre, dpre.sum(0)


def _naive_linear_gelu(x, w_in, b_in):
    pre = reference.linear(x, w_in, b_in)
    return pre, reference.gelu(pre, "tanh")


def _naive_dgrad_dgelu(dy, w_out, pre):
    pre = pre.detach().requires_grad_()
    (dpre,) = torch.autograd.grad(reference.gelu(pre, "tanh"), pre, dy @ w_out)
    return dpre, dpre.sum(0)


def _linear_gelu_by_kernel(x, w_in, b_in):
    """The launcher of the whole MLP with a second matmul of no rows."""
    from fastgpt.ops import autograd

    w_out = w_in.new_empty(0, w_in.shape[0])
    with torch.no_grad():
        _, pre, act = autograd.gelu_mlp_fwd(x, w_in, b_in, w_out, None, True, False)
    return pre, act


def _dgrad_dgelu_by_kernel(dy, w_out, pre):
    """The launcher of the whole backward, asked for the inner bias's gradient alone: dpre is made and not shown."""
    from fastgpt.ops import autograd

    with torch.no_grad():
        needs = [False, False, True, False, False]
        grads = autograd.gelu_mlp_bwd(dy, dy, w_out.t(), w_out, pre, pre, True, needs)
    return None, grads[2]


def linear_cross_entropy(machine: Machine, M: int, C: int, V: int, tier: int) -> list[Case]:
    e = machine.dtype.itemsize

    def problem():
        draw = _draw(machine)
        x, weight = draw(M, C), draw(V, C, scale=0.02)
        targets = torch.arange(M, device=machine.device) * 7919 % V
        one = torch.ones((), device=machine.device)
        return Problem(dict(x=x, weight=weight, targets=targets), ("x", "weight"), (one,))

    def products(p):
        x, weight = p.inputs["x"].detach(), p.inputs["weight"].detach()
        weight = F.pad(weight, (0, 0, 0, padded(V) - V))  # cuBLAS has its fast kernels for aligned sizes alone
        dlogits = _draw(machine)(M, len(weight), grad=False)
        return [(x, weight.t(), 1), (dlogits, weight, 1), (dlogits.t(), x, 1)]

    functions = _standard(machine, ops.linear_cross_entropy, pytorch.linear_cross_entropy)
    functions["all logits"] = lambda problem: baselines.all_logits_cross_entropy
    functions[COMPILED] = lambda problem: baselines.compiled(machine, baselines.all_logits_cross_entropy)
    functions["PyTorch, chunked"] = lambda problem: baselines.torch_linear_cross_entropy()
    functions["Liger, all logits"] = lambda problem: baselines.liger_cross_entropy(machine, fused=False)
    functions["Liger, fused"] = lambda problem: baselines.liger_cross_entropy(machine, fused=True)
    return function_cases(
        "linear_cross_entropy",
        dict(M=M, C=C, V=V),
        tier,
        {"fwd+bwd": work.linear_cross_entropy(M, C, V, e)},
        problem,
        functions,
        _naive_cross_entropy,
        products={"fwd+bwd": products},
    )


def _naive_cross_entropy(x, weight, targets):
    """The naive reference a few rows at a time, for in float64 the logits of all would fill a card."""

    def part(rows, targets):
        return reference.linear_cross_entropy(rows, weight, targets, reduction="sum")

    parts = zip(x.split(1024), targets.split(1024), strict=True)
    return torch.stack([checkpoint(part, *each, use_reentrant=False) for each in parts]).sum() / len(x)


def embedding(machine: Machine, B: int, T: int, C: int, V: int, tier: int) -> list[Case]:
    e = machine.dtype.itemsize

    def problem():
        draw = _draw(machine)
        ids = torch.arange(B * T, device=machine.device).view(B, T) * 7919 % V
        inputs = dict(ids=ids, token_weight=draw(V, C), position_weight=draw(T, C))
        return Problem(inputs, ("token_weight", "position_weight"), (draw(B, T, C, grad=False),))

    return function_cases(
        "embedding",
        dict(B=B, T=T, C=C, V=V),
        tier,
        {"fwd": work.embedding_fwd(B * T, T, C, e), "bwd": work.embedding_bwd(B * T, T, C, V, e)},
        problem,
        _standard(machine, ops.embedding, pytorch.embedding),
        reference.embedding,
    )


def decode(machine: Machine, B: int, H: int, T: int, D: int, tier: int) -> list[Case]:
    def problem():
        draw = _draw(machine)
        q, k, v = draw(B, H, 1, D, grad=False), draw(B, H, T, D, grad=False), draw(B, H, T, D, grad=False)
        lengths = torch.full((B,), T, device=machine.device)
        return Problem(dict(q=q, k_cache=k, v_cache=v, lengths=lengths))

    functions = _standard(machine, ops.decode_attention, pytorch.decode_attention)
    functions["SDPA, full caches"] = lambda problem: baselines.sdpa_decode
    phases = {"fwd": work.decode_attention(B, H, T, D, machine.dtype.itemsize)}
    shape = dict(B=B, H=H, T=T, D=D)
    return function_cases("decode_attention", shape, tier, phases, problem, functions, reference.decode_attention)
