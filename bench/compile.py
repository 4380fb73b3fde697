"""Compile every kernel as it is launched for real GPUs, with no GPU at hand: registers, spills, shared memory, and
which matrix instructions came out.

The launchers are called on CPU tensors while Triton's own launch is replaced by a note of its arguments; each note is
then compiled for each target as Triton would specialise it. ptxas and cuobjdump come with Triton's wheel.
"""

import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from bench import account
from fastgpt.kernels import (
    attention,
    attention_backward,
    attention_tiles,
    cross_entropy,
    decode,
    embedding,
    few_rows,
    greedy,
    layernorm,
    linear_gelu,
    mlp,
)

# Shared memory that one block may have, in bytes, by compute capability (CUDA C++ Programming Guide, table of features
# and technical specifications); Triton itself does not check.
SHARED_LIMIT = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
CAPABILITIES = tuple(SHARED_LIMIT)
RESULTS = Path(__file__).parent / "results"
# What may spill all the same, in bytes a thread: kernel, case, capabilities.
_MAY_SPILL = (
    ("attention_dkdv_kernel", r"D (80|128) \w*16", (90,), 128),  # at D 128 on an H200, 16 queries take 2 to 9% longer
    ("attention_dq_kernel", r"D 256 float32", CAPABILITIES, 256),  # no work of tensor cores, and no GPT-2 has it
    ("layer_norm_bwd_kernel", r"C 768 \w+ dropout", (120,), 8),  # more registers would leave fewer blocks
)

_POINTERS = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bool: "*i1",
}


class Launch(NamedTuple):
    kernel: JITFunction
    arguments: dict
    options: dict  # num_warps, num_stages


class Row(NamedTuple):
    kernel: str
    case: str
    capability: int
    registers: int
    spilled: int  # bytes of stack and local memory a thread
    shared: int
    matrix: str  # the matrix instructions of its PTX, "serialized" where ptxas lets no two wgmma overlap

    @property
    def passes(self) -> bool:
        """No spill but those above, no more shared memory than the card has, no TF32 (the cases never allow it), and on
        9.0 nothing but wgmma where it is expected: products of half-precision tiles for heads of up to 128."""
        within = self.spilled <= self.may_spill and self.shared <= SHARED_LIMIT[self.capability]
        wgmma_only = self.capability == 90 and not any(
            word in self.case for word in ("float32", "D 256", "cache", "few rows")
        )
        well_multiplied = not (wgmma_only and "mma.sync" in self.matrix) and "serialized" not in self.matrix
        return within and "tf32" not in self.matrix and well_multiplied

    @property
    def may_spill(self) -> int:
        found = [
            most
            for kernel, case, capabilities, most in _MAY_SPILL
            if kernel == self.kernel and re.search(case, self.case) and self.capability in capabilities
        ]
        return max(found, default=0)


