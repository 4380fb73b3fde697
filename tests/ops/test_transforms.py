"""What follows a call operation by operation: torch.func's transforms, forward-mode differentiation, a backward for
several gradients at once, torch.jit.trace. Values are the naive reference's by ordinary autograd, in float64."""

import functools
import math

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch.func import functional_call, grad, hessian, jvp, vjp, vmap

from fastgpt import GPT, GPTConfig, ops
from fastgpt.ops import reference
from fastgpt.testing import on_reference

ids = torch.tensor([[1, 5, 0, 9, 9], [3, 3, 10, 2, 7]])
documents = torch.tensor([[0, 0, 1, 1, 1], [0, 0, 0, 0, 2]])
padding = torch.tensor([[True] * 5, [False, False, True, True, True]])
masked = dict(key_mask=padding, documents=documents)
drops, head = dict(dropout_p=0.3, seed=3), [(2, 5, 8), (11, 8)]
# function, shapes of what it is differentiated by, and its call by them; the first axis is the batch's
CALLS = {
    "layer_norm": ([(2, 5, 8), (8,), (8,)], lambda f, x, w, b: f.layer_norm(x, w, b)),
    "add_layer_norm": (
        [(2, 5, 8), (2, 5, 8), (8,), (8,), (8,)],
        lambda f, x, r, w, b, bias: torch.stack(f.add_layer_norm(x, r, w, b, x_bias=bias, **drops)),
    ),
    "causal_attention": ([(2, 4, 5, 4), (2, 2, 5, 4), (2, 2, 5, 4)], lambda f, *qkv: f.causal_attention(*qkv)),
    "attention, masked": ([(2, 2, 5, 4)] * 3, lambda f, *qkv: f.causal_attention(*qkv, **masked, **drops)),
    "causal_attention_qkv": ([(2, 5, 24)], lambda f, qkv: f.causal_attention_qkv(qkv, 2)),
    "decode_attention": (
        [(2, 2, 1, 4), (2, 2, 6, 4), (2, 2, 6, 4)],
        lambda f, *qkv: f.decode_attention(*qkv, torch.tensor([6, 6])),
    ),
    "gelu_mlp": ([(2, 5, 8), (16, 8), (16,), (8, 16), (8,)], lambda f, *mlp: f.gelu_mlp(*mlp)),
    "gelu_mlp, recomputed": ([(2, 5, 8), (16, 8), (16,), (8, 16)], lambda f, *mlp: f.gelu_mlp(*mlp, recompute=True)),
    "linear_cross_entropy": (head, lambda f, x, w: f.linear_cross_entropy(x, w, ids)),
    "losses of rows": (
        head,
        lambda f, x, w: f.linear_cross_entropy(
            x, w, ids, reduction="none", ignore_index=9, label_smoothing=0.1, z_loss=0.01
        ),
    ),
    "embedding": ([(11, 8), (6, 8)], lambda f, token, position: f.embedding(ids, token, position, **drops)),
}
each_call = pytest.mark.parametrize("name", CALLS)


def made(name):
    """Operands, directions in which they may move, ours and the reference's function of them."""
    shapes, call = CALLS[name]
    operands, directions = ([torch.randn(s, dtype=torch.float64) for s in shapes] for _ in range(2))
    return operands, directions, lambda *t: call(ops, *t), lambda *t: call(reference, *t)


def close(got, expected):
    for a, b in zip(got, expected, strict=True):
        assert torch.isfinite(b).all()
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def gradients(function, operands, upstream=None):
    leaves = [t.detach().requires_grad_() for t in operands]
    return torch.autograd.grad(function(*leaves), leaves, upstream)


@each_call
def test_torch_funcs_gradients(name):
    operands, _, ours, naive = made(name)
    wanted = tuple(range(len(operands)))
    expected = gradients(lambda *t: naive(*t).square().sum(), operands)
    close(grad(lambda *t: ours(*t).square().sum(), wanted)(*operands), expected)
    y, back = vjp(ours, *operands)
    close([y, *back(2 * y)], [naive(*operands), *expected])


