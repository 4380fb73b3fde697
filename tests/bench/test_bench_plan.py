"""The plan's arithmetic: by hand where it can be, against what was measured where that is committed."""

import sys

import pytest

from bench import plan, sent, work
from bench.__main__ import main
from bench.plan import DDP, Cluster, Layout
from bench.work import CARDS
from fastgpt import GPTConfig

XL = GPTConfig.preset("gpt2-1558M")


def planned(gpus, fsdp, config=XL, batch=8, **changes):
    layout = Layout("FSDP2", gpus) if fsdp else DDP
    return plan.plan(config, batch, 1024, CARDS["h100"], Cluster(gpus, **changes), layout)


def test_a_collective_passes_all_but_its_own_part_over_the_slower_link():
    assert Cluster(1).collective(1e9) == 0
    assert Cluster(2).collective(1e9) == pytest.approx(1e9 / 2 / (450e9 * 0.8))
    assert Cluster(8).collective(1e9) == pytest.approx(1e9 * 7 / 8 / (450e9 * 0.8))
    assert Cluster(16).collective(1e9) == pytest.approx(1e9 * 15 / 16 / (400e9 * 0.8))
    assert Cluster(16, per_node=1).collective(1e9) == pytest.approx(1e9 * 15 / 16 / (50e9 * 0.8))


def test_one_gpu_takes_the_sum_of_its_floors():
    one, parameters = planned(1, fsdp=False), work.parameters(XL)
    lines = work.train_step(XL, 8, 1024, 2, adamw_bytes=28, gradient_bytes=4)
    floors = sum(n * w.floor(CARDS["h100"].flops[k], 3.0e12) for _, k, n, w in lines)
    casts = 2 * 6 * parameters / 3.0e12  # weights to bfloat16, gradients to float32
    assert one.step == pytest.approx(floors + casts)
    assert one.optimizer == pytest.approx((4 + 28) * parameters / 3.0e12), "a norm's reading, AdamW's seven numbers"
    assert one.exposed == one.sent == 0 and one.tokens == 8 * 1024
    assert 1.5 < one.backward / one.forward < 2, "two products for one, but for the head, which makes all of its early"


def test_more_gpus_send_more_and_fsdp_holds_less():
    parameters = work.parameters(XL)
    kept, root = 4 * parameters, 4 * 1600 * (50257 + 1024 + 2)
    ddp, sharded = planned(64, fsdp=False), planned(64, fsdp=True)
    a_byte = 63 / 64 / (400e9 * 0.8)
    assert ddp.sent == pytest.approx(2 * kept * a_byte)
    assert sharded.sent == pytest.approx(1.5 * kept * a_byte), "weights are gathered in bfloat16"
    assert ddp.exposed == pytest.approx(2 * root * a_byte), "the embedding's gradient is the last"
    assert sharded.exposed == pytest.approx((1.5 * root + (kept - root) / 48 / 2) * a_byte)
    assert sharded.optimizer == pytest.approx(ddp.optimizer / 64)
    assert ddp.bottleneck == "matmuls"
    slow = planned(64, fsdp=False, per_node=1, network=5e9)
    assert slow.bottleneck == "communication" and slow.exposed == pytest.approx(slow.sent - slow.backward)


def test_hsdp_sends_little_between_nodes():
    """Eight gather and scatter inside a node; an eighth of the gradients goes between nodes, past each adapter."""
    P, found = work.parameters(XL), Layout("HSDP", 8)
    assert found.sent(P, 64, 4, 2) == pytest.approx(
        {"all-gather": 2 * P * 7 / 8, "reduce-scatter": 4 * P * 7 / 8, "all-reduce": 2 * P / 2 * 7 / 8}
    )
    time = plan.plan(XL, 8, 1024, CARDS["h100"], Cluster(64), found)
    inside, between = 450e9 * 0.8, 50e9 * 0.8
    assert time.sent == pytest.approx(6 * P * 7 / 8 / inside + P * 7 / 8 / between)
    again = plan.plan(XL, 8, 1024, CARDS["h100"], Cluster(64), Layout("HSDP, resharded", 8, True))
    root = 1600 * (50257 + 1024 + 2)
    assert again.sent - time.sent == pytest.approx(2 * (P - root) * 7 / 8 / inside)
    assert [each.name for each in plan.layouts(Cluster(8))] == ["DDP", "FSDP2"]
    assert [each.shards for each in plan.layouts(Cluster(512))] == [1, 512, 8, 8]


