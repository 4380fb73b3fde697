"""accelerate and restore: the same numbers, the same object, and nobody else's forward touched."""

import copy
import inspect
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastgpt import accelerate, accelerated, families, restore
from fastgpt.testing import assert_accurate
from tests.models import CONTEXT, VOCAB, book, hugging_face, logits_and_loss, nanogpt, randomised

ROADS = [
    pytest.param("cpu", id="fallback"),
    pytest.param("cpu", marks=pytest.mark.interpreter, id="interpreter"),
    pytest.param("cuda", marks=pytest.mark.gpu, id="gpu"),
]


def batch(time=CONTEXT, device="cpu"):
    idx = torch.randint(0, VOCAB, (2, time), device=device)
    targets = torch.randint(0, VOCAB, (2, time), device=device)
    targets[0, 1] = -100
    return idx, targets


def results(model, idx, targets):
    """Logits, loss and every gradient, by name."""
    model.zero_grad()
    logits, loss = logits_and_loss(model, idx, targets)
    loss.backward()
    grads = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    return {"logits": logits.detach(), "loss": loss.detach(), **grads}


def assert_as_before(model, idx, targets, **options):
    """Accelerate `model` and hold all that comes out to float64, by its own error before.

    A gradient is judged as one row: rounding upstream reaches all of it, and rows that nearly cancel show it most. The
    model's own error is the larger one of two orders of the batch: a sum of few rows can be right by luck in one.
    """
    oracle = results(copy.deepcopy(model).double(), idx, targets)
    before, turned = results(model, idx, targets), results(model, idx.flip(0), targets.flip(0))
    turned["logits"] = turned["logits"].flip(0)
    for name, expected in oracle.items():
        before[name] = max(before[name], turned[name], key=lambda found: (found - expected).norm().item())
    report = accelerate(model, **options)
    after = results(model, idx, targets)
    doubt = 38 if idx.is_cuda else 8  # a GPU's exponentials and quotients are good to two units, not to half of one
    for name, expected in oracle.items():
        size = None
        if name.endswith("W_key.bias"):  # zero but for rounding: softmax does not see it
            size = torch.full_like(expected, oracle[name.replace("key", "query")].abs().max()).flatten()
        rows = (tensor.flatten() for tensor in (after[name], expected, before[name]))
        assert_accurate(*rows, size, logit_max=doubt, name=name)
    return report


@pytest.mark.parametrize("device", ROADS)
def test_logits_loss_and_gradients_are_those_of_before(family, device):
    model = family()
    report = assert_as_before(model.to(device), *batch(7, device))
    assert all(row.now for row in report.rows)


