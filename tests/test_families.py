"""What is almost one of the parts that families look for."""

import torch
from torch import nn

from fastgpt import families
from fastgpt.families import gpt2


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
        assert families.gelu_kind(act) is None


def test_what_is_no_norm():
    matrix = T5LayerNorm(3, 4)
    matrix.bias = None  # as nanoGPT's, but for its shape
    assert families.recognise_norm(T5LayerNorm(4)) is None and families.recognise_norm(matrix) is None


def test_what_is_no_linear_and_no_dropout():
    assert not families.is_linear("weight")
    assert families.dropout_p(nn.Identity()) == 0 and families.dropout_p(nn.ReLU()) is None


def test_an_mlp_without_its_activation():
    parts = nn.ModuleDict(dict(c_fc=nn.Linear(4, 16), act=nn.GELU(), c_proj=nn.Linear(16, 4)))
    assert isinstance(families.recognise_mlp(parts), families.Swap)
    parts._modules["act"] = None
    assert families.recognise_mlp(parts) is None


def test_masks_that_a_key_mask_does_not_say():
    queries, keys = 3, 5
    assert gpt2.key_mask(queries, keys, torch.zeros(2, 1, queries, keys), None) == (False, None)  # numbers to be added
    assert gpt2.key_mask(queries, keys, torch.ones(2, 4, queries, keys, dtype=torch.bool), None)[0] is False
    everything = torch.ones(2, 1, 1, keys, dtype=torch.bool)
    assert gpt2.key_mask(1, keys, everything, None)[1].shape == (2, keys)
