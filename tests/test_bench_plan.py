"""The plan's arithmetic: by hand where it can be, against what was measured where that is committed."""

import pytest

from bench import plan, work
from bench.__main__ import main
from bench.plan import Cluster
from bench.work import CARDS
from fastgpt import GPTConfig

XL = GPTConfig.preset("gpt2-1558M")


def planned(gpus, fsdp, config=XL, batch=8, **changes):
    return plan.plan(config, batch, 1024, CARDS["h100"], Cluster(gpus, **changes), fsdp)


def test_a_collective_passes_all_but_its_own_part_over_the_slower_link():
    assert Cluster(1).collective(1e9) == 0
    assert Cluster(2).collective(1e9) == pytest.approx(1e9 / 2 / (450e9 * 0.8))
    assert Cluster(8).collective(1e9) == pytest.approx(1e9 * 7 / 8 / (450e9 * 0.8))
    assert Cluster(16).collective(1e9) == pytest.approx(1e9 * 15 / 16 / (400e9 * 0.8))
    assert Cluster(16, per_node=1).collective(1e9) == pytest.approx(1e9 * 15 / 16 / (50e9 * 0.8))


def test_one_gpu_takes_the_sum_of_its_floors():
    one = planned(1, fsdp=False)
    lines = work.train_step(XL, 8, 1024, 2, adamw_bytes=28)
    assert one.step == pytest.approx(sum(n * w.floor(CARDS["h100"].flops[k], 3.0e12) for _, k, n, w in lines))
    assert one.exposed == one.sent == 0 and one.tokens == 8 * 1024
    assert 1.5 < one.backward / one.forward < 2, "two products for one, but for the head, which makes all of its early"


def test_more_gpus_send_more_and_fsdp_holds_less():
    parameters = work.parameters(XL)
    ddp, sharded = planned(64, fsdp=False), planned(64, fsdp=True)
    assert ddp.sent == pytest.approx(2 * 4 * parameters * 63 / 64 / (400e9 * 0.8)) == sharded.sent
    saved = (3 - 3 / 64 - 1) * 4 * parameters  # moments and weights, for the gathered ones
    assert ddp.memory - sharded.memory == pytest.approx(saved), "activations are the peak of both"
    small = [planned(64, fsdp, batch=1).memory for fsdp in (False, True)]
    assert small[0] - small[1] > saved + 2e9, "gradients were the peak, and are shared too"
    assert sharded.optimizer == pytest.approx(ddp.optimizer / 64)
    assert ddp.bottleneck == "matmuls"
    slow = planned(64, fsdp=False, per_node=1, network=5e9)
    assert slow.bottleneck == "communication" and slow.exposed == pytest.approx(slow.sent - slow.backward, rel=0.01)


def test_checkpointing_keeps_less():
    kept = {
        kind: work.kept_activations(GPTConfig.preset("gpt2-124M", activation_checkpointing=kind), 1000, 2)
        for kind in ("off", "mlp", "block")
    }
    assert kept == {"off": 12 * 16 * 768 * 2000, "mlp": 12 * 12 * 768 * 2000, "block": 12 * 2 * 768 * 2000}


def test_every_committed_training_step_agrees():
    found = plan.check()
    assert len(found) >= 3
    assert [each for each in found if not each.holds] == []


def test_a_measurement_that_cannot_be_is_told(monkeypatch, capsys):
    fast, fat = plan.Checked("run", "fast", 2.0, 1.0, 100, 100), plan.Checked("run", "fat", 1.0, 2.0, 100, 200)
    monkeypatch.setattr(plan, "check", lambda: [fast, fat])
    assert main(["plan", "--check"]) == 1
    assert capsys.readouterr().out.count("CONTRADICTS") == 2


def test_the_command_prints_what_it_assumes(capsys):
    assert main(["plan", "--preset", "gpt2-1558M", "--gpus", "64"]) == 0
    text = capsys.readouterr().out
    assert "64 GPUs" in text and "cuBLAS 600 TFLOP/s" in text and "None of it was measured" in text
    assert main(["plan", "--preset", "gpt2-1558M", "--batch", "64", "--memory", "80"]) == 1
    assert "! more than a device's 80 GB" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--gpus 0", "gpus is 0, not at least 1"),
        ("--time 2048", "time is 2048, not from 1 to the context of 1024"),
        ("--reached 1.5", "links need a speed above 0"),
        ("--network 0", "links need a speed above 0"),
    ],
)
def test_what_can_not_be_planned(arguments, message, capsys):
    assert main(["plan", *arguments.split()]) == 2
    assert message in capsys.readouterr().err
