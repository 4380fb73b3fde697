"""The compile gate: what it records is what people launch, and a launch that it must not let pass it sees."""

import functools

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not to be had on this platform")

import triton
import triton.language as tl

from bench.gates import compile as gate
from bench.gates import feign, record
from bench.gates.ways import ways
from fastgpt import ops
from fastgpt.kernels import attention_tiles, layernorm
from tests.conftest import HAS_GPU

WAYS = ways()


def launched(capability, *names):
    return {launch.name for _, launch in gate.recorded(capability, {name: WAYS[name] for name in names})}


STEP = {
    *("embedding_fwd_kernel", "run_sums_kernel", "join_runs_kernel", "layer_norm_fwd_kernel", "layer_norm_bwd_kernel"),
    *("attention_fwd_kernel", "attention_dq_kernel", "attention_dkdv_kernel"),
    *("gelu_fwd_kernel", "gelu_bwd_kernel", "cross_entropy_kernel", "poison_kernel"),
}


def test_a_step_of_fastgpt_train_is_recorded():
    assert launched(90, "train 124M") == STEP - {"poison_kernel"}
    assert launched(90, "train, document masks") == STEP | {"spans_kernel"}


def test_the_dtypes_of_a_step_are_its_own():
    """Float32 weights under autocast: the embedding's gradient is summed from halves into float32, which is what failed
    on users' cards while every kernel that was compiled had one dtype."""
    found = [each for each in gate.launches_of("train 124M", 90) if each.name == "run_sums_kernel"]
    assert found and {(each.pointers["dout_ptr"], each.pointers["dweight_ptr"]) for each in found} == {("bf16", "fp32")}
    assert not any(each.constexprs["DROPOUT"] for each in found)


def test_generation_takes_the_kernels_for_few_rows():
    few, many = launched(90, "generate 1, bfloat16"), launched(90, "generate 64, bfloat16")
    assert {"linear_kernel", "append_kernel", "decode_kernel", "greedy_kernel"} <= few
    assert "linear_kernel" not in many and "decode_kernel" in many


def test_a_card_is_feigned_and_nothing_is_left_of_it():
    with feign.card(80) as card:
        x = torch.empty(4, 768, device="cuda", dtype=torch.bfloat16)
        assert x.is_cuda and str(x.device) == "cuda:0" and (x @ x.t()).shape == (4, 4)
        assert torch.cuda.get_device_capability() == (8, 0) and card.shared == 166_912
        assert "its Triton kernel on cuda:0" in ops.explain(ops.layer_norm, x, x[0])
    assert HAS_GPU or not torch.cuda.is_available()
    assert not torch.empty(2).is_cuda


def test_every_way_can_be_taken():
    """On one card; CI's gate takes them on all. A package that is missing leaves its ways out."""
    seen = {way for way, _ in gate.recorded(90)}
    assert len(seen) > 30


@pytest.mark.slow
def test_other_cards_compile_one_launch_of_each_kernel():
    full = list(gate.recorded(90))
    for capability in (80, 120):
        found = list(gate.one_a_kernel(capability, full))
        names = [launch.name for _, launch in found]
        assert len(names) == len(set(names)) and {launch.name for _, launch in full} - set(names) <= {"merge_kernel"}
        assert all(launch.capability == capability for _, launch in found)


ROW = gate.Row("attention_fwd_kernel", "4xbf16 fp32; D=64 ", 90, 128, 0, 49152, "wgmma.mma_async", "train 124M")


@pytest.mark.parametrize(
    ("changes", "passes"),
    [
        ({}, True),
        (dict(spilled=8), False),
        (dict(shared=232_449), False),
        (dict(matrix="mma.sync wgmma.mma_async"), False),
        (dict(matrix="serialized wgmma.mma_async"), False),
        (dict(matrix="tf32 wgmma.mma_async"), False),
        (dict(matrix="mma.sync", capability=80), True),
        (dict(shared=101_377, capability=86, matrix="mma.sync"), False),
        (dict(registers=0, matrix="CompilationError: operand #1 does not dominate this use"), False),
    ],
)
def test_what_passes(changes, passes):
    row = ROW._replace(**changes)
    assert row.passes is passes
    assert gate.line(row).endswith("FAILS") is not passes


