"""kernels/hopper on a card of compute capability 9.0: every form for every shape, whatever ops' table chooses."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not to be had on this platform")

from fastgpt import ops
from fastgpt.kernels.attention import unpack
from fastgpt.ops import autograd, hopper
from tests.kernels import attention_checks, test_hopper, test_hopper_backward, test_mlp

pytestmark = pytest.mark.gpu
HALVES = [torch.bfloat16, torch.float16]
FORMS = [(64, 128), (64, 192), (128, 128)]


@pytest.fixture(autouse=True)
def _on_hopper():
    if torch.cuda.get_device_capability() != (9, 0) or not hopper.has_a_known_triton():
        pytest.skip("needs a card of compute capability 9.0, and a Triton whose Gluon is known")


@pytest.fixture
def always(monkeypatch):
    """Makes a table that serves every shape, attention's by a form of so many queries."""

    def make(block_m=128, hidden=((256, 1024),)):
        rows = []
        for dtype in HALVES:
            for dim in (64, 128):
                for kernel in ("attention_fwd", "attention_bwd"):
                    rows.append(hopper.Measured(kernel, dtype, (dim,), range(1, 2**20), 1, "no", block_m))
            for kernel in ("linear_gelu_fwd", "linear_gelu_bwd"):
                for gelu in ("tanh", "none"):
                    row = hopper.Measured(kernel, dtype, (), hopper._ANY, 1, "no", approximate=gelu)
                    rows += [row._replace(sizes=sizes) for sizes in hidden]
        monkeypatch.setattr(hopper, "TABLE", tuple(rows))
        monkeypatch.setattr(hopper, "RAN", dict.fromkeys(hopper.RAN, hopper.TRITONS))

    return make


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_attention_and_its_gradients(form, dtype, always):
    """And the packed projection's are the same bits. All lengths in one process, which compiles once."""
    dim, block_m = form
    always(block_m)
    for time in (1, 2, 63, 64, 65, 127, 128, 129, 300, 1000, 1024, 2047, 4096, 8192):
        print(f"T = {time}")
        batch, heads = (2, 3) if time <= 1024 else (1, 1)
        qkv = torch.randn(batch, time, 3 * heads * dim).to("cuda", dtype).requires_grad_()
        q, k, v = unpack(qkv.detach(), 3, heads)
        do = test_hopper_backward.gradient(q)
        said = ops.explain(ops.causal_attention, q, k, v)
        assert all(f"its {which} runs on Hopper's own kernel" in said for which in ("forward", "backward"))
        o, *grads = attention_checks.check([q, k, v, do])
        out = ops.causal_attention_qkv(qkv, heads)
        out.backward(do.transpose(1, 2).flatten(-2))
        assert torch.equal(out, o.transpose(1, 2).flatten(-2))
        assert all(torch.equal(a, b) for a, b in zip(unpack(qkv.grad, 3, heads), grads, strict=True))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("heads", [6, 3])  # of 64 and of 128, whose sums are a pass of their own
def test_a_bias_gets_the_sums_over_tokens(heads, dtype, always):
    always()
    for time in (1, 63, 64, 65, 300, 1000, 1024, 2047, 4096):
        print(f"T = {time}")
        qkv, dout = (torch.randn(2, time, columns).to("cuda", dtype) for columns in (3 * 384, 384))
        leaves = qkv.clone().requires_grad_(), torch.zeros(3 * 384, device="cuda", requires_grad=True)
        ops.causal_attention_qkv(leaves[0], heads, qkv_bias=leaves[1]).backward(dout)
        alone = qkv.clone().requires_grad_()
        ops.causal_attention_qkv(alone, heads).backward(dout)
        assert torch.equal(leaves[0].grad, alone.grad)
        test_hopper_backward.check_bias(leaves[1].grad, alone.grad)


