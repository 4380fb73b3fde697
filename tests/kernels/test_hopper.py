"""kernels/hopper against float64: run in Python in random orders without a GPU (gluon_model), and on one as they are.

Interpreted kernels know no Gluon, so these are ordinary tests.
"""

import math

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="Triton is not to be had on this platform")

from fastgpt.ops import hopper, reference

if not hopper.has_a_known_triton():
    pytest.skip("this Triton's Gluon is not known", allow_module_level=True)

from fastgpt.kernels.attention import unpack
from fastgpt.kernels.hopper import attention, linear_gelu, linear_gelu_backward, pipeline
from fastgpt.testing import assert_accurate
from tests.kernels.attention_checks import magnitudes
from tests.kernels.gluon_model import modelled

HALVES = [torch.bfloat16, torch.float16]
FORMS = list(attention.FORMS)


def packed(batch, time, heads, dim, dtype, device="cpu", more=0):
    """q, k, v as views of a packed projection, in memory with `more` rows of NaN behind each sequence."""
    qkv = torch.full((batch, time + more, 3 * heads * dim), math.nan, dtype=dtype, device=device)
    qkv[:, :time] = torch.randn(batch, time, 3 * heads * dim).to(device, dtype)
    return unpack(qkv[:, :time], 3, heads)


def attend(q, k, v, block_m, scale=None, more=0):
    """o and lse; behind each sequence of o `more` rows must stay as they were."""
    batch, heads, time, dim = q.shape
    out = torch.full((batch, time + more, heads * dim), math.nan, dtype=q.dtype, device=q.device)
    (o,) = unpack(out[:, :time], 1, heads)
    lse = torch.full((batch, heads, time), math.nan, device=q.device)
    attention.attention_fwd(q, k, v, o, lse, dim**-0.5 if scale is None else scale, block_m)
    assert out[:, time:].isnan().all()
    return o, lse


def check_attention(q, k, v, o, lse, scale=None):
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    wide = [t.double() for t in (q, k, v)]
    exact = reference.causal_attention(*wide, scale=scale)
    theirs = reference.causal_attention(q, k, v, scale=scale)
    (size, *_), largest = magnitudes(*wide, torch.zeros_like(wide[0]), q.dtype, scale=scale)
    assert_accurate(o, exact, theirs, size, logit_max=largest, name="o")
    hidden = ~torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril()
    sums = (wide[0] @ wide[1].mT * scale).masked_fill(hidden, -math.inf).logsumexp(-1) / math.log(2)
    assert_accurate(lse, sums, magnitude=sums.abs() + 4, name="lse")


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("time", [1, 2, 63, 64, 65, 127, 128, 129, 191, 193, 300, 385, 577])
def test_attention_at_any_length(form, time):
    """Two programs share out what there is, so that a ring goes on from one item to the next."""
    dim, block_m = form
    for dtype in HALVES:
        q, k, v = packed(1, time, 3, dim, dtype, more=5)
        with modelled(seed=time):
            o, lse = attend(q, k, v, block_m, more=5)
        check_attention(q, k, v, o, lse)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_attention_in_every_order_has_the_same_bits(form):
    dim, block_m = form
    q, k, v = packed(2, 450, 2, dim, torch.bfloat16)
    with modelled(seed=0, multiprocessors=1):
        expected = attend(q, k, v, block_m)
    for seed in range(1, 9):
        with modelled(seed, multiprocessors=1 + seed % 3):
            got = attend(q, k, v, block_m)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_a_second_launch_is_of_its_own_arguments():
    """What the first one compiled is launched again, for other lengths, batches, addresses and scales."""
    with modelled():
        for batch, time, heads, scale in ((1, 70, 2, 0.1), (2, 300, 1, 0.2), (3, 64, 3, 0.1)):
            q, k, v = packed(batch, time, heads, 64, torch.bfloat16)
            check_attention(q, k, v, *attend(q, k, v, 128, scale), scale)
        for rows in (200, 31):
            x, w_in, b_in, dy, w_out, pre = mlp_tensors(rows, 136, 512, torch.bfloat16)
            check_forward(x, w_in, b_in, *forward(x, w_in, b_in, True), True)
            check_backward(dy, w_out, pre, *linear_gelu_backward.linear_gelu_bwd(dy, w_out, pre, True), True)


