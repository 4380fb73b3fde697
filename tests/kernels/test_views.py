"""Every function and launcher reads each of its operands, and each gradient, by that tensor's own strides."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not to be had on this platform")

from fastgpt.kernels import cross_entropy, decode, few_rows, greedy
from tests.calls import CALLS, numbers, results
from tests.kernels.alike import alike
from tests.views import KINDS, drawn, spread


def the_same(got, expected, views, number):
    """A matmul of PyTorch's own may add up in another order at other strides, and so may a kernel on a GPU, for there
    its threads hold other elements where they can't be loaded side by side. In the interpreter the kernels may not."""
    kinds = {key: (tuple(view.shape), view.stride()) for key, view in views.items()}
    for place, (a, b) in enumerate(zip(got, expected, strict=True)):
        close = alike(a, b)
        if not close and (a.is_cuda or {"w_in", "targets"} & set(views)):
            close = _near(a, b)
        off = (a.double() - b.double()).abs().max().item()
        assert close, f"result {place} of draw {number} is off by {off:.3g} from that of contiguous copies: {kinds}"


def _near(a, b):
    if a.dtype != torch.float32:
        return (a.float() - b.float()).norm() <= 1e-3 * b.float().norm()
    return torch.allclose(a, b, rtol=1e-5, atol=1e-5 * max(1.0, b.abs().max().item()))


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
def test_functions(call, device):
    for number in range(len(KINDS)):
        operands, options = call(device, torch.float32)
        views = drawn(call.__name__, number, operands)
        copies = {key: view.contiguous() for key, view in views.items()}
        got, expected = (results(call.__name__, each, options, "triton") for each in (views, copies))
        the_same(got, expected, views, number)


ROWS = dict(x=(3, 40), branch=(3, 40), branch_bias=(40,), norm_weight=(40,), norm_bias=(40,), w=(11, 40), b=(11,))


@pytest.mark.parametrize("normed", [False, True], ids=["linear", "norm_linear"])
def test_few_rows(normed, device):
    for number in range(len(KINDS)):
        operands = numbers(device, torch.float32, **ROWS)
        if not normed:
            operands = {key: operands[key] for key in ("x", "w", "b")}
        options = dict(eps=1e-5, gelu="tanh") if normed else {}
        launch = few_rows.norm_linear if normed else few_rows.linear
        views = drawn(f"few_rows {normed}", number, operands, dense=("w",))
        assert few_rows.fits(3, views["w"])
        got = launch(**views, **options)
        expected = launch(**{key: view.contiguous() for key, view in views.items()}, **options)
        the_same(got if normed else [got], expected if normed else [expected], views, number)


def test_append(device):
    for number in range(len(KINDS)):
        operands = numbers(device, torch.float32, qkv=(2, 3, 72), k_cache=(2, 2, 9, 12), v_cache=(2, 2, 9, 12))
        operands["lengths"] = torch.tensor([5, 9], device=device)
        views = drawn("append", number, operands, written=("k_cache", "v_cache"))
        views["lengths"] = operands["lengths"]  # a row of its own in every cache
        copies = {key: view.clone(memory_format=torch.contiguous_format) for key, view in views.items()}
        decode.append(**views)
        decode.append(**copies)
        the_same(views.values(), copies.values(), views, number)


@pytest.mark.parametrize("axis", [0, 1, 2], ids=["batch", "heads", "slots"])
def test_append_past_an_offset_of_32_bits(axis, device):
    operands = numbers(device, torch.float16, qkv=(3, 1, 18), k_cache=(3, 3, 3, 2), v_cache=(3, 3, 3, 2))
    lengths = torch.tensor([3, 1, 2], dtype=torch.int32, device=device)
    for far in ("k_cache", "v_cache"):
        views = {**operands, far: spread(operands[far], axis)}
        copies = {key: view.clone(memory_format=torch.contiguous_format) for key, view in operands.items()}
        decode.append(**views, lengths=lengths)
        decode.append(**copies, lengths=lengths)
        assert torch.equal(views[far], copies[far])


def test_greedy(device):
    for number in range(len(KINDS)):
        operands = numbers(device, torch.float32, logits=(3, 50))
        operands["history"] = torch.zeros(3, 6, dtype=torch.int64, device=device)
        views = drawn("greedy", number, operands, dense=("logits",), written=("history",))
        views |= {"lengths": torch.tensor([2, 0, 5], device=device), "news": torch.zeros(3, 4, device=device).long()}
        views["last"] = torch.zeros(3, 1, dtype=torch.int64, device=device)
        copies = {key: view.clone(memory_format=torch.contiguous_format) for key, view in views.items()}
        greedy.greedy(*views.values())
        greedy.greedy(*copies.values())
        the_same(views.values(), copies.values(), views, number)


def test_cross_entropy_rows(device):
    for number in range(len(KINDS)):
        operands = numbers(device, torch.float32, logits=(3, 52), row_grads=(3,))
        operands["targets"] = torch.tensor([4, -100, 49], device=device)
        views = drawn("cross_entropy_rows", number, operands, written=("logits",))
        copies = {key: view.clone(memory_format=torch.contiguous_format) for key, view in views.items()}
        got = []
        for each in (views, copies):
            losses = torch.empty(3, device=device)
            cross_entropy.cross_entropy_rows(
                each["logits"], 50, each["targets"], each["row_grads"], -100, 0.1, 0.01, losses
            )
            got.append([losses, each["logits"]])
        the_same(*got, views, number)
