"""Where one training step's time goes: kernels by name and by part, each part's share, and its floor beside it.

On a GPU the rows are its kernels; elsewhere they are operators, by their own CPU time.
"""

import argparse
import json
import re
from pathlib import Path
from typing import NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from bench import models, work
from bench.case import SUBJECT
from bench.machine import Machine, header, measure_roofs
from fastgpt.model import PRESETS, GPTConfig

# A part: what its kernels' and operators' names look like, and the lines of work.train_step that are its floor. The
# first that matches takes a kernel.
PARTS = (
    (
        "attention, forward",
        r"attention_fwd|attention_qkv_fwd|dot_product\w*attention(?!\w*backward)",
        r"attention, forward",
    ),
    (
        "attention, backward",
        r"attention_(dq|dkdv)|attention(_qkv)?_bwd|poison_kernel|spans_kernel|dot_product\w*backward",
        r"attention, backward",
    ),
    ("LayerNorms, forward", r"layer_norm_fwd|native_layer_norm(?!_backward)", r"LayerNorm, forward"),
    ("LayerNorms, backward", r"layer_norm_(bwd|sums|backward)", r"LayerNorm, backward"),
    ("GELU, forward", r"(?<!linear_)gelu_fwd|gelu_mlp_fwd|aten::(gelu|addcmul|sigmoid_?)$", r"GELU, forward"),
    ("GELU, backward", r"(?<!linear_)gelu_bwd|gelu_mlp_bwd|(gelu|sigmoid)_backward", r"GELU, backward"),
    ("cross entropy", r"cross_entropy|chunked_losses", r"cross entropy"),
    ("AdamW", r"(?i)adam", r"AdamW"),
    ("embedding", r"(?i)embedding|run_sums|join_runs|index_select|gather|sort", r"embedding"),
    ("matmuls", r"(?i)gemm|nvjet|cutlass|cublas|aten::(add)?mm\b|splitK", r"projection|linear|head"),
    ("bias gradients and other sums", r"(?i)reduce|aten::sum", r"bias gradient"),
    ("everything else", r"", r"$^"),
)


class Kernel(NamedTuple):
    name: str
    part: str
    calls: int
    seconds: float


def kernels(machine: Machine, call) -> list[Kernel]:
    """What one call ran, the longest first."""
    on_device = machine.kind == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_device else [])]
    with torch.profiler.profile(activities=activities) as profile:
        call()
        if machine.kind != "cpu":
            machine.cuda.synchronize()
    wanted = DeviceType.CUDA if on_device else DeviceType.CPU
    found = []
    for event in profile.key_averages():
        seconds = (event.self_device_time_total if on_device else event.self_cpu_time_total) / 1e6
        if event.device_type == wanted and seconds > 0 and not event.is_user_annotation:  # spans over kernels
            found.append(Kernel(event.key, part_of(event.key), event.count, seconds))
    return sorted(found, key=lambda kernel: -kernel.seconds)


def part_of(kernel: str) -> str:
    return next(part for part, pattern, _ in PARTS if re.search(pattern, kernel))


def by_part(found: list[Kernel], lines: list[work.Line], roofs: dict[str, float]) -> list[dict]:
    """For each part its kernels' time, its share of all, and its floor on these roofs."""
    rates = roofs["flops_a_second"], roofs["bytes_a_second"]
    total = sum(kernel.seconds for kernel in found)
    rows = []
    for part, _, pattern in PARTS:
        mine = [kernel for kernel in found if kernel.part == part]
        seconds = sum(kernel.seconds for kernel in mine)
        floor = sum(line.times * line.work.floor(*rates) for line in lines if re.search(pattern, line.part))
        calls = sum(kernel.calls for kernel in mine)
        rows.append({"part": part, "calls": calls, "seconds": seconds, "share": seconds / total, "floor": floor})
    return rows


def table(rows: list[dict], found: list[Kernel]) -> str:
    text = [f"{'part':32}{'calls':>7}{'ms':>10}{'share':>8}{'floor ms':>10}{'of floor':>10}"]
    for row in rows:
        ratio = f"{row['floor'] / row['seconds']:10.0%}" if row["seconds"] and row["floor"] else f"{'':10}"
        numbers = f"{row['calls']:7}{1e3 * row['seconds']:10.3f}{row['share']:8.1%}{1e3 * row['floor']:10.3f}"
        text.append(f"{row['part']:32}{numbers}{ratio}")
    text.append("")
    text += [f"{1e3 * k.seconds:10.3f} ms {k.calls:5} x  {k.part:24} {k.name[:90]}" for k in found[:30]]
    return "\n".join(text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", choices=PRESETS, default="gpt2-124M")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--time", type=int, default=1024)
    parser.add_argument("--out", type=Path, default=Path("out/profile.json"))
    parser.add_argument("--dry-run", action="store_true", help="a tiny model in Triton's interpreter")


def main(options: argparse.Namespace) -> int:
    """Profile a training step of fastgpt after three that warm it up."""
    machine = Machine.of("dry" if options.dry_run else None)
    tiny = dict(vocab_size=65, block_size=16, n_layer=1, n_head=2, n_embd=32)
    shape, batch, time = (tiny, 1, 8) if options.dry_run else (PRESETS[options.preset], options.batch, options.time)
    roofs = measure_roofs(machine)
    (case,) = models.train_step(machine, batch, time, shape, tier=0)
    with machine.clock.session():
        subject = case.variants[SUBJECT](case.problem())
        for _ in range(1 if options.dry_run else 3):
            subject.run()
        found = kernels(machine, subject.run)
        seconds = machine.clock.sample(subject.run)
    e = machine.dtype.itemsize
    rows = by_part(found, work.train_step(GPTConfig(**shape), batch, time, e, adamw_bytes=7 * e), roofs)
    print(f"{case.name} on {machine.name}: {1e3 * seconds:.2f} ms a step, {batch * time / seconds:,.0f} tokens/s")
    print(table(rows, found))
    facts = header(machine) | {"roofs": roofs}
    record = {"machine": facts, "case": case.name, "seconds": seconds, "parts": rows}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    record["kernels"] = [kernel._asdict() for kernel in found]
    options.out.write_text(json.dumps(record, indent=1) + "\n")
    return 0
