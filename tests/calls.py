"""A small call of each public function of fastgpt.ops: operands by name, upstream gradients d0 and d1, and options."""

import torch

from fastgpt import ops


def numbers(device, dtype, **shapes):
    return {name: torch.randn(shape).to(device, dtype) for name, shape in shapes.items()}


def layer_norm(device, dtype):
    return numbers(device, dtype, x=(3, 4, 48), weight=(48,), bias=(48,), d0=(3, 4, 48)), {}


def wide_layer_norm(device, dtype):
    return numbers(device, dtype, x=(3, 4104), weight=(4104,), bias=(4104,), d0=(3, 4104)), {}


def add_layer_norm(device, dtype):
    rows, row = (3, 4, 48), (48,)
    shapes = dict(x=rows, residual=rows, weight=row, bias=row, x_bias=row, d0=rows, d1=rows)
    return numbers(device, dtype, **shapes), dict(dropout_p=0.3, seed=5)


def wide_add_layer_norm(device, dtype):
    rows, row = (3, 4104), (4104,)
    shapes = dict(x=rows, residual=rows, weight=row, bias=row, x_bias=row, d0=rows, d1=rows)
    return numbers(device, dtype, **shapes), dict(dropout_p=0.3, seed=5)


def causal_attention(device, dtype):
    shapes = dict(q=(2, 2, 17, 12), k=(2, 1, 19, 12), v=(2, 1, 19, 12), d0=(2, 2, 17, 12))
    return numbers(device, dtype, **shapes), {}


def masked_attention(device, dtype):
    shape = (2, 2, 17, 12)
    documents = torch.arange(17) // torch.tensor([[8], [5]])
    masks = dict(key_mask=(torch.rand(2, 17) < 0.8).to(device), documents=documents.to(device))
    return {**numbers(device, dtype, q=shape, k=shape, v=shape, d0=shape), **masks}, dict(dropout_p=0.2, seed=3)


def causal_attention_qkv(device, dtype):
    mask = dict(key_mask=(torch.rand(2, 17) < 0.8).to(device))
    return {**numbers(device, dtype, qkv=(2, 17, 72), qkv_bias=(72,), d0=(2, 17, 24)), **mask}, dict(heads=2)


def decode_attention(device, dtype):
    shapes = dict(q=(3, 4, 2, 16), k_cache=(3, 2, 40, 16), v_cache=(3, 2, 40, 16))
    return {**numbers(device, dtype, **shapes), "lengths": torch.tensor([40, 17, 33], device=device)}, {}


def gelu_mlp(device, dtype):
    shapes = dict(x=(2, 5, 16), w_in=(40, 16), b_in=(40,), w_out=(16, 40), b_out=(16,), d0=(2, 5, 16))
    return numbers(device, dtype, **shapes), {}


def linear_cross_entropy(device, dtype):
    targets = torch.randint(50, (2, 4), device=device)
    targets[0, 1] = -100
    options = dict(reduction="none", label_smoothing=0.1, z_loss=0.01)
    return {**numbers(device, dtype, x=(2, 4, 16), weight=(50, 16), d0=(2, 4)), "targets": targets}, options


def embedding(device, dtype):
    ids, positions = (torch.randint(size, (2, 5), device=device) for size in (9, 8))
    weights = numbers(device, dtype, token_weight=(9, 20), position_weight=(8, 20), d0=(2, 5, 20))
    return {"ids": ids, **weights, "positions": positions}, dict(dropout_p=0.3, seed=2)


CALLS = [
    layer_norm, wide_layer_norm, add_layer_norm, wide_add_layer_norm, causal_attention, masked_attention,
    causal_attention_qkv, decode_attention, gelu_mlp, linear_cross_entropy, embedding,
]  # fmt: skip
FUNCTIONS = {"wide_layer_norm": "layer_norm", "wide_add_layer_norm": "add_layer_norm"}
FUNCTIONS |= {"masked_attention": "causal_attention"}


def results(name, operands, options, backend):
    """The outputs, and the gradient of each operand that can have one, for the upstream gradients d0, d1."""
    upstream = [operands[key] for key in ("d0", "d1") if key in operands]
    given = {key: value.detach() for key, value in operands.items() if key not in ("d0", "d1")}
    leaves = [value.requires_grad_() for value in given.values() if value.is_floating_point() and upstream]
    outputs = getattr(ops, FUNCTIONS.get(name, name))(**given, **options, backend=backend)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    upstream = [gradient.to(output.dtype) for gradient, output in zip(upstream, outputs, strict=False)]
    return [*outputs, *(torch.autograd.grad(outputs, leaves, upstream) if leaves else ())]
