"""Training steps as people run them: what is wrong has no time, one row's failure costs the others nothing, and every
row is kept as soon as it is there."""

import json
import math

import pytest
import torch

from bench import report, steps
from bench.__main__ import main
from bench.families import BOOK
from bench.steps import entries, reference
from bench.steps import run as runs
from bench.steps.entries import BASELINE, GRAPH
from bench.steps.reference import Expected
from bench.steps.rows import StepRow, Steps
from tests import models

ROOT = report.ROOT
SMALL = ["--preset", "byte-0.1M", "--layers", "1", "--batch", "2", "--time", "16", "--steps", "2"]


def run(tmp_path, *more):
    """The exit status of a small run, and its rows by name."""
    code = main(["steps", *SMALL, "--out", str(tmp_path / "steps"), *more])
    return code, {row.what: row for row in Steps.load(tmp_path / "steps" / "steps.json").rows}


def test_every_row_at_a_small_size(tmp_path, capsys):
    models.book_package("ch04")  # whose head has a weight of its own
    code, rows = run(tmp_path)
    compiled = {what for what in rows if what.endswith("compiled")}
    assert code == 0 and len(compiled) == 5
    assert all(rows[what].note.startswith("on a CPU with --compiled alone") for what in compiled)
    assert rows[GRAPH].note == "a CUDA graph needs an NVIDIA GPU"
    timed = [row for row in rows.values() if row.status == "ok"]
    assert {row.what for row in timed} >= {
        BASELINE,
        *(f"{name}, {way}" for name in ("nanoGPT", "Hugging Face", BOOK) for way in ("eager", "accelerate")),
        *(f"{name}, accelerate(loss=True)" for name in ("nanoGPT", "Hugging Face")),
    }
    for row in timed:
        assert row.tokens_per_second == pytest.approx(2 * 16 / row.median)
        assert row.low <= row.median <= row.high and row.ratio == pytest.approx(row.median / row.baseline)
        assert row.loss == pytest.approx(row.expected_loss, rel=1e-5)
    assert rows[BASELINE].ratio == 1.0
    assert rows[GRAPH].setting == "float32 weights, no autocast, as fastgpt train on one GPU"
    assert rows["nanoGPT, compiled"].setting == "float32 weights, no autocast, as nanoGPT's train.py"
    told = capsys.readouterr().out
    kept = Steps.load(tmp_path / "steps" / "steps.json")
    assert all(row.setting in kept.table() and row.setting for row in rows.values())
    assert kept.table() in told and kept.conditions() in told
    assert "B = 2, T = 16" in told and "float32 weights, no autocast" in told and torch.__version__ in told
    assert kept.table() in (tmp_path / "steps" / "steps.md").read_text()
    assert len((tmp_path / "steps" / "steps.csv").read_text().splitlines()) == 1 + len(rows)


def test_autocast_is_held_to_the_reference_too(tmp_path):
    code, rows = run(tmp_path, "--dtype", "bfloat16", "--only", "nanoGPT")
    assert code == 0 and rows[BASELINE].status == rows["nanoGPT, accelerate"].status == "ok"
    assert rows[BASELINE].loss == pytest.approx(rows[BASELINE].expected_loss, rel=5e-4)
    assert rows[BASELINE].loss != pytest.approx(rows[BASELINE].expected_loss, rel=1e-7)


def test_a_wrong_row_has_no_time(tmp_path, monkeypatch, capsys):
    """Attention that sees nothing but itself, in fastgpt's own model: the loss hardly tells, and that suffices."""
    right = entries.with_backend

    def without_attention(model, backend, **changes):
        twin = right(model, backend, **changes)
        for block in twin.h:
            block.attn.forward = lambda x, add_bias=True, documents=None: torch.zeros_like(x)
        return twin

    monkeypatch.setattr(entries, "with_backend", without_attention)
    code, rows = run(tmp_path, "--only", "fastgpt.GPT", "--only", "Hugging Face, eager")
    wrong, theirs = rows[BASELINE], rows["Hugging Face, eager"]
    assert code == 1 and wrong.status == "WRONG" and "the reference's" in wrong.note
    assert wrong.median is wrong.ratio is wrong.tokens_per_second is wrong.first_call is None
    assert theirs.status == "ok" and theirs.median > 0 and theirs.ratio is None, "the others go on without a baseline"
    assert "| fastgpt.GPT | WRONG: its first loss is" in capsys.readouterr().out


