"""The order that Gluon's kernels rely on is there in what the compiler makes; the gate sees where it is not."""

import functools
import itertools

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not to be had on this platform")

from bench.gates import compile as gate
from bench.gates import order, record, ways
from fastgpt.ops import hopper

if not hopper.has_a_known_triton():
    pytest.skip("this Triton's Gluon is not known", allow_module_level=True)

CALLS = {
    "attention": functools.partial(ways._hopper_attention, dim=64, dtype=torch.bfloat16, block_m=128),
    "linear_gelu": functools.partial(ways._hopper_linear_gelu, dtype=torch.bfloat16, tanh=True),
    "linear_gelu_backward": functools.partial(ways._hopper_linear_gelu_bwd, dtype=torch.bfloat16, tanh=True),
}


@functools.cache
def compiled(module):
    (launch,) = record.launches(lambda: ways._on_hopper(None, CALLS[module], module), 90)
    return launch.compile()


@pytest.mark.parametrize("module", CALLS)
def test_a_shipped_kernel_is_in_order(module):
    """Each also has its products overlap, and spills nothing; which the gate holds for every form."""
    made = compiled(module)
    assert order.faults(made.asm["ptx"], gate.listing(made)) == []
    assert not any(loop.serialized for loop in gate.counted(made).loops)


def without(text, what, which=0):
    """A text without one of its lines that hold this."""
    lines = text.splitlines(keepends=True)
    found = [i for i, line in enumerate(lines) if what in line]
    del lines[found[which]]
    return "".join(lines)


def test_what_is_out_of_order_is_seen():
    """Machine code of which a barrier, a fence or a wait is taken away."""
    seen = set()
    for module in ("attention", "linear_gelu"):
        ptx = compiled(module).asm["ptx"]
        for what in ("bar.sync", "fence.proxy.async"):
            for which in range(ptx.count(what)):
                seen.update(order.faults(without(ptx, what, which), ""))
    assert seen == {
        "a copy of a tile with no fence",
        "an arrival with no barrier since a product",
        "an arrival with no barrier since shared memory",
        "a copy of a tile with no barrier since its fence",
        "shared memory is written where one thread alone waited for its copies",
    }


def test_a_softmax_behind_the_wait_is_seen():
    """The loop's wait for everything in flight put in front of its first exponential."""
    made = compiled("attention")
    lines = gate.listing(made).splitlines()
    waits = [i for i, line in enumerate(lines) if "WARPGROUP.DEPBAR" in line]
    one, nothing = next((a, b) for a, b in itertools.pairwise(waits) if "0x1" in lines[a] and "0x0" in lines[b])
    lines.insert(one + 1, lines.pop(nothing))
    (fault,) = order.faults(made.asm["ptx"], "\n".join(lines))
    assert fault.endswith("exponentials stand behind the wait for p v")


def test_the_gate_refuses_what_is_out_of_order(monkeypatch):
    (launch,) = record.launches(lambda: ways._on_hopper(None, CALLS["attention"], "attention"), 90)
    assert gate.measure(launch).passes
    monkeypatch.setattr(order, "_BARRIER", order.re.compile("nothing has this name"))
    row = gate.measure(launch)
    assert "disordered" in row.matrix and not row.passes
