"""A case that fell back is told, and noise is not."""

import dataclasses
import sys

import pytest

from bench import history
from bench.__main__ import main
from bench.case import COMPILED, SUBJECT
from bench.history import changes
from bench.measure import AGAIN, Folder
from bench.report import Report, slug
from bench.steps.rows import StepRow, Steps
from tests.bench.test_bench_report import MACHINE, row

CASES = ("attention fwd T 64", "attention fwd T 128")


def run(ours=1.0, again=1.01, theirs=2.0, status="ok", **machine):
    """A report of two cases; in the second fastgpt takes `ours` seconds, `again` the next time, a rival `theirs`."""
    rows = [row(SUBJECT, 1.0, CASES[0]), row(COMPILED, 1.0, CASES[0])]
    rows += [row(SUBJECT, ours, CASES[1], status=status), row(COMPILED, theirs, CASES[1])]
    rows += [row("SDPA flash", 4.0, CASES[1]), row("its matmuls alone", 0.1, CASES[1])]
    return Report({**MACHINE, **machine}, rows + ([row(AGAIN, again, CASES[1])] if ours else []))


def test_a_slower_kernel_falls_back_and_a_slower_machine_does_not():
    before = run()
    assert [c.fell_back for c in changes(before, before)] == [False, False]
    slower_machine = Report(MACHINE, [dataclasses.replace(r, median=3 * r.median) for r in before.rows])
    assert [c.fell_back for c in changes(before, slower_machine)] == [False, False]
    first, second = changes(before, run(ours=1.5, again=1.52))
    assert not first.fell_back and second.fell_back
    assert second.now == pytest.approx(second.before / 1.5)
    assert "FELL BACK  attention fwd T 128: rivals took 2.83 times fastgpt's time, now 1.89" in history.table([second])


def test_what_the_same_version_differs_by_is_allowed():
    assert [c.fell_back for c in changes(run(), run(ours=1.3, again=1.0))] == [False, False]
    assert [c.fell_back for c in changes(run(), run(ours=1.3, again=1.29))] == [False, True]


def test_a_case_that_lost_its_time_fell_back_and_one_that_is_gone_did_not():
    lost = run(ours=None, status="WRONG")
    assert [c.fell_back for c in changes(run(), lost)] == [False, True]
    assert "fastgpt has no time any more" in history.table(changes(run(), lost))
    skipped = run(ours=None, status="skipped")
    assert [c.case for c in changes(run(), skipped)] == [CASES[0]], "for want of memory, say"
    gone = Report(MACHINE, [r for r in run().rows if r.case != CASES[1]])
    assert [c.case for c in changes(run(), gone)] == [CASES[0]]
    assert changes(lost, run())[0].case == CASES[0], "what had no time can't fall back"


def test_only_rivals_that_both_runs_timed_count():
    before = run()
    fewer = Report(MACHINE, [r for r in before.rows if r.variant != "SDPA flash"])
    assert [c.now / c.before for c in changes(before, fewer)] == [1, 1]


@pytest.fixture
def kept(tmp_path):
    """A folder of results with two runs of one day, told apart by when they began."""
    device = tmp_path / "results" / slug(MACHINE)
    run(measured="2026-01-02T09:00+00:00").write(device / "2026-01-02-fffffff")
    run(measured="2026-01-02T11:00+00:00", ours=1.4, again=1.4).write(device / "2026-01-02-aaaaaaa")
    return tmp_path / "results"


def test_the_command_over_what_is_committed(kept, capsys):
    assert main(["history", "--results", str(kept)]) == 1
    out = capsys.readouterr().out
    assert "2026-01-02-fffffff, 2026-01-02-aaaaaaa" in out and "FELL BACK  attention fwd T 128" in out
    assert "2 cases compared: 1 fell back, 0 got ahead" in out
    assert (kept / "history.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_on_a_run_that_was_not_kept(kept, tmp_path, capsys):
    folder = Folder(tmp_path / "out")
    folder.start(MACHINE, resume=False)
    folder.add(run().rows)
    assert main(["history", str(folder.path), "--results", str(kept)]) == 0
    assert "0 fell back, 1 got ahead" in capsys.readouterr().out
    folder.start({**MACHINE, "device": "Another"}, resume=True)
    assert main(["history", str(folder.path), "--results", str(kept)]) == 2
    assert "no run of Another" in capsys.readouterr().err


def table(ours=1.0, setting="", measured="2026-01-02"):
    """Of training steps: fastgpt's, a swapped model's that takes `ours` seconds, and what both are compared with."""
    named = [("fastgpt.GPT", True, 1.0), ("nanoGPT, eager", False, 2.0), ("nanoGPT, accelerate", True, ours)]
    rows = [StepRow(what, "ok", "", mine, median=median, setting=setting) for what, mine, median in named]
    settings = dict(model="a GPT", batch=2, time=8, weights="float32", autocast="bfloat16")
    return Steps({**MACHINE, "measured": measured}, settings, rows)


def test_a_row_of_training_steps_that_fell_back(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Steps, "markdown", lambda self: "")
    device = tmp_path / "results" / slug(MACHINE)
    table().write(device / "2026-01-02-fffffff")
    table(1.05, "whose it is", "2026-01-03").write(device / "2026-01-03-aaaaaaa")
    assert main(["history", "--results", str(tmp_path / "results")]) == 0
    assert "2 cases compared: 0 fell back" in capsys.readouterr().out
    table(1.5, "whose it is", "2026-01-04").write(tmp_path / "out")
    assert main(["history", str(tmp_path / "out"), "--results", str(tmp_path / "results")]) == 1
    fell = "FELL BACK  nanoGPT, accelerate, a GPT, B 2 T 8, float32 weights, autocast bfloat16: rivals took 1.90 times"
    out = capsys.readouterr().out
    assert fell in out and "2 cases compared: 1 fell back" in out


def test_the_plot_marks_what_fell_back(kept):
    past = {"here": [("one", run()), ("two", run(ours=1.5, again=1.5))]}
    (axis,) = history.plot(past).axes
    assert [text.get_text() for text in axis.texts] == [CASES[1]]
    means = next(line for line in axis.lines if line.get_label() == "all of them").get_ydata()
    assert means[1] == pytest.approx(means[0] / 1.5**0.5)


def test_a_rival_that_joins_moves_no_line():
    more = run()
    more.rows += [row("nanoGPT", 0.1, CASES[1]), row(SUBJECT, 1.0, "new fwd T 1"), row(COMPILED, 9.0, "new fwd T 1")]
    (axis,) = history.plot({"here": [("one", run()), ("two", more)]}).axes
    for line in axis.lines:
        first, *others = line.get_ydata()
        assert all(other == first for other in others)


def test_without_matplotlib_it_draws_nothing(kept, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["history", "--results", str(kept)]) == 1
    assert "no plot: matplotlib.figure is not installed" in capsys.readouterr().out
    assert not (kept / "history.png").exists()
