"""Compile every kernel as people launch it, for real GPUs with no GPU at hand: registers, spills, shared memory, and
which matrix instructions came out.

What people launch is recorded (bench.gates.ways, bench.gates.record), not listed: each launch that Triton would compile
for itself on a card is compiled here for that card. ptxas and cuobjdump come with Triton's wheel.
"""

import argparse
import contextlib
import functools
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import triton
from triton.compiler.errors import CompilationError
from triton.runtime.errors import PTXASError

from bench.gates import account, feign, order, record
from bench.gates.record import Launch
from bench.gates.ways import Missing, Way, ways

CAPABILITIES = tuple(feign.CARDS)
RESULTS = Path(__file__).parent.parent / "results"
# What may spill all the same, in bytes a thread: kernel, case, capabilities.
_MAY_SPILL = (
    ("attention_dkdv_kernel", r"(bf16|fp16).* D=(80|128) ", (90,), 128),  # at D 128, 16 queries take 2 to 9% longer
    ("hopper_attention_dkdv_kernel", r" D=128 ", (90,), 56),  # constants outside of the loops, but for one in each
    ("attention_dq_kernel", r"^\d*x?fp32.* D=256 ", CAPABILITIES, 256),  # no work of tensor cores, and no GPT-2 has it
    # Of 255 registers, 14 or 16 numbers that no layer changes: stored once a token, loaded once a layer.
    ("token_kernel", r"", (90,), 64),
    # More registers would leave fewer blocks. None of these has been measured on its card.
    ("layer_norm_bwd_kernel", r"DROPOUT=True.* BLOCK_C=1024 ", (90, 100, 120), 24),
    ("layer_norm_bwd_kernel", r"C=768 HAS_DSUM=True NEEDS_DX_BIAS=True .* BLOCK_C=1024 ", (120,), 8),
    ("attention_dkdv_kernel", r"i64 u1( fp32)?; D=64 .*; no ids", (80,), 8),  # padding and dropout together
)
# Where ptxas may serialize wgmma: padding and dropout in one backward. A single stage would not be; it is not measured.
_MAY_SERIALIZE = (("attention_dkdv_kernel", r"i64 u1( fp32)?; D=64 .*; no ids", (90,)),)
_WGMMA = re.compile(r"(attention_(fwd|dq|dkdv)|hopper_\w+)_kernel \d*x?(bf16|fp16)\b(?!.* D=256 )")


class Row(NamedTuple):
    kernel: str
    case: str  # record.Launch.case
    capability: int
    registers: int
    spilled: int  # bytes of stack and local memory a thread
    shared: int
    matrix: (
        str  # its PTX's matrix instructions; "serialized" where no two wgmma overlap, "disordered" (bench.gates.order)
    )
    way: str = ""  # the first that launches it

    @property
    def compiles(self) -> bool:
        return self.registers > 0

    @property
    def passes(self) -> bool:
        """It compiles, with no spill but those above, no more shared memory than the card has, no TF32 where IEEE was
        promised, on 9.0 nothing but wgmma for products of half-precision tiles for heads of up to 128, and in a Gluon
        kernel the order that it relies on."""
        within = self.spilled <= self.may_spill and self.shared <= feign.CARDS[self.capability].shared
        wgmma_only = self.capability == 90 and _WGMMA.match(f"{self.kernel} {self.case}")
        overlaps = "serialized" not in self.matrix or any(map(self._is, _MAY_SERIALIZE))
        well_multiplied = not (wgmma_only and "mma.sync" in self.matrix) and overlaps
        promised = "tf32" not in self.matrix or "PRECISION=tf32" in self.case
        return self.compiles and within and promised and well_multiplied and "disordered" not in self.matrix

    @property
    def may_spill(self) -> int:
        return max((most for *which, most in _MAY_SPILL if self._is(which)), default=0)

    def _is(self, which: Sequence) -> bool:
        """Whether it is a row of this kernel, with this in its case, for one of these cards."""
        kernel, case, capabilities = which
        return kernel == self.kernel and self.capability in capabilities and bool(re.search(case, self.case))


def recorded(capability: int, among: dict[str, Way] | None = None) -> Iterator[tuple[str, Launch]]:
    """What is launched on a card of this compute capability, each once, with the first way that launches it. A way
    whose packages are missing is told of on stderr and left out."""
    seen: set[tuple] = set()
    for name, way in (ways() if among is None else among).items():
        try:
            prepared = way.prepare()
        except Missing as error:
            print(f"not recorded: {name}: {error}", file=sys.stderr)
            continue
        for launch in record.launches(functools.partial(way.run, prepared), capability):
            if (launch.kernel, launch.key) not in seen:
                seen.add((launch.kernel, launch.key))
                yield name, launch


