"""The kernels compile for every target without a GPU, without spills, within each card's shared memory."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not to be had on this platform")

from bench import compile as gate

SAMPLE = (
    "C 768 bfloat16",
    "C 8192 bfloat16",
    "D 64 bfloat16",
    "D 64 bfloat16 all",
    "cache D 64 bfloat16",
    "V 50257 bfloat16",
    "F 3072 tanh bfloat16",
    "K 768 bfloat16",
    "few rows, K 768 bfloat16",
    "V 50257 C 768 bfloat16",
)


@pytest.mark.parametrize("capability", gate.CAPABILITIES)
def test_no_kernel_spills_or_asks_for_too_much(capability):
    """All that is shipped for 9.0, but for float16, which takes bfloat16's tiles; one width for the others."""
    table = list(gate.rows([capability], lambda case: case in SAMPLE or (capability == 90 and " float16" not in case)))
    norms = {f"layer_norm_{kind}_kernel" for kind in ("fwd", "bwd", "sums")}
    gelu = {f"{form}gelu_{kind}_kernel" for form in ("", "linear_") for kind in ("fwd", "bwd")}
    heads = {f"attention_{kind}_kernel" for kind in ("fwd", "dq", "dkdv")}
    heads |= {"poison_kernel", "spans_kernel", "decode_kernel", "merge_kernel"}
    steps = {"linear_kernel", "append_kernel", "greedy_kernel"}
    lookups = {"embedding_fwd_kernel", "run_sums_kernel", "join_runs_kernel"}
    assert {row.kernel for row in table} == norms | heads | gelu | lookups | steps | {"cross_entropy_kernel"}
    assert [row for row in table if not row.passes] == []
    committed = gate.committed()  # of this Triton alone: another one's ptxas counts otherwise
    assert not committed or list(gate.worse(table, committed)) == []


def test_what_is_worse_than_the_committed_table_is_named():
    """A spill more, a wgmma less, a row that nobody committed; and nothing in the table itself."""
    table = gate.committed("3.7.1")
    assert len(table) > 1000 and list(gate.worse(table, table)) == []
    row = next(row for row in table if row.kernel == "attention_fwd_kernel" and "wgmma" in row.matrix)
    changed = [row._replace(spilled=16), row._replace(matrix="mma.sync"), row._replace(case="D 72 bfloat16")]
    name = f"attention_fwd_kernel, {row.case}, compute capability 90: "
    assert list(gate.worse(changed, table)) == [
        name + "spills 16 bytes, 0 in the committed table",
        name + "multiplies by mma.sync, by wgmma.mma_async in the committed table",
        name.replace(row.case, "D 72 bfloat16") + "the committed table has no such row",
    ]


def test_the_gate_sees_a_spill():
    """A row of 32768 channels does not fit the registers that the tiles give it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gate.layernorm, "_tiles", lambda columns, *_, **__: gate.layernorm.Tiles(1, columns, 4, 1, 96))
        _, backward, _ = gate.launches(lambda: gate._layer_norm(32768, torch.bfloat16, 0.1), 90)
    row = gate.measure("too wide", backward, 90)
    assert row.spilled > 0 and not row.passes


def test_the_gate_sees_tf32_where_ieee_was_promised():
    torch.set_float32_matmul_precision("high")
    try:
        forward = gate.launches(lambda: gate._attention(64, torch.float32), 90)[0]
    finally:
        torch.set_float32_matmul_precision("highest")
    row = gate.measure("D 64 float32", forward, 90)
    assert "tf32" in row.matrix and not row.passes


def test_the_gate_sees_a_product_that_is_no_wgmma():
    """Tiles of 32 queries are too small for it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gate.attention_tiles, "_tiles", lambda *args: gate.attention_tiles.Tiles(32, 32, 4, 1))
        forward = gate.launches(lambda: gate._attention(64, torch.bfloat16), 90)[0]
    row = gate.measure("D 64 bfloat16", forward, 90)
    assert row.matrix == "mma.sync" and not row.passes
