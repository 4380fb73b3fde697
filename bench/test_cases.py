"""Every case of the catalogue: a test a variant. What was sampled in turns is played back to pytest-benchmark, whose
own loop times one function after another; its table and its --benchmark-json hold the same samples."""

import pytest


class Replay:
    """A clock that each call moves on by the next sample."""

    def __init__(self):
        self.seconds, self.samples = 0.0, iter(())

    def now(self) -> float:
        return self.seconds

    def play(self) -> None:
        self.seconds += next(self.samples)


REPLAY = Replay()


@pytest.mark.benchmark(timer=REPLAY.now)
def test_case(case, variant, run, request):
    row, samples = run.row(case, variant)
    if row.status == "skipped":
        pytest.skip(row.note)
    if row.status == "WRONG" and not row.ours:  # someone else's: told here and in the report, and no fault of ours
        pytest.xfail(f"WRONG: {row.note}")
    assert row.status == "ok", f"{row.status}: {row.note}"
    if samples is None:
        pytest.skip("measured by the run that this one resumes")
    benchmark = request.getfixturevalue("benchmark")
    benchmark.group = case.name
    benchmark.extra_info.update(vars(row))
    REPLAY.samples = iter(samples)
    REPLAY.seconds = 0.0
    benchmark.pedantic(REPLAY.play, rounds=len(samples))
