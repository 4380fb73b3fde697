"""Everything that a GPU should tell, in two parts of a few minutes, from a bare checkout and with no network.

Part 1 says whether it is right (every test that needs a GPU) and how fast whole training steps are; part 2 all else.
They may run on different days on different machines: the folder, or the archive in its place, carries what was done.

Each stage is a process of its own with a limit of its own: one that fails or hangs costs the others nothing, and what
it printed, its traceback included, stays in the folder. The most telling come first, and time that one leaves goes
to the next. Started again on the same folder, the day goes on: stages that are done are not repeated, and the
benchmark and the search go on inside. After every stage all of it is packed into one archive.
"""

import argparse
import contextlib
import dataclasses
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

from bench import dry
from bench.machine import commit

ROOT = Path(__file__).parent.parent
PARTS = (1, 2)
ARCHIVE_LIMIT = 16 * 2**20
_LOG_TAIL = 2**20  # bytes of a log that are packed
_GRACE = 5.0  # seconds for a stopped process to print its stack

# Tests of every kernel's file that take seconds in the interpreter, for a dry run.
_DRY_TESTS = ("tests/kernels/test_cross_entropy.py", "-m", "interpreter", "-k", "257")


@dataclasses.dataclass(frozen=True)
class Stage:
    name: str
    share: float  # of its part's time
    command: Callable[[float], list[str]]  # given its limit in seconds
    resume_code: int | None = None  # an exit status after which it is started again


def stages(folder: Path, dry_run: bool, part: int, nanogpt: Path | None = None) -> list[Stage]:
    """A part of the day, in order."""
    python, flag = sys.executable, ["--dry-run"] if dry_run else []
    workers = str(max(1, min(15, (os.cpu_count() or 1) - 1)))  # Triton compiles on many cores
    spread = ["-n", workers, "--dist", "worksteal"] if find_spec("xdist") and not dry_run else []
    tests = list(_DRY_TESTS) if dry_run else ["tests", "-m", "gpu", "--maxfail=30", *spread]
    machine = ["--bench-machine", "dry"] if dry_run else ["--bench-machine", "cuda"]

    def bench(command, *arguments):
        return [python, "-m", "bench", command, *arguments, *flag]

    def pytest(*arguments):
        return [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]

    theirs = [] if nanogpt is None else ["--nanogpt", str(nanogpt)]
    if part == 1:
        return [
            Stage("parity", 0.5, lambda limit: pytest(*tests, "-rfE", f"--junitxml={folder / 'parity.xml'}")),
            Stage(
                "steps",
                0.5,
                lambda limit: bench(
                    "steps", "--out", str(folder / "steps"), "--resume", "--seconds", f"{0.85 * limit:.0f}", *theirs
                ),
                resume_code=3,
            ),
        ]
    cases = folder / "cases"
    return [
        Stage("roofs", 0.05, lambda limit: bench("roofs", "--out", str(folder / "machine.json"))),
        Stage(
            "cases",
            0.46,
            lambda limit: pytest(
                "bench/",
                *machine,
                *theirs,
                "--bench-out",
                str(cases),
                "--bench-resume",
                "--benchmark-columns=median,iqr,rounds",
            ),
            resume_code=3,
        ),
        Stage("profile", 0.08, lambda limit: bench("profile", "--out", str(folder / "profile.json"))),
        Stage(
            "tune",
            0.17,
            lambda limit: bench("tune", "--out", str(folder / "tune.jsonl"), "--minutes", f"{0.8 * limit / 60:.2f}"),
        ),
        Stage(
            "sanitize",
            0.16,
            lambda limit: bench("sanitize", "--out", str(folder / "sanitize"), "--seconds", f"{0.9 * limit:.0f}"),
        ),
        Stage(
            "report",
            0.08,
            lambda limit: [python, "-m", "bench", "report", str(cases), "--out", str(folder / "report")],
        ),
    ]


def run_day(folder: Path, day: Sequence[Stage], seconds: float, environment: dict[str, str]) -> dict[str, dict]:
    """Run what is not done yet of `day` within `seconds`; the outcomes of these and of all earlier stages, as they are
    kept in state.json. Where the folder is gone and its archive is there, it is unpacked first."""
    unpack(folder)
    folder.mkdir(parents=True, exist_ok=True)
    outcomes = _load(folder)
    saved, end = 0.0, time.monotonic() + seconds  # saved: what earlier stages left of their time
    for stage in day:
        if outcomes.get(stage.name, {}).get("status") == "done":
            saved += stage.share * seconds
            print(f"{stage.name}: done before", flush=True)
            continue
        limit = min(stage.share * seconds + saved, end - time.monotonic())
        if limit < 1:
            outcome = {"status": "no time left", "seconds": 0.0, "limit": limit}
        else:
            print(f"{stage.name}: up to {limit:.0f} s", flush=True)
            outcome = _run_stage(stage, folder / f"{stage.name}.log", limit, environment)
            saved = max(0.0, limit - outcome["seconds"])
        outcomes[stage.name] = outcome
        _save(folder, outcomes)
        print(f"{stage.name}: {outcome['status']} after {outcome['seconds']:.1f} s", flush=True)
        try:
            pack(folder)
        except OSError as error:  # a full disk must not end the day
            print(f"the archive could not be written: {error}", flush=True)
    return outcomes