RIGHT = Expected([4.0, 3.9, 3.8, 3.7], 2.0)


@pytest.mark.parametrize(
    ("losses", "norm", "said"),
    [
        ([4.0, 3.9, 3.8, 3.7], 2.0, ""),
        ([4.0005, 3.9, 3.8, 3.7], 2.01, ""),
        ([4.01, 3.9, 3.8, 3.7], 2.0, "first loss is 4.01"),
        ([math.nan] * 4, 2.0, "first loss is nan"),
        ([4.0, 3.9, 3.8, 3.7], 1.9, "the norm 1.9"),
        ([4.0, 3.9, 3.8, 3.7], math.inf, "the norm inf"),
        ([4.0, 3.9, 3.8, 3.8], 2.0, "went down by 0.2 in 4 steps, the reference's by 0.3"),  # a replay changed nothing
        ([4.0, 4.0, 4.0, 4.0], 2.0, "went down by 0 "),
    ],
)
def test_what_is_held_to_the_reference(losses, norm, said):
    found = reference.wrong(losses, norm, RIGHT, torch.bfloat16)
    assert said in found and bool(said) == bool(found)


def test_the_reference_is_the_model_in_float64():
    """Against transformers' own, at the same weights, over the compared steps."""
    machine = steps.Machine.of("cpu")
    sizes = runs.DEFAULTS["cpu"]._replace(batch=2, time=16)
    bench = runs.Bench(machine, sizes, None, None, Steps({}, {}, []))
    entry = next(entry for entry in bench.entries if entry.what == "Hugging Face, eager")
    expected = bench.expected(entry)
    problem = bench.problem._replace(model=bench.problem.model.double())
    step = entry.build(problem, machine)
    found = [step() for _ in range(reference.COMPARED)]
    assert [loss.item() for loss, _ in found] == pytest.approx(expected.losses, rel=2e-7)  # it makes logits float32
    assert found[0][1].item() == pytest.approx(expected.norm, rel=2e-7)
    assert expected.losses[-1] < expected.losses[0] - 0.01


def failing(what, error, times=1):
    """entries() with a row that raises when it is built, the first so many times."""
    right = runs.entries
    left = [times]

    def changed(shape):
        def build(p, machine):
            if left[0]:
                left[0] -= 1
                raise error
            return by_name[what].build(p, machine)

        found = right(shape)
        by_name = {entry.what: entry for entry in found}
        return [entry._replace(build=build) if entry.what == what else entry for entry in found]

    return changed


@pytest.mark.slow
def test_a_row_that_fails_costs_the_others_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "entries", failing("nanoGPT, eager", RuntimeError("no such layout\nand more"), 9))
    code, rows = run(tmp_path, "--only", "nanoGPT, e", "--only", "nanoGPT, accelerate")
    failed = rows["nanoGPT, eager"]
    assert (failed.status, failed.note) == ("FAILED", "RuntimeError: no such layout and more")
    assert failed.median is None and rows["nanoGPT, accelerate(loss=True)"].status == "ok"
    assert code == 0, "it is theirs"
    monkeypatch.setattr(runs, "entries", failing("nanoGPT, accelerate", RuntimeError("off"), 9))
    assert run(tmp_path, "--only", "nanoGPT, accelerate")[0] == 1, "it is ours"


@pytest.mark.slow
def test_out_of_memory_beside_the_baseline_is_tried_alone(tmp_path, monkeypatch):
    full = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 45 GiB")
    what = "Hugging Face, eager"
    monkeypatch.setattr(runs, "entries", failing(what, full))
    code, rows = run(tmp_path, "--only", what)
    assert code == 0 and rows[what].status == "ok" and rows[what].ratio > 0
    assert rows[what].note == "fastgpt's step after it, for both did not fit at once"
    monkeypatch.setattr(runs, "entries", failing(what, full, 9))
    code, rows = run(tmp_path, "--only", what, "--only", "Hugging Face, accelerate")
    assert rows[what].note.startswith("out of memory: CUDA out of memory. Tried") and rows[what].median is None
    assert rows["Hugging Face, accelerate"].status == "ok" and rows["Hugging Face, accelerate"].ratio > 0


