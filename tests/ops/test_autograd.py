"""The custom ops and Functions of the Triton backend: what autograd, the compiler and autocast ask of them."""

import itertools
from unittest import mock

import pytest
import torch
from torch.utils.checkpoint import checkpoint

pytest.importorskip("triton", reason="Triton is not to be had on this platform")

from fastgpt import GPT, GPTConfig, ops
from fastgpt.ops import autograd


def rows(device, dtype=torch.float32):
    """x, residual (5, 3, 20), weight, bias, x_bias (20,)."""
    shapes = ((5, 3, 20), (5, 3, 20), (20,), (20,), (20,))
    return [torch.randn(shape, dtype=dtype, device=device) for shape in shapes]


def test_opcheck_of_the_forward(device):
    x, residual, weight, bias, x_bias = rows(device)
    seed = torch.tensor([5], device=device)
    for dropout_p, stream in itertools.product((0.0, 0.5), (torch.float32, torch.float64)):
        args = (x.transpose(0, 1), residual.transpose(0, 1), weight, bias, x_bias, seed, 1e-5, dropout_p, stream)
        torch.library.opcheck(autograd.layer_norm_fwd.op, args)
    torch.library.opcheck(autograd.layer_norm_fwd.op, (x, None, weight, None, None, None, 1e-5, 0.0, x.dtype))
    torch.library.opcheck(autograd.layer_norm_fwd.op, (x[:0], None, weight, None, None, None, 1e-5, 0.0, x.dtype))


def test_opcheck_of_the_backward(device):
    dy, s, weight, *_ = rows(device)
    stats = torch.rand(3, 15, device=device)
    seed = torch.tensor([5], device=device)
    for dsum, dropout_p, x_bias in itertools.product((None, dy.transpose(0, 1)), (0.0, 0.5), (False, True)):
        args = (dy.transpose(0, 1), dsum, s.transpose(0, 1), weight, stats, seed, dropout_p, torch.float16, x_bias)
        torch.library.opcheck(autograd.layer_norm_bwd.op, args)


def heads(device, dtype=torch.float32):
    """q, k, v (2, 3, 9, 4) that are views of one packed projection, which comes last."""
    qkv = torch.randn(2, 9, 36, dtype=dtype, device=device)
    return [*(t.unflatten(-1, (3, 4)).transpose(1, 2) for t in qkv.chunk(3, -1)), qkv]


def extras(device):
    """Seed, key_mask and documents for two rows of nine tokens."""
    key_mask = torch.ones(2, 9, dtype=torch.bool, device=device)
    key_mask[1, :4] = False
    return torch.tensor([5], device=device), key_mask, torch.arange(18, device=device).view(2, 9) // 5


def test_opcheck_of_attention(device):
    q, k, v, qkv = heads(device)
    for masks, p in (((None, None, None), 0.0), (extras(device), 0.5)):
        later = q[:, :, 3:] if masks[2] is None else q
        torch.library.opcheck(autograd.attention_fwd.op, (later, k[:, :1], v[:, :1], *masks, 0.5, p))
        o, lse = autograd.attention_fwd(q, k[:, :1], v[:, :1], *masks, 0.5, p)
        grads = (torch.randn_like(o), q, k[:, :1], v[:, :1], o, lse, *masks, 0.5, p)
        torch.library.opcheck(autograd.attention_bwd.op, grads)
        torch.library.opcheck(autograd.attention_qkv_fwd.op, (qkv, *masks, 3, 0.5, p))
        out, lse = autograd.attention_qkv_fwd(qkv, *masks, 3, 0.5, p)
        for needs_bias in (False, True):
            grads = (torch.randn_like(out), qkv, out, lse, *masks, 3, 0.5, p, needs_bias)
            torch.library.opcheck(autograd.attention_qkv_bwd.op, grads)


def test_opcheck_of_the_embedding(device):
    token, position = torch.randn(5, 20, device=device), torch.randn(7, 20, device=device)
    ids, seed = torch.randint(5, (2, 3), device=device), torch.tensor([5], device=device)
    for positions, dropout_p in ((None, 0.0), (ids[0], 0.5), (ids, 0.0)):
        torch.library.opcheck(
            autograd.embedding_fwd.op, (token, position, ids, positions, seed, dropout_p, torch.float16)
        )
        dout = torch.randn(3, 2, 20, device=device).transpose(0, 1)
        torch.library.opcheck(autograd.embedding_bwd.op, (dout, positions, seed, 7, dropout_p, torch.float64))


@pytest.mark.interpreter
def test_gradcheck_of_the_embedding_in_float64():
    weights = [torch.randn(size, 4, dtype=torch.float64).requires_grad_() for size in (5, 7)]
    ids = torch.randint(5, (2, 3))
    for positions in (None, ids + 1):
        call = lambda *w, p=positions: ops.embedding(ids, *w, p, dropout_p=0.3, seed=9, backend="triton")  # noqa: E731
        assert torch.autograd.gradcheck(call, weights, fast_mode=True)


