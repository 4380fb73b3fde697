"""The instruction account of a kernel: what its loops issue, read from the machine code, and the rate that this allows.

nvdisasm lists a cubin's instructions; a backward branch closes a loop. Of each loop that multiplies matrices, the
instructions of one warp and one turn are counted by the unit that runs them, and turned into the clocks of an H100's
multiprocessor (Hopper: CUDA C++ Programming Guide, arithmetic throughput, compute capability 9.0; the tensor core's
rate from the H100 datasheet, 989 TFLOP/s at 1.83 GHz and 132 multiprocessors).

Two limits follow. `overlapped`: all units busy at once, the busiest decides. `serial`: the tensor core stands still
while the rest works, and the other way round; only copies, which are asynchronous, go on meanwhile. Neither knows
latencies, waits at barriers, bank conflicts, the launch, or programs that are left over when the others are done, so a
kernel may be slower than both; two blocks a multiprocessor, or more, are what brings it from the second limit towards
the first.
"""

import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

TENSOR_FLOPS = 4096  # dense bf16 or fp16, a clock and multiprocessor
SHARED_BYTES = 128  # as above
L2_BYTES = 32  # as above: assumed, 7.4 TB/s over all; attention's forward read about 5 on an H200
MULTIPROCESSORS, CLOCK = 132, 1.755e9  # the clock is an assumption: boost is 1.98 GHz, tensor-heavy kernels run lower

# Warp instructions that a multiprocessor starts each clock; 32 lanes each.
RATES = {"issue": 4.0, "mufu": 0.5, "fma": 4.0, "alu": 2.0, "shuffle": 1.0}
_UNITS = {
    "mufu": {"MUFU"},
    "fma": {"FADD", "FFMA", "FMUL", "IMAD", "HFMA2", "HADD2", "HMUL2"},
    "alu": {"FMNMX", "FSEL", "FSETP", "ISETP", "SEL", "LOP3", "PLOP3", "IADD3", "VIADD", "LEA", "SHF", "PRMT", "F2FP"}
    | {"F2F", "I2F", "F2I", "I2FP", "MOV", "IABS", "IMNMX", "VIMNMX", "P2R", "R2P", "SGXT", "BMSK"},
    "shuffle": {"SHFL"},
}
SHOWN = (
    "HGMMA",
    "MUFU",
    "FFMA",
    "FMUL",
    "FADD",
    "FMNMX",
    "F2FP",
    "ISETP",
    "FSEL",
    "LDS",
    "STS",
    "LDSM",
    "LDGSTS",
    "BAR",
)


class Loop(NamedTuple):
    counts: dict[str, int]  # instructions of one warp in one turn, by name
    flops: int  # of one warpgroup's wgmma in one turn
    operand_bytes: int  # that they read from shared memory
    copied_bytes: int  # from global to shared memory by one warp
    waits: int  # for all wgmma in flight; ptxas puts one behind each where it can't let them overlap

    @property
    def serialized(self) -> bool:
        return self.waits >= self.counts["HGMMA"]

    @property
    def instructions(self) -> int:
        return sum(self.counts.values())

    def clocks(self, warps: int) -> dict[str, float]:
        """What each unit of a multiprocessor is busy for one turn of a block of `warps`."""
        of = {unit: sum(self.counts.get(name, 0) for name in names) for unit, names in _UNITS.items()}
        busy = {unit: n * warps / RATES[unit] for unit, n in {"issue": self.instructions, **of}.items()}
        busy["tensor"] = self.flops * warps / 4 / TENSOR_FLOPS
        busy["shared"] = self.operand_bytes * warps / 4 / SHARED_BYTES
        busy["l2"] = self.copied_bytes * warps / L2_BYTES
        return busy

    def serial(self, warps: int) -> float:
        busy = self.clocks(warps)
        copies, tensor = busy.pop("l2"), max(busy.pop("tensor"), busy.pop("shared"))
        return max(tensor + max(busy.values()), copies)

    def overlapped(self, warps: int) -> float:
        return max(self.clocks(warps).values())


class Account(NamedTuple):
    loops: list[Loop]  # those with matrix products, in the order of the code
    outside: int  # instructions of one warp outside of them: the prologue and the end