@pytest.mark.slow
def test_a_lost_device_ends_the_run_and_another_goes_on(tmp_path, monkeypatch, capsys):
    lost = RuntimeError("CUDA error: an illegal memory access was encountered")
    monkeypatch.setattr(runs, "entries", failing("nanoGPT, eager", lost))
    code, rows = run(tmp_path, "--only", "nanoGPT")
    assert code == steps.DEVICE_LOST and "the device is lost" in capsys.readouterr().out
    assert rows["nanoGPT, eager"].status == "FAILED" and set(rows) == {BASELINE, "nanoGPT, eager"}
    before = rows[BASELINE]
    code, rows = run(tmp_path, "--only", "nanoGPT", "--resume")
    assert code == 0 and rows[BASELINE] == before and rows["nanoGPT, eager"].status == "FAILED"
    assert rows["nanoGPT, accelerate"].ratio > 0, "the baseline is made anew"


def test_what_was_stopped_in_the_middle_comes_last_the_next_time(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "entries", failing("nanoGPT, eager", KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, "--only", "nanoGPT")
    kept = {row.what: row for row in Steps.load(tmp_path / "steps" / "steps.json").rows}
    stopped = kept["nanoGPT, eager"]
    assert not stopped.ended and stopped.status == "FAILED" and "was stopped" in stopped.note
    order = []
    monkeypatch.setattr(
        runs.Bench, "measured", lambda self, entry: order.append(entry.what) or StepRow(entry.what, "ok")
    )
    run(tmp_path, "--only", "nanoGPT", "--resume")
    assert order[0] == "nanoGPT, accelerate" and order[-1] == "nanoGPT, eager" and BASELINE not in order


def test_no_row_begins_after_its_time(tmp_path, capsys):
    code, rows = run(tmp_path, "--seconds", "0")
    assert code == 1 and rows == {} and "no time left for" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--batch", "0"], "batch is 0, not at least 1"),
        (["--layers", "-1"], "layers is -1, not at least 1"),
        (["--only", "no such row"], "no row's name holds no such row"),
        (["--resume", "--batch", "3"], "has batch = 2, not 3"),
    ],
)
def test_what_is_refused(tmp_path, capsys, more, said):
    small = ["steps", *SMALL, "--out", str(tmp_path / "steps")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs.Bench, "run", lambda *given: None)
        main(small)
        capsys.readouterr()
        assert main([*small, *more]) == 2
    assert said in capsys.readouterr().err


ON_A_GPU = ["--preset", "byte-0.1M", "--batch", "4", "--time", "128", "--steps", "8", "--seconds", "100"]


@pytest.mark.gpu
def test_the_rows_of_a_gpu(tmp_path, monkeypatch):
    """Those with fastgpt's functions that compile no whole model, small, and none begun late: the graph's replays are
    held to the reference too."""
    right = runs.entries
    monkeypatch.setattr(runs, "entries", lambda shape: [e for e in right(shape) if "compiled" not in e.what])
    code = main(["steps", *ON_A_GPU, "--only", BASELINE, "--only", "(loss=True)", "--out", str(tmp_path)])
    rows = {row.what: row for row in Steps.load(tmp_path / "steps.json").rows}
    assert set(rows) == {BASELINE, GRAPH, *(f"{name}, accelerate(loss=True)" for name in ("nanoGPT", "Hugging Face"))}
    for what in rows:
        assert rows[what].status == "ok", rows[what].note
        assert rows[what].peak_bytes > 12 * 100_000, "weights and both moments at the least"
    assert code == 0, [row for row in rows.values() if row.status in ("WRONG", "FAILED")]


