"""gpu-day: no stage can end the day, nothing that is done is lost, and every stage runs without a GPU before it runs on
one."""

import json
import os
import shutil
import stat
import sys
import tarfile
import time
from unittest import mock

import pytest

from bench import gpu_day
from bench.__main__ import main
from bench.gates import sanitize
from bench.generation import BOOK_CACHED
from bench.gpu_day import Stage
from bench.measure import Folder
from bench.steps.rows import Steps


def python(name, code, part=0.2, **options):
    return Stage(name, part, lambda limit: [sys.executable, "-c", code], **options)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "day"


def test_a_failing_stage_stops_nothing_and_leaves_its_traceback(folder):
    day = [python("bad", "def stage():\n  raise OSError('no such device')\nstage()"), python("good", "print('fine')")]
    outcomes = gpu_day.run_day(folder, day, 60, {})
    assert [outcomes[name]["status"] for name in ("bad", "good")] == ["failed", "done"]
    assert outcomes["bad"]["exit"] == 1
    log = (folder / "bad.log").read_text()
    assert "Traceback" in log and "in stage" in log and "OSError: no such device" in log
    assert "fine" in (folder / "good.log").read_text()
    with tarfile.open(folder.with_name("day.tar.gz")) as tar:
        assert {"day/bad.log", "day/good.log", "day/state.json"} <= set(tar.getnames())


def test_a_hanging_stage_is_stopped_with_its_stack_and_its_children(folder):
    hang = (
        "import subprocess, sys, time, pathlib\n"
        "code = 'import signal, time; signal.signal(signal.SIGABRT, signal.SIG_IGN); time.sleep(600)'\n"
        "child = subprocess.Popen([sys.executable, '-c', code])\n"
        "time.sleep(0.5)\n"
        f"pathlib.Path({str(folder / 'child')!r}).write_text(str(child.pid))\n"
        "def waits_forever():\n  time.sleep(600)\n"
        "waits_forever()"
    )
    started = time.monotonic()
    outcomes = gpu_day.run_day(folder, [python("hang", hang, 0.2), python("next", "pass")], 20, {})
    assert outcomes["hang"]["status"] == "stopped" and outcomes["next"]["status"] == "done"
    assert time.monotonic() - started < 15
    log = (folder / "hang.log").read_text()
    assert "stopped at its limit of 4 s" in log and "in waits_forever" in log
    child = int((folder / "child").read_text())
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline and _running(child):
        time.sleep(0.05)
    assert not _running(child)


