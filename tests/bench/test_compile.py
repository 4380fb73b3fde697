"""What people launch compiles for every target without a GPU, without spills, within each card's shared memory.

CI runs the gate itself, `python -m bench compile`, on two Tritons; here it is shown that the gate can fail.
"""

import functools
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not to be had on this platform")

import triton
import triton.language as tl

from bench import smoke
from bench.__main__ import main
from bench.gates import compile as gate
from bench.gates import record, ways

ROOT = Path(__file__).parents[2]


@triton.jit
def _refused_kernel(x_ptr, REFUSED: tl.constexpr):
    tl.static_assert(not REFUSED)
    tl.store(x_ptr, 0.0)


def measured(call, kernel, capability=90):
    launch = next(each for each in record.launches(call, capability) if each.name == kernel)
    return gate.measure(launch)


@pytest.mark.slow
@pytest.mark.parametrize("capability", gate.CAPABILITIES)
def test_what_trains_and_generates_by_default_passes(capability):
    names = ("train 124M", "generate 1, bfloat16", "generate 64, bfloat16")
    launches = list(gate.recorded(capability, {name: ways.ways()[name] for name in names}))
    table = list(gate.rows(launches))
    assert len(table) > 20 and [gate.line(row) for row in table if not row.passes] == []
    committed = gate.committed()  # of this Triton alone: another one's ptxas counts otherwise
    assert not committed or list(gate.worse(table, committed)) == []


def test_what_is_worse_than_the_committed_table_is_named():
    """A spill more, a wgmma less, a row that nobody committed; and nothing in the table itself."""
    table = gate.committed("3.7.1")
    assert len(table) > 1000 and list(gate.worse(table, table)) == []
    row = next(row for row in table if row.kernel == "attention_fwd_kernel" and "wgmma" in row.matrix)
    changed = [row._replace(spilled=16), row._replace(matrix="mma.sync"), row._replace(case="bf16; D=72")]
    name = f"attention_fwd_kernel, {row.case}, compute capability {row.capability}: "
    assert list(gate.worse(changed, table)) == [
        name + "spills 16 bytes, 0 in the committed table",
        name + "multiplies by mma.sync, by wgmma.mma_async in the committed table",
        name.replace(row.case, "bf16; D=72") + "the committed table has no such row",
    ]


@pytest.mark.parametrize(("version", "cards"), [("3.7.1", gate.CAPABILITIES), ("3.6.0", (90,))])
def test_the_committed_tables_hold_their_cards_and_no_failure(version, cards):
    """CI compiles for 9.0 alone on the older Triton."""
    table = gate.committed(version)
    assert {row.capability for row in table} == set(cards)
    assert [gate.line(row) for row in table if not row.passes] == []
    lines = (gate.RESULTS / f"compile-triton-{version}.txt").read_text(encoding="utf-8").splitlines()
    assert lines[0] == f"Triton {version}" and lines[2:] == [gate.line(row) for row in table]


def test_a_kernel_that_does_not_compile_fails_the_gate(monkeypatch, capsys):
    def launch(_, refused):
        _refused_kernel[(1,)](torch.zeros(1, device="cuda"), REFUSED=refused)

    for refused in (False, True):
        way = ways.Way(lambda: None, functools.partial(launch, refused=refused))
        monkeypatch.setattr(gate, "ways", lambda way=way: {"mine": way})
        monkeypatch.setattr(gate, "committed", lambda *version: [])
        assert main(["compile", "--jobs", "1", "--capability", "90"]) == int(refused)
        out, err = capsys.readouterr()
        assert ("1 of 1 rows fail" in err) == ("FAILS" in out) == ("AssertionFailure" in out) == refused
        assert "refused_kernel" in out and "| mine" in out


def test_the_gate_sees_a_spill(monkeypatch):
    """A row of 16384 channels does not fit the registers that these tiles give it."""
    from fastgpt.kernels import layernorm

    monkeypatch.setattr(layernorm, "_tiles", lambda columns, *_, **__: layernorm.Tiles(1, columns, 4, 1, 96))
    row = measured(lambda: ways._norms(None, 16384, torch.bfloat16, 0.1), "layer_norm_bwd_kernel")
    assert row.compiles and row.spilled > 0 and not row.passes


def test_the_gate_sees_tf32_where_ieee_was_promised():
    torch.set_float32_matmul_precision("high")
    try:
        row = measured(lambda: ways._attention(None, 64, torch.float32), "attention_fwd_kernel")
    finally:
        torch.set_float32_matmul_precision("highest")
    assert "tf32" in row.matrix and row.passes  # it was asked for
    assert not row._replace(case=row.case.replace("PRECISION=tf32", "PRECISION=ieee")).passes


