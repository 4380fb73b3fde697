"""Flops and bytes that each operation cannot do without, from its shapes: the one place where the benchmarks count.

A product of (m, k) and (k, n) is 2 m n k flops. Bytes are each input read once and each output written once; what a
forward saves for its backward is an output of the forward. `e` is the bytes of an element, `M` = B T the rows.
The larger of flops / rate and bytes / bandwidth is the floor: nothing that does the same work runs faster.

`python -m bench bytes` prints the floor of every part of a training step, as fastgpt launches it, and their sum: a
step's kernels do not overlap, so floors add up.
"""

import argparse
import dataclasses
from typing import NamedTuple

from fastgpt.model import PRESETS, GPTConfig


@dataclasses.dataclass(frozen=True)
class Work:
    flops: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    def floor(self, flops_a_second: float, bytes_a_second: float) -> float:
        """Seconds."""
        return max(self.flops / flops_a_second, self.bytes / bytes_a_second)

    def bound(self, flops_a_second: float, bytes_a_second: float) -> str:
        return "flops" if self.flops / flops_a_second > self.bytes / bytes_a_second else "bytes"


def matmul(m: int, n: int, k: int, e: int) -> Work:
    return Work(2 * m * n * k, (m * k + k * n + m * n) * e)


def attention_fwd(B: int, H: int, T: int, D: int, e: int) -> Work:
    """Two products of T² D, half of each below the diagonal; q, k, v in, o and a float32 a row out."""
    return Work(4 * B * H * T * T * D / 2, 4 * B * H * T * D * e + 4 * B * H * T)


def attention_bwd(B: int, H: int, T: int, D: int, e: int) -> Work:
    """Five such products (the two that fastgpt makes twice are not counted twice); q, k, v, o, do in, three out."""
    return Work(10 * B * H * T * T * D / 2, 8 * B * H * T * D * e + 4 * B * H * T)


def decode_attention(B: int, H: int, T: int, D: int, e: int) -> Work:
    """One new token a row over T filled slots: the caches are read once, q and o are a slot each."""
    return Work(4 * B * H * T * D, (2 * B * H * T * D + 2 * B * H * D) * e)


def layer_norm_fwd(M: int, C: int, e: int) -> Work:
    return Work(0, 2 * M * C * e + 12 * M)


def layer_norm_bwd(M: int, C: int, e: int) -> Work:
    return Work(0, 3 * M * C * e + 12 * M)


def add_layer_norm_fwd(M: int, C: int, e: int) -> Work:
    """x and the residual in, the norm and the new residual out; three float32 statistics a row."""
    return Work(0, 4 * M * C * e + 12 * M)


def add_layer_norm_bwd(M: int, C: int, e: int) -> Work:
    """Both outputs' gradients and the saved sum in; one gradient out, for it is x's and the residual's alike."""
    return Work(0, 4 * M * C * e + 12 * M)


def gelu_fwd(M: int, F: int, e: int) -> Work:
    """As a pass of its own: the pre-activation in, the activation out."""
    return Work(0, 2 * M * F * e)


def gelu_bwd(M: int, F: int, e: int) -> Work:
    return Work(0, 3 * M * F * e)


def linear_gelu(M: int, C: int, F: int, e: int) -> Work:
    """The first half of the MLP's forward in one kernel: a product whose epilogue writes both activations."""
    return matmul(M, F, C, e) + Work(0, M * F * e)


def dgrad_dgelu(M: int, C: int, F: int, e: int) -> Work:
    """The backward's counterpart: dy w_out, times the derivative at the pre-activation, which it reads."""
    return matmul(M, F, C, e) + Work(0, M * F * e)


def gelu_mlp_fwd(M: int, C: int, F: int, e: int) -> Work:
    return Work(4 * M * C * F, 2 * (M * C + C * F + M * F) * e)


def gelu_mlp_bwd(M: int, C: int, F: int, e: int) -> Work:
    """Four products; x, dy, both weights, pre and act in, three gradients out. What lies between is not counted."""
    return Work(8 * M * C * F, (3 * M * C + 4 * C * F + 2 * M * F) * e)


def linear_cross_entropy(M: int, C: int, V: int, e: int) -> Work:
    """Forward and backward; logits need not reach memory. The weight's gradient is float32 while it is summed."""
    return Work(6 * M * C * V, 2 * M * C * e + V * C * (e + 4))


def cross_entropy_pass(M: int, V: int, e: int) -> Work:
    """Over logits that are in memory: read once, overwritten by their gradient."""
    return Work(0, 2 * M * V * e)


def embedding_fwd(M: int, T: int, C: int, e: int) -> Work:
    return Work(0, (2 * M + T) * C * e + 8 * M)


def embedding_bwd(M: int, T: int, C: int, V: int, e: int) -> Work:
    """The gradients are dense: the whole (V, C) is written."""
    return Work(0, (M + V + T) * C * e + 8 * M)


