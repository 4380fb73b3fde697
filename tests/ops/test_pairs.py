"""Every pair of options of each public function, on the fallback and in Triton's interpreter: values and every gradient
against the naive reference in float64."""

import itertools

import pytest
import torch

from fastgpt import ops
from fastgpt.ops import reference
from tests.pairs import covering, named

F64 = torch.float64
BOTH = [False, True]
ROWS = {
    "layer_norm": covering(bias=BOTH, eps=[1e-5, 0.3], shape=[(1, 7), (2, 3, 16), (5, 40)]),
    "add_layer_norm": covering(
        bias=BOTH, x_bias=BOTH, eps=[1e-5, 0.3], dropout_p=[0.0, 0.3, 1.0], residual_dtype=[None, torch.float32],
        used=["both", "normed", "sum"], shape=[(1, 7), (2, 3, 16)],
    ),
    "causal_attention": covering(
        group=[1, 2], mask=[None, "left", "right", "random", "nothing"], documents=[None, "in order", "mixed"],
        dropout_p=[0.0, 0.3], scale=[None, 0.7], dim=[5, 16], nan=BOTH, time=[1, 16, 35],
        window=[None, 1, 17],
    ),
    "causal_attention_qkv": covering(
        heads=[1, 3], mask=[None, "left", "right", "random", "nothing"], documents=[None, "in order", "mixed"],
        dropout_p=[0.0, 0.3], scale=[None, 0.7], dim=[5, 16], time=[1, 16, 35], bias=BOTH, window=[None, 1, 17],
    ),
    "decode_attention": covering(
        group=[1, 2], new=[1, 3, 16], scale=[None, 0.7], dim=[5, 16], integers=["int32", "int64"], window=[None, 9],
    ),
    "gelu_mlp": covering(
        b_in=BOTH, b_out=BOTH, approximate=["tanh", "none"], recompute=BOTH, turned=BOTH, rows=[1, 6],
        frozen=[None, "x", "w_in", "w_out"],
    ),
    "linear_cross_entropy": covering(
        ignored=["none", "some", "but one"], ignore_index=[-100, 3], reduction=["mean", "sum", "none"],
        label_smoothing=[0.0, 0.1], z_loss=[0.0, 0.05], integers=["int32", "int64"], frozen=[None, "x", "weight"],
        vocab=[17, 64],
    ),
    "embedding": covering(
        positions=[None, "(T,)", "(B, T)"], dropout_p=[0.0, 0.3, 1.0], dtype=[None, torch.float32],
        integers=["int32", "int64"], frozen=[None, "token_weight", "position_weight"], time=[1, 5],
    ),
}  # fmt: skip
CASES = [(name, row) for name, rows in ROWS.items() for row in rows]


def random(**shapes):
    return {name: torch.randn(shape, dtype=F64) for name, shape in shapes.items() if shape is not None}


