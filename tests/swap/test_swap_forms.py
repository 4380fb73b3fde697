"""accelerate of what only looks like one of the modules: another form is left, and its parts are not."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastgpt import restore
from tests.models import book, hugging_face, nanogpt
from tests.swap.swapped import accelerate, assert_as_before, batch


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
        "a trial of its own forward failed with AttributeError: 'MLP' object has no attribute 'missing'"
    ] * 2, "the MLP, and the block around it"


class InnerDropout(nn.Module):
    """Dropout between the layers, and not after them."""

    def __init__(self):
        super().__init__()
        self.up, self.act, self.drop, self.down = nn.Linear(8, 32), nn.GELU(), nn.Dropout(0.5), nn.Linear(32, 8)

    def forward(self, x):
        return self.down(self.drop(self.act(self.up(x))))


def dropped_branch(self, x):
    x = x + F.dropout(self.attn(self.ln_1(x)), 0.3, self.training)
    return x + self.mlp(self.ln_2(x))


class Clipped(type(nanogpt().transformer.h[0].attn)):
    def forward(self, x):
        return super().forward(x.clamp(-8, 8))


class EveryOther(type(nanogpt().transformer.h[0].attn)):
    """Attention that depends on its place."""

    def forward(self, x):
        return super().forward(x if self.layer_idx % 2 else x * 2)


class Table(type(nanogpt().transformer.h[0].attn)):
    def forward(self, x):
        return super().forward(x * self.table)


def test_dropout_in_another_place():
    assert [row.why for row in accelerate(InnerDropout()).rows] == ["this InnerDropout computes something else"]
    model = nanogpt()
    kind = type("Block", (type(model.transformer.h[0]),), {"forward": dropped_branch})
    model.transformer.h[0].__class__ = kind
    left = {row.name: row.why for row in accelerate(model).rows if row.why}
    assert left == {"transformer.h.0": "this Block computes something else"}


def test_attention_with_bounds():
    model = nanogpt()
    model.transformer.h[0].attn.__class__ = Clipped
    left = {row.name: row.why for row in accelerate(model).rows if row.why}
    assert left == {"transformer.h.0.attn": "this Clipped computes something else"}


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_layers_that_differ_are_each_tried(order):
    model = nanogpt()
    for block, place in zip(model.transformer.h, order, strict=True):
        block.attn.__class__ = EveryOther
        block.attn.layer_idx = place
    left = [row.name for row in accelerate(model).rows if row.why]
    assert left == [f"transformer.h.{order.index(0)}.attn"]
    model = nanogpt()
    for block, factor in zip(model.transformer.h, order, strict=True):
        block.attn.__class__ = Table
        block.attn.register_buffer("table", torch.tensor(1.0 + factor))
    left = [row.name for row in accelerate(model).rows if row.why]
    assert left == [f"transformer.h.{order.index(1)}.attn"]


class Shifted(type(nanogpt().transformer.h[0].attn)):
    def forward(self, x):
        return super().forward(x + self.table)


class Counts(type(nanogpt().transformer.h[0].attn)):
    """Its table changes nothing."""


@pytest.mark.parametrize("kind", [Shifted, Counts])
def test_a_buffer_that_is_zero_and_may_be_filled_later(kind):
    """What the trial can't see yet, as a gate that is learned, is a reason where it would change something."""
    model = nanogpt().eval()
    idx = torch.arange(6)[None]
    for block in model.transformer.h:
        block.attn.__class__ = kind
        block.attn.register_buffer("table", torch.zeros(1))
    report = accelerate(model)
    assert {row.why is None for row in report.rows if row.kind == kind.__name__} == {kind is Counts}
    for block in model.transformer.h:
        block.attn.table.fill_(0.5)
    found = model(idx)[0]
    restore(model)
    torch.testing.assert_close(found, model(idx)[0], rtol=1e-4, atol=1e-5)


def test_a_buffer_that_shows_no_bytes():
    for buffer in (torch.ones(1).expand(5), torch.eye(3).to_sparse(), torch.ones(2, device="meta")):
        model = nanogpt()
        model.transformer.h[0].attn.register_buffer("extra", buffer)
        assert len(accelerate(model).rows) == 11


def test_calls_that_a_class_of_ones_own_understands():
    model = nanogpt()
    block = model.transformer.h[0]

    class Masked(type(block.attn)):
        def forward(self, x, mask=None):
            return super().forward(x) if mask is None else super().forward(x) * mask

    block.attn.__class__ = Masked
    x, mask = torch.randn(2, 5, 48), torch.rand(2, 5, 1)
    calls = [lambda: block.attn(x, mask), lambda: block.attn(x, mask=mask), lambda: block.attn(x=x)]
    calls += [lambda: block.ln_1(x=x), lambda: block.mlp(x=x), lambda: block(x=x)]
    before = [call() for call in calls]
    assert all(row.now for row in accelerate(model).rows)
    for call, expected in zip(calls, before, strict=True):
        torch.testing.assert_close(call(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("make", [nanogpt, hugging_face, book])
def test_a_block_whose_norm_is_none(make):
    model = make()
    block = next(module for module in model.modules() if {"ln_1", "norm1"} & module._modules.keys())
    name = "ln_1" if hasattr(block, "ln_1") else "norm1"
    setattr(block, name, nn.Identity())
    (why,) = {row.why for row in accelerate(model, backend="torch").rows if row.why}
    assert why == f"its {name} has no weight"