@pytest.mark.interpreter
def test_gradcheck_of_attention_in_float64():
    q, k, v, qkv = (t.detach().requires_grad_() for t in heads("cpu", torch.float64))
    unpacked = lambda q, k, v: ops.causal_attention(q, k, v, backend="triton")  # noqa: E731
    assert torch.autograd.gradcheck(unpacked, (q, k, v), fast_mode=True)
    seed, key_mask, documents = extras("cpu")
    options = dict(dropout_p=0.3, seed=seed, key_mask=key_mask, documents=documents, backend="triton")
    packed = lambda qkv: ops.causal_attention_qkv(qkv, 3, **options)  # noqa: E731
    assert torch.autograd.gradcheck(packed, (qkv,), fast_mode=True)
    biased = lambda x, bias: ops.causal_attention_qkv(x + bias.detach(), 3, qkv_bias=bias, **options)  # noqa: E731
    bias = torch.randn(36, dtype=torch.float64, device=qkv.device, requires_grad=True)
    assert torch.autograd.gradcheck(biased, (qkv, bias), fast_mode=True)


def test_attention_of_any_length_compiles_once(device):
    """With every option, forward and backward; a new length recompiles nothing where T is marked dynamic."""
    seed, key_mask, documents = extras(device)

    def loss(qkv, key_mask, documents):
        options = dict(dropout_p=0.3, seed=seed, key_mask=key_mask, documents=documents, backend="triton")
        return ops.causal_attention_qkv(qkv, 3, **options).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    *_, qkv = heads(device)
    counters = torch._dynamo.utils.counters["stats"]
    counters.clear()
    for time in (9, 7, 5):
        args = [t[:, :time].clone() for t in (qkv, key_mask, documents)]
        for t in args:
            torch._dynamo.mark_dynamic(t, 1)
        grads = []
        for call in (loss, compiled):
            leaf = args[0].detach().requires_grad_()
            if call is compiled:
                torch._dynamo.mark_dynamic(leaf, 1)
            call(leaf, *args[1:]).backward()
            grads.append(leaf.grad)
        assert torch.equal(*grads)
    assert counters["unique_graphs"] == 1


@pytest.mark.interpreter
def test_gradcheck_in_float64():
    """Accumulators are float64 for float64, so finite differences are sharp; on a GPU the kernels refuse float64."""
    x, residual, weight, bias, x_bias = (t.requires_grad_() for t in rows("cpu", torch.float64))

    def both(x, residual, weight, bias, x_bias):
        return ops.add_layer_norm(x, residual, weight, bias, x_bias=x_bias, dropout_p=0.3, seed=9, backend="triton")

    assert torch.autograd.gradcheck(both, (x, residual, weight, bias, x_bias), fast_mode=True)
    plain = lambda x, weight, bias: ops.layer_norm(x, weight, bias, backend="triton")  # noqa: E731
    assert torch.autograd.gradcheck(plain, (x, weight, bias), fast_mode=True)


def gradients(function, tensors):
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    y, s = function(*leaves)
    ((y * y).sum() + (s * y).sum()).backward()
    return [y.detach(), s.detach(), *(leaf.grad for leaf in leaves)]


def test_compiled_in_one_graph_it_equals_eager(device):
    def function(x, residual, weight, bias, x_bias):
        return ops.add_layer_norm(x, residual, weight, bias, x_bias=x_bias, dropout_p=0.25, seed=11, backend="triton")

    tensors = rows(device)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for got, expected in zip(gradients(compiled, tensors), gradients(function, tensors), strict=True):
        assert torch.equal(got, expected)


def test_a_whole_gpt_compiles_in_one_graph(device):
    model = GPT(GPTConfig.preset("byte-0.1M", n_layer=1, n_embd=16, block_size=8)).to(device)
    idx = torch.randint(0, 257, (2, 8), device=device)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    results = []
    for call in (model, compiled):
        model.zero_grad()
        loss = call(idx, idx)
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "name", ["layer_norm", "add_layer_norm", "causal_attention", "causal_attention_qkv", "its bias"]
)
def test_a_second_derivative_is_refused_by_name(name, device):
    x, residual, weight, *_ = rows(device)
    q, k, v, qkv = heads(device)
    calls = {
        "layer_norm": (x, lambda x: ops.layer_norm(x, weight, backend="triton")),
        "add_layer_norm": (x, lambda x: ops.add_layer_norm(x, residual, weight, backend="triton")[0]),
        "causal_attention": (q, lambda q: ops.causal_attention(q, k, v, dropout_p=0.5, backend="triton")),
        "causal_attention_qkv": (qkv, lambda qkv: ops.causal_attention_qkv(qkv, 3, backend="triton")),
        "its bias": (
            qkv[0, 0].clone(),
            lambda bias: ops.causal_attention_qkv(qkv, 3, qkv_bias=bias, backend="triton"),
        ),
    }
    leaf, call = calls[name]
    leaf.requires_grad_()
    function = name.replace("its bias", "causal_attention_qkv")
    with pytest.raises(RuntimeError, match=rf"^{function}: .*backend='torch'"):
        torch.autograd.grad(call(leaf).sum(), leaf, create_graph=True)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_recomputes_the_same_mask(reentrant, device):
    x, residual, weight, bias, _ = rows(device)
    q, k, *_ = heads(device)

    def drop(x, residual):
        return ops.add_layer_norm(x, residual, weight, bias, dropout_p=0.5, backend="triton")

    def attend(q, k):
        return ops.causal_attention(q, k, k, dropout_p=0.5, backend="triton"), k

    for function, tensors in ((drop, (x, residual)), (attend, (q, k))):
        results = []
        for call in (function, lambda *args, f=function: checkpoint(f, *args, use_reentrant=reentrant)):
            torch.manual_seed(3)
            leaves = [t.clone().requires_grad_() for t in tensors]
            y, s = call(*leaves)
            (y.square().sum() + s.sum()).backward()
            results.append([y, s, *(leaf.grad for leaf in leaves)])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_inputs_are_left_alone_and_outputs_are_new(device):
    tensors = rows(device)
    before = [t.clone() for t in tensors]
    outputs = gradients(lambda *t: ops.add_layer_norm(*t[:4], x_bias=t[4], backend="triton"), tensors)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))
    assert not {t.data_ptr() for t in outputs} & {t.data_ptr() for t in tensors}


