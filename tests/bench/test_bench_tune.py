"""The search for tiles: what it tries reaches the launch, and what it proposes is right, fits and is faster."""

import json
import time
import types
from unittest import mock

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not to be had on this platform")

from triton.runtime.jit import JITFunction

from bench import dry, tune
from bench.case import Subject
from bench.gates import record, ways
from bench.machine import Machine
from bench.timing import DeviceClock


@pytest.fixture
def machine():
    return Machine("dry", "cpu", torch.float32, DeviceClock(dry.FakeCuda(), "cpu"), "eager", 0.0, (2, 2))


CALLS = {
    "attention": lambda: ways._attention(None, 64, torch.bfloat16),
    "layer_norm": lambda: ways._norms(None, 768, torch.bfloat16, 0.0),
    "gelu": lambda: ways._mlp(None, torch.bfloat16, "tanh", False),
    "decode": lambda: ways._decoding(None, 64, torch.bfloat16),
    "cross_entropy": lambda: ways._head(None, torch.bfloat16),
}


@pytest.mark.parametrize("tunable", tune.tunables(), ids=lambda tunable: tunable.name)
def test_a_trial_reaches_the_launch_of_its_kernel(tunable):
    """Every field, in the constants or options that the kernel is launched with; the other kernels keep theirs."""
    call = next(call for name, call in CALLS.items() if tunable.name.startswith(name))
    trial = {field: values[-1] for field, values in tunable.trials.items()}
    other = {launch.kernel.__name__: launch for launch in record.launches(call, 90)}
    with tunable.patched(trial):
        patched = {launch.kernel.__name__: launch for launch in record.launches(call, 90)}
    (mine,) = [name for name in patched if tunable.kernel in name]
    given = {name.lower(): value for name, value in {**patched[mine].constexprs, **vars(patched[mine].options)}.items()}
    trial.pop("resident", None)  # it is in the grid
    assert {field: given[field] for field in trial} == trial
    assert {launch.kernel.__name__ for launch in record.launches(call, 90)} == set(other)  # and it is taken off again
    for name, launch in patched.items():
        if name != mine:
            changed = {key for key, value in vars(launch.options).items() if value != vars(other[name].options)[key]}
            assert changed <= ({"num_warps"} if "delta" in name else set())


def test_the_nearest_trials_come_first_and_the_shipped_one_never():
    tunable = tune.tunables()[0]
    shipped = dict(block_m=64, block_n=128, num_warps=8, num_stages=2)
    found = tune.trials(tunable, shipped)
    changes = [sum(trial[field] != shipped[field] for field in shipped) for trial in found]
    assert changes == sorted(changes) and changes[0] == 1 and shipped not in found
    assert len(found) == 3 * 3 * 2 * 4 - 1


def target(results):
    """A target whose trials give `results(trial)`."""
    now = {}

    class Patch:
        def __init__(self, trial):
            self.trial = trial

        def __enter__(self):
            now["trial"] = self.trial

        def __exit__(self, *exc):
            now.clear()

    tunable = tune.Tunable("t", "t", "", dict(block=(1, 2, 4)), lambda shape, machine: dict(block=1), Patch)
    return tune.Target(tunable, dict(N=1), lambda: Subject(lambda: results(now.get("trial"))))


def test_a_wrong_trial_is_not_timed_and_a_broken_one_is_kept(machine):
    right = torch.randn(4, 8)

    def results(trial):
        if trial == {"block": 2}:
            return (right + 1,)
        if trial == {"block": 4}:
            raise RuntimeError("out of resource: shared memory")
        return (right,)

    wrong, broken = tune.search(target(results), machine, time.monotonic() + 60, 64, {})
    assert wrong["status"] == "WRONG" and "seconds" not in wrong
    assert broken["status"] == "failed" and "shared memory" in broken["note"]
    assert tune.proposals([wrong, broken]) == []
    assert "WRONG" in tune.line(wrong) and "shared memory" in tune.line(broken)


def test_it_goes_on_where_it_stopped_and_ends_at_its_deadline(machine):
    right = (torch.randn(4, 8),)
    records = list(tune.search(target(lambda trial: right), machine, time.monotonic() + 60, 64, {}))
    assert [record["trial"] for record in records] == [{"block": 2}, {"block": 4}]
    known = {json.dumps(records[0]["trial"]): records[0]}
    rest = list(tune.search(target(lambda trial: right), machine, time.monotonic() + 60, 64, known))
    assert [record["trial"] for record in rest] == [{"block": 4}]
    assert list(tune.search(target(lambda trial: right), machine, time.monotonic() - 1, 64, {})) == []


def test_a_proposal_gains_more_than_noise_and_spills_nothing():
    def record(gain, spills=0, name="a"):
        return {"target": name, "status": "ok", "gain": gain, "spills": spills, "trial": {}}

    assert tune.proposals([record(1.02)]) == []
    assert tune.proposals([record(2.0, spills=8), record(1.1), record(1.2), record(1.05, name="b")]) == [
        record(1.2),
        record(1.05, name="b"),
    ]


def test_registers_and_spills_are_read_off_the_kernel_that_was_launched():
    compiled = types.SimpleNamespace(n_regs=168, n_spills=12)

    @mock.patch.object(JITFunction, "run", lambda function, *args, **kwargs: compiled)
    def launch():
        function = object.__new__(JITFunction)
        function.__name__ = "_attention_fwd_kernel"
        with tune.launched("attention_fwd") as mine, tune.launched("layer_norm") as others:
            function.run(grid=(1,), warmup=False)
        return mine, others

    assert launch() == ([compiled], [])
