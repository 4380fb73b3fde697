"""Right before fast: what is wrong is never timed, and one variant's failure costs the others nothing."""

import dataclasses
import itertools
import json
import math
import os
import re
import subprocess
import sys
import types
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from bench import baselines, cases, dry, measure, models, plan, test_cases
from bench import machine as machine_module
from bench.case import COMPILED, EAGER, SUBJECT
from bench.check import judge
from bench.machine import Machine
from bench.report import Report
from bench.timing import DeviceClock, HostClock
from fastgpt import GPTConfig, ops
from fastgpt.ops import pytorch

ROOT = Path(__file__).parents[2]
ROOFS = {"flops_a_second": 1e11, "bytes_a_second": 1e10}


@pytest.fixture
def machine():
    """A GPU's clock over the CPU, with nothing interpreted: fastgpt's variant is what ops has."""
    return Machine("dry", "cpu", torch.float32, DeviceClock(dry.FakeCuda(), "cpu"), "eager", 0.0, (2, 2))


def rows_of(machine, change=None):
    """The rows of add_layer_norm's forward, with ops.add_layer_norm changed."""
    with mock.patch.object(ops, "add_layer_norm", change or ops.add_layer_norm):
        forward, _ = cases.add_layer_norm(machine, 16, 8, tier=0)
    found, samples = measure.measure(forward, machine, ROOFS)
    return {row.variant: row for row in found}, samples


def test_every_variant_is_timed_and_fastgpt_twice(machine):
    rows, samples = rows_of(machine)
    rows.pop("Liger")  # wherever that is installed
    assert list(rows) == [SUBJECT, EAGER, COMPILED, measure.AGAIN] == [*dict.fromkeys(rows)]
    for name, row in rows.items():
        assert (row.status, row.note, row.median, row.rounds) == ("ok", "graph replay", 1e-3, 2), name
        assert row.share == row.floor / 1e-3 and row.bound == "bytes" and row.error < 1e-6
    assert set(samples) == set(rows)


def test_a_wrong_kernel_is_called_wrong_and_has_no_time(machine):
    def forgets_the_last_row(x, *args, **kwargs):
        normed, total = pytorch.add_layer_norm(x, *args, **kwargs)
        keep = torch.arange(len(x))[:, None] < len(x) - 1
        return torch.where(keep, normed, 0.0), total

    rows, samples = rows_of(machine, forgets_the_last_row)
    wrong = rows[SUBJECT]
    assert wrong.status == "WRONG" and "result 0" in wrong.note
    assert wrong.median is wrong.first_call is wrong.peak_bytes is None
    assert measure.AGAIN not in rows and SUBJECT not in samples
    assert rows[EAGER].status == "ok"

    report = Report({**HEADER, "roofs": ROOFS}, list(rows.values()))
    (line,) = [line for line in report.markdown().splitlines() if "| fastgpt |" in line]
    assert "WRONG" in line and " ms" not in line and " µs" not in line
    (line,) = [line for line in report.summary().splitlines() if line.startswith("| add_layer_norm")]
    assert line == "| add_layer_norm fwd M 16 C 8 | WRONG | | | | |"


HEADER = {
    "device": "a machine",
    "kind": "cpu",
    "dtype": "float32",
    "torch": "2",
    "triton": "3",
    "python": "3",
    "commit": "abc",
    "changed": False,
    "sdpa": {"D 64": "flash_attention"},
}


def test_a_missing_baseline_is_skipped_with_its_reason(machine):
    def absent(machine, function):
        raise baselines.Unavailable("there is no compiler")

    with mock.patch.object(baselines, "compiled", absent):
        rows, _ = rows_of(machine)
    row = rows[COMPILED]
    assert (row.status, row.note, row.median) == ("skipped", "there is no compiler", None)


def test_a_variant_that_raises_costs_the_others_nothing(machine):
    def broken(*args, **kwargs):
        raise RuntimeError("out of registers\nand more")

    rows, _ = rows_of(machine, broken)
    assert (rows[SUBJECT].status, rows[SUBJECT].note) == (
        "FAILED",
        "RuntimeError: out of registers and more",
    )
    assert rows[EAGER].median == 1e-3


def test_an_error_that_the_device_keeps_ends_the_run(machine):
    def broken(*args, **kwargs):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(measure.DeviceLost, match="add_layer_norm fwd M 16 C 8: fastgpt: RuntimeError: CUDA error"):
        rows_of(machine, broken)


