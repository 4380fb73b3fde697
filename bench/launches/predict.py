"""What a row's step should take on an H100, from its account and from how far each part was from its floor there.

A launch takes its floor over its part's share of the floor, and never less than the shortest launch. The shares are of
one profile, of fastgpt's own step in bfloat16 weights (PROFILE), so a row's prediction knows nothing of the row's own
time. What that profile has no launch of has its share from elsewhere (ELSEWHERE), or, where it goes over memory once,
the share of a pass over activations. Kernels of PyTorch that are slower than that, and a host that can't launch as
fast as the card runs, make a row slower than predicted: the prediction is of the card alone.
"""

import json
from pathlib import Path

from bench.launches.parts import CLIPPING, EMBEDDING, MATMULS, SUMS, UNALIGNED
from bench.launches.rows import Line

RATES = (763e12, 3.0e12)  # of that card, in the same sitting: bfloat16 flops and bytes a second
STEPS = Path(__file__).parent.parent / "results" / "nvidia-h100" / "2026-11-27-78e5e3d" / "steps.json"

# Whose launches are fewer since they were measured: blocks of a swapped model add their last sum inside the next norm.
# With the launches of then the prediction was 66.9, 145.0 and 68.1 ms.
CHANGED = ("nanoGPT, accelerate(loss=True)", "Hugging Face, accelerate", "Hugging Face, accelerate(loss=True)")

# Of fastgpt's other rows each moves GONE less since then, some 0.9 ms.

PROFILED = "fastgpt.GPT, bfloat16 weights"
PROFILE_WORDS = (
    "NVIDIA H100 80GB HBM3 (driver 580.159.04), PyTorch 2.11.0+cu130, Triton 3.6.0, cuDNN 9.19, commit 78e5e3d, with "
    "the embedding's backward mended: a profile of one step of fastgpt.GPT, GPT-2 124M, B 32, T 1024, bfloat16 weights "
    "and a fused AdamW without clipping"
)
PROFILE = {  # ms of the 58.3 of that step
    MATMULS: 35.3,
    "attention, backward": 6.9,
    "cross entropy": 2.86,
    "GELU, backward": 2.56,
    "attention, forward": 2.40,
    "LayerNorms, backward": 1.73,
    "LayerNorms, forward": 1.67,
    "GELU, forward": 1.67,
    SUMS: 1.20,
    "AdamW": 0.84,
    EMBEDDING: 0.40,  # not in the table: what its rows leave of the 58.3
}
GONE = {SUMS: 12 * 2 * 32768 * 2304}  # bytes that it moved and the account does not: dqkv, read for its columns' sums
OTHERS, OTHER_LAUNCHES = 0.77, 217  # everything else: memsets, copies and casts
SHORTEST = 1e-3 * OTHERS / OTHER_LAUNCHES

ELSEWHERE = {
    # An H200 at commit e24dcd79b: the head's three products over 50257 columns, 61.5 ms at a roof of 811 TFLOP/s.
    UNALIGNED: (3 * 2 * 32768 * 768 * 50257 / 61.5e-3) / 811e12,
    # cuDNN's attention, B 32, H 12, T 1024, D 64: forward on the same H100, backward by what it took of fastgpt's on
    # the H200.
    "_scaled_dot_product_cudnn_attention": 336e12 / RATES[0],
    "_scaled_dot_product_cudnn_attention_backward": (516 / 526, "attention, backward"),
}
PASS = "GELU, forward"  # whose share is that of any pass over memory


def shares(profiled: list[Line]) -> dict[str, float]:
    """Of its floor that each part of the profile reached."""
    floors = {part: count / RATES[1] for part, count in GONE.items()}
    for line in profiled:
        floors[line.part] = floors.get(line.part, 0.0) + line.floor(RATES)
    return {part: 1e3 * floors[part] / ms for part, ms in PROFILE.items()}


def share_of(line: Line, known: dict[str, float]) -> float:
    found = ELSEWHERE.get(line.name, ELSEWHERE.get(line.part))
    if isinstance(found, tuple):
        return found[0] * known[found[1]]
    return found or known.get(line.part, known[PASS])


def seconds(lines: list[Line], known: dict[str, float]) -> float:
    return sum(max(line.floor(RATES) / share_of(line, known), line.launches * SHORTEST) for line in lines)


def without_clipping(lines: list[Line]) -> list[Line]:
    return [line for line in lines if line.part != CLIPPING]


def measured() -> dict[str, dict[str, float]]:
    """Seconds of the rows that were measured on the H100, by the account that they are rows of."""
    found: dict[str, dict[str, float]] = {}
    for row in json.loads(STEPS.read_text())["rows"]:
        if row["median"] is not None and "compiled" not in row["what"]:
            account = row["what"].replace(", one CUDA graph", "")
            found.setdefault(account, {})[row["what"]] = row["median"]
    return found
