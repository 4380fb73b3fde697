"""The trainer's settings two at a time: a run that was stopped halfway is, to the bit, the run that was not; and what
float16 does beside what float32 does."""

import pytest
import torch

from fastgpt import GPT
from fastgpt.training.distributed import World
from fastgpt.training.optimizer import adamw
from fastgpt.training.step import Step
from tests.models import randomised
from tests.pairs import covering, named
from tests.training.runs import MODEL, Runs, digests

ROWS = covering(
    order=["random", "epoch"],
    document_mask=[False, True],
    schedule=["cosine", "wsd"],
    decay_lr=[True, False],
    lr_decay_iters=[None, 3],
    warmup_iters=[0, 2],
    dtype=["float32", "bfloat16", "float16"],
    grad_clip=[0.0, 0.05, 1.0],
    batches=[dict(), dict(gradient_accumulation_steps=3), dict(gradient_accumulation_steps=1, total_batch_size=96)],
    skip_nonfinite=[0, 2],
    log_interval=[1, 3],
    eval_interval=[1, 100],
    sample_tokens=[0, 2],
    weight_decay=[0.0, 0.1],
    model=[dict(), dict(dropout=0.0), dict(activation_checkpointing="block"), dict(residual="float32", tie=False)],
)


def name(row):
    return named({key: value for key, value in row.items() if key not in ("model", "batches")})


@pytest.mark.parametrize("row", ROWS, ids=name)
def test_stopped_halfway_and_gone_on(tmp_path, monkeypatch, row):
    """Weights, moments and generators; the losses, the learning rate and the norm that were written down; and at the
    half no more had been written than the whole run had then."""
    run = Runs(tmp_path, monkeypatch)
    changes = {**row, **row["batches"], "max_iters": 4}
    model = MODEL.from_dict({**vars(MODEL), **row["model"]})
    del changes["model"], changes["batches"]
    run("whole", model, **changes)
    full = {**changes, "lr_decay_iters": changes["lr_decay_iters"] or 4}  # which max_iters would say otherwise
    run("halves", model, **{**full, "max_iters": 2})
    run("halves", model, resume=True, **full)
    assert digests(tmp_path / "halves", 4) == digests(tmp_path / "whole", 4)
    found = [lines_of(tmp_path / folder) for folder in ("whole", "halves")]
    if row["eval_interval"] == 1:
        assert found[0] == found[1] and len(found[0]) == 4
    assert found[0][-1][0] == found[1][-1][0] == "4" and found[0][-1][2:] == found[1][-1][2:]


def lines_of(folder):
    """Step, losses, learning rate and norm; no times."""
    rows = [line.split(",") for line in (folder / "metrics.csv").read_text().splitlines()[1:]]
    return [[*row[:4], row[6]] for row in rows]


@pytest.mark.parametrize("batches", [1, 3])
@pytest.mark.parametrize("max_norm", [0.0, 0.05, 1e6])
def test_float16_clips_the_gradients_themselves(max_norm, batches):
    """Not the scaled ones, 65536 times as large: the norm that is told is float32's, what is left of it is max_norm."""
    ids = torch.randint(257, (batches, 3, 16))
    found = []
    for autocast in (torch.float16, None):
        model = randomised(GPT(MODEL.from_dict({**vars(MODEL), "dropout": 0.0}))).train()
        step = Step(model, adamw(model, 0.0, weight_decay=0.0), World(0, 1, torch.device("cpu")), max_norm, autocast)
        _, norm = step(ids, ids.roll(1, -1))
        left = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
        found.append((norm.item(), left.item()))
    (half, left), (single, _) = found
    assert half == pytest.approx(single, rel=0.02) and 0.1 < half < 1e4
    assert left == pytest.approx(max_norm if max_norm == 0.05 else half, rel=1e-3)