def test_packed_attention_has_the_bits_of_the_unpacked():
    qkv = torch.randn(2, 77, 3 * 3 * 64).to(torch.bfloat16)
    out, lse = torch.empty(2, 77, 3 * 64, dtype=qkv.dtype), torch.empty(2, 3, 77)
    with modelled():
        attention.attention_qkv_fwd(qkv, out, lse, 3, 0.125, 128)
        o, expected = attend(*unpack(qkv, 3, 3), 128)
    assert torch.equal(out, o.transpose(1, 2).flatten(-2)) and torch.equal(lse, expected)


def test_a_part_of_a_projection_lies_where_its_view_does():
    """The copy engine is told an address: on a card nothing else says that it is the right one."""
    qkv = torch.randn(3, 7, 3 * 128).to(torch.bfloat16)[1:]
    for i in range(3):
        view, part = qkv.narrow(-1, i * 128, 128), pipeline.Part(qkv, i * 128)
        given = pipeline.Map(part, [2, 7, 2, 64], [7 * 384, 384, 64, 1], (1, 64, 1, 64))
        assert part.data_ptr() == given.checked().base.data_ptr() == view.data_ptr()
        assert torch.equal(part.as_strided(view.shape, view.stride()), view)


def test_attention_hears_its_scale_and_large_scores():
    q, k, v = packed(1, 200, 1, 64, torch.float16)
    for factor, scale in ((1.0, 0.5), (6.0, None)):
        with modelled():
            o, lse = attend(q * factor, k * factor, v, 128, scale)
        check_attention(q * factor, k * factor, v, o, lse, scale)


def test_attention_reads_any_nested_strides():
    """One batch, head or token has any stride; every other channel's head belongs to another tensor."""
    for batch, time, heads in ((1, 70, 1), (1, 1, 2), (3, 1, 1), (2, 130, 1)):
        wide = torch.randn(3, batch, time + 3, 2 * heads, 64).to(torch.bfloat16)
        q, k, v = wide[:, :, :time, ::2].transpose(2, 3)
        with modelled():
            got = attend(q, k, v, 128)
        check_attention(q, k, v, *got)


# The MLP's first matmul


def mlp_tensors(rows, channels, hidden, dtype, device="cpu"):
    """x, w_in, b_in, dy, w_out and pre, so scaled that pre is of size 1."""
    shapes = ((rows, channels), (hidden, channels), (hidden,), (rows, channels), (channels, hidden), (rows, hidden))
    scales = (1.0, channels**-0.5, 1.0, 1.0, channels**-0.5, 2.0)
    return [(torch.randn(shape) * s).to(device, dtype) for shape, s in zip(shapes, scales, strict=True)]


def guarded(rows, columns, dtype, device):
    """A matrix of NaN, and what lies behind it in memory."""
    whole = torch.full((rows + 40, columns), math.nan, dtype=dtype, device=device)
    return whole[:rows], whole[rows:]


def forward(x, w_in, b_in, tanh):
    (pre, behind), (act, behind_act) = (guarded(len(x), len(w_in), x.dtype, x.device) for _ in range(2))
    linear_gelu.linear_gelu_fwd(x, w_in, b_in, tanh, pre, act)
    assert behind.isnan().all() and behind_act.isnan().all()
    return pre, act