def adamw(parameters: int, bytes_a_parameter: int) -> Work:
    return Work(0, parameters * bytes_a_parameter)


ADAMW_BYTES = {"bf16": 14, "master": 30}
"""Bytes a parameter. bf16: parameter, gradient and both moments in bfloat16, 8 read and 6 written. master: a float32
gradient, float32 parameter and moments, and a bfloat16 copy of the parameter, 16 read and 14 written."""


class Line(NamedTuple):
    part: str
    kind: str  # "matmul", "attention_fwd", "attention_bwd" or "memory": which rate bounds its flops
    times: int
    work: Work  # of one


def parameters(config: GPTConfig) -> int:
    C, F = config.n_embd, config.n_inner or 4 * config.n_embd
    block = 4 * C * C + 2 * C * F + (9 * C + F if config.bias else 2 * C)
    return (config.vocab_size + config.block_size) * C + config.n_layer * block + (2 if config.bias else 1) * C


def kept_activations(config: GPTConfig, rows: int, e: int) -> int:
    """Bytes that `rows` tokens keep from the layers' forward for their backward, as fastgpt.model.Block's docstring
    counts them; statistics are not."""
    C, F = config.n_embd, config.n_inner or 4 * config.n_embd
    wide = {"off": 8 * C + 2 * F, "mlp": 8 * C + F, "block": 2 * C}[config.activation_checkpointing]
    return config.n_layer * wide * rows * e