@pytest.mark.parametrize("dim", [64, 128])
def test_the_gradients_are_the_kernels(dim, always):
    """To the bit; with a gradient that the copy engine can't read they are the Triton kernel's, near to that."""
    always()
    q, k, v = (t.requires_grad_() for t in test_hopper.packed(2, 300, 3, dim, torch.bfloat16, "cuda"))
    do = test_hopper_backward.gradient(q)
    with torch.no_grad():
        expected = test_hopper_backward.differentiate(do, q, k, v, *test_hopper.attend(q, k, v, 128), more=3)
    out = ops.causal_attention(q, k, v)
    got = torch.autograd.grad(out, (q, k, v), do, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    others = torch.autograd.grad(out, (q, k, v), do.contiguous())
    assert not all(torch.equal(a, b) for a, b in zip(others, expected, strict=True))
    test_hopper_backward.check(do, *(t.detach() for t in (q, k, v)), others)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_attention_of_more_items_than_multiprocessors(form, always):
    dim, block_m = form
    always(block_m)
    q, k, v = test_hopper.packed(16, 700, 12, dim, torch.bfloat16, "cuda", more=9)
    o, lse = test_hopper.attend(q, k, v, block_m, more=9)
    do = test_hopper_backward.gradient(q, more=9)
    grads = test_hopper_backward.differentiate(do, q, k, v, o, lse, more=9)
    for batch in (0, 7, 15):
        there = slice(batch, batch + 1)
        test_hopper.check_attention(q[there], k[there], v[there], o[there], lse[there])
        test_hopper_backward.check(do[there], q[there], k[there], v[there], [grad[there] for grad in grads])


@pytest.mark.parametrize("approximate", ["tanh", "none"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_gelu_mlp_and_its_gradients(dtype, approximate, always):
    always(hidden=((256, 1024), (768, 3072)))
    for rows in ((1,), (127,), (3, 300), (32, 1024)):
        print(f"rows {rows}")
        for channels, hidden in ((256, 1024), (768, 3072)):
            if rows != (32, 1024) or dtype == torch.bfloat16:
                test_mlp.check(test_mlp.operands(rows, channels, hidden, dtype, "cuda"), approximate=approximate)


SERVED = ("attention", "attention and a bias", "attention of wide heads", "gelu_mlp")


def served(always):
    """A call of each, and its operands."""
    always()
    qkv = torch.randn(3, 300, 3 * 6 * 64, device="cuda").bfloat16().requires_grad_()
    bias = torch.zeros(3 * 6 * 64, device="cuda", requires_grad=True)
    given = [torch.randn(shape, device="cuda").mul(0.3).bfloat16().requires_grad_() for shape in MLP]
    return {
        "attention": (lambda qkv: ops.causal_attention_qkv(qkv, 6), [qkv]),
        "attention and a bias": (lambda qkv, bias: ops.causal_attention_qkv(qkv, 6, qkv_bias=bias), [qkv, bias]),
        "attention of wide heads": (lambda qkv: ops.causal_attention_qkv(qkv, 3), [qkv]),
        "gelu_mlp": (ops.gelu_mlp, given),
    }


MLP = ((1500, 256), (1024, 256), (1024,), (256, 1024), (256,))


@pytest.mark.parametrize("name", SERVED)
def test_a_thousand_runs_give_the_same_bits(name, always):
    call, leaves = served(always)[name]
    out = call(*leaves)
    dout = torch.randn_like(out)
    expected = [out.detach(), *torch.autograd.grad(out, leaves, dout)]
    differs = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(1000):
        out = call(*leaves)
        for got, first in zip([out.detach(), *torch.autograd.grad(out, leaves, dout)], expected, strict=True):
            differs += (got != first).any() | got.isnan().any()
    assert differs.item() == 0


@pytest.mark.parametrize("name", SERVED)
def test_in_a_cuda_graph_and_on_another_stream(name, always):
    call, leaves = served(always)[name]
    dout = torch.randn_like(call(*leaves))

    def run():
        out = call(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, dout)]

    def same(some, others):
        return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))

    expected = run()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        other = run()
    torch.cuda.current_stream().wait_stream(side)
    assert same(other, expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    with torch.no_grad():
        leaves[0].mul_(0.5)
    graph.replay()
    assert same(captured, run()) and not same(captured, expected)


def test_on_a_device_that_is_not_the_current_one(always):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two devices")
    for call, leaves in served(always).values():
        there = [leaf.detach().to("cuda:1") for leaf in leaves]
        assert torch.equal(call(*there).cpu(), call(*leaves).cpu())


def test_opcheck(always):
    served(always)
    qkv = torch.randn(2, 70, 3 * 128, device="cuda").bfloat16()
    torch.library.opcheck(autograd.attention_qkv_fwd.op, (qkv, None, None, None, 2, 0.1, 0.0))
    out, lse = autograd.attention_qkv_fwd(qkv, None, None, None, 2, 0.1, 0.0)
    dout = torch.randn_like(out)
    for needs_bias in (False, True):
        given = (dout, qkv, out, lse, None, None, None, 2, 0.1, 0.0, needs_bias)
        torch.library.opcheck(autograd.attention_qkv_bwd.op, given)
    q, k, v = (t.contiguous().transpose(1, 2) for t in qkv.view(2, 70, 3, 2, 64).unbind(2))
    torch.library.opcheck(autograd.attention_fwd.op, (q, k, v, None, None, None, 0.1, 0.0))
    o, lse = autograd.attention_fwd(q, k, v, None, None, None, 0.1, 0.0)
    do = torch.randn_like(o)
    torch.library.opcheck(autograd.attention_bwd.op, (do, q, k, v, o, lse, None, None, None, 0.1, 0.0))
    x, w_in, b_in, w_out, b_out = (torch.randn(shape, device="cuda").bfloat16() for shape in MLP)
    torch.library.opcheck(autograd.gelu_mlp_fwd.op, (x, w_in, b_in, w_out, b_out, True, False))
    _, pre, act = autograd.gelu_mlp_fwd(x, w_in, b_in, w_out, b_out, True, False)
    torch.library.opcheck(autograd.gelu_mlp_bwd.op, (x, x, w_in, w_out, pre, act, True, [True] * 5))


def test_compiled_calls_are_served_too(always):
    for call, leaves in served(always).values():
        out = call(*leaves)
        dout = torch.randn_like(out)  # of a sum it would be expanded, which the table leaves to others
        expected = torch.autograd.grad(out, leaves, dout)
        got = torch.autograd.grad(torch.compile(call, fullgraph=True)(*leaves), leaves, dout)
        assert [torch.equal(a, b) for a, b in zip(got, expected, strict=True)] == [True] * len(leaves)