def test_which_errors_a_device_keeps():
    lost = ("CUDA error: an illegal memory access", "Triton Error [CUDA]: an illegal memory access")
    kept = ("Triton Error [CUDA]: out of memory", "Triton Error [CUDA]: invalid argument", "out of resource: registers")
    assert [measure.device_is_lost(RuntimeError(text)) for text in (*lost, *kept)] == [True, True, False, False, False]


def test_a_crash_of_their_compiler_is_their_own(machine):
    class InductorError(torch._dynamo.exc.BackendCompilerFailed):
        def __init__(self):
            RuntimeError.__init__(self, "LLVM ERROR")

    def crashes(problem):
        raise InductorError

    forward, _ = cases.add_layer_norm(machine, 16, 8, tier=0)
    crashing = dict.fromkeys((SUBJECT, COMPILED), crashes)
    case = dataclasses.replace(forward, variants={**forward.variants, **crashing})
    rows, _ = measure.measure(case, machine, ROOFS)
    found = {row.variant: row.status for row in rows}
    assert (found[SUBJECT], found[COMPILED]) == ("FAILED", "skipped")


def test_rows_outlive_an_interruption(tmp_path, machine):
    rows, _ = rows_of(machine)
    folder = measure.Folder(tmp_path / "run")
    folder.start({"device": "x"}, resume=False)
    folder.add(list(rows.values()))
    with folder.rows_file.open("a") as file:
        file.write('{"case": "cut sho')
    assert folder.rows() == list(rows.values()) and folder.facts() == {"device": "x"}
    folder.start({"device": "x"}, resume=True)
    folder.add([next(iter(rows.values()))])
    assert len(folder.rows()) == len(rows) + 1, "and the line that was cut is gone"
    folder.start({"device": "x"}, resume=False)
    assert folder.rows() == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_judge(dtype):
    exact = torch.randn(4096, 64, dtype=torch.float64)
    rounded = exact.to(dtype)
    assert judge([rounded], [exact], [rounded]).reason == ""
    assert judge([rounded], [exact], None).reason == ""
    assert judge([None, rounded], [exact, exact], [rounded, rounded]).reason == ""

    stale = rounded.clone()
    stale[17] = stale[18]
    assert judge([stale], [exact], [rounded]).reason.startswith("result 0 is off by")
    unwritten = rounded.clone()
    unwritten[0, 0] = math.nan
    assert judge([unwritten], [exact], [rounded]).reason.startswith("result 0 is off by inf")
    assert "result 0 is off" in judge([rounded * 1.05], [exact], [rounded]).reason
    assert "result 1" in judge([rounded, rounded.flip(0)], [exact, exact], [rounded, rounded]).reason
    assert "1 results instead of 2" in judge([rounded], [exact, exact], None).reason
    assert "off by inf" in judge([rounded[:, :1]], [exact], None).reason


def test_the_judge_sees_one_row_that_a_whole_norm_does_not():
    exact = torch.randn(2**16, 16, dtype=torch.float64)
    stale = exact.bfloat16()
    stale[17] = stale[18]
    assert judge([stale], [exact], [exact.bfloat16()]).reason.startswith("a row of result 0 is off by")


@pytest.mark.slow
def test_other_peoples_kernels_are_asked_for_what_they_know(machine, monkeypatch):
    """With functions of their signatures in PyTorch's place: layouts, defaults and results are those of the case."""

    def flash(q, k, v, causal):
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2)

    liger = types.SimpleNamespace(
        liger_layer_norm=lambda x, weight, bias, eps: F.layer_norm(x, weight.shape, weight, bias, eps),
        liger_cross_entropy=F.cross_entropy,
        liger_fused_linear_cross_entropy=lambda x, weight, target: F.cross_entropy(x @ weight.t(), target),
    )
    monkeypatch.setattr(baselines, "find_spec", lambda name: name)
    modules = {
        "flash_attn": types.SimpleNamespace(flash_attn_func=flash),
        "flash_attn_interface": types.SimpleNamespace(flash_attn_func=lambda *qkv, causal: (flash(*qkv, causal), None)),
        "liger_kernel.transformers.functional": liger,
    }
    monkeypatch.setattr(baselines.importlib, "import_module", modules.__getitem__)
    wanted = ("flash-attn 2", "flash-attn 3", "Liger", "Liger, all logits", "Liger, fused")
    found = {}
    for case in (
        *cases.attention(machine, 1, 2, 16, 16, tier=0),
        *cases.add_layer_norm(machine, 8, 32, tier=0),
        *cases.linear_cross_entropy(machine, 4, 16, 65, tier=0),
    ):
        kept = {name: build for name, build in case.variants.items() if name in (SUBJECT, *wanted)}
        rows, _ = measure.measure(dataclasses.replace(case, variants=kept), machine, ROOFS)
        found |= {(case.op, row.variant): (row.status, row.note) for row in rows if row.variant in wanted}
    assert len(found) == 8
    assert set(found.values()) == {("ok", "graph replay")}
    on_a_cpu = dataclasses.replace(machine, kind="cpu")
    with pytest.raises(baselines.Unavailable, match="flash-attn has no kernels for a CPU"):
        baselines.flash_attn(on_a_cpu, 2)


