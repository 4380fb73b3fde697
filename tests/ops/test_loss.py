"""linear_cross_entropy's fallback: PyTorch's loss and gradients, in a fraction of the memory."""

import itertools
import json

import pytest
import torch
import torch.nn.functional as F

from fastgpt import ops
from fastgpt.ops import loss, reference
from fastgpt.ops.cpu import logits
from fastgpt.testing import assert_accurate


def head(rows, channels, vocab, dtype, ignored=7, scale=1.0, device="cpu"):
    x = (scale * torch.randn(rows, channels)).to(device, dtype).requires_grad_()
    weight = torch.randn(vocab, channels).to(device, dtype).requires_grad_()
    targets = torch.randint(0, vocab, (rows,))
    targets[:2] = torch.tensor([0, vocab - 1])
    targets[ignored::5] = -100
    return x, weight, targets.to(device)


@pytest.mark.parametrize("pads", [False, True])
def test_dweight_is_no_view(pads):
    """Only then does autograd add a tied embedding's gradient to it in place, and not hold both beside their sum."""
    x, weight = torch.randn(5, 4), torch.randn(70, 4)
    dweight = loss.outputs(x, weight, torch.float32, True, True, pads)[2]
    assert dweight.shape == (70, 4) and dweight.is_contiguous() and not dweight._is_view()
    assert dweight.untyped_storage().nbytes() == (128 if pads else 70) * 4 * 4


def test_a_second_derivative_of_what_autocast_computed():
    """The backward is under no autocast, and computes all in the forward's dtype again."""
    x, weight, targets = head(12, 8, 20, torch.float32)
    found = []
    for function in (ops.linear_cross_entropy, lambda x, w, t: F.cross_entropy(F.linear(x, w).float(), t)):
        with torch.autocast("cpu", torch.bfloat16):
            loss = function(x, weight, targets)
        dx, dweight = torch.autograd.grad(loss, (x, weight), create_graph=True)
        found.append(torch.autograd.grad(dx.square().sum() + dweight.square().sum(), (x, weight)))
    for ours, theirs in zip(*found, strict=True):
        assert (ours - theirs).norm() < 0.05 * theirs.norm()


def gradients(loss, x, weight, upstream):
    return torch.autograd.grad((loss * upstream.to(loss.dtype)).sum(), (x, weight))


def check(x, weight, targets, upstream, reduction, backend="torch", **options):
    """Loss and both gradients against float64, by PyTorch's own error in the same dtype."""
    wide = [t.detach().double().requires_grad_() for t in (x, weight)]
    got = ops.linear_cross_entropy(x, weight, targets, reduction=reduction, backend=backend, **options)
    exact, theirs = (
        reference.linear_cross_entropy(*leaves, targets, reduction=reduction, **options)
        for leaves in (wide, (x, weight))
    )
    rows = (t.reshape(-1, 1) for t in (got, exact, theirs))
    added_up = 10 * (len(x) if reduction == "sum" else 1)  # logits reach some 10, and each row's loss is off by theirs
    assert_accurate(*rows, magnitude=exact.abs().reshape(-1, 1) + added_up, name="loss")

    logits = F.linear(*wide).detach()
    shares = logits.softmax(-1) + F.one_hot(targets.clamp(min=0), len(weight))  # no cancellation
    shares = shares * (targets != -100)[:, None] * upstream.abs().double().reshape(-1, 1)
    if reduction == "mean":
        shares = shares / (targets != -100).sum()
    sizes = (shares @ wide[1].abs(), shares.T @ wide[0].abs())
    for name, size, a, b, c in zip(
        ("dx", "dweight"),
        sizes,
        gradients(got, x, weight, upstream),
        gradients(exact, *wide, upstream),
        gradients(theirs, x, weight, upstream),
        strict=True,
    ):
        assert a.dtype == x.dtype
        assert_accurate(a, b, c, size, logit_max=logits.abs().max().item(), name=name)


