"""A thousand times the same bits: what a race or a read of memory that nobody wrote would not give."""

import pytest
import torch

from fastgpt import ops

pytest.importorskip("triton", reason="Triton is not to be had on this platform")


def draw(*shape, scale=1.0):
    return (torch.randn(shape, device="cuda") * scale).bfloat16().requires_grad_()


def attention(**options):
    qkv = draw(4, 300, 3 * 6 * 64)
    return lambda: ops.causal_attention_qkv(qkv, 6, **options), [qkv]


def attention_and_a_bias():
    qkv, bias = draw(4, 300, 3 * 6 * 64), draw(3 * 6 * 64)
    return lambda: ops.causal_attention_qkv(qkv, 6, qkv_bias=bias), [qkv, bias]


def add_layer_norm():
    given = [draw(1500, 768), draw(1500, 768), draw(768), draw(768)]
    return lambda: torch.cat(ops.add_layer_norm(*given)), given


def gelu_mlp():
    given = [draw(1500, 256), draw(1024, 256, scale=0.1), draw(1024), draw(256, 1024, scale=0.1)]
    return lambda: ops.gelu_mlp(*given), given


def linear_cross_entropy():
    x, weight = draw(700, 128), draw(5003, 128, scale=0.1)
    targets = torch.arange(700, device="cuda") * 7919 % 5003
    return lambda: ops.linear_cross_entropy(x, weight, targets), [x, weight]


def embedding():
    ids, token, position = torch.arange(4000, device="cuda").view(4, 1000) % 7, draw(9, 768), draw(1000, 768)
    return lambda: ops.embedding(ids, token, position), [token, position]


FUNCTIONS = {
    "attention": attention,
    "attention, a bias": attention_and_a_bias,
    "attention, dropout": lambda: attention(dropout_p=0.1, seed=3),
    "attention, documents": lambda: attention(documents=torch.arange(300, device="cuda").expand(4, 300) // 70),
    "add_layer_norm": add_layer_norm,
    "gelu_mlp": gelu_mlp,
    "linear_cross_entropy": linear_cross_entropy,
    "embedding": embedding,
}


@pytest.mark.gpu
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_thousand_runs_give_the_same_bits(name):
    function, leaves = FUNCTIONS[name]()
    out = function()
    dout = torch.randn_like(out)
    expected = [out.detach(), *torch.autograd.grad(out, leaves, dout)]
    differs = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(1000):
        out = function()
        for got, first in zip([out.detach(), *torch.autograd.grad(out, leaves, dout)], expected, strict=True):
            differs += (got != first).any() | got.isnan().any()
    assert differs.item() == 0
