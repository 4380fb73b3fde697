"""The book's models: scale and shift, mask buffers, either name of the residual dropout, caches, its own generation."""

import copy

import pytest
import torch
from torch import nn

from fastgpt import restore
from tests.models import CONTEXT, FAMILIES, VOCAB, book, book_package
from tests.swap.swapped import accelerate

IDX = torch.randint(0, VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))
KINDS = {
    "ch04": dict(kind="GPTModel"),
    "fast": dict(kind="GPTModelFast"),
    "cache": dict(kind="GPTModel", module="kv_cache.gpt2"),
}


@pytest.fixture(params=KINDS)
def make(request):
    return lambda **changes: book(**KINDS[request.param], **changes)


@pytest.mark.parametrize("qkv_bias", [True, False])
@pytest.mark.parametrize("time", [1, 2, CONTEXT])
def test_every_length_with_and_without_bias(make, qkv_bias, time):
    model = make(qkv_bias=qkv_bias).double()
    idx = torch.randint(0, VOCAB, (3, time))
    before = model(idx)
    report = accelerate(model)
    assert all(row.now for row in report.rows) and len(report.rows) in (
        11,
        12,
    )  # 11 where the model calls each block by itself
    torch.testing.assert_close(model(idx), before, rtol=1e-6, atol=1e-7)


def test_heads_of_25_channels(make):
    model = make(emb_dim=100).double()
    before = model(IDX)
    accelerate(model)
    torch.testing.assert_close(model(IDX), before, rtol=1e-6, atol=1e-7)


def test_mask_buffers_stay_in_the_state_dict():
    model = book()
    accelerate(model)
    masks = [name for name in model.state_dict() if name.endswith("att.mask")]
    assert len(masks) == 2 and model.state_dict()[masks[0]].shape == (CONTEXT, CONTEXT)
    fresh = book()
    fresh.load_state_dict(model.state_dict())


def test_either_name_of_the_residual_dropout(make):
    """A hook on it sees both branches of each block, the attention's first."""

    def seen(accelerates):
        model, shapes = make(drop_rate=0.2).double().eval(), []
        if accelerates:
            accelerate(model)
        for block in model.trf_blocks:
            name = "drop_resid" if hasattr(block, "drop_resid") else "drop_shortcut"
            getattr(block, name).register_forward_hook(lambda module, args, output: shapes.append(args[0].detach()))
        model(IDX)
        return shapes

    before, after = seen(False), seen(True)
    assert len(before) == 4
    torch.testing.assert_close(after, before, rtol=1e-6, atol=1e-7)


def test_monte_carlo_dropout_follows_the_dropout_modules_own_mode(make):
    model = make(drop_rate=0.5).eval()
    accelerate(model)
    quiet = model(IDX)
    assert torch.equal(model(IDX), quiet)
    for module in model.modules():
        if isinstance(module, nn.Dropout) and module is not model.drop_emb:
            module.train()
    assert not torch.equal(model(IDX), quiet)


def test_a_hook_that_watches_the_attentions_weights_sees_them():
    model, seen = book(), []
    accelerate(model)
    model.trf_blocks[0].att.dropout.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    model(IDX)
    assert seen == [(2, 4, 9, 9)]


def test_its_own_generation_gives_the_same_tokens(make):
    model = make().double().eval()
    generate = book_package("ch04").generate_text_simple
    before = generate(model, IDX, 8, CONTEXT)
    accelerate(model)
    assert torch.equal(generate(model, IDX, 8, CONTEXT), before)


def test_the_cache_of_the_packages_variant_works():
    """Its own decoding step raises (a mask cut on the wrong side); ours aligns the mask at the end."""
    model = book(**KINDS["cache"]).double().eval()
    expected = model(IDX)

    def stepwise():
        model.current_pos = 0
        cache = book_package("kv_cache.utils").KVCache(2)
        parts = [model(IDX[:, a:b], use_cache=True, cache=cache) for a, b in ((0, 5), (5, 6), (6, 9))]
        return torch.cat(parts, dim=1)

    with pytest.raises(RuntimeError, match="doesn't match"):
        stepwise()
    accelerate(model)
    torch.testing.assert_close(stepwise(), expected, rtol=1e-6, atol=1e-7)
    model.current_pos = 0
    restore(model)
    assert torch.equal(model(IDX), expected)


def test_a_call_that_it_does_not_know_is_its_own_to_answer():
    model = book(module="kv_cache.gpt2")
    accelerate(model)
    attn = model.trf_blocks[0].att
    with pytest.raises(TypeError, match="unexpected keyword argument 'mask'"):
        attn(torch.zeros(1, 3, 48), mask=None)


