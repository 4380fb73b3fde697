"""Which lines of fastgpt/ and kernels/ no test enters: `python -m tests.entered`, some twelve minutes on two cores.

Runs the tests, the slow ones too, in every process they start, and compares with tests/unentered.txt, which gives a
reason for each line that is left. Exit code 1 for a line without a reason, and for a reason without its line. A GPU
enters more: its tests need no reason here, so lines that only it reaches are listed.
"""

import collections
import contextlib
import io
import linecache
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIST = ROOT / "tests" / "unentered.txt"
SETTINGS = """[run]
parallel = True
concurrency = multiprocessing, thread
patch = subprocess, _exit
source = {root}/fastgpt, {root}/kernels
data_file = {folder}/data
"""


def measured(folder: Path) -> int:
    """Run all tests under coverage, which leaves its data in `folder`; the first exit code that is not 0, or 0."""
    settings = folder / "coveragerc"
    settings.write_text(SETTINGS.format(root=ROOT, folder=folder))
    command = [sys.executable, "-m", "coverage", "run", f"--rcfile={settings}", "-m", "pytest", "-q", "-n", "auto"]
    environment = {**os.environ, "COVERAGE_RCFILE": str(settings)}
    spread = [*command, "--dist", "worksteal"]
    codes = [subprocess.run([*spread, *more], cwd=ROOT, env=environment).returncode for more in ([], ["-m", "slow"])]
    return next((code for code in codes if code), 0)


def unentered(folder: Path) -> list[str]:
    """`file: text of the line` for each that was not entered."""
    import coverage

    whole = coverage.Coverage(data_file=str(folder / "data"), config_file=str(folder / "coveragerc"))
    with contextlib.redirect_stdout(io.StringIO()):
        whole.combine([str(folder)])
    found = []
    for file in sorted(whole.get_data().measured_files()):
        for line in whole.analysis2(file)[3] if Path(file).is_relative_to(ROOT) else ():
            found.append(f"{Path(file).relative_to(ROOT).as_posix()}: {linecache.getline(file, line).strip()}")
    return found


def listed(text: str) -> list[str]:
    """The lines that have a reason, which stands indented under those that it is for."""
    found: list[str] = []
    waiting: list[str] = []
    for line in text.splitlines():
        if line.startswith("    "):
            found += waiting
            waiting = []
        elif ".py: " in line:
            waiting.append(line)
    if waiting:
        raise ValueError(f"{LIST.name} gives no reason for {waiting[0]}")
    return found


def main() -> int:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        code = measured(folder)
        found = unentered(folder)
    measured_now, reasons = collections.Counter(found), collections.Counter(listed(LIST.read_text(encoding="utf-8")))
    new, gone = list((measured_now - reasons).elements()), list((reasons - measured_now).elements())
    print(f"{len(found)} lines no test enters, {len(new)} of them without a reason; tests ended with {code}")
    print(*(f"no reason: {line}" for line in new), *(f"entered now: {line}" for line in gone), sep="\n")
    return int(bool(new or gone or code))


if __name__ == "__main__":
    sys.exit(main())
