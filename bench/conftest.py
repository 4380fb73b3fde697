"""`pytest bench/`: its options, and the run that measures each case when the first of its rows is asked for."""

import dataclasses
from pathlib import Path

import pytest

from bench.case import Case
from bench.catalogue import catalogue
from bench.machine import Machine, header, measure_roofs
from bench.measure import AGAIN, DeviceLost, Folder, Row, failed, measure

ROOT = Path(__file__).parent.parent
DEVICE_LOST = 3  # the exit status of a run that another one can resume


def pytest_addoption(parser):
    group = parser.getgroup("bench", "fastgpt's benchmarks")
    group.addoption("--bench-machine", choices=("cuda", "cpu", "dry"), help="the GPU if there is one, else the CPU")
    group.addoption("--bench-out", type=Path, default=ROOT / "out" / "bench", help="the folder for the rows")
    group.addoption(
        "--nanogpt", type=Path, metavar="DIR", help="a checkout of nanoGPT, to compare with: runs its model.py"
    )
    group.addoption(
        "--book-cached", type=Path, metavar="FILE", help="the book's gpt_with_kv_cache.py, likewise: runs it"
    )
    group.addoption(
        "--bench-compiled", action="store_true", help="on a CPU too, the families' whole models by torch.compile"
    )
    group.addoption("--bench-large", action="store_true", help="on a CPU too, GPT-2 355M to 1558M as memory allows")
    group.addoption("--bench-tier", type=int, default=3, help="only the more telling cases: 0, 1, 2 or all")
    group.addoption("--bench-resume", action="store_true", help="keep the rows that are in that folder already")


class Run:
    """The machine and its roofs, the folder, and the cases that have been measured."""

    def __init__(self, config):
        machine = Machine.of(config.getoption("--bench-machine"))
        given = dict(
            nanogpt=config.getoption("--nanogpt"),
            book=config.getoption("--book-cached"),
            compiles_models=config.getoption("--bench-compiled"),
            large=config.getoption("--bench-large"),
        )
        self.machine = dataclasses.replace(machine, **given)
        most = config.getoption("--bench-tier")
        self.cases = {case.name: case for case in catalogue(self.machine) if case.tier <= most}
        self.folder = Folder(config.getoption("--bench-out"))
        self.resume = config.getoption("--bench-resume")
        self.roofs: dict[str, float] = {}
        self.facts: dict = {}
        self.lost = False
        self._rows: dict[str, list[Row]] = {}
        self._samples: dict[str, dict[str, list[float]]] = {}

    def start(self) -> None:
        self.roofs = measure_roofs(self.machine)
        self.facts = header(self.machine) | {"roofs": self.roofs}
        kept = self.folder.rows() if self.resume else []
        for row in kept:
            self._rows.setdefault(row.case, []).append(row)
        self.folder.start(self.facts, self.resume)

    def row(self, case: Case, variant: str) -> tuple[Row, list[float] | None]:
        """Its row, and its samples if it was timed in this process."""
        if case.name not in self._rows:
            self._rows[case.name] = self._measured(case)
        (row,) = [row for row in self._rows[case.name] if row.variant == variant] or [None]
        if row is None:
            pytest.skip("its first timing is missing")
        return row, self._samples.get(case.name, {}).get(variant)

    def _measured(self, case: Case) -> list[Row]:
        try:
            rows, self._samples[case.name] = measure(case, self.machine, self.roofs)
        except DeviceLost as error:
            self.lost = True
            self.folder.add(failed(case, self.machine, str(error)))
            pytest.exit(f"the device is lost; --bench-resume goes on after this case: {error}", DEVICE_LOST)
        except Exception as error:
            rows = failed(case, self.machine, f"{type(error).__name__}: {error}")
            self.folder.add(rows)
            raise
        self.folder.add(rows)
        return rows

    def finish(self) -> None:
        """The roofs once more: a machine that was busy at the start may be less so now, and a roof is the best seen."""
        if self.lost:
            return
        now = measure_roofs(self.machine)
        self.facts["roofs"] = {name: max(rate, now[name]) for name, rate in self.roofs.items()}
        self.folder.start(self.facts, resume=True)

    def without_a_time(self) -> set[str]:
        """What was skipped or wrong, and why."""
        rows = [row for rows in self._rows.values() for row in rows]
        found = {f"{row.variant}: {row.note}" for row in rows if row.status == "skipped"}
        return found | {f"{row.label}: {row.status}: {row.note}" for row in rows if row.status == "WRONG"}


_RUN = pytest.StashKey[Run]()


def _run(config) -> Run:
    if _RUN not in config.stash:
        config.stash[_RUN] = Run(config)
    return config.stash[_RUN]


def pytest_generate_tests(metafunc):
    if {"case", "variant"} <= set(metafunc.fixturenames):
        pairs = [(c, v) for c in _run(metafunc.config).cases.values() for v in (*c.variants, AGAIN)]
        metafunc.parametrize(("case", "variant"), pairs, ids=[f"{case.name}: {variant}" for case, variant in pairs])


@pytest.fixture(scope="session")
def run(pytestconfig):
    run = _run(pytestconfig)
    run.start()
    return run


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session):
    if _RUN in session.config.stash and session.config.stash[_RUN].facts:
        session.config.stash[_RUN].finish()


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info["fastgpt"] = _run(config).facts


def pytest_terminal_summary(terminalreporter, config):
    if _RUN not in config.stash or not config.stash[_RUN].facts:
        return
    run = config.stash[_RUN]
    terminalreporter.section("what could not be compared")
    for line in sorted(run.without_a_time()):
        terminalreporter.line(line)
    path = run.folder.path
    terminalreporter.line(f"rows are in {path}; python -m bench report {path} makes tables and plots")
