"""Subclasses of Hugging Face's GPT-2 that ask for more, and blocks in a wrapper."""

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="the extra `test` brings transformers")


from tests.families.huggingface import assert_as_before, attention_calls, padded, results  # noqa: E402
from tests.models import hugging_face  # noqa: E402
from tests.swap.swapped import accelerate  # noqa: E402


def test_what_a_subclass_is_told_beside_the_known_arguments():
    model = hugging_face(n_layer=1).double().eval()
    block = model.transformer.h[0]

    class Block(type(block)):
        def forward(self, hidden_states, *args, task_scale=1.0, **kwargs):
            return super().forward(hidden_states * task_scale, *args, **kwargs)

    class Attention(type(block.attn)):
        def forward(self, hidden_states, *args, shift=0.0, **kwargs):
            return super().forward(hidden_states + shift, *args, **kwargs)

    block.__class__, block.attn.__class__ = Block, Attention
    idx, mask = padded("left")
    calls = [
        lambda: block(torch.ones(1, 3, 48, dtype=torch.float64), task_scale=2.0),
        lambda: block.attn(torch.ones(1, 3, 48, dtype=torch.float64), shift=0.5)[0],
        lambda: block.attn(hidden_states=torch.ones(1, 3, 48, dtype=torch.float64))[0],
        lambda: block(hidden_states=torch.ones(1, 3, 48, dtype=torch.float64)),
        lambda: model(idx, attention_mask=mask).logits * mask[..., None],
    ]
    before = [call() for call in calls]
    assert all(row.now for row in accelerate(model).rows)
    for call, expected in zip(calls, before, strict=True):
        torch.testing.assert_close(call(), expected, rtol=1e-9, atol=1e-10)


def test_a_subclass_without_room_for_our_mask():
    model = hugging_face(n_layer=1).double()
    attn = model.transformer.h[0].attn

    class Attention(type(attn)):
        def forward(
            self, hidden_states, past_key_values=None, cache_position=None, attention_mask=None, use_cache=None,
            encoder_hidden_states=None, encoder_attention_mask=None, output_attentions=None, position_ids=None,
        ):  # fmt: skip
            y, weights = super().forward(hidden_states, past_key_values=past_key_values, attention_mask=attention_mask)
            return 2 * y, weights  # so that it is left

    attn.__class__ = Attention
    idx, mask = padded("left")
    try:
        assert_as_before(model, idx, attention_mask=mask, use_cache=False)
    except TypeError as error:
        raise AssertionError("it was given what it does not take") from error


def test_blocks_in_a_wrapper_still_see_a_padding_mask(monkeypatch):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = hugging_face().double()
    idx, mask = padded("left")
    expected = results(model, idx, attention_mask=mask, use_cache=False)
    accelerate(model)
    for place, block in enumerate(model.transformer.h):
        model.transformer.h[place] = checkpoint_wrapper(block) if place else torch.compile(block, backend="eager")
    calls = attention_calls(monkeypatch)
    found = model(idx, attention_mask=mask, use_cache=False).logits * mask[..., None]
    torch.testing.assert_close(found.detach(), expected["logits"], rtol=1e-9, atol=1e-10)
    assert calls == ["causal_attention_qkv"] * 2


def test_subclasses_that_hand_everything_on_still_see_a_padding_mask(monkeypatch):
    calls, model = attention_calls(monkeypatch), hugging_face()
    for block in model.transformer.h:
        for module in (block, block.attn):
            kind = type(module)
            hand_on = {"forward": lambda self, *args, _kind=kind, **more: _kind.forward(self, *args, **more)}
            module.__class__ = type(f"My{kind.__name__}", (kind,), hand_on)
    idx, mask = padded("left")
    assert not assert_as_before(model, idx, attention_mask=mask, use_cache=False, calls=calls)
    assert calls == ["causal_attention_qkv"] * 2