def test_fifty_steps_give_the_same_losses(family):
    """With an optimizer that was made before, in float64, where only rounding differs."""

    def losses(accelerates):
        torch.manual_seed(3)
        model = family(n_layer=1, n_layers=1) if family is None else family()
        model = model.double().train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        if accelerates:
            accelerate(model)
        found = []
        for _ in range(50):
            loss = logits_and_loss(model, *batch(8))[1]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.detach())
        return torch.stack(found)

    before, after = losses(False), losses(True)
    assert before[-10:].mean() < before[:10].mean()
    torch.testing.assert_close(after, before, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dropout", ["attn_pdrop", "resid_pdrop", "embd_pdrop"])
def test_hugging_faces_dropouts_stay_where_they_are(dropout):
    assert_the_same_draws(hugging_face(**{dropout: 0.4}))


@pytest.mark.parametrize("flash", [True, False])
def test_nanogpts_dropout_stays_where_it_is(flash):
    assert_the_same_draws(nanogpt(dropout=0.4, flash=flash))


@pytest.mark.parametrize("kind", ["GPTModel", "GPTModelFast"])
def test_the_books_dropout_stays_where_it_is(kind):
    assert_the_same_draws(book(kind, drop_rate=0.4))


def assert_the_same_draws(model):
    """On PyTorch's road dropout asks torch's generator for the same numbers in the same order."""
    model.double().train()
    idx, targets = batch(9)

    def losses():
        torch.manual_seed(5)
        return torch.stack([logits_and_loss(model, idx, targets)[1] for _ in range(3)])

    before = losses()
    assert before.std() > 0
    accelerate(model, backend="torch")
    torch.testing.assert_close(losses(), before, rtol=1e-6, atol=0)
    model.eval()
    assert torch.equal(losses(), losses()[[1, 2, 0]])


def test_restore_undoes_all_of_it(family):
    model, (idx, targets) = family(), batch(9)
    attributes = {name: dict(module.__dict__) for name, module in model.named_modules()}
    before = results(model, idx, targets)
    accelerate(model)
    restore(model)
    assert {name: dict(module.__dict__) for name, module in model.named_modules()} == attributes
    after = results(model, idx, targets)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_the_object_stays_what_it_was(family):
    model = family().eval()
    model.register_forward_hook(lambda *_: None)
    parameters, keys, modules = list(model.parameters()), list(model.state_dict()), list(model.modules())
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    generator = torch.get_rng_state()
    accelerate(model)
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert list(model.state_dict()) == keys and not model.training and model._forward_hooks
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert not any(parameter.grad is not None for parameter in parameters)


def test_each_forward_says_what_it_takes(family):
    """transformers' Trainer and generate() look at it."""
    model, other = family(), family()
    accelerate(model, loss=True)
    for (name, module), theirs in zip(model.named_modules(), other.modules(), strict=True):
        ours, before = inspect.signature(module.forward).parameters, inspect.signature(theirs.forward).parameters
        assert list(ours) == list(before), name
        assert [p.kind for p in ours.values()] == [p.kind for p in before.values()]
        assert [p.default for p in ours.values()] == [p.default for p in before.values()]


def test_no_class_and_no_other_model_is_touched(family):
    model, other = family(), family()
    classes = {type(module) for module in model.modules()} | {nn.LayerNorm, nn.Linear, nn.Module}
    forwards = {kind: (kind.forward, kind.__call__, dict(vars(kind))) for kind in classes}
    accelerate(model)
    assert {kind: (kind.forward, kind.__call__, dict(vars(kind))) for kind in classes} == forwards
    assert not any("forward" in module.__dict__ for module in other.modules())


def test_twice_is_once(family):
    model = family()
    first = accelerate(model)
    forwards = {name: module.__dict__.get("fastgpt_swap") for name, module in model.named_modules()}
    assert accelerate(model) == first
    assert {name: module.__dict__.get("fastgpt_swap") for name, module in model.named_modules()} == forwards
    accelerate(model, attention=False, layer_norm=False)
    assert {module.fastgpt_swap.flag for module in model.modules() if hasattr(module, "fastgpt_swap")} == {"mlp"}


def pickled(model):
    return pickle.loads(pickle.dumps(model))


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, saved])
def test_copies_are_models_of_their_own(family, copied):
    model, (idx, targets) = family(), batch(9)
    report = accelerate(model)
    twin = copied(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()  # a copy that still ran on the old one's weights would show it
    expected = results(family(), idx, targets)
    actual = results(twin, idx, targets)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    assert accelerate(twin) == report
    restore(twin)
    assert all(torch.equal(a, b) for a, b in zip(results(twin, idx, targets).values(), expected.values(), strict=True))
    assert any("fastgpt_swap" in module.__dict__ for module in model.modules())


def test_the_report(family):
    model = family()
    report = accelerate(model)
    text = str(report)
    assert "x2" in text and "gelu_mlp" in text and "causal_attention" in text and "left" not in text
    assert len(text.splitlines()) < 10, "layers share a line"
    assert {row.name for row in report.rows if row.now} == {
        name for name, module in model.named_modules() if "fastgpt_swap" in module.__dict__
    }
    assert str(accelerate(nn.Linear(2, 2))) == "fastgpt recognised nothing in this model"


def test_accelerated_gives_back_what_it_found(family):
    model = family()
    with accelerated(model, mlp=False) as same:
        assert same is model and any("fastgpt_swap" in module.__dict__ for module in model.modules())
    assert not any("fastgpt_swap" in module.__dict__ or "forward" in module.__dict__ for module in model.modules())
    accelerate(model, attention=False)
    before = {name: module.__dict__.get("fastgpt_swap") for name, module in model.named_modules()}
    with pytest.raises(ZeroDivisionError), accelerated(model, mlp=False, backend="torch"):
        raise ZeroDivisionError
    assert {name: module.__dict__.get("fastgpt_swap") for name, module in model.named_modules()} == before


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        (dict(model=nn.Linear), TypeError, "model is a type, not an nn.Module"),
        (dict(backend="cuda"), ValueError, "backend is 'cuda', not 'auto', 'triton' or 'torch'"),
        (dict(attention="yes"), TypeError, "attention is 'yes', not True or False"),
        (dict(loss=None), TypeError, "loss is None, not True or False"),
    ],
)
def test_bad_arguments(arguments, kind, message):
    model = nanogpt()
    with pytest.raises(kind, match=message):
        accelerate(**{"model": model, **arguments})
    assert not any("fastgpt_swap" in module.__dict__ for module in model.modules())