@each_call
def test_forward_mode(name):
    operands, directions, ours, naive = made(name)
    leaves = [t.requires_grad_() for t in operands]
    upstream = torch.zeros_like(naive(*leaves)).requires_grad_()  # the derivative along a line, by two backwards
    back = torch.autograd.grad(naive(*leaves), leaves, upstream, create_graph=True)
    along = sum((g * d).sum() for g, d in zip(back, directions, strict=True))
    (expected,) = torch.autograd.grad(along, upstream)
    y, tangent = jvp(ours, tuple(t.detach() for t in operands), tuple(directions))
    close([y, tangent], [naive(*operands).detach(), expected])
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(t.detach(), d) for t, d in zip(operands, directions, strict=True)]
        close([forward_ad.unpack_dual(ours(*duals)).tangent], [expected])


@each_call
def test_second_derivatives(name):
    """Forward over reverse, of all operands."""
    operands, directions, ours, naive = made(name)

    def slope(function):
        return grad(lambda *t: function(*t).square().sum(), tuple(range(len(operands))))

    _, got = jvp(slope(ours), tuple(operands), tuple(directions))
    leaves = [t.requires_grad_() for t in operands]
    back = torch.autograd.grad(naive(*leaves).square().sum(), leaves, create_graph=True)
    close(got, torch.autograd.grad(sum((g * d).sum() for g, d in zip(back, directions, strict=True)), leaves))


@pytest.mark.parametrize("mode", ["is_grads_batched", "vmap"])
@each_call
def test_several_gradients_at_once(name, mode):
    check_several(name, mode, "auto")


def check_several(name, mode, backend):
    """Of a forward that knew of nothing."""
    shapes, call = CALLS[name]
    operands = [torch.randn(s, dtype=torch.float64).requires_grad_() for s in shapes]
    y = call(_On(backend), *operands)
    upstream = torch.randn(3, *y.shape, dtype=torch.float64)
    if mode == "vmap":
        got = vmap(lambda each: torch.autograd.grad(y, operands, each))(upstream)
    else:
        got = torch.autograd.grad(y, operands, upstream, is_grads_batched=True)
    expected = [gradients(lambda *t: call(reference, *t), operands, each) for each in upstream]
    close(got, [torch.stack(each) for each in zip(*expected, strict=True)])


class _On:
    """fastgpt.ops on a backend."""

    def __init__(self, backend):
        self.backend = backend

    def __getattr__(self, name):
        return functools.partial(getattr(ops, name), backend=self.backend)


def test_what_is_mapped():
    """Over tokens and targets too; one out of range is still found."""
    x, weight = torch.randn(2, 5, 8, dtype=torch.float64), torch.randn(11, 8, dtype=torch.float64)
    got = vmap(lambda x, ids: ops.linear_cross_entropy(x, weight, ids))(x, ids)
    close([got], [torch.stack([reference.linear_cross_entropy(a, weight, b) for a, b in zip(x, ids, strict=True)])])
    with pytest.raises(ValueError, match=r"target 11 .* is outside a vocabulary of 11"):
        vmap(lambda x, ids: ops.linear_cross_entropy(x, weight, ids))(x, ids + 1)
    lengths = torch.tensor([[3, 6], [2, 4]])
    q, k, v = torch.randn(3, 2, 2, 2, 6, 4, dtype=torch.float64)
    got = vmap(ops.decode_attention)(q[..., :1, :], k, v, lengths)
    close(got, [reference.decode_attention(*each) for each in zip(q[..., :1, :], k, v, lengths, strict=True)])