def test_parts_of_the_book_in_a_model_of_ones_own():
    chapter = book_package()
    cfg = dict(
        vocab_size=VOCAB, context_length=CONTEXT, emb_dim=48, n_layers=2, n_heads=4, drop_rate=0.0, qkv_bias=False
    )
    model = nn.Sequential(nn.Linear(7, 48), chapter.TransformerBlock(cfg), chapter.LayerNorm(48), nn.Linear(48, 3))
    model = model.double()
    x = torch.randn(2, 9, 7, dtype=torch.float64)
    before = copy.deepcopy(model)(x)
    report = accelerate(model)
    assert [row.kind for row in report.rows] == [
        "TransformerBlock", "MultiHeadAttention", "Sequential", "LayerNorm", "LayerNorm", "LayerNorm",
    ]  # fmt: skip
    torch.testing.assert_close(model(x), before, rtol=1e-6, atol=1e-7)


class CachingAttention(nn.Module):
    """As in the book's chapters on caches and windows: keys and values in buffers, and use_cache in every call."""

    def __init__(self, width, heads, window=None):
        super().__init__()
        self.num_heads, self.d_out, self.window = heads, width, window
        self.W_query, self.W_key, self.W_value, self.out_proj = (nn.Linear(width, width) for _ in range(4))
        self.dropout = nn.Dropout(0.1)
        self.register_buffer("cache_k", None, persistent=False)
        self.register_buffer("cache_v", None, persistent=False)

    def forward(self, x, use_cache=False):
        batch, time, width = x.shape
        q, k, v = (
            linear(x).view(batch, time, self.num_heads, -1).transpose(1, 2)
            for linear in (self.W_query, self.W_key, self.W_value)
        )
        if use_cache:
            if self.cache_k is not None:
                k, v = torch.cat((self.cache_k, k), 2), torch.cat((self.cache_v, v), 2)
            self.cache_k, self.cache_v = k, v
        keys = torch.arange(k.shape[2])
        distance = keys[-time:, None] - keys
        hidden = (distance < 0) | (distance >= (self.window or k.shape[2]))
        scores = (q @ k.transpose(2, 3)).masked_fill(hidden, -torch.inf) / q.shape[-1] ** 0.5
        y = self.dropout(scores.softmax(-1)) @ v
        return self.out_proj(y.transpose(1, 2).reshape(batch, time, width))


@pytest.mark.parametrize("window", [None, 7])
def test_attention_with_a_cache_of_its_own_is_left_and_the_report_says_so(window):
    """A window of 7 is more than a trial's five tokens show."""
    model = book_package().TransformerBlock(
        dict(vocab_size=VOCAB, context_length=CONTEXT, emb_dim=48, n_layers=1, n_heads=4, drop_rate=0.0, qkv_bias=False)
    )

    class Block(type(model)):
        def forward(self, x, use_cache=False):
            shortcut = x
            x = self.drop_resid(self.att(self.norm1(x), use_cache=use_cache)) + shortcut
            return self.drop_resid(self.ff(self.norm2(x))) + x

    model.__class__ = Block
    model.att = CachingAttention(48, 4, window)
    model = model.double().eval()
    x = torch.randn(2, 12, 48, dtype=torch.float64)

    def results():
        model.att.cache_k = model.att.cache_v = None
        return model(x), torch.cat([model(x[:, a:b], use_cache=True) for a, b in ((0, 9), (9, 10), (10, 12))], 1)

    before = results()
    report = accelerate(model)
    (row,) = (row for row in report.rows if row.kind == "CachingAttention")
    assert row.now is None and "keeps a cache of its own" in str(report) and "causal_attention" not in str(report)
    assert [row.kind for row in report.rows if row.now] == ["Block", "Sequential", "LayerNorm", "LayerNorm"]
    torch.testing.assert_close(results(), before, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", ["book", "book, fast", "book, cache"])
@pytest.mark.parametrize("part", ["", "att"], ids=["block", "attention"])
def test_what_a_block_may_be_called_with(kind, part):
    """By place and by keyword; what its class does not take is refused as its class refuses it, and not dropped."""
    model = FAMILIES[kind]().double().eval()
    module, x = model.trf_blocks[0].get_submodule(part), torch.randn(2, 5, 48, dtype=torch.float64)
    keeps = [((x,), dict(use_cache=True, cache=None)), ((x, True), dict(start_pos=0)), ((x, True, 0, None), {})]
    given = [((x,), {}), ((), dict(x=x)), *(keeps if "cache" in kind else [])]
    refused = [
        ((x,), dict(mask=None)),
        ((x,), dict(use_cache=True, mask=None)),
        ((x, False, 0, None, None), {}),
        ((x, False), dict(use_cache=True)),
        ((), {}),
    ]

    def results():
        with torch.no_grad():
            found = [module(*args, **kwargs) for args, kwargs in given]
        for args, kwargs in refused:
            with pytest.raises(TypeError):
                module(*args, **kwargs)
        return [tuple(each) if isinstance(each, tuple) else (each, None) for each in found]

    before = results()
    accelerate(model, backend="torch")
    for (y, cache), (expected, was) in zip(results(), before, strict=True):
        torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)
        assert (cache is None) == (was is None)
        for ours, theirs in zip(cache or (), was or (), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
