"""The instruction account: its arithmetic on a made-up listing, and that the docstrings' numbers are the machine's."""

import re

import pytest

pytest.importorskip("triton", reason="Triton is not to be had on this platform")

import torch
import triton

from bench.gates import account
from bench.gates import compile as gate
from fastgpt.kernels import attention, attention_backward, decode, linear_gelu

LISTING = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   LDGSTS.E.BYPASS.LTC128B.128 [R2], desc[UR4][R4.64] ;
        /*0020*/                   WARPGROUP.ARRIVE ;
        /*0030*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], RZ, !UPT ;
        /*0040*/                   HGMMA.64x64x16.F32.BF16 R56, R24, gdesc[UR8].tnspB, R56, gsb0 ;
        /*0050*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0060*/              @!P0 MUFU.EX2 R24, R24 ;
        /*0070*/                   FMNMX R2, R2, R3, !PT ;
        /*0080*/              @P1  BRA `(.L_x_1) ;
        /*0090*/                   EXIT ;
"""


def test_a_listing_is_read():
    counted = account.read(LISTING)
    (loop,) = counted.loops
    assert counted.outside == 2 and loop.instructions == 8
    assert (loop.counts["HGMMA"], loop.counts["MUFU"], loop.waits) == (2, 1, 1) and not loop.serialized
    assert loop.flops == 2 * 2 * 64 * 64 * 16
    assert loop.operand_bytes == 2 * 16 * (64 + 64) + 2 * 16 * 64  # the second takes its first operand from registers
    busy = loop.clocks(warps=4)
    assert (busy["tensor"], busy["mufu"], busy["alu"], busy["issue"]) == (64, 8, 2, 8)
    assert busy["l2"] == 4 * 32 * 16 / account.L2_BYTES
    assert loop.serial(4) == busy["tensor"] + busy["mufu"] > busy["l2"]
    assert loop.overlapped(4) == max(busy.values())


def test_a_wait_behind_each_product_is_seen():
    wait = "        /*0035*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;\n"
    above, below = LISTING.split("        /*0040*/")
    (loop,) = account.read(f"{above}{wait}        /*0040*/{below}").loops
    assert loop.serialized


@pytest.mark.parametrize(
    ("kernel", "tiles", "expected"),
    [
        ("fwd", (128, 64), (8, 56, 16)),
        ("dq", (64, 64), (16, 120, 16)),
        ("dkdv", (64, 128), (8, 56, 16)),
        ("fwd", (64, 128), (16, 56, 16)),
    ],
)
def test_turns_of_causal_loops(kernel, tiles, expected):
    assert account.turns(kernel, 1024, *tiles) == expected


@pytest.mark.skipif(triton.__version__ != "3.7.1", reason="another compiler issues other instructions")
def test_the_docstrings_tell_what_the_machine_code_holds():
    lines = list(gate.accounts())
    whole = [line.split() for line in lines if " whole " in line]
    documented = [*_rows(attention.__doc__), *_rows(attention_backward.__doc__)]
    assert len(whole) == len(documented) == 6
    for words in whole:
        name, dim, tile, warps, _, *counts = words
        kind = name.split("_")[1]
        busy = {unit: int(clocks) for unit, clocks in re.findall(r"(\w+) (\d+)", " ".join(words[19:]))}
        numbers = [int(n) for n in (warps, *counts[:6])]
        row = [kind, dim, tile, *numbers, busy["tensor"], busy["mufu"], busy["issue"], busy["l2"]]
        assert row in documented, row
    said = attention.__doc__ + attention_backward.__doc__
    for line in (line for line in lines if "at most" in line):
        serial, overlapped = re.search(r"at most (\d+) TFLOP/s serial, (\d+)", line).groups()
        assert serial in said and overlapped in said, line
        if "D 64" in line:
            assert int(serial) >= 300, line


def _rows(doc):
    """[kernel, D, tile, numbers …] for each line of a docstring's table."""
    for line in doc.splitlines():
        if found := re.match(r"    (?:(\w+) +)?(\d+) +(\d+x\d+) +([\d ]+)$", line):
            yield [found[1] or "fwd", found[2], found[3], *map(int, found[4].split())]


def _fused():
    return [launch for launch in gate.launches_of("gelu_mlp fused bfloat16", 90) if "linear" in launch.name]


@pytest.mark.skipif(triton.__version__ != "3.7.1", reason="another compiler issues other instructions")
def test_the_fused_matmuls_docstring_tells_it_too():
    said = set(re.findall(r"\d+", linear_gelu.__doc__))
    tiles = linear_gelu.candidate(torch.bfloat16, 90)
    for launch in _fused():
        counted = gate.counted(launch.compile())
        (loop,), turns = counted.loops, 768 // tiles.block_k
        busy, serial = loop.clocks(tiles.num_warps), loop.serial(tiles.num_warps)
        flops = 2 * tiles.block_m * tiles.block_n * tiles.block_k
        ends = counted.outside * tiles.num_warps / account.RATES["issue"]
        rates = account.teraflops(flops, serial), account.teraflops(flops * turns, serial * turns + ends)
        numbers = [loop.instructions, busy["tensor"], busy["shared"], busy["l2"], *rates]
        assert {str(round(number)) for number in numbers} <= said, numbers


@pytest.mark.skipif(triton.__version__ != "3.7.1", reason="another compiler issues other instructions")
def test_decodings_docstring_tells_it_too():
    said = set(re.findall(r"\d+(?:\.\d+)?", decode.__doc__))
    for dim in (64, 128):
        launch = gate.launches_of(f"decode_attention D {dim}", 90)[0]
        (loop,) = gate.counted(launch.compile()).loops
        busy = loop.clocks(launch.options.num_warps)
        assert max(clocks for unit, clocks in busy.items() if unit != "l2") == busy["issue"] == loop.instructions
        read = 2 * launch.constexprs["BLOCK_N"] * dim * 2  # bytes of keys and values
        rate = read / busy["issue"] * account.MULTIPROCESSORS * account.CLOCK / 1e12
        assert {str(loop.instructions), f"{read // 1024}", f"{rate:.1f}"} <= said
