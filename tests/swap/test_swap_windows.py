"""Strangers' attention that looks back no further than a window is left alone, however long the window is."""

import pytest
import torch
import torch.nn.functional as F

from fastgpt import accelerate, generate
from tests.models import CausalSelfAttention, nanogpt


class Windowed(CausalSelfAttention):
    """nanoGPT's, in a window that no setting tells of."""

    reach = 0

    def forward(self, x):
        batch, time, channels = x.shape
        q, k, v = (t.view(batch, time, self.n_head, -1).transpose(1, 2) for t in self.c_attn(x).split(channels, dim=2))
        steps = torch.arange(time, device=x.device)
        seen = (steps <= steps[:, None]) & (steps > steps[:, None] - self.reach)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, dropout_p=self.dropout if self.training else 0)
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).reshape(x.shape)))


def stranger(reach, context=96):
    model = nanogpt(block_size=context)
    kind = type("Attention", (Windowed,), {"reach": reach})
    for block in model.transformer.h:
        block.attn.__class__ = kind
    return model


@pytest.mark.parametrize("reach", [2, 7, 40, 95])
def test_a_window_of_any_length_is_seen(reach):
    report = accelerate(stranger(reach), backend="torch")
    found = [row for row in report.rows if row.name.endswith("attn")]
    assert len(found) == 2 and all(row.now is None and "computes something else" in row.why for row in found)


def test_a_window_of_the_whole_context_is_none():
    report = accelerate(stranger(96), backend="torch")
    assert all(row.now for row in report.rows if row.name.endswith("attn"))


def test_a_window_longer_than_a_trial_is_read_from_the_settings():
    model = stranger(3000, context=4096)
    for block in model.transformer.h:
        block.attn.window_size = 3000
    report = accelerate(model, backend="torch")
    found = [row for row in report.rows if row.name.endswith("attn")]
    assert all(
        row.now is None and "has a window of 3000, and a trial has no more than 2048" in row.why for row in found
    )


def test_generate_refuses_a_window_that_the_settings_tell():
    model = stranger(30)
    model.config.window_size = 30
    with pytest.raises(ValueError, match="computes something else than its parts say"):
        generate(model, [[1, 2, 3]], 2)