def test_what_is_wrong_of_others_is_told_and_is_no_fault_of_ours(machine, request):
    forward, _ = cases.add_layer_norm(machine, 16, 8, tier=0)
    rows = {row.variant: row for row in measure.failed(forward, machine, "")}

    def outcome(variant, status):
        rows[variant].status, rows[variant].note = status, "off by 1"
        run = types.SimpleNamespace(row=lambda case, variant: (rows[variant], None))
        try:
            test_cases.test_case(forward, variant, run, request)
        except (AssertionError, pytest.xfail.Exception, pytest.skip.Exception) as told:
            return type(told).__name__, str(told).splitlines()[0]

    assert outcome("Liger", "WRONG") == ("XFailed", "WRONG: off by 1")
    assert outcome(COMPILED, "WRONG")[0] == "XFailed"
    assert outcome("Liger", "FAILED") == ("AssertionError", "FAILED: off by 1")  # the adapter is ours
    assert outcome("Liger", "skipped") == ("Skipped", "off by 1")
    for name in (SUBJECT, EAGER):
        assert outcome(name, "WRONG") == ("AssertionError", "WRONG: off by 1")


def test_who_runs_out_of_memory(machine):
    """What another takes is its own affair; that fastgpt does not fit is a failure."""

    def too_much(problem):
        raise torch.OutOfMemoryError("Tried to allocate 2 GiB")

    forward, _ = cases.add_layer_norm(machine, 16, 8, tier=0)
    greedy = dict.fromkeys((SUBJECT, COMPILED), too_much)
    case = dataclasses.replace(forward, variants={**forward.variants, **greedy})
    rows, _ = measure.measure(case, machine, ROOFS)
    found = {row.variant: (row.status, row.note) for row in rows}
    assert found[SUBJECT] == ("FAILED", "out of memory: Tried to allocate 2 GiB")
    assert found[COMPILED] == ("skipped", "out of memory: Tried to allocate 2 GiB")
    assert found[EAGER][0] == "ok"


def test_a_case_beyond_the_machines_memory_is_not_begun(machine):
    forward, _ = cases.add_layer_norm(machine, 16, 8, tier=0)
    large = dataclasses.replace(forward, memory=2.0**60, problem=lambda: pytest.fail("it is begun"))
    rows, samples = measure.measure(large, machine, ROOFS)
    assert samples == {} and {row.variant for row in rows} == set(large.variants)
    for row in rows:
        assert row.status == "skipped"
        assert re.fullmatch(r"it takes about 1073741824 GiB, this machine has \d+", row.note)


def test_each_row_says_whose_setting_it_is(machine):
    rows, _ = rows_of(machine)
    assert {row.setting for row in rows.values()} == {"all in float32"}
    cpu = dataclasses.replace(machine, kind="cpu")
    settings = {}
    for autocast in (False, True):
        (case,) = models.train_step(cpu, 1, 8, dict(vocab_size=64, block_size=8), tier=0, autocast=autocast)
        settings[autocast] = {row.setting for row in measure.failed(case, cpu, "it is not run")}
    assert settings[False] == {"float32 weights, no autocast, as `fastgpt train`"}
    assert settings[True] == {"float32 weights, autocast bfloat16, as `fastgpt train --dtype bfloat16`"}


