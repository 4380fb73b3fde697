"""Which tests enter each line of fastgpt/ and kernels/, and how long each takes: what tests.mutate_random asks.

`known(files, interpreted)` runs those test files under coverage, as ordinary tests or in
Triton's interpreter, in one process and the ones that it starts, and keeps what it saw in a folder beside other
temporary files: one JSON a test file, until that file or a line of fastgpt/ or kernels/ changes. As a pytest plugin it
tells coverage which test is running.
"""

import collections
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = """[run]
parallel = True
core = ctrace
concurrency = multiprocessing, thread
patch = subprocess, _exit
source = {root}/fastgpt, {root}/kernels
data_file = {folder}/data
"""
_TIMES = "FASTGPT_TEST_TIMES"  # where a process of this plugin writes them


class Reached(dict[str, Any]):
    """What one test file does: {"seconds": {test: seconds}, "lines": {file: {line: [tests]}}}."""


def mode(interpreted: bool) -> list[str]:
    """pytest's options for the one kind of tests or the other."""
    kind = "interpreter" if interpreted else "not interpreter and not gpu"
    return ["-m", f"{kind} and not slow and not nightly", "-p", "no:cacheprovider"]


def environment(interpreted: bool) -> dict[str, str]:
    """What those tests find in their environment."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return {
        **kept,
        **({"TRITON_INTERPRET": "1"} if interpreted else {}),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }


def known(files: list[Path], interpreted: bool) -> dict[Path, Reached]:
    """What each of these test files enters, run now unless it is known already."""
    missing = [file for file in files if not _cache(file, interpreted).exists()]
    if missing:
        with tempfile.TemporaryDirectory() as folder:
            _measure(missing, interpreted, Path(folder))
            for file, found in _by_file(missing, Path(folder)).items():
                _cache(file, interpreted).parent.mkdir(parents=True, exist_ok=True)
                _cache(file, interpreted).write_text(json.dumps(found))
    return {file: Reached(json.loads(_cache(file, interpreted).read_text())) for file in files}


def already(files: list[Path], interpreted: bool) -> list[Path]:
    """Those that need no run."""
    return [file for file in files if _cache(file, interpreted).exists()]


def _cache(file: Path, interpreted: bool) -> Path:
    sources = hashlib.sha256()
    for source in sorted([*(ROOT / "fastgpt").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]):
        sources.update(source.read_bytes())
    own = hashlib.sha256(file.read_bytes()).hexdigest()[:12]
    name = f"{file.stem}-{own}-{'interpreted' if interpreted else 'ordinary'}.json"
    return Path(tempfile.gettempdir(), "fastgpt-reached", sources.hexdigest()[:16], name)


def _measure(files: list[Path], interpreted: bool, folder: Path) -> None:
    settings = folder / "coveragerc"
    settings.write_text(SETTINGS.format(root=ROOT, folder=folder))
    under_coverage = [sys.executable, "-m", "coverage", "run", f"--rcfile={settings}", "-m", "pytest"]
    plugins = ["-p", "tests.reached", "-p", "no:xdist"]
    subprocess.run(
        [*under_coverage, "-q", "--tb=line", *plugins, *mode(interpreted), *map(str, files)],
        cwd=ROOT,
        env={**environment(interpreted), _TIMES: str(folder / "times"), "PYTHONPATH": str(ROOT)},
    )  # fmt: skip


def _by_file(files: list[Path], folder: Path) -> dict[Path, Reached]:
    import coverage

    whole = coverage.Coverage(data_file=str(folder / "data"), config_file=str(folder / "coveragerc"))
    whole.combine([str(folder)])
    times = json.loads((folder / "times").read_text())
    found = {file: Reached(seconds={}, lines={}) for file in files}
    place = {str(file.relative_to(ROOT)): file for file in files}
    for test, seconds in times.items():
        found[place[test.partition("::")[0]]]["seconds"][test] = seconds
    data = whole.get_data()
    for source in data.measured_files():
        name = Path(source).relative_to(ROOT).as_posix()
        for line, tests in data.contexts_by_lineno(source).items():
            per_file = collections.defaultdict(list)
            for test in tests:
                if test in times:  # the others ran before the first test: imports
                    per_file[place[test.partition("::")[0]]].append(test)
            for file, those in per_file.items():
                found[file]["lines"].setdefault(name, {})[str(line)] = those
    return found


_seconds: dict[str, float] = {}
_not_passed: set[str] = set()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """The plugin: lines entered from now on, in processes that the test starts too, are this test's."""
    import coverage

    measuring = coverage.Coverage.current()
    if measuring is None:
        raise RuntimeError("tests.reached is a plugin for pytest under coverage; see its first lines")
    measuring.switch_context(item.nodeid)
    measuring.config.context = item.nodeid
    os.environ["COVERAGE_PROCESS_CONFIG"] = measuring.config.serialize()
    started = time.perf_counter()
    try:
        return (yield)
    finally:
        _seconds[item.nodeid] = time.perf_counter() - started


def pytest_runtest_logreport(report):
    if not report.passed:  # it can judge no mutant
        _not_passed.add(report.nodeid)


def pytest_sessionfinish():
    passed = {test: seconds for test, seconds in _seconds.items() if test not in _not_passed}
    Path(os.environ[_TIMES]).write_text(json.dumps(passed))
