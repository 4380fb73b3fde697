"""Attention's backward in kernels/hopper against float64, run in Python in random orders without a GPU (gluon_model).

Interpreted kernels know no Gluon, so these are ordinary tests.
"""

import math

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not to be had on this platform")

from fastgpt.ops import hopper, reference

if not hopper.has_a_known_triton():
    pytest.skip("this Triton's Gluon is not known", allow_module_level=True)

from fastgpt.kernels.attention import unpack
from fastgpt.kernels.hopper import attention_backward
from fastgpt.testing import assert_accurate
from tests.kernels import attention_checks
from tests.kernels.gluon_model import modelled
from tests.kernels.test_hopper import HALVES, attend, packed

DIMS = list(attention_backward.FORMS)


def forward(q, k, v, scale=None, more=0):
    """What the forward leaves, from float64: o as `gradient` has its, and lse in base 2."""
    wide = [t.double() for t in (q, k, v)]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    hidden = ~torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril()
    lse = (wide[0] @ wide[1].mT * scale).masked_fill(hidden, -math.inf).logsumexp(-1) / math.log(2)
    return gradient(q, more, reference.causal_attention(*wide, scale=scale)), lse.float()


def gradient(q, more=0, values=None):
    """Of o, in memory (B, T, H, D) with `more` rows of NaN behind each sequence; random if there are no values."""
    batch, heads, time, dim = q.shape
    whole = torch.full((batch, time + more, heads * dim), math.nan, dtype=q.dtype, device=q.device)
    (found,) = unpack(whole[:, :time], 1, heads)
    found.copy_(torch.randn(q.shape) if values is None else values)
    return found


def differentiate(do, q, k, v, o, lse, scale=None, more=0):
    """dq, dk, dv in a packed tensor; behind each sequence `more` rows must stay as they were."""
    batch, heads, time, dim = q.shape
    whole = torch.full((batch, time + more, 3 * heads * dim), math.nan, dtype=q.dtype, device=q.device)
    grads = unpack(whole[:, :time], 3, heads)
    attention_backward.attention_bwd(do, q, k, v, o, lse, *grads, dim**-0.5 if scale is None else scale)
    assert whole[:, time:].isnan().all()
    return grads


def check(do, q, k, v, grads, scale=None):
    options = {} if scale is None else {"scale": scale}
    wide = [t.double() for t in (q, k, v, do)]
    _, *expected = attention_checks.run(*wide, reference.causal_attention, **options)
    _, *theirs = attention_checks.run(q, k, v, do, reference.causal_attention, **options)
    (_, *sizes), largest = attention_checks.magnitudes(*wide, q.dtype, **options)
    for name, got, exact, their, size in zip(("dq", "dk", "dv"), grads, expected, theirs, sizes, strict=True):
        assert_accurate(got, exact, their, size, logit_max=largest, name=name)


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("time", [1, 2, 63, 64, 65, 127, 128, 129, 191, 193, 300, 577])
def test_gradients_at_any_length(dim, time):
    """Two programs share out what there is, so that a ring goes on from one item to the next."""
    for dtype in HALVES:
        q, k, v = packed(1, time, 3, dim, dtype, more=5)
        do = gradient(q, more=5)
        o, lse = forward(q, k, v, more=5)
        with modelled(seed=time):
            grads = differentiate(do, q, k, v, o, lse, more=5)
        check(do, q, k, v, grads)


@pytest.mark.parametrize("dim", DIMS)
def test_gradients_in_every_order_have_the_same_bits(dim):
    q, k, v = packed(2, 450, 2, dim, torch.bfloat16)
    do, (o, lse) = gradient(q), forward(q, k, v)
    with modelled(seed=0, multiprocessors=1):
        expected = differentiate(do, q, k, v, o, lse)
    for seed in range(1, 7):
        with modelled(seed, multiprocessors=1 + seed % 3):
            got = differentiate(do, q, k, v, o, lse)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_a_second_launch_is_of_its_own_arguments():
    """What the first one compiled is launched again, for other lengths, batches, addresses and scales."""
    with modelled():
        for batch, time, heads, scale in ((1, 70, 2, 1), (2, 300, 1, 0.2), (3, 64, 3, 0.1)):
            q, k, v = packed(batch, time, heads, 64, torch.bfloat16)
            do, (o, lse) = gradient(q), forward(q, k, v, scale)
            check(do, q, k, v, differentiate(do, q, k, v, o, lse, scale), scale)


