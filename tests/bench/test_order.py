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

BF16 = torch.bfloat16
CALLS = {  # by module and kernel
    ("attention", "attention_fwd"): functools.partial(ways._hopper_attention, dim=64, dtype=BF16, block_m=128),
    ("attention_backward", "attention_dq"): functools.partial(ways._hopper_attention_bwd, dim=64, dtype=BF16),
    ("attention_backward", "attention_dkdv"): functools.partial(ways._hopper_attention_bwd, dim=64, dtype=BF16),
    ("linear_gelu", "linear_gelu_fwd"): functools.partial(ways._hopper_linear_gelu, dtype=BF16, tanh=True),
    ("linear_gelu_backward", "linear_gelu_bwd"): functools.partial(ways._hopper_linear_gelu_bwd, dtype=BF16, tanh=True),
}
FORWARD, FUSED = ("attention", "attention_fwd"), ("linear_gelu", "linear_gelu_fwd")


def launched(which):
    module, kernel = which
    found = record.launches(lambda: ways._on_hopper(None, CALLS[which], module), 90)
    return next(launch for launch in found if launch.name == f"hopper_{kernel}_kernel")


@functools.cache
def compiled(which):
    return launched(which).compile()


@pytest.mark.parametrize("which", CALLS, ids=lambda which: which[1])
def test_a_shipped_kernel_is_in_order(which):
    """Each also has its products overlap, and spills nothing; which the gate holds for every form."""
    made = compiled(which)
    assert order.faults(made.asm["ptx"], gate.listing(made)) == []
    assert not any(loop.serialized for loop in gate.counted(made).loops)


def without(text, what, place=0):
    """A text without one of its lines that hold this."""
    lines = text.splitlines(keepends=True)
    found = [i for i, line in enumerate(lines) if what in line]
    del lines[found[place]]
    return "".join(lines)


def test_what_is_out_of_order_is_seen():
    """Machine code of which a barrier, a fence or a wait is taken away."""
    seen = set()
    for which in (FORWARD, FUSED):
        ptx = compiled(which).asm["ptx"]
        for what in ("bar.sync", "fence.proxy.async"):
            for place in range(ptx.count(what)):
                seen.update(order.faults(without(ptx, what, place), ""))
    assert seen == {
        "a copy of a tile with no fence",
        "an arrival with no barrier since a product",
        "an arrival with no barrier since shared memory",
        "a copy of a tile with no barrier since its fence",
        "shared memory is written where one thread alone waited for its copies",
    }


def test_a_softmax_behind_the_wait_is_seen():
    """The loop's wait for everything in flight put in front of its first exponential."""
    made = compiled(FORWARD)
    lines = gate.listing(made).splitlines()
    waits = [i for i, line in enumerate(lines) if "WARPGROUP.DEPBAR" in line]
    one, nothing = next((a, b) for a, b in itertools.pairwise(waits) if "0x1" in lines[a] and "0x0" in lines[b])
    lines.insert(one + 1, lines.pop(nothing))
    (fault,) = order.faults(made.asm["ptx"], "\n".join(lines))
    assert fault.endswith("exponentials stand behind the next wait")


def test_the_gate_refuses_what_is_out_of_order(monkeypatch):
    launch = launched(FORWARD)
    assert gate.measure(launch).passes
    monkeypatch.setattr(order, "_BARRIER", order.re.compile("nothing has this name"))
    row = gate.measure(launch)
    assert "disordered" in row.matrix and not row.passes