def one_a_kernel(capability: int, full: list[tuple[str, Launch]]) -> Iterator[tuple[str, Launch]]:
    """Of each kernel in a recording the first launch that its way makes on another card."""
    first: dict[str, str] = {}
    for way, launch in full:
        first.setdefault(launch.name, way)
    everything = ways()
    seen: set[str] = set()
    for way, launch in recorded(capability, {name: everything[name] for name in dict.fromkeys(first.values())}):
        if launch.name not in seen:
            seen.add(launch.name)
            yield way, launch


def measure(launch: Launch, way: str = "") -> Row:
    name, case, capability = launch.name, launch.case, launch.capability
    try:
        compiled = launch.compile()
    except (CompilationError, PTXASError, RuntimeError) as error:  # which is what a gate is for: no row of it passes
        said = (str(error).strip().splitlines() or [""])[0]
        return Row(name, case, capability, 0, 0, 0, f"{type(error).__name__}: {said}", way)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        usage = subprocess.run(
            [tool("cuobjdump"), "--dump-resource-usage", cubin], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    if found is None:
        raise ValueError(f"cuobjdump's report is not understood: {usage}")
    registers, stack, local = map(int, found.groups())
    matrix = set(re.findall(r"wgmma\.mma_async|mma\.sync|tcgen05\.mma|tf32", compiled.asm["ptx"]))
    if "wgmma.mma_async" in matrix and any(loop.serialized for loop in counted(compiled).loops):
        matrix.add("serialized")
    if launch.kernel.is_gluon() and order.faults(compiled.asm["ptx"], listing(compiled)):
        matrix.add("disordered")
    shared = compiled.metadata.shared
    return Row(name, case, capability, registers, stack + local, shared, " ".join(sorted(matrix)), way)


def counted(compiled: triton.compiler.CompiledKernel) -> account.Account:
    return account.of(compiled.asm["cubin"], tool("nvdisasm"))


def listing(compiled: triton.compiler.CompiledKernel) -> str:
    return account.listing(compiled.asm["cubin"], tool("nvdisasm"))


_WORK: list[tuple[str, Launch]] = []  # a forked process finds it here: a launch can't be pickled


def _measured(number: int) -> Row:
    way, launch = _WORK[number]
    return measure(launch, way)


def rows(launches: Iterable[tuple[str, Launch]], jobs: int = 1) -> Iterator[Row]:
    """A row for each launch, by `jobs` processes; those that differ in nothing that a row tells are told once."""
    _WORK[:] = launches
    numbers = range(len(_WORK))
    seen = set()
    with contextlib.ExitStack() as stack:
        if jobs > 1:
            pool = stack.enter_context(multiprocessing.get_context("fork").Pool(jobs))
            found = pool.imap(_measured, numbers)
        else:
            found = map(_measured, numbers)
        for row in found:
            if row._replace(way="") not in seen:
                seen.add(row._replace(way=""))
                yield row


_LINE = "{:24} {:>3} {:>9} {:>9} {:>8}  {:24}  {}  | {}"


def line(row: Row) -> str:
    numbers = (row.capability, row.registers, row.spilled, row.shared)
    mark = "" if row.passes else "  FAILS"
    return _LINE.format(row.kernel, *numbers, row.matrix or "-", row.case, row.way) + mark


def committed(version: str = triton.__version__) -> list[Row]:
    """The rows of this Triton's table in results/; none if there is no such table."""
    path = RESULTS / f"compile-triton-{version}.txt"
    if not path.is_file():
        return []
    found = []
    for text in path.read_text(encoding="utf-8").splitlines()[2:]:
        left, way = text.removesuffix("  FAILS").split("  | ")
        kernel, capability, registers, spilled, shared, rest = left.split(maxsplit=5)
        matrix, case = re.split(r"  +", rest, maxsplit=1)
        numbers = map(int, (capability, registers, spilled, shared))
        found.append(Row(kernel, case, *numbers, "" if matrix == "-" else matrix, way))
    return found


def worse(rows: Iterable[Row], table: list[Row]) -> Iterator[str]:
    """A line for each row that spills more than the table's of its name, or has other matrix instructions."""
    before: dict[tuple, list[Row]] = {}
    for row in table:
        before.setdefault(row[:3], []).append(row)
    for row in rows:
        name = f"{row.kernel}, {row.case}, compute capability {row.capability}"
        was = before.get(row[:3], [])
        spilled, matrices = max((each.spilled for each in was), default=0), {each.matrix for each in was}
        if not was:
            yield f"{name}: the committed table has no such row"
        elif row.spilled > spilled:
            yield f"{name}: spills {row.spilled} bytes, {spilled} in the committed table"
        elif row.matrix not in matrices:
            yield f"{name}: multiplies by {row.matrix or 'none'}, by {was[0].matrix or 'none'} in the committed table"


def launches_of(way: str, capability: int) -> list[Launch]:
    """What one of the ways launches."""
    return [launch for _, launch in recorded(capability, {way: ways()[way]})]


def tool(name: str) -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def accounts(capability: int = 90) -> Iterator[str]:
    """Lines of the instruction account of attention at heads of 64 and 128; bench.gates.account says what it counts."""
    time = 1024
    header = "".join(f"{name:>7}" for name in account.SHOWN)
    yield f"{'kernel':24}{'D':>4}{'tile':>10}{'warps':>6}  loop  {'all':>5}{header}   clocks a turn: busiest units"
    for dim in (64, 128):
        backward = [0.0, 0.0]
        for launch in launches_of(f"attention D {dim} bfloat16", capability):
            name, warps = launch.name, launch.options.num_warps
            if "attention" not in name:
                continue
            found = counted(launch.compile())
            block_m, block_n = launch.constexprs["BLOCK_M"], launch.constexprs["BLOCK_N"]
            for kind, loop in zip(("whole", "masked"), account.ordered(found), strict=True):
                numbers = "".join(f"{loop.counts.get(n, 0):7}" for n in account.SHOWN)
                busy = sorted(loop.clocks(warps).items(), key=lambda item: -item[1])[:6]
                units = ", ".join(f"{unit} {round(clocks)}" for unit, clocks in busy)
                tile = f"{block_m}x{block_n}"
                yield f"{name:24}{dim:4}{tile:>10}{warps:6}  {kind:6}{loop.instructions:5}{numbers}   {units}"
            clocks = account.clocks(name, found, warps, time, block_m, block_n)
            if "fwd" in name:
                yield _limits(f"forward D {dim}", 4 * time * time * dim / 2, clocks)
            else:
                backward = [a + b for a, b in zip(backward, clocks, strict=True)]
        yield _limits(f"backward D {dim}", 10 * time * time * dim / 2, backward)


def _limits(what: str, flops: float, clocks) -> str:
    serial, overlapped = (account.teraflops(flops, c) for c in clocks)
    return f"{what}: T 1024 causal, at most {serial:.0f} TFLOP/s serial, {overlapped:.0f} overlapped"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--all", action="store_true", help="every launch for every card, not one a kernel beside 9.0's")
    parser.add_argument("--capability", type=int, nargs="*", choices=CAPABILITIES, help="these cards alone; 80 is 8.0")
    parser.add_argument("--triton", type=Path, help="a folder with another version's wheel: for 9.0 alone, or --all")
    parser.add_argument("--ways", default="", help="of the ways to a kernel those alone whose names hold this")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes that compile")
    parser.add_argument("--sass", action="store_true", help="the account of attention's loops instead")


def main(options: argparse.Namespace) -> int:
    """Print the table, and below it what is worse than in the committed one; 1 if a row does not pass or is worse."""
    if options.triton is not None:
        return with_triton(options.triton, arguments(options)).returncode
    if options.sass:
        print(*accounts(), sep="\n")
        return 0
    print(f"Triton {triton.__version__}")
    print(_LINE.format("kernel", "cc", "registers", "spilled B", "shared B", "matrix", "tensors; constants", "way"))
    table, failed, found = committed(), 0, []
    for row in rows(work(options.capability or CAPABILITIES, options.all, options.ways), options.jobs):
        found.append(row)
        failed += not row.passes
        print(line(row), flush=True)
    lines = list(worse(found, table)) if table else []
    if failed:
        lines.append(f"{failed} of {len(found)} rows fail")
    for text in lines:
        print(text, file=sys.stderr)
    return int(bool(lines))


def work(capabilities: Iterable[int], everything: bool, named: str = "") -> Iterator[tuple[str, Launch]]:
    """What to compile: all that is launched on 9.0, and on other cards with `everything`; else one launch a kernel."""
    chosen = {name: way for name, way in ways().items() if named in name}
    if not chosen:
        raise ValueError(f"no way to a kernel has {named!r} in its name; there are: {', '.join(ways())}")
    full: list[tuple[str, Launch]] = []
    for capability in sorted(capabilities, key=lambda capability: capability != 90):
        if everything:
            yield from recorded(capability, chosen)
            continue
        full = full or list(recorded(90, chosen))
        yield from full if capability == 90 else one_a_kernel(capability, full)


def arguments(options: argparse.Namespace) -> list[str]:
    """Of a command line that asks for the same without --triton."""
    flags = [f"--{name}" for name in ("all", "sass") if getattr(options, name)]
    cards = options.capability or (CAPABILITIES if options.all else (90,))
    return [*flags, "--jobs", str(options.jobs), "--ways", options.ways, "--capability", *map(str, cards)]


def with_triton(folder: Path, command: list[str], **options) -> subprocess.CompletedProcess:
    """`python -m bench compile` in a process that imports the Triton in this folder."""
    if not (folder / "triton" / "__init__.py").is_file():
        raise ValueError(
            f"{folder} holds no Triton: pip download --no-deps triton==VERSION, and unpack its wheel there"
        )
    path = os.pathsep.join([str(folder.resolve()), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        [sys.executable, "-m", "bench", "compile", *command], env={**os.environ, "PYTHONPATH": path}, **options
    )
