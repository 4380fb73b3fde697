"""What is almost one of the parts that families look for."""

import pytest
import torch
from torch import nn

from fastgpt import generate, modules
from fastgpt.families import book as book_family
from fastgpt.families import gpt2
from fastgpt.swap import book, layers, trial
from tests import models
from tests.swap.swapped import accelerate


class Sums(nn.Module):
    def forward(self, x):
        return x.sum()


class T5LayerNorm(nn.Module):
    """Takes no mean off, and has no bias at all."""

    def __init__(self, *shape):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(*shape))


def test_what_is_no_gelu():
    for act in (nn.ReLU(), Sums(), nn.Bilinear(1, 1, 1)):  # another function, no element's, of two tensors
        assert layers.gelu_kind(act) is None


def test_a_norm_of_a_tensor_of_ones_own_is_the_classs():
    class Named(torch.Tensor):
        pass

    norm, x = nn.LayerNorm(4), torch.randn(2, 4).as_subclass(Named)
    expected = norm(x)
    accelerate(norm)
    assert type(norm(x)) is Named and torch.equal(norm(x), expected)


def test_what_is_no_norm():
    matrix = T5LayerNorm(3, 4)
    matrix.bias = None  # as nanoGPT's, but for its shape
    assert layers.recognise_norm(T5LayerNorm(4)) is None and layers.recognise_norm(matrix) is None


def test_what_is_no_linear_and_no_dropout():
    assert not modules.is_linear("weight")
    assert modules.dropout_p(nn.Identity()) == 0 and modules.dropout_p(nn.ReLU()) is None


def test_an_mlp_without_its_activation():
    parts = nn.ModuleDict(dict(c_fc=nn.Linear(4, 16), act=nn.GELU(), c_proj=nn.Linear(16, 4)))
    assert isinstance(layers.recognise_mlp(parts), modules.Swap)
    parts._modules["act"] = None
    assert layers.recognise_mlp(parts) is None


def test_masks_that_a_key_mask_does_not_say():
    queries, keys = 3, 5
    assert gpt2.key_mask(queries, keys, torch.zeros(2, 1, queries, keys), None) == (False, None)  # numbers to be added
    assert gpt2.key_mask(queries, keys, torch.ones(2, 4, queries, keys, dtype=torch.bool), None)[0] is False
    everything = torch.ones(2, 1, 1, keys, dtype=torch.bool)
    assert gpt2.key_mask(1, keys, everything, None)[1].shape == (2, keys)


def test_an_attention_of_the_books_names_without_its_parts():
    attn = nn.Module()
    attn.num_heads, attn.d_out, attn.dropout = 2, 4, nn.Dropout()
    assert book.recognise(attn) is None
    attn.qkv, attn.proj = nn.Linear(4, 12), nn.Linear(4, 4)
    assert isinstance(book.recognise(attn), modules.Swap)
    del attn.dropout
    assert book.recognise(attn) is None


def test_the_books_checkpoint_without_a_third_of_a_projection():
    tensors = {f"trf_blocks.0.att.W_{part}.weight": torch.ones(4, 4) for part in ("query", "value")}
    with pytest.raises(ValueError, match=r"there is no att\.W_key for h\.0\.attn\.c_attn\.weight"):
        book_family.read_weights(tensors, {})


def test_a_result_of_another_shape_or_dtype_does_not_agree():
    x = torch.ones(3)
    assert trial._agree((x, None), (x + 1e-8, None))
    assert not any(trial._agree(x, other) for other in (x.double(), torch.ones(1, 3), None, (x,), x + 1e-3))


DROPOUTS = {
    "hugging face": (models.hugging_face, "transformer", ("drop", "h.1.attn.resid_dropout", "h.1.mlp.dropout")),
    "nanogpt": (models.nanogpt, "transformer", ("drop", "h.1.attn.resid_dropout", "h.1.mlp.dropout")),
    "nanogpt, no flash": (lambda: models.nanogpt(flash=False), "transformer", ("h.1.attn.attn_dropout",)),
    "book": (models.book, "", ("drop_emb", "trf_blocks.1.drop_resid", "trf_blocks.1.att.dropout")),
}


@pytest.mark.parametrize("name", DROPOUTS)
def test_a_dropout_with_a_hook_that_generation_would_not_call(name):
    """Though it only looks, so that no comparison of logits shows it."""
    make, body, dropouts = DROPOUTS[name]
    model = make().eval()
    ids = torch.tensor([[1, 2, 3]])
    for dropout in (f"{body}.{each}".lstrip(".") for each in dropouts):
        seen = []
        handle = model.get_submodule(dropout).register_forward_hook(lambda *_, seen=seen: seen.append(1))
        model(ids)
        assert seen
        with pytest.raises(ValueError, match=f"generate: {dropout} would be passed by, and it has hooks"):
            generate(model, ids, 2)
        handle.remove()
    assert len(generate(model, ids, 2).tokens[0]) == 2


def test_a_dropout_with_a_hook_in_a_part_that_is_called():
    model, seen = models.nanogpt().eval(), []
    mlp = model.transformer.h[1].mlp
    for module in (mlp, mlp.dropout):
        module.register_forward_hook(lambda *_: seen.append(1))
    generate(model, [[1, 2, 3]], 3)
    assert len(seen) >= 2 * 3