def _running(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = f"/proc/{pid}/stat"
    return not (os.path.exists(status) and open(status).read().split()[2] == "Z")


def test_a_second_start_repeats_only_what_is_not_done(folder):
    counted = "import pathlib; p = pathlib.Path({!r}); p.write_text(p.read_text() + 'x' if p.exists() else 'x'); {}"
    first, second = str(folder / "first"), str(folder / "second")
    day = [python("first", counted.format(first, "pass")), python("second", counted.format(second, "1 / 0"))]
    gpu_day.run_day(folder, day, 60, {})
    outcomes = gpu_day.run_day(folder, day, 60, {})
    assert [outcomes[name]["status"] for name in ("first", "second")] == ["done", "failed"]
    assert (folder / "first").read_text() == "x" and (folder / "second").read_text() == "xx"


def test_what_earlier_stages_leave_goes_to_the_later_ones_and_no_more_than_there_is(folder):
    limits = []

    def noted(name, part, code="pass"):
        return Stage(name, part, lambda limit: limits.append(limit) or [sys.executable, "-c", code])

    outcomes = gpu_day.run_day(folder, [noted("a", 0.5), noted("b", 0.5)], 60, {})
    assert limits[0] == pytest.approx(30, abs=0.1) and 50 < limits[1] < 60
    late = [noted("a", 1.0, "import time; time.sleep(9)"), noted("b", 0.5)]
    spent = gpu_day.run_day(folder.with_name("other"), late, 1.5, {})
    assert outcomes["b"]["status"] == "done" and spent["b"]["status"] == "no time left"


def test_a_run_that_lost_the_device_is_started_again(folder):
    flag = str(folder / "flag")
    code = f"import pathlib, sys; p = pathlib.Path({flag!r}); e = p.exists(); p.touch(); sys.exit(0 if e else 3)"
    outcomes = gpu_day.run_day(folder, [python("cases", code, 0.9, resume_code=3)], 60, {})
    assert outcomes["cases"]["status"] == "done" and outcomes["cases"]["runs"] == 2


def test_a_command_that_cannot_be_made_or_started(folder):
    def broken(limit):
        raise KeyError("shape")

    day = [
        Stage("made", 0.3, broken),
        Stage("started", 0.3, lambda limit: ["/no/such/program"]),
        python("good", "pass"),
    ]
    outcomes = gpu_day.run_day(folder, day, 60, {})
    assert [outcomes[stage.name]["status"] for stage in day] == ["failed", "failed", "done"]
    assert "KeyError: 'shape'" in (folder / "made.log").read_text()


def test_a_folder_of_another_commit_is_refused(folder, capsys):
    gpu_day.run_day(folder, [python("a", "pass")], 60, {})
    state = json.loads((folder / "state.json").read_text())
    state["commit"] = "0000000"
    (folder / "state.json").write_text(json.dumps(state))
    assert main(["gpu-day", "--out", str(folder)]) == 2
    assert "0000000" in capsys.readouterr().err


def test_two_parts_on_two_machines(tmp_path, monkeypatch, capsys):
    """The second finds the first one's outcomes in the folder, or in the archive alone; a part looks at its own."""
    parts = {1: [python("parity", "1 / 0"), python("steps", "print('ms')")], 2: [python("cases", "print('rows')")]}
    monkeypatch.setattr(gpu_day, "stages", lambda folder, dry_run, part, nanogpt: parts[part])
    first, second = tmp_path / "one" / "day", tmp_path / "two" / "day"
    assert main(["gpu-day", "--part", "1", "--out", str(first)]) == 1
    assert json.loads((first / "state.json").read_text())["stages"].keys() == {"parity", "steps"}
    second.parent.mkdir()
    shutil.copy(first.with_name("day.tar.gz"), second.parent)
    assert main(["gpu-day", "--part", "2", "--out", str(second)]) == 0
    stages = json.loads((second / "state.json").read_text())["stages"]
    assert {name: outcome["status"] for name, outcome in stages.items()} == {
        "parity": "failed",
        "steps": "done",
        "cases": "done",
    }
    assert "ZeroDivisionError" in (second / "parity.log").read_text()
    with tarfile.open(second.with_name("day.tar.gz")) as tar:
        assert {"day/parity.log", "day/steps.log", "day/cases.log"} <= set(tar.getnames())

    parts[1] = [python("parity", "pass"), python("steps", "1 / 0")]  # steps was done: it is not repeated
    capsys.readouterr()
    assert main(["gpu-day", "--out", str(second)]) == 0
    told = capsys.readouterr().out
    assert "steps: done before" in told and "cases: done before" in told and "parity: done after" in told
    assert main(["gpu-day", "--part", "2", "--out", str(second), "--restart"]) == 0
    assert json.loads((second / "state.json").read_text())["stages"].keys() == {"cases"}


def test_an_archive_that_names_files_outside_is_refused(folder, capsys):
    folder.parent.mkdir(exist_ok=True)
    with tarfile.open(folder.with_name("day.tar.gz"), "w:gz") as tar:
        gpu_day._add(tar, "day/../../state.json", b"{}")
    assert main(["gpu-day", "--out", str(folder)]) == 2
    assert "day/../../state.json" in capsys.readouterr().err and not (folder.parent.parent / "state.json").exists()


@pytest.mark.parametrize("part", [1, 2])
def test_a_parts_stages_share_its_time(folder, part):
    day = gpu_day.stages(folder, dry_run=False, part=part)
    assert sum(stage.share for stage in day) == pytest.approx(1)
    for stage in day:
        assert stage.command(60.0)[0] == sys.executable
    names = [stage.name for stage in day]
    assert names == [["parity", "steps"], ["roofs", "cases", "profile", "tune", "sanitize", "report"]][part - 1]


def test_the_archive_stays_within_its_limit(folder):
    folder.mkdir(parents=True)
    (folder / "rows.jsonl").write_text("{}\n")
    (folder / "noise.bin").write_bytes(os.urandom(2**20))
    (folder / "long.log").write_bytes(b"start" + os.urandom(2 * 2**20) + b"end")
    archive = gpu_day.pack(folder, limit=2**20)
    assert archive.stat().st_size < 2**20
    with tarfile.open(archive) as tar:
        assert "day/rows.jsonl" in tar.getnames()
        left_out = tar.extractfile("day/left-out.txt").read().decode()
    assert "noise.bin 1048576" in left_out and "long.log" in left_out
    with tarfile.open(gpu_day.pack(folder)) as tar:
        log = tar.extractfile("day/long.log").read()
    assert log.startswith(b"(its beginning was cut off)") and log.endswith(b"end") and len(log) < 1.1 * 2**20


@pytest.fixture
def sanitizer(tmp_path, monkeypatch):
    """A compute-sanitizer on PATH that runs the command it is given and finds what FOUND says."""
    tool = tmp_path / "bin" / "compute-sanitizer"
    tool.parent.mkdir()
    tool.write_text(
        f"#!{sys.executable}\nimport subprocess, sys\n"
        "assert sys.argv[1] == '--tool' and sys.argv[3:5] == ['--error-exitcode', '9']\n"
        "tool, command = sys.argv[2], sys.argv[5:]\n"
        "code = subprocess.run(command).returncode if tool == 'memcheck' else 0\n"
        "found = 3 if tool == 'racecheck' else 0\n"
        "print(f'========= ERROR SUMMARY: {found} errors')\n"
        "sys.exit(9 if found else code)\n"
    )
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tool.parent}{os.pathsep}{os.environ['PATH']}")
    return tool