def cases() -> dict[str, Callable[[], object]]:
    """A call of a launcher for each kernel, width, dtype and option that is shipped."""
    halves_and_full = (torch.bfloat16, torch.float16, torch.float32)
    norms = {
        f"C {columns} {str(dtype).removeprefix('torch.')}{' dropout' if p else ''}": lambda c=columns, d=dtype, p=p: (
            _layer_norm(c, d, p)
        )
        for columns in (64, 768, 1600, 4096, 8192, layernorm.MAX_COLUMNS)
        for dtype in halves_and_full
        for p in (0.0, 0.1)
    }
    heads = {
        f"D {dim} {str(dtype).removeprefix('torch.')}": lambda dim=dim, dtype=dtype: _attention(dim, dtype)
        for dim in (64, 80, 128, 256)
        for dtype in (halves_and_full if dim == 64 else (torch.bfloat16, torch.float32))
    }
    extras = {
        f"D {dim} bfloat16 {extra}": lambda dim=dim, extra=extra: _attention(dim, torch.bfloat16, extra)
        for dim in (64, 128, 256)
        for extra in (("all",) if dim == 256 else ("dropout", "documents", "all"))
    }
    decoding = {
        f"cache D {dim} {str(dtype).removeprefix('torch.')}": lambda dim=dim, dtype=dtype: _decode(dim, dtype)
        for dim in (64, 128, 256)
        for dtype in (torch.bfloat16, torch.float32)
    }
    few = {
        f"few rows, K {channels} {str(dtype).removeprefix('torch.')}": lambda channels=channels, dtype=dtype: _few_rows(
            channels, dtype
        )
        for channels in (768, 1600)
        for dtype in halves_and_full
    }
    losses = {
        f"V 50257 {str(dtype).removeprefix('torch.')}": lambda dtype=dtype: _cross_entropy(50257, dtype)
        for dtype in halves_and_full
    }
    mlps = {
        f"F 3072 {approximate} {str(dtype).removeprefix('torch.')}": lambda dtype=dtype, tanh=approximate == "tanh": (
            _gelu_mlp(dtype, tanh)
        )
        for approximate in ("tanh", "none")
        for dtype in halves_and_full
    }
    fused = {
        f"K 768 {str(dtype).removeprefix('torch.')}": lambda dtype=dtype: _linear_gelu(dtype)
        for dtype in halves_and_full
    }
    embeddings = {
        f"V 50257 C 768 {str(dtype).removeprefix('torch.')}": lambda dtype=dtype: _embedding(dtype)
        for dtype in halves_and_full
    }
    return {**norms, **heads, **extras, **decoding, **few, **losses, **mlps, **fused, **embeddings}


def _layer_norm(columns: int, dtype: torch.dtype, p: float) -> None:
    x, weight = torch.empty(4096, columns, dtype=dtype), torch.empty(columns, dtype=dtype)
    seed = torch.empty(1, dtype=torch.int64)
    y, s, stats = layernorm.layer_norm_fwd(x, x, weight, weight, weight, seed, 1e-5, p, dtype)
    layernorm.layer_norm_bwd(y, y, s, weight, stats, seed, p, dtype, True)


def _attention(dim: int, dtype: torch.dtype, extra: str = "") -> None:
    qkv, seed = torch.empty(2, 1024, 3 * 12 * dim, dtype=dtype), torch.empty(1, dtype=torch.int64)
    key_mask, documents = torch.empty(2, 1024, dtype=torch.bool), torch.empty(2, 1024, dtype=torch.int32)
    options = (
        seed if extra in ("dropout", "all") else None,
        key_mask if extra in ("key mask", "all") else None,
        documents if extra in ("documents", "all") else None,
        12,
        0.125,
        0.1 if extra in ("dropout", "all") else 0.0,
    )
    out, lse = attention.attention_qkv_fwd(qkv, *options)
    attention_backward.attention_qkv_bwd(out, qkv, out, lse, *options)


def _decode(dim: int, dtype: torch.dtype) -> None:
    q, cache = torch.empty(32, 12, 1, dim, dtype=dtype), torch.empty(32, 12, 1024, dim, dtype=dtype)
    decode.decode_attention_fwd(q, cache, cache, torch.empty(32, dtype=torch.int64), 0.125)


def _few_rows(channels: int, dtype: torch.dtype) -> None:
    """A decoding step's launches for a layer of one row and of four: the head's, attention over a cache of one split,
    and the choice of a token, too."""
    rows, heads = few_rows.MAX_ROWS, channels // 64
    w, bias = torch.empty(4 * channels, channels, dtype=dtype), torch.empty(channels, dtype=dtype)
    for count in (1, rows):
        x = torch.empty(count, channels, dtype=dtype)
        few_rows.norm_linear(x, x, bias, bias, bias, 1e-5, w, w[:, 0].contiguous(), "tanh")
        few_rows.linear(torch.empty(count, 4 * channels, dtype=dtype), w.view(channels, -1), None)
        few_rows.linear(x, w, None, torch.float32)
    qkv = torch.empty(rows, 1, 3 * channels, dtype=dtype)
    cache, lengths = torch.empty(rows, heads, 256, 64, dtype=dtype), torch.empty(rows, dtype=torch.int64)
    decode.append(qkv, cache, cache, lengths)
    decode.decode_attention_fwd(cache[:, :, :1], cache, cache, lengths, 0.125)
    greedy.greedy(torch.empty(rows, 50257), torch.empty(rows, 1024, dtype=torch.int64), lengths, lengths)