def test_the_backend_is_handed_on():
    model, (idx, targets) = nanogpt(), batch(5)
    accelerate(model, backend="triton")
    with pytest.raises(ValueError, match="backend='triton' can't be had"):
        model(idx, targets)


# Children that must be called


class Lora(nn.Module):
    """A stranger's adapter around a linear layer."""

    def __init__(self, base):
        super().__init__()
        self.base, (wide, deep) = base, base.weight.shape
        self.a = nn.Parameter(torch.ones(4, deep, dtype=base.weight.dtype) / deep)
        self.b = nn.Parameter(torch.linspace(-1, 1, 4 * wide, dtype=base.weight.dtype).view(wide, 4))

    def forward(self, x):
        return self.base(x) + F.linear(F.linear(x, self.a), self.b)


class Halved(nn.Linear):
    """A stranger's subclass, as quantised layers are."""

    def forward(self, x):
        return super().forward(x) / 2


class Scaled(torch.nn.Module):
    def forward(self, weight):
        return 3 * weight


def lora(model, path):
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, Lora(model.get_submodule(path)))


def halved(model, path):
    model.get_submodule(path).__class__ = Halved


def hooked(model, path):
    model.get_submodule(path).register_forward_hook(lambda module, args, output: output * 2)


def hooked_before(model, path):
    model.get_submodule(path).register_forward_pre_hook(lambda module, args: (args[0] * 2, *args[1:]))


def parametrized(model, path):
    torch.nn.utils.parametrize.register_parametrization(model.get_submodule(path), "weight", Scaled())


def own_forward(model, path):
    module = model.get_submodule(path)
    module.forward = lambda x: type(module).forward(module, x) * 2


LINEARS = {
    "nanogpt": (nanogpt, ["c_attn", "c_proj"], "transformer.h.0.attn.", ["c_fc", "c_proj"], "transformer.h.0.mlp."),
    "book": (book, ["W_query", "out_proj"], "trf_blocks.0.att.", ["0", "2"], "trf_blocks.0.ff.layers."),
}
PATHS = [
    pytest.param(make, prefix + name, id=f"{family}-{prefix}{name}")
    for family, (make, heads, attention, layers, mlp) in LINEARS.items()
    for prefix, names in ((attention, heads), (mlp, layers))
    for name in names
]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("change", [lora, halved, hooked, hooked_before, parametrized, own_forward])
@pytest.mark.parametrize(("make", "path"), PATHS)
def test_a_changed_child_is_called(make, path, change, when):
    model, expected, (idx, targets) = make().double(), make().double(), batch(6)
    change(expected, path)
    if when == "before":
        change(model, path)
    accelerate(model)
    if when == "after":
        change(model, path)
    before, after = results(expected, idx, targets), results(model, idx, targets)
    torch.testing.assert_close(after, before, rtol=1e-6, atol=1e-6)
    assert (logits_and_loss(make().double(), idx, targets)[0] - after["logits"]).abs().max() > 1e-3


NORMS_AND_MORE = [
    ("transformer.h.0.ln_2", [hooked, own_forward]),
    ("transformer.h.0.attn", [hooked, hooked_before, own_forward]),
    ("transformer.h.0.attn.resid_dropout", [hooked, own_forward]),
    ("transformer.h.0.mlp", [hooked, own_forward]),
    ("transformer.h.0.mlp.gelu", [hooked, hooked_before, own_forward]),
    ("transformer.h.0.mlp.dropout", [hooked]),
    ("transformer.h.0", [hooked, hooked_before, own_forward]),
]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(("path", "change"), [(path, change) for path, changes in NORMS_AND_MORE for change in changes])
def test_a_changed_part_is_called(path, change, when):
    model, expected, (idx, targets) = nanogpt().double(), nanogpt().double(), batch(6)
    change(expected, path)
    if when == "before":
        change(model, path)
    accelerate(model)
    if when == "after":
        change(model, path)
    before, after = results(expected, idx, targets), results(model, idx, targets)
    torch.testing.assert_close(after, before, rtol=1e-6, atol=1e-6)
    assert (logits_and_loss(nanogpt().double(), idx, targets)[0] - after["logits"]).abs().max() > 1e-3


class Quantised(torch.Tensor):
    """A weight of another kind, as quantised and distributed ones are."""