def mask_of(kind, time):
    mask = torch.ones(2, time, dtype=torch.bool)
    if kind == "left":
        mask[1, : time // 2] = False
    elif kind == "right":
        mask[0, time - time // 3 :] = False
    elif kind == "random":
        mask = torch.rand(2, time) < 0.6
    elif kind == "nothing":
        mask[1] = False
    return None if kind is None else mask


def documents_of(kind, time):
    if kind is None:
        return None
    return torch.arange(time).expand(2, -1) // 7 if kind == "in order" else torch.randint(3, (2, time))


def arguments(name, row):
    """Operands by name, and options, of a row."""
    row = dict(row)
    frozen, integers = row.pop("frozen", None), getattr(torch, row.pop("integers", "int64"))
    if name in ("layer_norm", "add_layer_norm"):
        shape, bias = row.pop("shape"), row.pop("bias")
        added = name == "add_layer_norm"
        shapes = dict(x=shape, residual=shape if added else None, weight=shape[-1:], bias=shape[-1:] if bias else None)
        operands = random(**shapes, x_bias=shape[-1:] if row.pop("x_bias", False) else None)
        row.pop("used", None)
    elif name.startswith("causal"):
        time, dim = row.pop("time"), row.pop("dim")
        masks = dict(key_mask=mask_of(row.pop("mask"), time), documents=documents_of(row.pop("documents"), time))
        if name == "causal_attention_qkv":
            packed = 3 * row["heads"] * dim
            operands = random(qkv=(2, time, packed), qkv_bias=(packed,) if row.pop("bias") else None)
        else:
            group = row.pop("group")
            operands = random(q=(2, 2 * group, time, dim), k=(2, 2, time, dim), v=(2, 2, time, dim))
            if row.pop("nan") and masks["key_mask"] is not None:  # of one head's hidden keys
                operands["k"][:, 1].masked_fill_(~masks["key_mask"][..., None], torch.nan)
                operands["v"][:, 0].masked_fill_(~masks["key_mask"][..., None], torch.inf)
        row |= masks
    elif name == "decode_attention":
        new, dim, heads = row.pop("new"), row.pop("dim"), 2 * row.pop("group")
        operands = random(q=(3, heads, new, dim), k_cache=(3, 2, 40, dim), v_cache=(3, 2, 40, dim))
        row["lengths"] = torch.tensor([40, new, 23], dtype=integers)
    elif name == "gelu_mlp":
        b_in, b_out, turned, rows = (row.pop(key) for key in ("b_in", "b_out", "turned", "rows"))
        shapes = dict(x=(rows, 8), w_in=(24, 8), b_in=(24,) if b_in else None, w_out=(8, 24))
        operands = {"b_in": None, **random(**shapes, b_out=(8,) if b_out else None)}
        if turned:
            operands |= {key: operands[key].t().contiguous().t() for key in ("w_in", "w_out")}
    elif name == "linear_cross_entropy":
        vocab, ignored = row.pop("vocab"), row.pop("ignored")
        operands = random(x=(2, 4, 8), weight=(vocab, 8))
        targets = torch.randint(4, vocab, (2, 4)).to(integers)
        those = {"none": slice(0), "some": slice(1, 4), "but one": slice(1, None)}[ignored]
        targets.view(-1)[those] = row["ignore_index"]
        row["targets"] = targets
    else:
        time, kind = row.pop("time"), row.pop("positions")
        operands = random(token_weight=(9, 20), position_weight=(8, 20))
        shape = (2, time) if kind == "(B, T)" else (time,)
        row["positions"] = None if kind is None else torch.randint(8, shape).to(integers)
        row["ids"] = torch.randint(9, (2, time)).to(integers)
    if "dropout_p" in row:
        row["seed"] = 2**40 + 5
    for key, operand in operands.items():
        if operand is not None and key != frozen:
            operand.requires_grad_()
    return operands, row


def results(function, operands, options, upstream, used="both", **more):
    """Outputs, then gradients; the upstream gradients are drawn for the first who comes."""
    outputs = function(**operands, **options, **more)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    upstream += [torch.randn(output.shape, dtype=output.dtype) for output in outputs[len(upstream) :]]
    counted = {"both": slice(None), "normed": slice(1), "sum": slice(1, 2)}[used]
    leaves = [operand for operand in operands.values() if operand is not None and operand.requires_grad]
    if not outputs[0].requires_grad:
        return outputs
    gradients = torch.autograd.grad(outputs[counted], leaves, upstream[counted], allow_unused=True)
    return [*outputs, *(torch.zeros_like(x) if g is None else g for x, g in zip(leaves, gradients, strict=True))]


def check(name, row, backend):
    operands, options = arguments(name, row)
    upstream: list = []
    used = row.get("used", "both")
    if backend == "triton" and name == "decode_attention":  # has no derivative
        operands = {key: each.detach() for key, each in operands.items()}
    expected = results(getattr(reference, name), operands, options, upstream, used)
    got = results(getattr(ops, name), operands, options, upstream, used, backend=backend)
    rounded = torch.float32 in row.values() or name == "linear_cross_entropy"  # whose loss is float32
    limits = dict(rtol=2e-5, atol=2e-5) if rounded else dict(rtol=1e-8, atol=1e-9)
    for place, (a, b) in enumerate(zip(got, expected, strict=True)):
        torch.testing.assert_close(a.double(), b.double(), **limits, msg=lambda said, at=place: f"result {at}: {said}")


@pytest.mark.parametrize(("name", "row"), CASES, ids=[f"{name}-{named(row)}" for name, row in CASES])
def test_the_fallback(name, row):
    check(name, row, "torch")


@pytest.mark.interpreter
@pytest.mark.parametrize(("name", "row"), CASES, ids=[f"{name}-{named(row)}" for name, row in CASES])
def test_the_kernels(name, row):
    pytest.importorskip("triton", reason="Triton is not to be had on this platform")
    check(name, row, "triton")


@pytest.mark.interpreter
@pytest.mark.parametrize("name", [name for name in ROWS if name != "decode_attention"])
def test_a_backward_alone_under_autocast_changes_no_bit_of_the_kernels(name):
    pytest.importorskip("triton", reason="Triton is not to be had on this platform")
    operands, options = arguments(name, ROWS[name][-1])
    operands = {key: None if each is None else each.detach().float() for key, each in operands.items()}
    leaves = [each.requires_grad_() for each in operands.values() if each is not None]
    found = []
    for under in (False, True):
        outputs = getattr(ops, name)(**operands, **options, backend="triton")
        with torch.autocast("cpu", torch.bfloat16, enabled=under):
            first = outputs[0] if isinstance(outputs, tuple) else outputs
            found.append(torch.autograd.grad(first.float().square().sum(), leaves))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("row", ROWS["linear_cross_entropy"], ids=named)
def test_second_derivatives_of_the_loss(row):
    """As a gradient's penalty asks for them."""
    operands, options = arguments("linear_cross_entropy", {**row, "frozen": None})
    found = []
    for function, more in ((reference.linear_cross_entropy, {}), (ops.linear_cross_entropy, {"backend": "torch"})):
        loss = function(**operands, **options, **more).sum()
        first = torch.autograd.grad(loss, operands.values(), create_graph=True)
        penalty = sum(gradient.square().sum() for gradient in first)
        found.append(torch.autograd.grad(penalty, operands.values()))
    for got, expected in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_every_pair_is_there():
    options = dict(one=[1, 2, 3], two=["a", "b"], three=[None, 0.5], four=BOTH)
    rows = covering(**options)
    for (one, a), (other, b) in itertools.combinations(options.items(), 2):
        assert {(row[one], row[other]) for row in rows} == set(itertools.product(a, b))
    assert len(rows) < 3 * 2 * 2 * 2 / 2