def test_the_gate_sees_a_product_that_is_no_wgmma(monkeypatch):
    """Tiles of 32 queries are too small for it."""
    from fastgpt.kernels import attention_tiles

    monkeypatch.setattr(attention_tiles, "_tiles", lambda *args: attention_tiles.Tiles(32, 32, 4, 1))
    row = measured(lambda: ways._attention(None, 64, torch.bfloat16), "attention_fwd_kernel")
    assert row.matrix == "mma.sync" and not row.passes


def test_the_gate_sees_wgmma_that_is_serialized_where_that_is_not_known():
    row = measured(lambda: ways._attention(None, 64, torch.bfloat16, extras="dropout, mask"), "attention_dkdv_kernel")
    assert "serialized" in row.matrix and row.passes  # which is written down
    assert not row._replace(case=row.case.replace("i64 u1", "i64")).passes


def test_a_missing_package_is_told_in_a_line_and_the_rest_is_recorded(monkeypatch, capsys):
    found = {name: ways.ways()[name] for name in ("Hugging Face, autocast", "decode_attention D 64")}
    ways._accelerated.cache_clear()
    monkeypatch.setattr(ways, "find_spec", lambda name: None)
    names = {name for name, _ in gate.recorded(90, found)}
    assert names == {"decode_attention D 64"}
    assert capsys.readouterr().err == (
        "not recorded: Hugging Face, autocast: transformers is not installed (pip install transformers)\n"
    )


def test_what_the_command_is_given_wrong_is_said(capsys, tmp_path):
    for arguments, said in ((["--triton", str(tmp_path)], "holds no Triton"), (["--ways", "trian"], "'trian'")):
        assert main(["compile", *arguments]) == 2
        assert said in capsys.readouterr().err


OLD = """
            if ~begins_here:
                tl.store(heads_ptr + chunk.to(tl.int64) * C + cols, total, in_cols)
            elif ~ends:
                tl.store(tails_ptr + chunk.to(tl.int64) * C + cols, total, in_cols)
            elif (key >= 0) & (key < size):
                tl.store(dweight_ptr + key * C + cols, total.to(dweight_ptr.dtype.element_ty), in_cols)
"""


@pytest.mark.nightly
def test_the_defect_of_the_embeddings_backward_turns_the_gate_red_on_triton_3_6_0(tmp_path):
    """Put back, it would have been seen by the launches of `fastgpt train`; needs a registry to fetch that Triton."""
    folder = ROOT / ".triton-3.6.0"  # where CI has it
    if not folder.is_dir():
        folder = tmp_path / "triton"
        fetch = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder), "triton==3.6.0"]
        subprocess.run(fetch, check=True)
    source = (ROOT / "kernels" / "embedding.py").read_text(encoding="utf-8")
    begin = source.index("            # Two stores:")
    end = source.index("            total = tl.zeros([BLOCK_C], ACC)\n            begins_here")
    old = re.sub(r"from \.(\w+)", r"from fastgpt.kernels.\1", source[:begin] + OLD.lstrip("\n") + source[end:])
    (tmp_path / "old_embedding.py").write_text(old, encoding="utf-8")
    script = textwrap.dedent("""
        import sys
        import old_embedding
        from fastgpt.kernels import embedding
        from bench.__main__ import main
        if sys.argv[1] == "old":
            embedding._run_sums_kernel = old_embedding._run_sums_kernel
        sys.exit(main(["compile", "--capability", "90", "--ways", "train 124M"]))
    """)
    for which, code in (("new", 0), ("old", 1)):
        process = subprocess.run(
            [sys.executable, "-c", script, which],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (folder, tmp_path, ROOT)))},
            capture_output=True,
            text=True,
            cwd=ROOT,
        )
        failing = [line for line in process.stdout.splitlines() if line.endswith("FAILS")]
        assert process.returncode == code, process.stderr
        assert process.stdout.startswith("Triton 3.6.0")
        assert all(line.startswith("run_sums_kernel") for line in failing) and len(failing) == code


def test_a_sanitizer_reaches_every_form_of_hoppers_kernels(capsys):
    """What `bench smoke --hopper` launches there is what the gate compiles of them."""
    hopper = pytest.importorskip("fastgpt.ops.hopper")
    if not hopper.has_a_known_triton():
        pytest.skip("this Triton's Gluon is not known")
    names = {launch.name for launch in record.launches(smoke.hoppers, 90)}
    assert names == {f"hopper_{kind}_kernel" for kind in HOPPERS}
    assert "Hopper's attention_backward with a bias bfloat16" in capsys.readouterr().out
    assert record.launches(smoke.hoppers, 80) == []
    assert main(["smoke", "--hopper"]) == 1


HOPPERS = ("attention_fwd", "attention_dq", "attention_dkdv", "linear_gelu_fwd", "linear_gelu_bwd")