def test_what_is_worse_than_the_committed_table_is_named():
    """A spill more, a wgmma less, a row that nobody committed; and nothing in the table itself."""
    changed = [ROW._replace(spilled=16), ROW._replace(matrix="mma.sync"), ROW._replace(case="D=72 ")]
    name = f"attention_fwd_kernel, {ROW.case}, compute capability 90: "
    assert list(gate.worse([ROW], [ROW])) == []
    assert list(gate.worse(changed, [ROW])) == [
        name + "spills 16 bytes, 0 in the committed table",
        name + "multiplies by mma.sync, by wgmma.mma_async in the committed table",
        name.replace(ROW.case, "D=72 ") + "the committed table has no such row",
    ]


def test_the_committed_tables_pass_and_are_read_as_they_were_written():
    for version in ("3.7.1", "3.6.0"):
        table = gate.committed(version)
        assert len(table) > 300 and [row for row in table if not row.passes] == []
        text = (gate.RESULTS / f"compile-triton-{version}.txt").read_text().splitlines()[2:]
        assert [gate.line(row).split() for row in table] == [line.split() for line in text]


# A launch that must not pass.


def first(name, run, capability=90):
    return next(launch for launch in record.launches(run, capability) if launch.name == name)


def norms(columns):
    x, weight = (torch.zeros(shape, device="cuda", requires_grad=True) for shape in ((64, columns), (columns,)))
    ops.layer_norm(x, weight).sum().backward()


def heads(dtype):
    ops.causal_attention_qkv(torch.zeros(2, 1024, 3 * 768, device="cuda", dtype=dtype), 12)


def test_the_gate_sees_a_spill(monkeypatch):
    """A row of 16384 channels does not fit the registers that these tiles give it."""
    tiles = layernorm.Tiles(1, 16384, 4, 1, 96)
    monkeypatch.setattr(layernorm, "_tiles", lambda *_, **__: tiles)
    row = gate.measure(first("layer_norm_bwd_kernel", lambda: norms(16384)))
    assert row.spilled > 0 and not row.passes


def test_the_gate_sees_tf32_where_ieee_was_promised():
    launch = first("attention_fwd_kernel", lambda: heads(torch.float32))
    assert "PRECISION=ieee" in launch.case and gate.measure(launch).passes
    torch.set_float32_matmul_precision("high")
    try:
        row = gate.measure(first("attention_fwd_kernel", lambda: heads(torch.float32)))
    finally:
        torch.set_float32_matmul_precision("highest")
    assert "tf32" in row.matrix and row.passes, "the user allowed it"
    assert not row._replace(case=launch.case).passes


def test_the_gate_sees_a_product_that_is_no_wgmma(monkeypatch):
    """Tiles of 32 queries are too small for it."""
    monkeypatch.setattr(attention_tiles, "_tiles", lambda *args: attention_tiles.Tiles(32, 32, 4, 1))
    row = gate.measure(first("attention_fwd_kernel", lambda: heads(torch.bfloat16)))
    assert row.matrix == "mma.sync" and not row.passes


@triton.jit
def _no_code_kernel(x_ptr):
    tl.store(x_ptr, tl.dot(tl.zeros([16, 16], tl.float32), tl.zeros([32, 16], tl.float32)))


def test_the_gate_sees_what_does_not_compile():
    row = gate.measure(first("no_code_kernel", lambda: _no_code_kernel[(1,)](torch.zeros(4, device="cuda"))))
    assert not row.compiles and not row.passes and "Error" in row.matrix
    assert gate.line(row).endswith("FAILS")


@pytest.mark.gpu
@pytest.mark.parametrize("name", [name for name in WAYS if "1558M" not in name])
def test_what_is_recorded_is_what_a_card_launches(name):
    """Each way taken for real: the same kernels, specialised alike."""
    major, minor = torch.cuda.get_device_capability()
    capability = 10 * major + minor
    card = torch.cuda.get_device_properties(0)
    there = feign.CARDS.get(capability)
    if there is None or card.multi_processor_count != there.multiprocessors:
        pytest.skip(f"no card like this {card.name} is feigned")
    way = WAYS[name]
    try:
        feigned = record.launches(functools.partial(way.run, way.prepare()), capability)
        with record.noted(capability, really=True) as real:
            way.run(way.prepare())
    except gate.Missing as reason:
        pytest.skip(str(reason))
    told = [{(launch.name, launch.key) for launch in side} for side in (feigned, real)]
    assert told[0] == told[1], sorted(name for name, _ in told[0] ^ told[1])