def test_a_sanitizers_finding_fails_its_stage(sanitizer, tmp_path, capsys):
    assert sanitize.find() == str(sanitizer)
    with mock.patch.object(sanitize, "TOOLS", {"racecheck": 0.5, "synccheck": 1.0}):
        assert main(["sanitize", "--dry-run", "--out", str(tmp_path / "out")]) == 1
    text = capsys.readouterr().out
    assert "racecheck: exit status 9, ERROR SUMMARY: 3 errors" in text
    assert "synccheck: exit status 0, ERROR SUMMARY: 0 errors" in text


def test_without_a_sanitizer_the_reason_is_printed(capsys):
    with mock.patch.object(sanitize, "find", lambda: None):
        assert main(["sanitize"]) == 0
    assert "nothing was sanitized" in capsys.readouterr().out


@pytest.mark.slow
def test_the_whole_day_runs_dry(sanitizer, tmp_path):
    """Every stage, on Triton's interpreter and a clock of its own; only torch.cuda is another object."""
    pytest.importorskip("triton", reason="Triton is not to be had on this platform")
    out = tmp_path / "dry"
    sanitizer.write_text(sanitizer.read_text().replace("3 if tool == 'racecheck' else 0", "0"))
    code = main(["gpu-day", "--part", "1", "--dry-run", "--minutes", "15", "--out", str(out)])
    first = json.loads((out / "state.json").read_text())["stages"]
    assert list(first) == ["parity", "steps"] and code == 0
    shutil.rmtree(out)  # the second part runs elsewhere, where only the archive was brought
    code = main(["gpu-day", "--part", "2", "--dry-run", "--minutes", "15", "--out", str(out)])
    for log in out.glob("*.log"):
        print(f"--- {log.name}", log.read_text()[-2000:], sep="\n")
    outcomes = json.loads((out / "state.json").read_text())["stages"]
    assert {name: outcome["status"] for name, outcome in outcomes.items()} == dict.fromkeys(
        ("parity", "steps", "roofs", "cases", "profile", "tune", "sanitize", "report"), "done"
    )
    assert code == 0 and outcomes["parity"] == first["parity"]

    steps = {row.what: row for row in Steps.load(out / "steps" / "steps.json").rows}
    skipped = {what for what, row in steps.items() if row.status == "skipped"}
    assert {row.status for row in steps.values()} == {"ok", "skipped"}
    assert steps.keys() - skipped >= {
        "fastgpt.GPT",
        "nanoGPT, accelerate(loss=True), compiled",
        "Hugging Face, compiled",
    }
    assert all(steps[what].median == pytest.approx(1e-3) for what in steps.keys() - skipped)

    rows = Folder(out / "cases").rows()
    timed = [row for row in rows if row.status == "ok"]
    assert all(row.median == pytest.approx(1e-3) for row in timed) and len(timed) > 60
    absent = ("nanoGPT: ", "the book, fast: ")  # whose models are swapped where they are installed
    skipped = {row.variant for row in rows if row.status == "skipped" and row.note and not row.case.startswith(absent)}
    not_installed = {"nanoGPT", "the book, fast", BOOK_CACHED, "flash-attn 2", "flash-attn 3"}
    not_installed |= {name for name in skipped if name.startswith("Liger")}
    assert skipped - not_installed <= {"SDPA cuDNN", "SDPA efficient", "flex_attention", "PyTorch, chunked"}
    assert len(timed) + sum(row.status == "skipped" for row in rows) == len(rows)
    tried = [json.loads(line) for line in (out / "tune.jsonl").read_text().splitlines()]
    assert len(tried) == 10 and all(record["status"] == "ok" for record in tried)  # two of decoding
    profile = json.loads((out / "profile.json").read_text())
    launched = {part["part"] for part in profile["parts"] if part["calls"]}
    assert {"cross entropy", "matmuls", "AdamW"} <= launched  # kernels that are no operators are seen on a GPU alone
    assert "training step B 1" in (out / "sanitize" / "memcheck.log").read_text()
    with tarfile.open(out.with_name("dry.tar.gz")) as tar:
        names = set(tar.getnames())
    assert {
        "dry/steps/steps.md",
        "dry/report/report.md",
        "dry/report/bars.png",
        "dry/cases/rows.jsonl",
        "dry/parity.xml",
    } <= names
