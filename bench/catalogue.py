"""Which cases run on which kind of machine, and at which sizes."""

import torch

from bench import cases, models
from bench.case import SUBJECT, Case
from bench.families import EAGER_ATTENTION, HUGGING_FACE, NANOGPT
from bench.generation import KEPT, LOOP, STATIC, generation
from bench.machine import Machine
from bench.swap import swap
from fastgpt.model import PRESETS
from fastgpt.ops.loss import multiplies

_124M = PRESETS["gpt2-124M"]
_LARGER = ("gpt2-355M", "gpt2-774M", "gpt2-1558M")
_TINY = dict(vocab_size=65, block_size=16, n_layer=1, n_head=2, n_embd=32)


def catalogue(machine: Machine) -> list[Case]:
    """All cases of this kind of machine, the most telling first."""
    found = {"cuda": _on_a_gpu, "cpu": _on_a_cpu, "dry": small}[machine.kind](machine)
    return sorted(found, key=lambda case: case.tier)


def _on_a_gpu(machine: Machine) -> list[Case]:
    """124M at B = 32, T = 1024: 32k rows throughout."""
    M = 32 * 1024
    # STATIC and LOOP compile for half a minute: once is enough
    cached = (SUBJECT, KEPT, HUGGING_FACE)  # loops that compute all of it anew are another league
    found = [
        *cases.attention(machine, 32, 12, 1024, 64, tier=0),
        *cases.attention(machine, 32, 6, 1024, 128, tier=1),
        *cases.add_layer_norm(machine, M, 768, tier=0),
        *cases.mlp_halves(machine, M, 768, 3072, tier=1),
        *cases.gelu_mlp(machine, M, 768, 3072, tier=1),
        *cases.linear_cross_entropy(machine, M, 768, 50257, tier=0),
        *cases.embedding(machine, 32, 1024, 768, 50257, tier=1),
        *models.train_step(machine, 32, 1024, _124M, tier=0),
        *models.block(machine, 32, 1024, _124M, tier=1),
        *cases.decode(machine, 64, 12, 1024, 64, tier=1),
        *cases.decode(machine, 1, 12, 1024, 64, tier=1),
        *generation(machine, 1, 32, 128, _124M, tier=1, only=(*cached, STATIC, LOOP, NANOGPT)),
        *generation(machine, 64, 32, 128, _124M, tier=1, only=cached),
        *generation(machine, 8, 512, 1, _124M, tier=2),
        *swap(machine, 8, 1024, _124M, tier=2),
        *cases.add_layer_norm(machine, M, 1600, tier=3),
        *_growth(machine, {**_124M, "block_size": 2048}, (1, 4, 16, 64), (512, 1024, 2048), tier=3),
        *_larger(machine, B={"gpt2-355M": 16, "gpt2-774M": 8, "gpt2-1558M": 4}, T=1024, tier=3),
    ]
    for T in (4096, 16384, 512, 2048, 8192):
        for H, D in ((12, 64), (6, 128)):
            found += cases.attention(machine, M // T, H, T, D, tier=3)
    return found


def _on_a_cpu(machine: Machine) -> list[Case]:
    halves = []
    if multiplies(torch.bfloat16):
        halves = [
            *models.train_step(machine, 1, 256, _124M, tier=1, autocast=True),
            *models.train_step(machine, 8, 256, PRESETS["byte-10M"], tier=1, autocast=True),
            *generation(machine, 1, 32, 128, _124M, tier=1, dtype=torch.bfloat16),
            *generation(machine, 1, 128, 1, _124M, tier=1, dtype=torch.bfloat16),
        ]
    return [
        *cases.attention(machine, 1, 12, 1024, 64, tier=0),
        *cases.attention(machine, 1, 6, 1024, 128, tier=0),
        *cases.attention(machine, 4, 12, 256, 64, tier=1),
        *cases.add_layer_norm(machine, 2048, 768, tier=0),
        *cases.mlp_halves(machine, 256, 768, 3072, tier=0),
        *cases.gelu_mlp(machine, 256, 768, 3072, tier=0),
        *cases.linear_cross_entropy(machine, 128, 768, 50257, tier=0),
        *cases.embedding(machine, 4, 256, 768, 50257, tier=1),
        *models.block(machine, 1, 256, _124M, tier=1),
        *models.train_step(machine, 1, 256, _124M, tier=0),
        *models.train_step(machine, 8, 256, PRESETS["byte-10M"], tier=0),
        *cases.decode(machine, 8, 12, 1024, 64, tier=1),
        *generation(machine, 1, 32, 128, _124M, tier=1),
        *generation(machine, 1, 32, 16, _124M, tier=1),
        *generation(machine, 1, 128, 1, _124M, tier=1),
        *swap(machine, 1, 256, {**_124M, "n_layer": 2, "vocab_size": 4096}, tier=1),
        *_growth(machine, {**_124M, "n_layer": 2, "vocab_size": 4096}, (1, 2, 4), (128, 256, 512, 1024), tier=2),
        *halves,
        *(_larger(machine, B=dict.fromkeys(_LARGER, 1), T=256, tier=3) if machine.large else []),
    ]


def _growth(machine: Machine, config: dict, batches: tuple, times: tuple, tier: int) -> list[Case]:
    """Training steps that show how time and memory grow with the batch and with T."""
    shapes = [(B, 256) for B in batches] + [(1, T) for T in times if T != 256]
    only = (*models.LARGE, EAGER_ATTENTION)
    return [case for B, T in shapes for case in models.train_step(machine, B, T, config, tier, only=only)]


def _larger(machine: Machine, B: dict[str, int], T: int, tier: int) -> list[Case]:
    """Whole models beyond 124M, against the few that fit beside each other."""
    found = []
    for name, batch in B.items():
        config = PRESETS[name]
        found += models.train_step(machine, batch, T, config, tier, only=models.LARGE)
        found += generation(machine, 1, 32, 16, config, tier, only=models.LARGE)
        found += generation(machine, 1, 128, 1, config, tier, only=models.LARGE)
    return found


def small(machine: Machine) -> list[Case]:
    """One case of each kind, small enough for Triton's interpreter and for a GPU under a sanitizer."""
    return [
        *cases.attention(machine, 1, 2, 32, 16, tier=0),
        *cases.add_layer_norm(machine, 8, 32, tier=0),
        *cases.mlp_halves(machine, 8, 16, 32, tier=1),
        *cases.gelu_mlp(machine, 8, 16, 32, tier=1),
        *cases.linear_cross_entropy(machine, 4, 16, 65, tier=0),
        *cases.embedding(machine, 1, 16, 16, 65, tier=2),
        *models.train_step(machine, 1, 8, _TINY, tier=0),
        *models.block(machine, 1, 8, _TINY, tier=1),
        *cases.decode(machine, 1, 2, 16, 16, tier=2),
        *cases.decode(machine, 1, 1, 300, 16, tier=2),
        *generation(machine, 1, 2, 3, _TINY, tier=2),
        *swap(machine, 1, 8, _TINY, tier=2),
        *models.train_step(machine, 2, 8, _TINY, tier=3, only=models.LARGE),
    ]
