"""kernels/cross_entropy.py: the fallback's tests on the kernel, and what only a kernel can get wrong."""

import math

import pytest
import torch

from fastgpt import ops
from fastgpt.testing import assert_accurate
from tests.ops.test_loss import check, check_sure, head, sure

pytest.importorskip("triton", reason="Triton is not to be had on this platform")

from fastgpt.kernels import cross_entropy
from fastgpt.ops import autograd
from tests.kernels.alike import alike

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("vocab", [2, 65, 257, 2049])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_loss_and_gradients(vocab, reduction, device):
    for dtype in DTYPES:
        upstream = torch.randn(20, device=device) if reduction == "none" else torch.tensor(3.7, device=device)
        check(*head(20, 16, vocab, dtype, scale=0.3, device=device), upstream, reduction, backend="triton")


@pytest.mark.parametrize(("label_smoothing", "z_loss"), [(0.1, 0.0), (0.0, 1e-2), (0.2, 1e-3)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_smoothing_and_z_loss(label_smoothing, z_loss, reduction, device):
    upstream = torch.randn(20, device=device) if reduction == "none" else torch.tensor(3.7, device=device)
    options = dict(label_smoothing=label_smoothing, z_loss=z_loss)
    check(*head(20, 16, 257, torch.float32, scale=0.3, device=device), upstream, reduction, backend="triton", **options)


@pytest.mark.parametrize("label_smoothing", [0.0, 1e-5])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_loss_near_zero_keeps_its_digits(reduction, label_smoothing, device, monkeypatch):
    monkeypatch.setattr(cross_entropy, "_tiles", lambda vocab: (128, 4))
    check_sure(*sure(20, 257, device=device), reduction, "triton", label_smoothing)


@pytest.mark.parametrize("vocab", [50257, 50304])
def test_a_few_rows_of_gpt2s_vocabulary(vocab, device):
    upstream = torch.tensor(3.7, device=device)
    check(*head(3, 16, vocab, torch.bfloat16, scale=0.3, device=device), upstream, "mean", "triton", z_loss=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("vocab", [50257, 50304])
def test_the_real_vocabulary(vocab):
    upstream = torch.tensor(3.7 * 2**12).cuda()  # as a GradScaler's: float16 has no numbers for a gradient of 1e-8
    for dtype in DTYPES:
        check(*head(2048, 768, vocab, dtype, scale=0.03, device="cuda"), upstream, "mean", "triton")


def test_several_blocks_and_chunks(device, monkeypatch):
    """Blocks of 128 logits, and 150 rows in three chunks, the last one short."""
    monkeypatch.setattr(autograd, "_FEWEST_ROWS", 64)
    monkeypatch.setattr(cross_entropy, "_tiles", lambda vocab: (128, 4))
    upstream = torch.tensor(1.0, device=device)
    check(*head(150, 16, 300, torch.float32, scale=0.3, device=device), upstream, "mean", backend="triton")


def rows(logits, targets, row_grads=None, ignore_index=-100, label_smoothing=0.0, z_loss=0.0, vocab=None):
    losses = torch.full((len(logits),), math.nan, device=logits.device)
    out = cross_entropy.cross_entropy_rows(
        logits, vocab or logits.shape[1], targets, row_grads, ignore_index, label_smoothing, z_loss, losses
    )
    return losses, out


def test_a_common_offset_and_large_logits(device):
    z, targets = torch.randn(5, 65, device=device), torch.tensor([0, 64, 3, 9, 9], device=device)
    for offset in (0.0, 200.0, -200.0, 1e4):
        shifted = z + offset
        exact = torch.nn.functional.cross_entropy(shifted.double(), targets, reduction="none").cpu()
        losses, _ = rows(shifted.clone(), targets)
        assert_accurate(losses, exact, magnitude=exact.abs() + 4 + abs(offset))


def test_without_row_grads_the_logits_stay(device):
    z, targets = torch.randn(5, 65, device=device), torch.tensor([0, 64, 3, 9, 9], device=device)
    _, out = rows(z.clone(), targets)
    assert torch.equal(out, z)


def test_ignored_rows_and_targets_out_of_range(device):
    z = torch.randn(6, 65, device=device)
    targets = torch.tensor([3, -100, 65, -1, 2**40, 64], device=device)
    losses, dz = rows(z.clone(), targets, torch.ones(6, device=device))
    assert losses.isnan().tolist() == [False, False, True, True, True, False]
    assert losses[1] == 0 and not dz[1].any()
    assert dz.isnan().all(1).tolist() == losses.isnan().tolist()
    assert dz[0].isfinite().all() and dz[5].isfinite().all()


def test_the_padding_of_a_row_is_not_read_and_gets_zeros(device):
    """Rows of 65 logits in a buffer of 128, as linear_cross_entropy pads them."""
    buffer = torch.full((4, 128), math.nan, device=device)
    buffer[:, :65] = torch.randn(4, 65, device=device)
    targets = torch.tensor([0, 64, 3, 9], device=device)
    expected = rows(buffer[:, :65].clone(), targets, torch.ones(4, device=device))
    losses, dz = rows(buffer, targets, torch.ones(4, device=device), vocab=65)
    assert alike(losses, expected[0]) and alike(dz[:, :65], expected[1])
    assert torch.equal(dz[:, 65:], torch.zeros(4, 63, device=device))


def test_int32_and_strided_targets_and_row_grads(device):
    z = torch.randn(6, 65, device=device)
    targets, grads = torch.tensor([3, -100, 7, 1, 0, 64], device=device), torch.randn(6, device=device)
    expected = rows(z.clone(), targets, grads)
    strided = [t.repeat_interleave(2)[::2] for t in (targets.int(), grads)]
    assert all(torch.equal(a, b) for a, b in zip(rows(z.clone(), *strided), expected, strict=True))
    ones = torch.ones(6, device=device)
    expected, got = (rows(z.clone(), targets, grads) for grads in (ones, ones[:1].expand(6)))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.interpreter
def test_gradcheck_in_float64():
    x, weight, targets = head(6, 4, 9, torch.float64, ignored=3)

    def loss(x, weight):
        return ops.linear_cross_entropy(x, weight, targets, label_smoothing=0.1, z_loss=0.01, backend="triton")

    assert torch.autograd.gradcheck(loss, (x, weight), fast_mode=True)


def test_opcheck(device):
    x, weight, targets = (t.detach() for t in head(20, 8, 65, torch.float32, device=device))
    for row_grads, needs in ((None, (False, False)), (torch.ones(20, device=device), (True, True))):
        args = (x, weight, targets, row_grads, -100, 0.1, 0.01, torch.float32, *needs)
        torch.library.opcheck(autograd.chunked_losses, args)


def test_all_targets_ignored(device):
    x, weight, targets = head(10, 8, 65, torch.float32, device=device)
    loss = ops.linear_cross_entropy(x, weight, torch.full_like(targets, -100), backend="triton")
    assert loss.isnan()
    loss.backward()
    assert torch.equal(x.grad, torch.zeros_like(x)) and torch.equal(weight.grad, torch.zeros_like(weight))


def test_no_rows(device):
    x, weight, _ = head(10, 8, 65, torch.float32, device=device)
    empty = ops.linear_cross_entropy(x[:0], weight, torch.zeros(0, dtype=torch.long, device=device), backend="triton")
    assert empty.isnan()