def test_memory_a_device():
    """By hand, for one row of 124M, where gradients are the peak, and for eight of 1558M, where activations are."""
    small, P, C = GPTConfig.preset("gpt2-124M"), 124_439_808, 768
    head, widest = 4 * 50257 * C, 1024 * 4 * C * 2
    assert plan.step_memory(small, 1, 1024, 4, 2) == 3 * 4 * P + 2 * P + 4 * P + head + widest
    activations = 12 * 16 * C * 1024 * 4
    assert plan.step_memory(small, 1, 1024, 4, 4) == 12 * P + activations + head + 2 * widest, "no autocast, no copy"
    P, C, activations = work.parameters(XL), 1600, 48 * 16 * 1600 * 8192 * 2
    call = activations + 4 * 50257 * C + 8192 * 4 * C * 2
    assert plan.step_memory(XL, 8, 1024, 4, 2) == 14 * P + call
    assert plan.step_memory(XL, 8, 1024, 4, 2, gpus=64) == 18 * P + call, "and DDP's buckets"
    sharded = plan.step_memory(XL, 8, 1024, 4, 2, 64, Layout("FSDP2", 64))
    assert sharded == pytest.approx((12 / 64 + 2) * P + call), "all weights are there in bfloat16"
    block = 12 * C * C + 13 * C
    less = plan.step_memory(XL, 8, 1024, 4, 2, 64, Layout("FSDP2", 64, reshards=True))
    assert sharded - less == pytest.approx(2 * 46 * block, rel=1e-2), "two layers' of 48"


def test_checkpointing_costs_time_and_saves_memory():
    found = {}
    for kind in ("off", "mlp", "block"):
        found[kind] = planned(1, False, GPTConfig.preset("gpt2-1558M", activation_checkpointing=kind))
    assert found["off"].memory > found["mlp"].memory > found["block"].memory
    assert found["off"].backward < found["mlp"].backward < found["block"].backward
    layers = found["block"].backward - found["off"].backward
    assert 0.75 * found["off"].forward < layers < 0.95 * found["off"].forward, "all of the forward but head and casts"


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
    assert main(["plan", "--gpus", "8", "--batch", "32", "--tokens", "10.26e9", "--price", "3"]) == 0
    rows = {line[:24].strip(): line[24:].split() for line in capsys.readouterr().out.splitlines()}
    speed, time = (float(rows[name][0].replace(",", "")) for name in ("tokens a second", "hours of the run"))
    assert time == pytest.approx(10.26e9 / speed / 3600, rel=0.01)
    assert float(rows["its price"][0]) == pytest.approx(3 * 8 * time, abs=0.6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--gpus 0", "gpus is 0, not at least 1"),
        ("--time 2048", "time is 2048, not from 1 to the context of 1024"),
        ("--reached 1.5", "links and memory are above 0"),
        ("--price 3", "a price is of a run, whose --tokens are missing"),
        ("--tokens 0", "tokens is 0.0, not a finite number above 0"),
        ("--memory 0", "links and memory are above 0"),
        ("--network 0", "links and memory are above 0"),
    ],
)
def test_what_can_not_be_planned(arguments, message, capsys):
    assert main(["plan", *arguments.split()]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells what a connection sent")
@pytest.mark.parametrize(
    ("layout", "processes"), [(Layout("FSDP2", 2), 2), (Layout("HSDP", 2), 4)], ids=["fsdp", "hsdp"]
)
def test_processes_here_send_and_hold_what_is_planned(layout, processes):
    """Two batches a step, whose gradients are reduced once."""
    found = sent.measure(layout, processes, batches=2)
    assert found.sent == pytest.approx(found.planned, rel=0.05)
    assert found.held == pytest.approx(found.planned_held, rel=0.05)