@pytest.mark.parametrize("vocab", [65, 257, 2049])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(("label_smoothing", "z_loss"), [(0.0, 0.0), (0.1, 0.0), (0.0, 1e-2), (0.2, 1e-3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("way", ["at once", "by rows"])
def test_loss_and_gradients(vocab, reduction, label_smoothing, z_loss, dtype, way, monkeypatch):
    """At once and in many chunks, the last one short, in passes over seven rows; the upstream gradient is not 1."""
    rows = 150
    in_chunks(way, vocab, monkeypatch)
    upstream = torch.randn(rows) if reduction == "none" else torch.tensor(3.7)
    options = dict(label_smoothing=label_smoothing, z_loss=z_loss)
    check(*head(rows, 20, vocab, dtype, scale=0.3), upstream, reduction, **options)


def in_chunks(way, vocab, monkeypatch):
    """By four chunks and one row, if so, and passes over seven rows of float32 logits."""
    if way == "by rows":
        monkeypatch.setattr(logits, "_AT_ONCE", 0)
    monkeypatch.setattr(logits, "_IN_CACHE", 7 * 4 * vocab)


def test_the_real_vocabulary():
    check(*head(70, 48, 50257, torch.float32, scale=0.3), torch.tensor(1.0), "mean")


def test_a_common_offset_of_the_logits_costs_nothing():
    x, weight, targets = head(40, 20, 65, torch.float32)
    shifted = torch.cat((weight, torch.full((65, 1), 200.0)), 1)
    got = ops.linear_cross_entropy(torch.cat((x, torch.ones(40, 1)), 1), shifted, targets)
    torch.testing.assert_close(got, ops.linear_cross_entropy(x, weight, targets), rtol=1e-4, atol=1e-4)


def sure(rows, vocab, dtype=torch.float32, device="cpu"):
    """A head whose logits are exact in every dtype and reach 128, and of which each target's is 8 to 14 above all
    others: the loss is 1e-2 to 1e-5. The weight holds a row's logits as a column, and x picks that."""
    targets = torch.randint(0, vocab, (rows,))
    logits = torch.randint(86, 100, (rows, vocab)).to(torch.float64)
    gaps = torch.tensor([8.0, 10.0, 12.0, 14.0]).repeat(rows)[:rows].double()
    logits[torch.arange(rows), targets] = 100 + gaps + torch.randint(0, 15, (rows,))
    x, weight = torch.eye(rows).to(device, dtype), logits.t().contiguous().to(device, dtype)
    assert torch.equal(weight.cpu().double().t(), logits)
    return x.requires_grad_(), weight.requires_grad_(), targets.to(device)


def check_sure(x, weight, targets, reduction, backend, label_smoothing=0.0):
    """Judged by F.cross_entropy's own error in float32, which its logits do not share: they are exact."""
    options = dict(reduction=reduction, label_smoothing=label_smoothing)
    wide = [t.detach().double().requires_grad_() for t in (x, weight)]
    got = ops.linear_cross_entropy(x, weight, targets, backend=backend, **options)
    exact = F.cross_entropy(F.linear(*wide), targets, **options)
    theirs = F.cross_entropy(F.linear(x, weight).float(), targets, **options)
    one = exact.detach().reshape(-1, 1) + 1  # the sum of exponentials is 1 and a little
    assert_accurate(*(t.reshape(-1, 1) for t in (got, exact, theirs)), one, name="loss")
    shares = F.linear(*wide).detach().softmax(-1) + F.one_hot(targets, len(weight))
    shares = shares / (len(x) if reduction == "mean" else 1)
    sizes = (shares @ wide[1].detach().abs(), shares.t() @ wide[0].detach().abs())
    losses = ((got, (x, weight)), (exact, wide), (theirs, (x, weight)))
    grads = [torch.autograd.grad(loss.sum(), leaves) for loss, leaves in losses]
    for name, size, *each in zip(("dx", "dweight"), sizes, *grads, strict=True):
        assert_accurate(*each, size, name=name)


@pytest.mark.parametrize("label_smoothing", [0.0, 1e-5])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("way", ["at once", "by rows"])
def test_a_loss_near_zero_keeps_its_digits(way, reduction, label_smoothing, monkeypatch):
    in_chunks(way, 257, monkeypatch)
    check_sure(*sure(50, 257), reduction, "torch", label_smoothing)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("rows", [0, 10])
def test_all_targets_ignored(reduction, rows):
    x, weight, targets = (
        head(rows, 8, 65, torch.float32, ignored=0)
        if rows
        else (
            torch.zeros(0, 8, requires_grad=True),
            torch.randn(65, 8, requires_grad=True),
            torch.zeros(0, dtype=torch.long),
        )
    )
    targets = torch.full_like(targets, -100)
    loss = ops.linear_cross_entropy(x, weight, targets, reduction=reduction)
    expected = F.cross_entropy(F.linear(x, weight), targets, reduction=reduction)
    torch.testing.assert_close(loss, expected, equal_nan=True)
    loss.sum().backward()
    assert torch.equal(x.grad, torch.zeros_like(x)) and torch.equal(weight.grad, torch.zeros_like(weight))


def test_shapes_ids_and_ignore_index():
    x, weight, targets = head(24, 8, 65, torch.float32)
    losses = ops.linear_cross_entropy(x.view(2, 3, 4, 8), weight, targets.view(2, 3, 4).int(), reduction="none")
    assert losses.shape == (2, 3, 4) and losses.dtype == torch.float32
    torch.testing.assert_close(losses.flatten(), reference.linear_cross_entropy(x, weight, targets, reduction="none"))
    counted = targets.masked_fill(targets == -100, 3)
    expected = F.cross_entropy(F.linear(x, weight), counted, ignore_index=3)
    torch.testing.assert_close(ops.linear_cross_entropy(x, weight, counted, ignore_index=3), expected)


def test_strided_operands_and_expanded_gradients():
    _, _, targets = head(24, 8, 65, torch.float32)
    wide = torch.randn(24, 16)[:, ::2].requires_grad_()
    column = torch.randn(8, 65, requires_grad=True)
    got = ops.linear_cross_entropy(wide, column.t(), targets, reduction="none")
    expected = reference.linear_cross_entropy(wide, column.t(), targets, reduction="none")
    upstream = torch.tensor(0.5).expand(24)
    for a, b in zip(gradients(got, wide, column, upstream), gradients(expected, wide, column, upstream), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("wanted", ["x", "weight"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_frozen_operand_gets_no_gradient(wanted, reduction):
    x, weight, targets = head(24, 8, 65, torch.float32)
    ops.linear_cross_entropy(x, weight, targets, reduction=reduction).sum().backward()
    alone = {"x": x.detach(), "weight": weight.detach()}
    alone[wanted].requires_grad_()
    ops.linear_cross_entropy(alone["x"], alone["weight"], targets, reduction=reduction).sum().backward()
    assert torch.equal(alone[wanted].grad, (x if wanted == "x" else weight).grad)


def test_a_second_backward_through_a_kept_graph():
    x, weight, targets = head(24, 8, 65, torch.float32)
    loss = ops.linear_cross_entropy(x, weight, targets)
    first = torch.autograd.grad(loss, (x, weight), torch.tensor(2.0), retain_graph=True)
    kept = [t.clone() for t in first]
    second = torch.autograd.grad(loss, (x, weight), torch.tensor(2.0))
    for a, b, c in zip(first, kept, second, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_second_derivatives(reduction):
    x, weight, targets = head(6, 4, 9, torch.float64, ignored=3)

    def loss(x, weight):
        return ops.linear_cross_entropy(x, weight, targets, reduction=reduction, label_smoothing=0.1, z_loss=0.01)

    assert torch.autograd.gradcheck(loss, (x, weight))
    assert torch.autograd.gradgradcheck(loss, (x, weight))


def test_out_of_range_is_nan_where_it_cannot_be_checked(monkeypatch):
    """As on a GPU: that row's loss is NaN, the others' are right, and nothing is read out of bounds."""
    from fastgpt.ops import checks

    x, weight, targets = head(10, 8, 65, torch.float32)
    expected = ops.linear_cross_entropy(x, weight, targets, reduction="none")
    monkeypatch.setattr(checks, "in_range", lambda *args: None)
    for bad in (65, -1, 2**40):
        got = ops.linear_cross_entropy(x, weight, targets.index_fill(0, torch.tensor(4), bad), reduction="none")
        assert got[4].isnan()
        torch.testing.assert_close(got[torch.arange(10) != 4], expected[torch.arange(10) != 4])


def test_autocast_computes_logits_in_half_and_gradients_in_float32():
    x, weight, targets = head(150, 20, 257, torch.float32, scale=0.3)
    with torch.autocast("cpu", torch.bfloat16):
        loss = ops.linear_cross_entropy(x, weight, targets)
    dx, dweight = torch.autograd.grad(loss, (x, weight))
    assert (loss.dtype, dx.dtype, dweight.dtype) == (torch.float32,) * 3
    halves = [t.detach().bfloat16().requires_grad_() for t in (x, weight)]
    expected = ops.linear_cross_entropy(*halves, targets)
    assert torch.equal(loss, expected)
    torch.testing.assert_close(dx, torch.autograd.grad(expected, halves)[0].float(), rtol=2e-2, atol=1e-4)


def peak_bytes(call, folder):
    """The most bytes that the allocator had given out at once during the call, by PyTorch's own profiler."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = call()
    trace = folder / "trace.json"
    profile.export_chrome_trace(str(trace))
    events = [event for event in json.loads(trace.read_text())["traceEvents"] if event["name"] == "[memory]"]
    changes = [event["args"]["Bytes"] for event in sorted(events, key=lambda event: event["ts"])]
    del result
    return max(itertools.accumulate(changes))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(("at_once", "rows"), [(0, 64), (0, 900), (20 * 2**20, 256)])
def test_beside_the_gradients_it_holds_a_part_of_the_logits(at_once, rows, reduction, tmp_path, monkeypatch):
    hold_a_part(at_once, rows, torch.float32, reduction, tmp_path, monkeypatch)


@pytest.mark.slow  # on a CPU without bfloat16
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(("at_once", "rows"), [(0, 256), (20 * 2**20, 2560)])
def test_in_half_precision_too(at_once, rows, reduction, tmp_path, monkeypatch):
    hold_a_part(at_once, rows, torch.bfloat16, reduction, tmp_path, monkeypatch)


def hold_a_part(at_once, rows, dtype, reduction, folder, monkeypatch):
    """A quarter of the logits' bytes or `at_once`, beside dx and dweight, GPT-2's vocabulary, and what passes hold."""
    monkeypatch.setattr(logits, "_AT_ONCE", at_once)
    channels, vocab = 64, 50257
    x, weight = (torch.randn(n, channels, dtype=dtype, requires_grad=True) for n in (rows, vocab))
    targets = torch.randint(0, vocab, (rows,))
    full = rows * vocab * dtype.itemsize
    most = max(full / 4, at_once) * 1.01 + 3 * 2**20
    gradients = rows * channels * dtype.itemsize + vocab * channels * (4 + (dtype != torch.float32) * dtype.itemsize)

    def step():
        loss = ops.linear_cross_entropy(x, weight, targets, reduction=reduction)
        return loss, torch.autograd.grad(loss.sum(), (x, weight))

    def plain_step():
        loss = F.cross_entropy(F.linear(x, weight), targets, reduction=reduction)
        return loss, torch.autograd.grad(loss.sum(), (x, weight))

    halves = dtype != torch.float32
    assert (
        peak_bytes(step, folder) - gradients <= most + halves * vocab * channels * 2
    )  # a product on its way to float32
    if not halves:
        assert peak_bytes(plain_step, folder) - gradients > full  # so the count can see what it is to forbid
    with torch.no_grad():
        assert peak_bytes(lambda: ops.linear_cross_entropy(x, weight, targets), folder) <= most


def test_only_halves_are_multiplied_as_halves():
    assert not loss.multiplies(torch.float32) and not loss.multiplies(torch.float64)
