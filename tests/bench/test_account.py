"""The instruction account: its arithmetic on a made-up listing."""

import pytest

pytest.importorskip("triton", reason="Triton is not to be had on this platform")

from bench.gates import account

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