def read(listing: str) -> Account:
    """The account of a kernel from nvdisasm's listing."""
    instructions: list[tuple[str, str]] = []  # name with its suffixes, the rest
    labels: dict[str, int] = {}
    spans = []
    for line in listing.splitlines():
        if found := re.match(r"(\.L_x_\d+):", line.strip()):
            labels[found[1]] = len(instructions)
        elif found := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(\S+)\s*(.*?)\s*;", line):
            instructions.append((found[1], found[2]))
            if found[1].startswith("BRA") and (target := re.search(r"`\((\.L_x_\d+)\)", found[2])):
                begin = labels.get(target[1], len(instructions))  # a label not yet seen lies ahead
                spans.append(range(begin, len(instructions)))
    products = [s for s in spans if any(instructions[i][0].startswith(("HGMMA", "HMMA")) for i in s)]
    innermost = [s for s in products if not any(o != s and o.start >= s.start and o.stop <= s.stop for o in products)]
    inside = sum(map(len, innermost))
    return Account([_loop([instructions[i] for i in s]) for s in innermost], len(instructions) - inside)


def _loop(body: list[tuple[str, str]]) -> Loop:
    counts: dict[str, int] = {}
    flops = operand_bytes = copied_bytes = 0
    for name, operands in body:
        bare = name.split(".")[0]
        counts[bare] = counts.get(bare, 0) + 1
        if bare == "LDGSTS":
            copied_bytes += 32 * int(width[1]) // 8 if (width := re.search(r"\.(64|128)\b", name)) else 128
        if shape := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", name):
            m, n, k = map(int, shape.groups())
            flops += 2 * m * n * k
            a_in_registers = re.match(r"R\d+, R\d+", operands) is not None
            operand_bytes += 2 * k * (n if a_in_registers else m + n)
        if name.startswith("HMMA.16816"):  # of one warp, where HGMMA is of four
            flops += 4 * 2 * 16 * 8 * 16
    waits = sum(name.startswith("WARPGROUP.DEPBAR") and operands.endswith("0x0") for name, operands in body)
    return Loop(counts, flops, operand_bytes, copied_bytes, waits)


def of(cubin: bytes, nvdisasm: str) -> Account:
    return read(listing(cubin, nvdisasm))


def listing(cubin: bytes, nvdisasm: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(cubin)
        return subprocess.run([nvdisasm, "-c", str(file)], capture_output=True, text=True, check=True).stdout


def turns(kernel: str, time: int, block_m: int, block_n: int) -> tuple[int, int, int]:
    """Causal attention over `time` tokens of one head: programs, turns of the unmasked loop, of the masked one."""
    by_keys = "dkdv" in kernel
    block, other = (block_n, block_m) if by_keys else (block_m, block_n)
    programs = -(-time // block)
    whole = masked = 0
    for first in range(0, time, block):
        if by_keys:  # from the first tile with a query that sees a key, to where all see all, to the end
            begin, below = first // other * other, min(-(-(first + block - 1) // other) * other, time)
            masked += -(-(below - begin) // other)
            whole += -(-(time - below) // other)
        else:
            below, end = (first + 1) // other * other, min(first + block, time)
            whole += below // other
            masked += -(-(end - below) // other)
    return programs, whole, masked


def ordered(account: Account) -> list[Loop]:
    """The loop over whole tiles, then the one over the diagonal, which selects."""
    return sorted(account.loops, key=lambda loop: loop.counts.get("FSEL", 0))


def clocks(kernel: str, account: Account, warps: int, time: int, block_m: int, block_n: int) -> tuple[float, float]:
    """What one head takes of one multiprocessor: (serial, overlapped)."""
    programs, whole, masked = turns(kernel, time, block_m, block_n)
    plain_loop, masked_loop = ordered(account)
    ends = programs * account.outside * warps / RATES["issue"]
    serial = whole * plain_loop.serial(warps) + masked * masked_loop.serial(warps)
    overlapped = whole * plain_loop.overlapped(warps) + masked * masked_loop.overlapped(warps)
    return serial + ends, overlapped + ends


def teraflops(flops: float, clocks_of_a_multiprocessor: float) -> float:
    return flops / clocks_of_a_multiprocessor * MULTIPROCESSORS * CLOCK / 1e12