def check_forward(x, w_in, b_in, pre, act, tanh):
    wide = [t.double() for t in (x, w_in, b_in)]
    sizes = wide[0].abs() @ wide[1].abs().T + wide[2].abs()
    assert_accurate(pre, wide[0] @ wide[1].T + wide[2], magnitude=sizes, name="pre")
    exact = F.gelu(pre.double(), approximate="tanh" if tanh else "none")
    assert_accurate(act, exact, magnitude=exact.abs() + torch.finfo(act.dtype).tiny, name="act")


def check_backward(dy, w_out, pre, dpre, sums, tanh):
    z = pre.double().requires_grad_()
    F.gelu(z, approximate="tanh" if tanh else "none").backward(dy.double() @ w_out.double())
    sizes = 1.13 * (dy.double().abs() @ w_out.double().abs())
    assert_accurate(dpre, z.grad, magnitude=sizes, name="dpre")
    assert_accurate(sums.sum(0), z.grad.sum(0), magnitude=sizes.sum(0), name="sums")


@pytest.mark.parametrize("tanh", [True, False], ids=["tanh", "erf"])
@pytest.mark.parametrize(("rows", "channels"), [(1, 64), (63, 8), (127, 200), (129, 128), (300, 320), (897, 72)])
def test_linear_gelu_at_any_number_of_rows(rows, channels, tanh):
    """Channels are no multiple of a step's 64, and of one step, several or more than the ring holds."""
    for dtype in HALVES:
        x, w_in, b_in, dy, w_out, pre = mlp_tensors(rows, channels, 512, dtype)
        with modelled(seed=rows, multiprocessors=5):
            check_forward(x, w_in, b_in, *forward(x, w_in, b_in, tanh), tanh)
            check_backward(dy, w_out, pre, *linear_gelu_backward.linear_gelu_bwd(dy, w_out, pre, tanh), tanh)


def test_linear_gelu_in_every_order_has_the_same_bits():
    x, w_in, b_in, dy, w_out, pre = mlp_tensors(520, 200, 256, torch.bfloat16)
    found = []
    for seed in range(8):
        with modelled(seed, multiprocessors=2 + seed % 3):
            backward = linear_gelu_backward.linear_gelu_bwd(dy, w_out, pre, True)
            found.append([*forward(x, w_in, b_in, True), *backward])
    assert all(torch.equal(a, b) for got in found[1:] for a, b in zip(got, found[0], strict=True))


@pytest.mark.parametrize("tanh", [True, False], ids=["tanh", "erf"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_gelu_and_its_derivative_in_the_tails(tanh, dtype):
    """Of a product with one channel that is the point itself; what a float16 holds of the tail, infinities and NaN."""
    points = torch.cat([torch.linspace(-12, 12, 509), torch.tensor([1e4, -1e4, math.nan])]).to(dtype)
    approximate = "tanh" if tanh else "none"
    x, w_in = torch.zeros(2, 8, dtype=dtype), torch.zeros(512, 8, dtype=dtype)
    x[0, 0], x[1, 1], w_in[:, 0] = 1.0, 1.0, points
    w_in[:, 1], bias = w_in[:, 0].flip(0), torch.zeros(512, dtype=dtype)
    with modelled():
        pre, act = forward(x, w_in.nan_to_num(0.5), bias, tanh)
    exact = F.gelu(pre.double(), approximate=approximate)
    assert_accurate(act, exact, magnitude=exact.abs() + torch.finfo(dtype).tiny)
    pre = torch.stack([points, points.flip(0)])
    dy, w_out = torch.zeros(2, 8, dtype=dtype), torch.zeros(8, 512, dtype=dtype)
    dy[:, 0], w_out[0] = 1.0, 1.0
    with modelled():
        dpre, _ = linear_gelu_backward.linear_gelu_bwd(dy, w_out, pre, tanh)
    z = pre.double().requires_grad_()
    F.gelu(z, approximate=approximate).sum().backward()
    assert torch.equal(dpre.isnan(), pre.isnan())
    there = ~pre.isnan()
    assert_accurate(dpre[there], z.grad[there], magnitude=torch.ones_like(z.grad[there]))
