"""Muon for the blocks' matrices beside AdamW for the rest: the parts, their steps, and what a run makes of them."""

import copy

import pytest
import torch
from torch import nn

from bench.__main__ import main
from bench.muon import reaches
from fastgpt import GPT, GPTConfig
from fastgpt.training.capture import why_no_graph
from fastgpt.training.distributed import World
from fastgpt.training.optimizer import TrainingStep, adamw, clipped_step, muon, set_learning_rate
from fastgpt.training.settings import TrainConfig
from tests.training.runs import MODEL, Runs, digests
from tests.training.test_resume import stop_after


def model(**changes):
    torch.manual_seed(1)
    return GPT(GPTConfig.preset("byte-0.1M", n_layer=1, block_size=8, **changes))


def batch():
    return torch.randint(257, (2, 8)), torch.randint(257, (2, 8))


def test_the_blocks_matrices_are_muons_and_all_else_is_adamws():
    gpt = model(tie=False)
    gpt.wpe.weight.requires_grad_(False)
    optimizer = muon(gpt, 1e-3, weight_decay=0.3)
    kinds = {id(p): "momentum" in group for group in optimizer.param_groups for p in group["params"]}
    found = {name: kinds.get(id(p)) for name, p in gpt.named_parameters()}
    matrices = ("h.0.attn.c_attn", "h.0.attn.c_proj", "h.0.mlp.c_fc", "h.0.mlp.c_proj")
    assert {name for name, by_muon in found.items() if by_muon} == {f"{each}.weight" for each in matrices}
    assert [name for name, by_muon in found.items() if by_muon is None] == ["wpe.weight"]
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert all(decays[id(p)] == (0.3 if p.dim() == 2 else 0) for p in gpt.parameters() if p.requires_grad)


@pytest.mark.parametrize("max_norm", [0.5, 1e6])
def test_a_step_is_pytorchs_two_optimizers(max_norm):
    """With the gradients clipped before, and one schedule for both."""
    ours, theirs = model(), model()
    step = TrainingStep(ours, muon(ours, 1e-2, 0.1, (0.9, 0.99)), max_norm)
    matrices = [p for p in theirs.h.parameters() if p.dim() == 2]
    rest = nn.ParameterList(p for p in theirs.parameters() if all(p is not each for each in matrices))
    pair = (
        torch.optim.Muon(matrices, 1e-2, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        adamw(rest, 1e-2, 0.1, (0.9, 0.99)),
    )
    for rate in (1e-2, 3e-3, 1e-3):
        idx, targets = batch()
        set_learning_rate(step.optimizer, rate)
        loss, norm = step(idx, targets)
        theirs.zero_grad()
        expected = theirs(idx, targets)
        expected.backward()
        assert loss == expected
        gradients = [p.grad for p in theirs.parameters()]
        torch.testing.assert_close(norm, nn.utils.get_total_norm(gradients))
        for gradient in gradients:
            gradient.mul_((max_norm / norm).clamp(max=1))
        for optimizer in pair:
            set_learning_rate(optimizer, rate)
            optimizer.step()
        for name, parameter in ours.named_parameters():
            assert torch.equal(parameter, theirs.get_parameter(name)), name


def test_gradients_that_are_not_finite_change_nothing():
    gpt = model()
    optimizer = muon(gpt, 1e-2)
    TrainingStep(gpt, optimizer)(*batch())
    before = copy.deepcopy((gpt.state_dict(), optimizer.state_dict()["state"]))
    gpt(*batch()).backward()
    gpt.h[0].mlp.c_fc.weight.grad[3] = torch.nan
    assert clipped_step(optimizer, 1.0).isnan()
    after = (gpt.state_dict(), optimizer.state_dict()["state"])
    assert all(torch.equal(a, b) for a, b in zip(before[0].values(), after[0].values(), strict=True))
    for old, new in zip(before[1].values(), after[1].values(), strict=True):
        assert all(torch.equal(old[key], new[key]) for key in old)


def test_a_loop_of_ones_own_goes_on_from_its_state_dict():
    gpt, batches = model(), [batch() for _ in range(4)]
    optimizer = muon(gpt, 1e-2)
    for each in batches[:2]:
        TrainingStep(gpt, optimizer)(*each)
    again = model()
    again.load_state_dict(gpt.state_dict())
    taken_up = muon(again, 1.0)
    taken_up.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each in batches[2:]:
        TrainingStep(gpt, optimizer)(*each)
        TrainingStep(again, taken_up)(*each)
    assert all(map(torch.equal, gpt.state_dict().values(), again.state_dict().values()))
    with pytest.raises(ValueError, match="step takes no closure"):
        optimizer.step(lambda: 0.0)


@pytest.fixture
def run(tmp_path, monkeypatch):
    return Runs(tmp_path, monkeypatch)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_resumed_is_uninterrupted_to_the_bit(run, monkeypatch, dtype):
    changes = dict(optimizer="muon", dtype=dtype)
    run("whole", **changes)
    with monkeypatch.context() as patch:
        stop_after(3, patch)
        with pytest.raises(SystemExit, match="143"):
            run(**changes)
    run(resume=True, **changes)
    assert digests(run.out) == digests(run.folder / "whole")


@pytest.mark.parametrize(("was", "now"), [("adamw", "muon"), ("muon", "adamw")])
def test_the_other_optimizer_can_not_go_on(run, was, now):
    run(max_iters=1, optimizer=was)
    with pytest.raises(ValueError, match=f"was trained with optimizer = '{was}', not '{now}'"):
        run(resume=True, optimizer=now)


def test_a_graph_would_keep_the_learning_rate_of_its_capture():
    card, why = World(0, 1, torch.device("cuda")), "Muon takes its learning rate from the host"
    assert (why_no_graph(MODEL, TrainConfig(optimizer="muon", dtype="bfloat16"), card) or "").startswith(why)
    with pytest.raises(ValueError, match=why):
        why_no_graph(MODEL, TrainConfig(optimizer="muon", cuda_graph=True), card)


def test_the_bench_trains_both_and_goes_on_from_what_is_done(tmp_path, capsys):
    text = tmp_path / "fox.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 50)
    arguments = ["muon", "--preset", "byte-0.1M", "--n_layer", "1", "--batch_size", "1", "--steps", "2", "--every", "1"]
    arguments += ["--data", str(text), "--device", "cpu", "--out", str(tmp_path / "out"), "--rates", "1e-3", "1e-2"]
    threads = torch.get_num_threads()
    assert main([*arguments, "--seeds", "1", "2", "--threads", str(threads)]) == 0
    said = capsys.readouterr().out
    assert said.count("\nseed ") + said.startswith("seed ") == 3, "two rates, then the other seed with the better ones"
    assert "| 2 |" in said and "mean of 2 seeds" in said and (tmp_path / "out/muon.png").exists()
    assert main([*arguments, "--seeds", "1", "2", "--threads", str(threads)]) == 0
    again = capsys.readouterr().out
    assert "seed 1," not in again and again in said, "what is done is read"
    assert main([*arguments, "--seeds", "1", "--threads", str(threads), "--n_layer", "2"]) == 2
    assert "is of other settings" in capsys.readouterr().err


def test_where_a_curve_comes_to_a_loss():
    curve = [(0, 0.0, 5.0), (10, 2.0, 3.0), (20, 4.0, 2.0)]
    assert reaches(curve, 2.5, 0) == 15 and reaches(curve, 4.0, 1) == 1.0
    assert reaches(curve, 5.0, 0) == 0 and reaches(curve, 1.0, 0) is None