def biased(qkv, dout, o, lse, heads):
    """The packed gradient, and its columns' sums."""
    dqkv, scale = torch.empty_like(qkv), (qkv.shape[2] // 3 // heads) ** -0.5
    args = dout, qkv, o.transpose(1, 2).flatten(-2), lse, dqkv, heads, scale, True
    return dqkv, attention_backward.attention_qkv_bwd(*args).sum(0)


def check_bias(sums, dqkv):
    """What the sums of the gradient's columns may be off is what rounding took from its elements, which are right."""
    info = torch.finfo(dqkv.dtype)
    wide = dqkv.double()
    rounding = (info.eps / 2 * wide.abs() + info.smallest_normal * info.eps).sum((0, 1))
    assert ((sums.double() - wide.sum((0, 1))).abs() <= 1.01 * rounding).all()


@pytest.mark.parametrize("time", [1, 64, 65, 130, 300])
def test_a_bias_gets_the_sums_over_tokens(time):
    """Of two rows whose tiles lie side by side in what is summed; the gradient keeps its bits."""
    for dtype in HALVES:
        qkv, dout = (torch.randn(2, time, columns).to(dtype) for columns in (3 * 128, 128))
        o, lse = forward(*unpack(qkv, 3, 2))
        with modelled(seed=time):
            dqkv, sums = biased(qkv, dout, o, lse, 2)
            expected = differentiate(*unpack(dout, 1, 2), *unpack(qkv, 3, 2), o, lse)
        assert all(torch.equal(a, b) for a, b in zip(unpack(dqkv, 3, 2), expected, strict=True))
        check_bias(sums, dqkv)


def test_heads_of_128_leave_the_sums_to_others():
    """Their tiles fill shared memory."""
    qkv, dout = (torch.randn(1, 70, columns).to(torch.bfloat16) for columns in (3 * 128, 128))
    o, lse = forward(*unpack(qkv, 3, 1))
    with modelled():
        args = dout, qkv, o.transpose(1, 2).flatten(-2), lse, torch.empty_like(qkv), 1, 128**-0.5, True
        assert attention_backward.attention_qkv_bwd(*args) is None


@pytest.mark.parametrize("dim", DIMS)
def test_packed_gradients_have_the_bits_of_the_unpacked(dim):
    qkv = torch.randn(2, 77, 3 * 3 * dim).to(torch.bfloat16)
    q, k, v = unpack(qkv, 3, 3)
    dout, dqkv = torch.randn(2, 77, 3 * dim).to(torch.bfloat16), torch.empty_like(qkv)
    o, lse = forward(q, k, v)
    with modelled():
        attention_backward.attention_qkv_bwd(dout, qkv, o.transpose(1, 2).flatten(-2), lse, dqkv, 3, dim**-0.5)
        expected = differentiate(*unpack(dout, 1, 3), q, k, v, o, lse)
    assert all(torch.equal(a, b) for a, b in zip(unpack(dqkv, 3, 3), expected, strict=True))


def test_gradients_start_from_what_the_forward_leaves():
    """Its own o and lse; and from large scores, whose P is nearly one of a row's keys."""
    for factor in (1.0, 4.0):
        q, k, v = (t * factor for t in packed(1, 200, 1, 64, torch.float16))
        do = gradient(q)
        with modelled():
            grads = differentiate(do, q, k, v, *attend(q, k, v, 128))
        check(do, q, k, v, grads)


def test_gradients_read_any_nested_strides():
    """One batch, head or token has any stride; every other channel's head belongs to another tensor."""
    for batch, time, heads in ((1, 70, 1), (1, 1, 2), (3, 1, 1), (2, 130, 1)):
        wide = torch.randn(4, batch, time + 3, 2 * heads, 64).to(torch.bfloat16)
        q, k, v, do = wide[:, :, :time, ::2].transpose(2, 3)
        with modelled():
            grads = differentiate(do, q, k, v, *forward(q, k, v))
        check(do, q, k, v, grads)