@pytest.mark.gpu
@pytest.mark.slow
def test_the_compiled_rows_of_a_gpu(tmp_path):
    code = main(["steps", *ON_A_GPU, "--layers", "1", "--only", "GPT, compiled", "--out", str(tmp_path)])
    rows = {row.what: row for row in Steps.load(tmp_path / "steps.json").rows}
    assert code == 0 and rows["nanoGPT, compiled"].status == "ok", rows["nanoGPT, compiled"].note


# What is made of them.


def table_of(tmp_path, **machine):
    facts = {
        "device": "NVIDIA X",
        "kind": "cuda",
        "torch": "2.11.0",
        "triton": "3.6.0",
        "commit": "abcdef123",
        "changed": False,
        "measured": "2026-11-30T10:00+00:00",
    }
    settings = dict(model="a GPT", batch=2, time=8, weights="float32", autocast="bfloat16", clip=1.0, how="By turns.")
    rows = [
        StepRow(BASELINE, "ok", "", True, 0.064, 0.063, 0.066, 512345.0, 11 * 2**30, 0.064, 1.0),
        StepRow("nanoGPT, eager", "ok", "", False, 0.0064, 0.006, 0.007, 2500.0, None, 0.064, 0.1),
        StepRow("Hugging Face, eager", "FAILED", "out of memory: 1 | 2"),
    ]
    found = Steps({**facts, **machine}, settings, rows)
    found.write(tmp_path)
    return found


def test_the_table_tells_times_memory_and_failures(tmp_path):
    lines = table_of(tmp_path).table().splitlines()
    assert lines[2:] == [
        "| fastgpt.GPT | 64.0 | 512,000 | 11.0 | 1.00 |",
        "| nanoGPT, eager | 6.4 | 2,500 |  | 0.10 |",
        "| Hugging Face, eager | FAILED: out of memory: 1 \\| 2 | | | |",
    ]
    assert Steps.load(tmp_path / "steps.json") == table_of(tmp_path)


def test_the_report_keeps_it_and_it_leads_the_page(tmp_path, monkeypatch, capsys):
    results, page = tmp_path / "bench" / "results", tmp_path / "docs" / "benchmarks.md"
    results.mkdir(parents=True)
    page.parent.mkdir()
    monkeypatch.setattr(report, "RESULTS", results)
    monkeypatch.setattr(report.renew_docs, "__defaults__", (page, results))
    page.write_text(f"# x\n\n{report.BEGIN}\nold\n{report.END}\n\nrest\n")
    found = table_of(tmp_path / "steps")
    assert main(["report", str(tmp_path / "steps"), "--keep"]) == 0
    assert found.table() in capsys.readouterr().out
    (kept,) = results.glob("*/*/steps.json")
    assert kept.parent.relative_to(results).as_posix() == "nvidia-x/2026-11-30-abcdef123"
    text = page.read_text()
    assert found.conditions() in text and found.table() in text and "old" not in text and report.NO_GPU not in text
    assert "(../bench/results/nvidia-x/2026-11-30-abcdef123/steps.md)" in text and (kept.parent / "steps.md").exists()

    later = dict(commit="fffffff", measured="2027-01-01")  # of the same device, in whatever folder
    table_of(results / "another" / "2027-01-01-fffffff", **later)
    table_of(results / "a-cpu" / "2027-01-01-fffffff", device="A CPU", kind="cpu", commit="eeeeeee")
    block = report.generated_block(results)
    assert "commit fffffff" in block and "abcdef123" not in block and "eeeeeee" not in block

    table_of(tmp_path / "dry", kind="dry")
    assert main(["report", str(tmp_path / "dry"), "--keep"]) == 2
    assert "mean nothing" in capsys.readouterr().err


def test_the_committed_tables_are_whole():
    found = report.committed_steps()
    assert found
    for file, kept in found:
        assert (file.parent / "steps.md").read_text() == kept.markdown()
        for row in kept.rows:
            assert (row.median is None) == (row.status != "ok") and (row.status == "ok" or row.note)
            if row.median is not None:
                tokens = kept.settings["batch"] * kept.settings["time"] / row.median
                assert row.tokens_per_second == pytest.approx(tokens, rel=0.005) and row.peak_bytes and row.ratio
        assert json.loads(file.read_text())["machine"]["kind"] == "cuda"