def train_step(
    config: GPTConfig,
    batch: int,
    time: int,
    e: int = 2,
    adamw_bytes: int = ADAMW_BYTES["bf16"],
    gradient_bytes: int | None = None,
) -> list[Line]:
    """What one training step launches, in Lines: activations, weights and their gradients of `e` bytes, no dropout.
    gradient_bytes: of a gradient that the norm reads, `e` if None; clipping is a factor of AdamW's own pass."""
    B, T, C, H, L = batch, time, config.n_embd, config.n_head, config.n_layer
    M, F, V, D = B * T, config.n_inner or 4 * C, config.vocab_size, C // H
    chunks = 12 if M >= 768 else -(-M // 256)  # of the head; each reads the weight and adds to its float32 gradient
    rows = M / chunks
    bias_grads = [Line("qkv bias gradient", "memory", L, Work(0, 3 * M * C * e))] if config.bias else []
    return [
        Line("qkv projection, forward and two gradients", "matmul", 3 * L, matmul(M, 3 * C, C, e)),
        Line("attention projection, the same", "matmul", 3 * L, matmul(M, C, C, e)),
        Line("MLP's first linear, the same", "matmul", 3 * L, matmul(M, F, C, e)),
        Line("MLP's second linear, the same", "matmul", 3 * L, matmul(M, C, F, e)),
        Line("head: logits and dx, a chunk", "matmul", 2 * chunks, matmul(rows, V, C, e)),
        Line("head: dweight, a chunk", "matmul", chunks, matmul(rows, V, C, e) + Work(0, V * C * (8 - e))),
        Line("attention, forward", "attention_fwd", L, attention_fwd(B, H, T, D, e)),
        Line("attention, backward", "attention_bwd", L, attention_bwd(B, H, T, D, e)),
        Line("embedding, forward", "memory", 1, embedding_fwd(M, T, C, e)),
        Line("embedding, backward", "memory", 1, embedding_bwd(M, T, C, V, e)),
        Line("first LayerNorm, forward", "memory", 1, layer_norm_fwd(M, C, e)),
        Line("first LayerNorm, backward", "memory", 1, layer_norm_bwd(M, C, e)),
        Line("add + LayerNorm, forward", "memory", 2 * L, add_layer_norm_fwd(M, C, e)),
        Line("add + LayerNorm, backward", "memory", 2 * L, add_layer_norm_bwd(M, C, e)),
        Line("GELU, forward", "memory", L, gelu_fwd(M, F, e)),
        Line("GELU, backward", "memory", L, gelu_bwd(M, F, e)),
        Line("cross entropy over the logits", "memory", 1, cross_entropy_pass(M, V, e)),
        *bias_grads,
        Line("gradient norm", "memory", 1, Work(0, parameters(config) * (gradient_bytes or e))),
        Line("AdamW", "memory", 1, adamw(parameters(config), adamw_bytes)),
    ]


def forward(config: GPTConfig, batch: int, time: int, e: int) -> Work:
    """The logits of every position."""
    B, T, C, H, L = batch, time, config.n_embd, config.n_head, config.n_layer
    M, F, V, D = B * T, config.n_inner or 4 * C, config.vocab_size, C // H
    layer = matmul(M, 3 * C, C, e) + matmul(M, C, C, e) + matmul(M, F, C, e) + matmul(M, C, F, e)
    layer += attention_fwd(B, H, T, D, e) + gelu_fwd(M, F, e) + add_layer_norm_fwd(M, C, e)
    layer += add_layer_norm_fwd(M, C, e)
    rest = embedding_fwd(M, T, C, e) + layer_norm_fwd(M, C, e) + matmul(M, V, C, e)
    return Work(L * layer.flops, L * layer.bytes) + rest


def generation(config: GPTConfig, batch: int, prompt: int, new: int, e: int) -> Work:
    """`new` tokens a row with a cache: the prompt in one pass, then every weight once a token, and the filled slots."""
    C, L, V = config.n_embd, config.n_layer, config.vocab_size
    weights = parameters(config) - config.block_size * C  # the embedding is the head
    linears = weights - V * C
    slots = sum(range(prompt, prompt + new - 1))  # what the single steps read
    flops = 2 * batch * (linears * (prompt + new - 1) + V * C * new) + 4 * batch * L * C * (prompt**2 / 2 + slots)
    return Work(flops, (new * weights + 2 * batch * L * C * slots) * e)


class Card(NamedTuple):
    label: str
    bytes: float
    flops: dict[str, float]  # by Line.kind


# None of these was measured here; python -m bench roofs measures the machine at hand.
CARDS = {
    "h100-sheet": Card(
        "H100 SXM, NVIDIA's data sheet: 989 TFLOP/s dense bf16, 3.35 TB/s",
        3.35e12,
        dict.fromkeys(("matmul", "attention_fwd", "attention_bwd", "memory"), 989e12),
    ),
    "h100": Card(
        "H100 SXM, as others published it: cuBLAS 600 TFLOP/s at GPT-2's widths, a copy 3.0 TB/s, causal attention of "
        "64-wide heads at T = 1024 291 TFLOP/s forward and 250 (an aim) backward",
        3.0e12,
        {"matmul": 600e12, "attention_fwd": 291e12, "attention_bwd": 250e12, "memory": 600e12},
    ),
    "h100-800": Card(
        "as h100, with matmuls at 800 TFLOP/s, which nobody has published at these widths",
        3.0e12,
        {"matmul": 800e12, "attention_fwd": 291e12, "attention_bwd": 250e12, "memory": 800e12},
    ),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", choices=PRESETS, default="gpt2-124M")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--time", type=int, help="tokens a row; the context if not given")
    parser.add_argument("--vocab-size", type=int, help="50304 pads GPT-2's 50257")
    parser.add_argument("--card", choices=CARDS, default="h100")
    parser.add_argument("--optimizer", choices=ADAMW_BYTES, default="bf16")


def main(options: argparse.Namespace) -> int:
    """Flops, bytes and floor of every part of a training step."""
    changes = {} if options.vocab_size is None else {"vocab_size": options.vocab_size}
    config = GPTConfig.preset(options.preset, **changes)
    time = options.time or config.block_size
    if options.batch < 1 or not 1 <= time <= config.block_size:
        raise ValueError(f"bytes: batch {options.batch} and time {time}: at least 1, and at most {config.block_size}")
    lines = train_step(config, options.batch, time, adamw_bytes=ADAMW_BYTES[options.optimizer])
    print(table(lines, CARDS[options.card], options.batch * time, parameters(config)))
    return 0


def table(lines: list[Line], card: Card, tokens: int, parameters: int) -> str:
    header = f"{'part':44}{'times':>6}{'GFLOP':>10}{'MB':>9}{'floor µs':>10}{'total ms':>10}  bound"
    text = [f"{tokens:,} tokens, {parameters:,} parameters", f"floors on {card.label}", "", header]
    totals: dict[str, tuple[Work, float]] = {}
    for part, kind, times, work in lines:
        rates = card.flops[kind], card.bytes
        seconds = times * work.floor(*rates)
        total, spent = totals.get(kind, (Work(), 0.0))
        totals[kind] = total + Work(times * work.flops, times * work.bytes), spent + seconds
        numbers = f"{work.flops / 1e9:10.1f}{work.bytes / 1e6:9.1f}{1e6 * seconds / times:10.1f}{1e3 * seconds:10.2f}"
        text.append(f"{part:44}{times:6}{numbers}  {work.bound(*rates)}")
    text.append("")
    for kind, (total, spent) in totals.items():
        text.append(f"{kind:16}{total.flops / 1e12:9.2f} TFLOP {total.bytes / 1e9:8.2f} GB {1e3 * spent:9.2f} ms")
    step = sum(spent for _, spent in totals.values())
    text.append(f"{'step':16}{1e3 * step:.1f} ms, {tokens / step:,.0f} tokens/s")
    gelu = sum(line.times * line.work.floor(card.flops["memory"], card.bytes) for line in lines if "GELU" in line.part)
    text.append(
        f"of which {1e3 * gelu:.1f} ms are the two passes between the MLP's matmuls, which epilogues that overlap with "
        f"them would save: {1e3 * (totals['memory'][1] - gelu):.1f} ms of memory-bound work would be left"
    )
    return "\n".join(text)