def test_what_must_be_called():
    """By the reason that is found, for a call may give the same numbers as its bypass."""
    model = nanogpt()
    fc = model.transformer.h[0].mlp.c_fc
    assert families.free_linear(fc) and families.occupied(fc) is None
    parametrized(model, "transformer.h.0.mlp.c_fc")
    assert families.occupied(fc) == "it is parametrized" and not families.free_linear(fc)
    for change, why in ((hooked, "it has hooks"), (own_forward, "it has a forward of its own")):
        change(model, "transformer.h.0.mlp.c_proj")
        assert families.occupied(model.transformer.h[0].mlp.c_proj) == why
        model = nanogpt()
    fc = model.transformer.h[0].mlp.c_fc
    fc.compile(backend="eager")
    assert families.occupied(fc) == "it is compiled by itself"
    fc = model.transformer.h[1].mlp.c_fc
    fc.weight = nn.Parameter(fc.weight.detach().as_subclass(Quantised))
    assert not families.free_linear(fc)
    assert not families.free_linear(Halved(2, 2)) and not families.free_linear(Lora(nn.Linear(2, 2)))


def test_a_backward_hook_on_a_child_fires():
    model, seen = nanogpt(), []
    accelerate(model)
    model.transformer.h[0].mlp.c_fc.register_full_backward_hook(lambda *_: seen.append("c_fc"))
    model.transformer.h[1].attn.c_proj.register_full_backward_hook(lambda *_: seen.append("c_proj"))
    results(model, *batch(5))
    assert sorted(seen) == ["c_fc", "c_proj"]


def test_a_hook_on_every_module_is_called_as_before():
    def calls(model):
        seen = []
        handle = torch.nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module)))
        model(batch(5)[0])
        handle.remove()
        return seen

    model = nanogpt()
    before = calls(model)
    accelerate(model)
    assert sorted(map(str, calls(model))) == sorted(map(str, before))


def test_a_replaced_activation_is_called():
    model, expected, (idx, targets) = nanogpt().double(), nanogpt().double(), batch(6)
    accelerate(model)
    for m in (model, expected):
        m.transformer.h[0].mlp.gelu = nn.Tanh()
    before, after = results(expected, idx, targets), results(model, idx, targets)
    torch.testing.assert_close(after, before, rtol=1e-6, atol=1e-6)


def test_replaced_children_are_called():
    model, expected, (idx, targets) = nanogpt().double(), nanogpt().double(), batch(6)
    accelerate(model)
    for m in (model, expected):
        m.transformer.h[0].ln_2 = nn.Identity()
        m.transformer.h[1].attn = nn.Identity()
    before, after = results(expected, idx, targets), results(model, idx, targets)
    torch.testing.assert_close(after, before, rtol=1e-6, atol=1e-6)


def test_a_wrapper_around_our_forward_outlives_restore():
    """As the accelerate package wraps the forward of what it prepares."""
    model, (idx, targets) = nanogpt(), batch(5)
    before = results(model, idx, targets)
    accelerate(model)
    block = model.transformer.h[0]
    inner, calls = block.forward, []
    block.forward = lambda *args: (calls.append(1), inner(*args))[1]
    restore(model)
    after = results(model, idx, targets)
    assert calls and all(torch.equal(after[name], before[name]) for name in before)


# Models that only look like one of the families


def parallel(block, x):
    return x + block.attn(block.ln_1(x)) + block.mlp(block.ln_2(x))


def post_norm(block, x):
    x = block.ln_1(x + block.attn(x))
    return block.ln_2(x + block.mlp(x))


class Windowed(type(nanogpt().transformer.h[0].attn)):
    """Attention of the family's form that sees a window of keys."""

    def forward(self, x):
        batch, time, width = x.shape
        q, k, v = (t.view(batch, time, self.n_head, -1).transpose(1, 2) for t in self.c_attn(x).chunk(3, dim=-1))
        steps = torch.arange(time)
        mask = (steps <= steps[:, None]) & (steps > steps[:, None] - 3)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).reshape(batch, time, width)))


class Noisy(type(nanogpt().transformer.h[0].mlp)):
    """An MLP with a dropout of its own making between its layers, which shows only in training."""

    def forward(self, x):
        return self.dropout(self.c_proj(F.dropout(self.gelu(self.c_fc(x)), 0.3, self.training)))


class OtherLayerNorm(type(nanogpt().transformer.ln_f)):
    def forward(self, x):
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-6)


def test_a_block_of_another_form_is_left_and_its_parts_are_not():
    for forward in (parallel, post_norm):
        model = nanogpt()
        kind = type("Block", (type(model.transformer.h[0]),), {"forward": forward})
        for block in model.transformer.h:
            block.__class__ = kind
        report = assert_as_before(model, *batch(7))
        left = {row.name: row.why for row in report.rows if row.why}
        assert left == {f"transformer.h.{i}": "this Block computes something else" for i in (0, 1)}


