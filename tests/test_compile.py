"""The kernels compile for every target without a GPU, without spills, within each card's shared memory."""

import pytest

pytest.importorskip("triton", reason="Triton is not to be had on this platform")

from bench import compile as gate


@pytest.mark.parametrize("capability", gate.CAPABILITIES)
def test_no_kernel_spills_or_asks_for_too_much(capability):
    """All that is shipped for 9.0, one width for the others."""
    table = list(gate.rows([capability], lambda case: capability == 90 or case.startswith("C 768 ")))
    assert {row.kernel for row in table} == {"layer_norm_fwd_kernel", "layer_norm_bwd_kernel"}
    assert [row for row in table if not row.passes] == []


def test_the_gate_sees_a_spill():
    """A row of 32768 channels does not fit the registers that the tiles give it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gate.layernorm, "_tiles", lambda columns, backward: (1, columns, 4))
        _, backward = gate.launches(lambda: gate._layer_norm(32768, gate.torch.bfloat16, 0.1))
    row = gate.measure("too wide", backward, 90)
    assert row.spilled > 0 and not row.passes