def _cross_entropy(vocab: int, dtype: torch.dtype) -> None:
    buffer = torch.empty(2, -(-vocab // 64) * 64, dtype=dtype)
    targets, numbers = torch.empty(2, dtype=torch.int64), torch.empty(2)
    cross_entropy.cross_entropy_rows(buffer, vocab, targets, numbers, -100, 0.0, 0.0, numbers)


def _gelu_mlp(dtype: torch.dtype, tanh: bool) -> None:
    x, w_in, bias = (torch.empty(shape, dtype=dtype) for shape in ((64, 16), (3072, 16), (3072,)))
    y, pre, _ = mlp.gelu_mlp_fwd(x, w_in, bias, w_in.t(), None, tanh, False)
    mlp.gelu_mlp_bwd(y, x, w_in, w_in.t(), pre, pre[:0], tanh, [True, True, True, True, False])


def _linear_gelu(dtype: torch.dtype) -> None:
    x, w_in, w_out = (torch.empty(shape, dtype=dtype) for shape in ((4096, 768), (3072, 768), (768, 3072)))
    pre, bias = torch.empty(4096, 3072, dtype=dtype), torch.empty(3072, dtype=dtype)
    tiles = linear_gelu.candidate(dtype, linear_gelu.capability(x))
    linear_gelu.linear_gelu_fwd(x, w_in, bias, True, pre, pre, tiles)
    linear_gelu.linear_gelu_bwd(x, w_out, pre, True, pre, pre, False, tiles)


def _embedding(dtype: torch.dtype) -> None:
    token, position = torch.empty(50257, 768, dtype=dtype), torch.empty(1024, 768, dtype=dtype)
    ids, seed = torch.zeros(2, 1024, dtype=torch.int64), torch.empty(1, dtype=torch.int64)
    out = embedding.embedding_fwd(token, position, ids, None, seed, 0.1, dtype)
    embedding.embedding_bwd(out, ids, seed, 50257, 0.1, dtype)


def launches(call: Callable[[], object], capability: int) -> list[Launch]:
    """What `call` would launch on a card of this compute capability (90 is 9.0)."""
    noted = []

    def note(kernel, *args, grid, warmup, **kwargs):
        named = {**dict(zip(kernel.arg_names, args, strict=False)), **kwargs}
        arguments = {name: named.pop(name) for name in kernel.arg_names}
        noted.append(Launch(kernel, arguments, named))

    card = attention_tiles.Card(capability, SHARED_LIMIT[capability])
    with (
        mock.patch.object(JITFunction, "run", note),
        mock.patch.object(attention_tiles, "card_of", lambda tensor: card),
        mock.patch.object(decode, "card_of", lambda tensor: "any"),
        mock.patch.object(linear_gelu, "capability", lambda tensor: capability),
        mock.patch.object(linear_gelu, "multiprocessors", lambda tensor: 132),
        mock.patch.object(mlp, "multiprocessors", lambda tensor: 132),
    ):
        call()
    return noted


def compile_for(launch: Launch, capability: int) -> triton.compiler.CompiledKernel:
    """The kernel as Triton specialises it: the int 1 is a constant, multiples of 16 and tensors are marked as such."""
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        specialised = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1 and specialised):
            signature[parameter.name], constants[(index,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = _POINTERS[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and specialised:
                attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch.options)


def measure(case: str, launch: Launch, capability: int) -> Row:
    compiled = compile_for(launch, capability)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        usage = subprocess.run(
            [_tool("cuobjdump"), "--dump-resource-usage", cubin], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump's report is not understood: {usage}")
    registers, stack, local = map(int, found.groups())
    found = set(re.findall(r"wgmma\.mma_async|mma\.sync|tcgen05\.mma|tf32", compiled.asm["ptx"]))
    if "wgmma.mma_async" in found and any(loop.serialized for loop in _account(compiled).loops):
        found.add("serialized")
    name, shared = launch.kernel.__name__.strip("_"), compiled.metadata.shared
    return Row(name, case, capability, registers, stack + local, shared, " ".join(sorted(found)))


def _account(compiled: triton.compiler.CompiledKernel) -> account.Account:
    return account.of(compiled.asm["cubin"], _tool("nvdisasm"))


def rows(capabilities=CAPABILITIES, only: Callable[[str], bool] = lambda case: True) -> Iterator[Row]:
    for case, call in cases().items():
        for capability in capabilities:
            if only(case):
                for launch in launches(call, capability):
                    yield measure(case, launch, capability)


def committed(version: str = triton.__version__) -> list[Row]:
    """The rows of this Triton's table in results/; none if there is no such table."""
    path = RESULTS / f"compile-triton-{version}.txt"
    if not path.is_file():
        return []
    found = []
    for line in path.read_text(encoding="utf-8").splitlines()[2:]:
        capability, *numbers = map(int, line[56:93].split())
        matrix = line[93:].removesuffix("FAILS").strip()
        found.append(Row(line[:28].strip(), line[28:56].strip(), capability, *numbers, matrix))
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


def _tool(name: str) -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def accounts(capability: int = 90) -> Iterator[str]:
    """Lines of the instruction account of attention at heads of 64 and 128 (bench.account says what it counts)."""
    time = 1024
    header = "".join(f"{name:>7}" for name in account.SHOWN)
    yield f"{'kernel':24}{'D':>4}{'tile':>10}{'warps':>6}  loop  {'all':>5}{header}   clocks a turn: busiest units"
    for dim in (64, 128):
        backward = [0.0, 0.0]
        for launch in launches(lambda dim=dim: _attention(dim, torch.bfloat16), capability):
            name, warps = launch.kernel.__name__.strip("_"), launch.options["num_warps"]
            if "attention" not in name:
                continue
            counted = _account(compile_for(launch, capability))
            block_m, block_n = launch.arguments["BLOCK_M"], launch.arguments["BLOCK_N"]
            for kind, loop in zip(("whole", "masked"), account.ordered(counted), strict=True):
                numbers = "".join(f"{loop.counts.get(n, 0):7}" for n in account.SHOWN)
                busy = sorted(loop.clocks(warps).items(), key=lambda item: -item[1])[:6]
                units = ", ".join(f"{unit} {round(clocks)}" for unit, clocks in busy)
                tile = f"{block_m}x{block_n}"
                yield f"{name:24}{dim:4}{tile:>10}{warps:6}  {kind:6}{loop.instructions:5}{numbers}   {units}"
            clocks = account.clocks(name, counted, warps, time, block_m, block_n)
            if "fwd" in name:
                yield _limits(f"forward D {dim}", 4 * time * time * dim / 2, clocks)
            else:
                backward = [a + b for a, b in zip(backward, clocks, strict=True)]
        yield _limits(f"backward D {dim}", 10 * time * time * dim / 2, backward)


def _limits(what: str, flops: float, clocks) -> str:
    serial, overlapped = (account.teraflops(flops, c) for c in clocks)
    return f"{what}: T 1024 causal, at most {serial:.0f} TFLOP/s serial, {overlapped:.0f} overlapped"


def main(capabilities) -> int:
    """Print the table, and below it what is worse than in the committed one; 1 if a row does not pass or is worse."""
    print(f"Triton {triton.__version__}")
    print(f"{'kernel':28}{'case':28}{'cc':>5}{'registers':>11}{'spilled B':>11}{'shared B':>10}  matrix")
    failed, found = 0, []
    for row in rows(capabilities):
        found.append(row)
        failed += not row.passes
        mark = "" if row.passes else "  FAILS"
        numbers = f"{row.capability:5}{row.registers:11}{row.spilled:11}{row.shared:10}"
        print(f"{row.kernel:28}{row.case:28}{numbers}  {row.matrix}{mark}")
    table = committed()
    lines = list(worse(found, table)) if table else []
    for line in lines:
        print(line, file=sys.stderr)
    return int(failed > 0 or bool(lines))
