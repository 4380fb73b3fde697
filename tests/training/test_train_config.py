"""What TrainConfig says a run does: learning rates, bad fields, devices."""

import math

import pytest
import torch

from fastgpt import GPTConfig, training
from fastgpt.training.distributed import World
from fastgpt.training.settings import TrainConfig


@pytest.mark.parametrize(
    ("fields", "step", "rate"),
    [
        (dict(warmup_iters=10), 0, 0.1),
        (dict(warmup_iters=10), 9, 1.0),
        (dict(warmup_iters=10), 10, 1.0),
        (dict(warmup_iters=0), 0, 1.0),
        (dict(warmup_iters=0), 50, 0.6),
        (dict(warmup_iters=50), 75, 0.6),
        (dict(warmup_iters=10), 100, 0.2),
        (dict(warmup_iters=10), 150, 0.2),
        (dict(warmup_iters=1000), 100, 0.101),
        (dict(warmup_iters=0, max_iters=1), 0, 1.0),
    ],
    ids=[
        "first",
        "warmed",
        "cosine",
        "no-warmup",
        "half",
        "half-after-warmup",
        "last",
        "past-last",
        "all-warmup",
        "one-step",
    ],
)
def test_learning_rate_at(fields, step, rate):
    config = TrainConfig(**{"learning_rate": 1.0, "min_lr": 0.2, "max_iters": 101, **fields})
    assert config.learning_rate_at(step) == pytest.approx(rate)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        *((name, 0, "0, not at least 1") for name in ("max_iters", "batch_size", "eval_interval", "eval_iters")),
        ("learning_rate", math.nan, "nan, not a finite number of at least 0"),
        ("min_lr", -1e-4, "-0.0001, not a finite number of at least 0"),
        ("warmup_iters", -3, "-3, not a finite number of at least 0"),
        ("weight_decay", math.inf, "inf, not a finite number of at least 0"),
        ("grad_clip", -1.0, "-1.0, not a finite number of at least 0"),
        ("beta1", 1.0, r"1.0, not in \[0, 1\)"),
        ("beta2", -0.1, r"-0.1, not in \[0, 1\)"),
        ("cuda_graph", 1, "1, not 'auto', True or False"),
        ("seed", -1, r"-1, not in \[0, 2\*\*63\)"),
        ("seed", 2**63, r"9223372036854775808, not in \[0, 2\*\*63\)"),
    ],
)
def test_bad_field(field, value, message):
    with pytest.raises(ValueError, match=f"TrainConfig: {field} is {message}"):
        TrainConfig(**{field: value})


def test_min_lr_is_zero_unless_said_and_never_above():
    assert TrainConfig(learning_rate=1e-4).learning_rate_at(10**9) == 0
    with pytest.raises(ValueError, match=r"min_lr = 0.1 is above learning_rate = 0.001"):
        TrainConfig(learning_rate=1e-3, min_lr=0.1)


@pytest.mark.parametrize(
    ("world", "fields", "message"),
    [
        ((3, "cpu"), dict(batch_size=8), "8 windows a step do not divide among 3 processes"),
        ((2, "cuda"), dict(cuda_graph=True), "cuda_graph is true, and a CUDA graph can't be: 2 processes"),
        ((1, "cpu"), dict(fsdp=True), "fsdp needs several processes"),
        ((2, "cuda"), dict(fsdp=True, optimizer="muon"), "fsdp and optimizer = 'muon' do not go together"),
        ((2, "cuda"), dict(fsdp=True, dtype="float16"), "fsdp and float16 do not go together"),
        ((4, "cpu"), dict(fsdp=True, fsdp_shard=3, batch_size=4), "fsdp_shard = 3 does not divide 4 processes"),
    ],
)
def test_what_these_devices_can_not_do(world, fields, message):
    size, device = world
    with pytest.raises(ValueError, match=message):
        training.fitting._hold_device(
            GPTConfig.preset("byte-0.1M"), TrainConfig(**fields), World(0, size, torch.device(device))
        )