@pytest.mark.parametrize(("path", "kind"), [("attn", Windowed), ("mlp", Noisy), ("ln_2", OtherLayerNorm)])
def test_a_part_of_another_form_is_left(path, kind):
    model = nanogpt()
    model.transformer.h[0].get_submodule(path).__class__ = kind
    report = assert_as_before(model.eval(), *batch(7))
    left = {row.name: row.why for row in report.rows if row.why}
    assert left == {f"transformer.h.0.{path}": f"this {kind.__name__} computes something else"}


def test_a_subclass_and_a_notebook_copy_are_recognised():
    model = nanogpt()
    for module in list(model.modules()):
        if type(module).__module__ == "tests.models":
            module.__class__ = type("My" + type(module).__name__, (type(module),), {"__module__": "__main__"})
    report = assert_as_before(model, *batch(7))
    assert len(report.rows) == 11 and all(row.now for row in report.rows)


def test_a_module_that_cannot_be_tried_is_left():
    model = nanogpt()
    model.transformer.h[1].mlp.__class__ = type("MLP", (nn.Module,), {"forward": lambda self, x: self.missing(x)})
    assert [row.why for row in accelerate(model).rows if row.why] == [
        "a trial of it failed with AttributeError: 'MLP' object has no attribute 'missing'"
    ] * 2, "the MLP, and the block around it"


# Single modules


@pytest.mark.parametrize("approximate", ["tanh", "none"])
@pytest.mark.parametrize("bias", [True, False])
def test_any_layer_norm_and_linear_gelu_linear(approximate, bias):
    class Vision(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(24, eps=1e-3, bias=bias)
            gelu = nn.GELU(approximate)
            self.mlp = nn.Sequential(nn.Linear(24, 40, bias=bias), gelu, nn.Linear(40, 24, bias=bias), nn.Dropout(0.0))

        def forward(self, x):
            return self.mlp(self.norm(x))

    model = randomised(Vision())
    x = torch.randn(2, 3, 5, 24) * 0.03
    oracle, before = copy.deepcopy(model).double()(x.double()), model(x)
    report = accelerate(model)
    assert [row.now for row in report.rows] == ["layer_norm", f"gelu_mlp ({approximate})"]
    assert_accurate(model(x), oracle, before)


@pytest.mark.parametrize(
    ("module", "why"),
    [
        (nn.LayerNorm((3, 4)), "it normalises 2 axes"),
        (nn.LayerNorm(4, elementwise_affine=False), "it has no weight"),
        (nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)), "its activation, ReLU, is no GELU"),
        (nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 5)), "its output is 5 wide, its input 4"),
        (nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4), nn.GELU()), "this Sequential computes something else"),
    ],
)
def test_what_is_left_and_why(module, why):
    (row,) = accelerate(module).rows
    assert row.now is None and row.why == why
    assert f"left: {why}" in str(accelerate(module))
    assert "forward" not in module.__dict__


def test_modules_of_other_kinds_are_not_mentioned():
    model = nn.Sequential(nn.Conv2d(1, 1, 3), nn.BatchNorm2d(1), nn.MultiheadAttention(8, 2), nn.ReLU())
    assert accelerate(model).rows == ()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models(family, dtype):
    model = family()
    assert_as_before(model.to(dtype).float(), *batch(7))  # weights that both precisions hold
    restore(model)
    idx, _ = batch(7)
    with torch.no_grad():
        oracle = logits_and_loss(copy.deepcopy(model).double(), idx, idx)[0]
        before = logits_and_loss(model.to(dtype), idx, idx)[0]
        accelerate(model)
        assert_accurate(logits_and_loss(model, idx, idx)[0], oracle, before)


def test_autocast(family):
    model, (idx, targets) = family(), batch(7)
    oracle = results(copy.deepcopy(model).double(), idx, targets)
    with torch.autocast("cpu", torch.bfloat16):
        before = results(model, idx, targets)
        accelerate(model)
        after = results(model, idx, targets)
    assert all(after[name].dtype == before[name].dtype for name in before)
    for names in (["logits"], ["loss"], [name for name, _ in model.named_parameters()]):
        theirs, ours = (
            torch.cat([(side[name].double() - oracle[name]).flatten() for name in names]).norm()
            for side in (before, after)
        )
        assert ours <= 1.5 * theirs + 1e-3, names