def test_under_autocast_the_float32_weights_serve_half_precision(device):
    x, residual, weight, bias, _ = rows(device)
    leaves = [t.clone().requires_grad_() for t in (weight, bias)]
    with torch.autocast(device.type, torch.bfloat16):
        y, s = ops.add_layer_norm(x.half(), residual, *leaves, backend="triton")
    assert y.dtype == torch.float16 and s.dtype == torch.float32
    y.float().sum().backward()
    assert [leaf.grad.dtype for leaf in leaves] == [torch.float32, torch.float32]


def test_inference_mode(device):
    x, residual, weight, *_ = rows(device)
    with torch.inference_mode():
        inferred = ops.add_layer_norm(x, residual, weight, backend="triton")
    expected = ops.add_layer_norm(x, residual, weight, backend="triton")
    assert all(torch.equal(a, b) for a, b in zip(inferred, expected, strict=True))


@pytest.mark.gpu
def test_cuda_graph_replays_draw_new_masks():
    x, residual, weight, *_ = (t.cuda() for t in rows("cpu"))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):  # compiles before the capture
        ops.add_layer_norm(x, residual, weight, dropout_p=0.5, backend="triton")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _, s = ops.add_layer_norm(x, residual, weight, dropout_p=0.5, backend="triton")
    replays = []
    for _ in range(2):
        graph.replay()
        replays.append(s.clone())
    assert not torch.equal(*replays)


def test_launches_on_the_device_of_the_tensors():
    """No second GPU is needed: the launcher is a stub, the guard is noted."""
    guarded = []

    class OnGPU:
        is_cuda, device = True, torch.device("cuda:3")

    def launcher(x: torch.Tensor) -> torch.Tensor:
        guarded.append("launched")
        return x

    class Guard:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            guarded.append(self.device)

        def __exit__(self, *_):
            guarded.append("left")

    with mock.patch.object(torch.cuda, "device", Guard), mock.patch.object(torch.library, "custom_op") as register:
        autograd._custom_op(launcher, launcher)
    _, on_its_device = register.call_args.args
    with mock.patch.object(torch.cuda, "device", Guard), mock.patch.object(torch.cuda, "current_device", lambda: 0):
        on_its_device(OnGPU())
    assert guarded == [torch.device("cuda:3"), "launched", "left"]


def test_a_launch_is_out_of_autocast_which_stays_on():
    """After one that fails too."""
    seen = []

    def launcher(x):
        seen.append(torch.is_autocast_enabled("cpu"))
        raise RuntimeError("as on a card that is gone")

    launch = autograd._on_its_device(launcher)
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(RuntimeError, match="a card that is gone"):
            launch(torch.zeros(1))
        assert torch.is_autocast_enabled("cpu")
    assert seen == [False]


def test_a_backward_under_autocast_of_a_forward_without(device):
    model = GPT(GPTConfig.preset("byte-0.1M", n_layer=1, n_embd=16, block_size=8)).to(device)
    idx = torch.randint(0, 257, (2, 8), device=device)
    results = []
    for enabled in (False, True):
        model.zero_grad()
        loss = model(idx, idx)
        with torch.autocast(device.type, torch.bfloat16, enabled=enabled):
            loss.backward()
        results.append(model.h[0].mlp.c_fc.bias.grad)
    assert torch.equal(*results)


def test_attention_under_autocast_takes_mixed_dtypes(device):
    q, k, v, qkv = heads(device)
    with torch.autocast(device.type, torch.bfloat16):
        assert ops.causal_attention(q, k.half(), v.half(), backend="triton").dtype == torch.bfloat16
        assert ops.causal_attention_qkv(qkv, 3, backend="triton").dtype == torch.bfloat16
        assert ops.causal_attention_qkv(qkv.double(), 3).dtype == torch.float64
