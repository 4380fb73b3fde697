"""One function of a backend is off by a hundredth: a result, or one operand's gradient. Who judges must see it."""

import inspect

import pytest
import torch

from fastgpt import ops

OFF = 1.01
PARTS = {  # results by name, then the operands that have a gradient
    "layer_norm": (("result",), ("x", "weight", "bias")),
    "add_layer_norm": (("normed", "total"), ("x", "residual", "weight", "bias")),
    "causal_attention": (("result",), ("q", "k", "v")),
    "causal_attention_qkv": (("result",), ("qkv",)),
    "decode_attention": (("result",), ()),
    "gelu_mlp": (("result",), ("x", "w_in", "b_in", "w_out", "b_out")),
    "linear_cross_entropy": (("result",), ("x", "weight")),
    "embedding": (("result",), ("token_weight", "position_weight")),
}
BREAKS = [(name, part) for name, (results, operands) in PARTS.items() for part in (*results, *operands)]


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad * OFF


def broken(right, part):
    """The function `right`, of ops or of a backend, with that part of it off."""
    signature, results = inspect.signature(right), PARTS[right.__name__][0]

    def wrong(*args, **kwargs):
        given = signature.bind(*args, **kwargs)
        if part not in results:
            given.arguments[part] = _Scaled.apply(given.arguments[part])
        outs = right(*given.args, **given.kwargs)
        if part not in results:
            return outs
        if len(results) == 1:
            return outs * OFF
        return tuple(out * (OFF if name == part else 1) for name, out in zip(results, outs, strict=True))

    wrong.__name__, wrong.__signature__ = right.__name__, signature
    return wrong


CHOSEN = [  # by themselves on the device
    pytest.param(("torch", "cpu"), id="fallback"),
    pytest.param(("triton", "cpu"), marks=pytest.mark.interpreter, id="interpreter"),
    pytest.param(("triton", "cuda"), marks=pytest.mark.gpu, id="gpu"),
]
ON_A_GPU = pytest.param(("torch", "cuda"), marks=pytest.mark.gpu, id="fallback on a gpu")


@pytest.fixture(params=[*CHOSEN, ON_A_GPU])
def backend(request):
    """A backend's name and the device that it is tried on."""
    return request.param


@pytest.fixture
def break_function(backend, monkeypatch):
    """Breaks a function of that backend; "shared loss" is the head that both backends share."""

    def break_it(name, part):
        if name == "shared loss":
            from fastgpt.ops import loss

            monkeypatch.setattr(loss, "linear_cross_entropy", broken(loss.linear_cross_entropy, part))
        else:
            module = ops.pytorch if backend[0] == "torch" else ops.autograd
            monkeypatch.setattr(module, name, broken(getattr(module, name), part))

    return break_it


SHARED = [("shared loss", part) for part in ("result", "x", "weight")]