def _run_stage(stage: Stage, log: Path, limit: float, environment: dict[str, str]) -> dict:
    """Its outcome: "done", "failed" with an exit status, or "stopped" at its limit."""
    started = time.monotonic()
    runs = 0
    while True:
        left = limit - (time.monotonic() - started)
        runs += 1
        try:
            with log.open("a") as file:
                code = _run(stage.command(left), file, left, environment)
        except Exception as error:  # a command that can't even be started
            with log.open("a") as file:
                file.write(f"{type(error).__name__}: {error}\n")
            code = -1
        seconds = time.monotonic() - started
        if code is None:
            return {"status": "stopped", "seconds": seconds, "limit": limit, "runs": runs}
        again = code == stage.resume_code and runs < 5 and limit - seconds > 5
        if not again:
            status = "done" if code == 0 else "failed"
            return {"status": status, "exit": code, "seconds": seconds, "limit": limit, "runs": runs}


def _run(command: list[str], file, limit: float, environment: dict[str, str]) -> int | None:
    """Its exit status, or None if it had to be stopped; then it is first asked for its stack, which goes to the log."""
    file.write(f"$ {' '.join(command)}\n")
    file.flush()
    process = subprocess.Popen(
        command,
        stdout=file,
        stderr=subprocess.STDOUT,
        cwd=ROOT,
        env={**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1", **environment},
        start_new_session=True,
    )
    try:
        return process.wait(max(limit - _GRACE, limit / 2))
    except subprocess.TimeoutExpired:
        file.write(f"\nstopped at its limit of {limit:.0f} s\n")
        file.flush()
        os.killpg(process.pid, signal.SIGABRT)  # faulthandler prints every thread's stack
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(min(_GRACE, limit / 2))
        return None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # and whatever it has started
        process.wait()


def _load(folder: Path) -> dict[str, dict]:
    state = folder / "state.json"
    if not state.exists():
        return {}
    kept = json.loads(state.read_text())
    now = commit()["commit"]
    if kept["commit"] != now:
        raise ValueError(f"{folder} holds a day of commit {kept['commit']}, this is {now}: --restart or another --out")
    return kept["stages"]


def _save(folder: Path, outcomes: dict[str, dict]) -> None:
    text = json.dumps({"commit": commit()["commit"], "stages": outcomes}, indent=2) + "\n"
    new = folder / "state.json.new"
    new.write_text(text)
    os.replace(new, folder / "state.json")


def pack(folder: Path, limit: int = ARCHIVE_LIMIT) -> Path:
    """The folder as FOLDER.tar.gz beside it, of at most `limit` bytes: the smallest files first, long logs by their
    ends, and the names of what found no room in left-out.txt."""
    archive = folder.with_name(folder.name + ".tar.gz")
    new = archive.with_name(archive.name + ".new")
    files = sorted((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    left_out = []
    with new.open("wb") as raw, tarfile.open(fileobj=raw, mode="w:gz") as tar:
        for path in files:
            data = path.read_bytes()
            if path.suffix == ".log" and len(data) > _LOG_TAIL:
                data = b"(its beginning was cut off)\n" + data[-_LOG_TAIL:]
            if raw.tell() + len(data) > limit - 2**16:  # as if it did not compress
                left_out.append(f"{path.relative_to(folder)} {len(data)}")
                continue
            _add(tar, f"{folder.name}/{path.relative_to(folder)}", data)
        if left_out:
            _add(tar, f"{folder.name}/left-out.txt", "\n".join(left_out).encode())
    os.replace(new, archive)
    return archive


def unpack(folder: Path) -> None:
    """What `pack` put into FOLDER.tar.gz, where there is no FOLDER: a part may run where another did not."""
    archive = folder.with_name(folder.name + ".tar.gz")
    if folder.exists() or not archive.exists():
        return
    with tarfile.open(archive) as tar:
        for entry in tar:
            _, *inside = Path(entry.name).parts
            data = tar.extractfile(entry)
            if data is None or not inside or ".." in inside or Path(entry.name).is_absolute():
                raise ValueError(f"{archive} holds {entry.name!r}, which gpu-day has not packed")
            target = folder.joinpath(*inside)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data.read())
    print(f"{folder} was unpacked from {archive}", flush=True)


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mtime = len(data), int(time.time())
    tar.addfile(entry, io.BytesIO(data))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--part", type=int, choices=PARTS, help="1: parity and training steps; 2: the rest; or both")
    parser.add_argument("--minutes", type=float, default=5.0, help="for each part (default 5)")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "gpu-day")
    parser.add_argument("--nanogpt", type=Path, metavar="DIR", help="nanoGPT's checkout, to compare with its model.py")
    parser.add_argument("--dry-run", action="store_true", help="every stage without a GPU, tiny, with a fake clock")
    parser.add_argument("--restart", action="store_true", help="forget what that folder and its archive hold")


def main(options: argparse.Namespace) -> int:
    """0 if every stage of the parts that were asked for was done; the archive is there in any case."""
    folder = options.out.resolve()
    archive = folder.with_name(folder.name + ".tar.gz")
    if options.restart:
        archive.unlink(missing_ok=True)
        if folder.exists():
            shutil.rmtree(folder)
    environment = dry.interpreter_environment() if options.dry_run else {}
    nanogpt = None if options.nanogpt is None else options.nanogpt.resolve()
    wanted, outcomes = [], {}
    for part in PARTS if options.part is None else (options.part,):
        day = stages(folder, options.dry_run, part, nanogpt)
        outcomes = run_day(folder, day, 60 * options.minutes, environment)
        wanted += day
    for stage in wanted:
        print(f"{stage.name:10}{outcomes[stage.name]['status']}")
    print(f"all of it is in {archive} ({archive.stat().st_size / 2**20:.1f} MiB)")
    return int(any(outcomes[stage.name]["status"] != "done" for stage in wanted))
