"""kernels/linear_gelu.py, the matmuls that end in GELU, by the tests of the MLP that they are part of."""

import itertools

import pytest
import torch

from fastgpt import ops
from tests.kernels.test_mlp import DTYPES, check, operands, run

pytest.importorskip("triton", reason="Triton is not to be had on this platform")

from fastgpt.kernels import linear_gelu, mlp
from fastgpt.kernels.launch import capability


@pytest.fixture(autouse=True)
def fused(monkeypatch):
    """As if both matmuls had been measured to win; the other road is out of reach."""
    monkeypatch.setattr(
        linear_gelu, "measured_tiles", lambda kernel, x, hidden: linear_gelu.candidate(x.dtype, capability(x))
    )
    for other in ("_gelu", "_gelu_backward"):
        monkeypatch.setattr(mlp, other, None)


@pytest.mark.parametrize(("channels", "hidden"), [(1, 1), (20, 80), (48, 192), (20, 50), (16, 300)])
def test_widths(channels, hidden, device):
    """One step over the channels and several, whole ones and not; tiles of 16 by 32 that do not fit."""
    for dtype in DTYPES:
        check(operands((3, 5), channels, hidden, dtype, device))


@pytest.mark.parametrize("rows", [1, 16, 17, 150])
def test_row_counts(rows, device):
    """150 rows are ten rows of tiles, a band of eight and one of two, over which three programs walk."""
    check(operands((rows,), 16, 70, torch.float32, device))


@pytest.mark.parametrize("approximate", ["tanh", "none"])
@pytest.mark.parametrize("recompute", [False, True])
def test_both_gelus_recomputed_or_not(approximate, recompute, device):
    for dtype in DTYPES:
        check(operands((20,), 16, 40, dtype, device), approximate=approximate, recompute=recompute)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_recompute_changes_no_bit(dtype, device):
    """The activation that is made again comes from pre as it was rounded, and so does the first one."""
    tensors = operands((20,), 16, 40, dtype, device)
    kept, made = (run(ops.gelu_mlp, tensors[:5], tensors[5], backend="triton", recompute=r) for r in (False, True))
    assert all(torch.equal(a, b) for a, b in zip(kept, made, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_are_kept_in_float32(dtype, device):
    """1024 ones in bfloat16 end at 256; the GELU of so large a number is itself."""
    x, w_in, w_out = (torch.ones(shape, dtype=dtype, device=device) for shape in ((16, 1024), (32, 1024), (1024, 32)))
    _, _, activation = mlp.gelu_mlp_fwd(x, w_in, None, w_out, None, True, False)
    assert torch.equal(activation, torch.full_like(activation, 1024))


def test_without_a_bias(device):
    tensors = operands((20,), 16, 40, torch.float32, device)
    tensors[2] = None
    check(tensors)


def test_any_strides_give_the_same_bits(device):
    """Conv1D's transposed weights, a strided x, an expanded gradient."""
    x, w_in, b_in, w_out, b_out, dy = operands((4, 6), 16, 40, torch.float32, device)
    strided = [
        x.transpose(0, 1).contiguous().transpose(0, 1),
        w_in.t().contiguous().t(),
        b_in.repeat_interleave(2)[::2],
        w_out.t().contiguous().t(),
        b_out,
    ]
    for grad in (dy, dy[:1, :1, :1].expand_as(dy)):
        got = run(ops.gelu_mlp, strided, grad, backend="triton")
        expected = run(ops.gelu_mlp, [x, w_in, b_in, w_out, b_out], grad.contiguous(), backend="triton")
        assert torch.equal(got[3], expected[3])  # db_in comes from these kernels alone
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_an_empty_batch_takes_the_other_road(device, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(linear_gelu, "measured_tiles", lambda *args: linear_gelu.candidate(torch.float32, None))
    tensors = operands((0,), 16, 40, torch.float32, device)
    y, dx, *grads = run(ops.gelu_mlp, tensors[:5], tensors[5], backend="triton")
    assert y.shape == dx.shape == (0, 16) and not any(grad.any() for grad in grads)


def test_the_tiles_of_a_gpu_too(device, monkeypatch):
    """What is compiled for Hopper, on a shape of one and a half tiles each way."""
    tiles = linear_gelu.candidate(torch.bfloat16, 90)
    monkeypatch.setattr(linear_gelu, "measured_tiles", lambda *args: tiles)
    for dtype in (torch.float32, torch.bfloat16) if device.type == "cpu" else (torch.bfloat16,):
        check(operands((200,), 80, 200, dtype, device))


@pytest.mark.interpreter
def test_gradcheck_in_float64():
    tensors = [t.double().requires_grad_() for t in operands((5,), 4, 6, torch.float32, "cpu")[:5]]
    for options in itertools.product(("tanh", "none"), (False, True)):
        call = lambda *t, o=options: ops.gelu_mlp(*t, approximate=o[0], recompute=o[1], backend="triton")  # noqa: E731
        assert torch.autograd.gradcheck(call, tensors, fast_mode=True)


def test_float32_stays_float32(device):
    """Its products are IEEE unless the user allowed TF32, which the sanitizer emulates."""
    x, w_in, b_in, w_out, b_out, _ = operands((20,), 64, 40, torch.float32, device)
    ieee = ops.gelu_mlp(x, w_in, b_in, w_out, b_out, backend="triton")
    torch.set_float32_matmul_precision("high")
    try:
        tf32 = ops.gelu_mlp(x, w_in, b_in, w_out, b_out, backend="triton")
    finally:
        torch.set_float32_matmul_precision("highest")
    wide = ops.gelu_mlp(*(t.double().cpu() for t in (x, w_in, b_in, w_out, b_out)), backend="torch")
    error = lambda y: ((y.cpu() - wide).norm() / wide.norm()).item()  # noqa: E731
    assert error(ieee) < 1e-6 < 1e-4 < error(tf32)


@pytest.mark.gpu
@pytest.mark.parametrize(("channels", "hidden"), [(768, 3072), (1600, 6400)])
def test_the_sizes_that_people_train(channels, hidden):
    for dtype in DTYPES:
        check(operands((4, 512), channels, hidden, dtype, "cuda"))