def test_a_hessian():
    x, weight = torch.randn(5, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    targets = torch.tensor([0, 3, 1, -100, 2])
    got = hessian(lambda w: ops.linear_cross_entropy(x, w, targets))(weight)
    close([got], [torch.autograd.functional.hessian(lambda w: reference.linear_cross_entropy(x, w, targets), weight)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [name for name in CALLS if name not in ("attention, masked", "decode_attention")])
def test_in_half_precision(name, dtype):
    operands, directions, ours, naive = made(name)
    operands, directions = ([t.to(dtype) for t in each] for each in (operands, directions))
    wide = gradients(lambda *t: naive(*t).sum(), [t.double() for t in operands])
    for a, b in zip(grad(lambda *t: ours(*t).sum(), tuple(range(len(operands))))(*operands), wide, strict=True):
        assert a.dtype == dtype
        assert (a.double() - b).norm() <= 0.05 * b.norm() + 0.05 * math.sqrt(b.numel())
    assert jvp(ours, tuple(operands), tuple(directions))[1].isfinite().all()


def test_explain_says_so():
    x, weight = torch.randn(5, 8), torch.randn(8)
    said = []

    def look(x):
        said.append(ops.explain(ops.layer_norm, x, weight))
        return x

    vmap(look)(x)
    torch.jit.trace(look, (x,), check_trace=False)
    with forward_ad.dual_level():
        look(x)
    look(x)
    ours = "layer_norm runs on PyTorch's own differentiable operations: "
    reasons = ("a transform of torch.func is at work", "torch.jit.trace records the call")
    assert [each.removeprefix(ours) for each in said[:3]] == [*reasons, "forward-mode differentiation is on"]
    assert "differentiable" not in said[3]
    with pytest.raises(ValueError, match=r"backend=.triton. can.t be had: a transform of torch\.func is at work"):
        vmap(lambda x: ops.layer_norm(x, weight, backend="triton"))(x)


# fastgpt's GPT

SHAPE = dict(vocab_size=13, block_size=8, n_layer=2, n_head=2, n_embd=8)


def gpt(**changes):
    model = GPT(GPTConfig(**SHAPE, **changes)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5)
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return model, on_reference(model), parameters


def ordinary(model, *inputs):
    return dict(
        zip(
            dict(model.named_parameters()),
            torch.autograd.grad(model(*inputs), list(model.parameters())),
            strict=True,
        )
    )


def same(got, expected):
    assert got.keys() == expected.keys()
    close(got.values(), expected.values())


@pytest.mark.parametrize("again", ["off", "mlp", "block"])
def test_gradients_of_a_gpt(again):
    model, twin, parameters = gpt(activation_checkpointing=again)
    same(grad(lambda p: functional_call(model, p, (ids, ids)))(parameters), ordinary(twin, ids, ids))
    each = vmap(grad(lambda p, row: functional_call(model, p, (row[None], row[None]))), (None, 0))(parameters, ids)
    for i, row in enumerate(ids):
        same({name: g[i] for name, g in each.items()}, ordinary(twin, row[None], row[None]))
    y, weight = model(ids).sum((1, 2)), model.h[0].mlp.c_fc.weight
    (got,) = torch.autograd.grad(y, weight, torch.eye(2, dtype=torch.float64), is_grads_batched=True)
    for row, g in zip(ids, got, strict=True):
        close([g], torch.autograd.grad(twin(row[None]).sum(), twin.h[0].mlp.c_fc.weight))


def test_forward_mode_of_a_gpt():
    model, twin, parameters = gpt()
    directions = {name: torch.randn_like(parameter) for name, parameter in parameters.items()}
    _, tangent = jvp(lambda p: functional_call(model, p, (ids, ids)), (parameters,), (directions,))
    expected = sum((g * directions[name]).sum() for name, g in ordinary(twin, ids, ids).items())
    close([tangent], [expected])


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("training", [False, True])
def test_a_traced_gpt(training, tmp_path):
    """Of the loss and of the logits, with gradients; at other sizes too, for nothing of a size is kept."""
    model, twin, _ = gpt()
    model.train(training)
    others = torch.randint(0, 13, (3, 7))
    for inputs in ((ids,), (ids, ids)):
        for check in (True, False):
            torch.jit.trace(model, inputs, check_trace=check).save(str(tmp_path / "traced.pt"))
            traced = torch.jit.load(str(tmp_path / "traced.pt"))
            for tokens in (ids, others):
                given = (tokens,) * len(inputs)
                close([traced(*given)], [twin(*given)])
        y = traced(*inputs).sum()
        got = torch.autograd.grad(y, dict(traced.named_parameters())["wpe.weight"])
        close(got, torch.autograd.grad(twin(*inputs).sum(), twin.wpe.weight))