def test_the_memory_of_a_training_step_is_what_pytorch_gives_out():
    """Beyond its inputs' own, at a shape where weights and activations both count."""
    machine = Machine("cpu", "cpu", torch.float32, HostClock(2**10), "inductor", 0.0, (2, 2))
    shape = dict(vocab_size=512, block_size=128, n_layer=4, n_head=4, n_embd=128)
    for B in (1, 8):
        (case,) = models.train_step(machine, B, 128, shape, tier=0)
        subject = case.variants[SUBJECT](case.problem())
        subject.run()
        peak = machine.clock.peak_bytes(subject.run)
        assert plan.call_memory(GPTConfig(**shape), B, 128, 4, 4) == pytest.approx(peak, rel=0.15)


def test_a_padded_vocabulary_computes_the_loss_of_its_own_size(machine):
    """Rows of zeros take a share of the softmax, so its loss is another one; it is judged by that."""
    shape = dict(vocab_size=65, block_size=16, n_layer=1, n_head=2, n_embd=32)
    (case,) = models.train_step(machine, 1, 8, shape, tier=0, only=(SUBJECT, models.PADDED))
    rows, _ = measure.measure(case, machine, ROOFS)
    assert {row.status for row in rows} == {"ok"} and len(rows) == 4
    problem = case.problem()
    plain, padded = (case.variants[name](problem).results()[0] for name in (SUBJECT, models.PADDED))
    assert plain + 1e-3 < padded < plain + 0.7  # log(128 / 65) if all were as likely


@pytest.mark.slow
def test_pytest_bench_says_wrong(tmp_path):
    """The whole command on a CPU, one case of it, with a fastgpt.ops.embedding that is off by its last token."""
    (tmp_path / "wrong.py").write_text(
        "import torch\nfrom fastgpt import ops\nright = ops.embedding\n"
        "ops.embedding = lambda ids, *args, **kwargs: right(ids.roll(1, 1), *args, **kwargs)\n"
    )
    command = [sys.executable, "-m", "pytest", "-p", "wrong", "bench/", "-k", "embedding and fwd", "-q"]
    out, file = tmp_path / "out", tmp_path / "benchmark.json"
    outside_xdist = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    run = subprocess.run(
        [*command, "-p", "no:cacheprovider", "--bench-out", out, "--benchmark-json", file],
        cwd=ROOT,
        env={**outside_xdist, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=900,
    )
    print(run.stdout[-4000:], run.stderr[-2000:])
    assert run.returncode == 1 and "WRONG: result 0 is off by" in run.stdout
    rows = {row.variant: row for row in measure.Folder(out).rows()}
    assert rows[SUBJECT].status == "WRONG" and rows[SUBJECT].median is None
    timed = {name for name, row in rows.items() if row.median}
    recorded = json.loads(file.read_text())
    assert {b["extra_info"]["variant"] for b in recorded["benchmarks"]} == timed <= {COMPILED}
    for benchmark in recorded["benchmarks"]:  # pytest-benchmark holds the samples that the row was made of
        row = rows[benchmark["extra_info"]["variant"]]
        assert benchmark["stats"]["median"] == pytest.approx(row.median)
    assert recorded["machine_info"]["fastgpt"]["roofs"]["bytes_a_second"] > 0


@pytest.mark.parametrize("program", ["/usr/bin/pytest", "/somewhere/pytest/__main__.py"])
def test_the_command_is_told_without_this_machines_folders(monkeypatch, tmp_path, program):
    folder = str(tmp_path / "nanoGPT")
    monkeypatch.setattr(sys, "argv", [program, "bench/", "--nanogpt", folder, "--book-cached", "a/b.py"])
    name = "pytest" if program.endswith("pytest") else "python -m pytest"
    assert machine_module._command() == f"{name} bench/ --nanogpt nanoGPT --book-cached a/b.py"


def test_a_case_is_known_by_its_name():
    machine = Machine("cpu", "cpu", torch.float32, HostClock(2**10), "inductor", 0.0, (2, 2))
    from bench.catalogue import catalogue

    names = [case.name for case in catalogue(machine)]
    assert len(names) == len(set(names))
    for case in catalogue(machine):
        assert next(iter(case.variants)) == SUBJECT and EAGER not in case.variants
    on_a_gpu = catalogue(Machine("cuda", "cuda", torch.bfloat16, None, "inductor", 0.0, (2, 2)))
    assert [case.tier for case in on_a_gpu] == sorted(case.tier for case in on_a_gpu)
    swept = {(case.shape["T"], case.shape["D"]) for case in on_a_gpu if case.op == "attention bwd"}
    assert swept == set(itertools.product((512, 1024, 2048, 4096, 8192, 16384), (64, 128)))
