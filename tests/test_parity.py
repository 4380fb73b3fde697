"""Training on the kernels and on the fallback: one seed, the same losses."""

import pytest
import torch

from fastgpt import GPT, GPTConfig
from fastgpt.training.optimizer import TrainingStep, adamw

pytest.importorskip("triton", reason="Triton is not to be had on this platform")

from fastgpt.kernels import attention_tiles, embedding

STEPS = 300


def losses(backend, device):
    """Of a GPT of one layer, C = 32 and T = 32, that learns a sequence with a rule."""
    torch.manual_seed(5)
    config = GPTConfig(
        vocab_size=24, block_size=32, n_layer=1, n_head=2, n_embd=32, backend=backend, layer_norm_eps=1e-5
    )
    gpt = GPT(config).to(device)
    step = TrainingStep(gpt, adamw(gpt, 3e-3))
    start = torch.randint(24, (STEPS, 1, 1))
    sequences = (start + torch.arange(33) * torch.arange(33) % 7).remainder(24).to(device)
    return torch.stack([step(row[:, :-1], row[:, 1:])[0] for row in sequences]).cpu()


@pytest.mark.slow
def test_three_hundred_steps_lose_the_same(device, monkeypatch):
    """Both add in float32 in another order, and training magnifies what that rounds away, about tenfold in a hundred
    steps here: the first losses agree to float32, the last to a part in ten thousand."""
    if device.type == "cpu":  # tiles that hold all of it, or the interpreter takes twice as long
        monkeypatch.setattr(attention_tiles, "_tiles", lambda *args: attention_tiles.Tiles(32, 32, 4, 1))
        monkeypatch.setattr(embedding, "_chunk", lambda tensor: 32)
    kernels, fallback = losses("triton", device), losses("torch", device)
    assert fallback[-20:].mean() < 0.5 * fallback[0]  # it learned
    apart = (kernels - fallback).abs() / fallback
    assert apart[:10].max() < 1e-5 and apart.max() < 1e-3
