"""What a training step would take on many GPUs, on paper: time, memory and what bounds it, for DDP, FSDP2 and HSDP.

    python -m bench plan --preset gpt2-1558M --gpus 64
    python -m bench plan --batch 32 --tokens 1e10 --price 3     a whole run: its hours, and its money
    python -m bench sent                                    what two processes here send and hold, against the same
    python -m bench plan --check                            the same arithmetic against every committed training step

The step's kernels are those of bench.work, each at its floor on the card's rates; what the processes send each other is
counted in bytes over the slower of two links. Nothing here was measured on many GPUs. The assumptions are printed.
"""

import argparse
import dataclasses
from typing import NamedTuple

from bench import work
from bench.case import SUBJECT
from bench.report import RESULTS, Report, runs
from bench.work import CARDS, Card, Line
from fastgpt.model import PRESETS, GPTConfig

BUCKET = 25 * 2**20  # bytes: of DDP's gradients that go together


class Cluster(NamedTuple):
    gpus: int
    per_node: int = 8
    nvlink: float = 450e9  # bytes a second that a GPU sends inside its node: half of NVLink 4's 900 GB/s both ways
    network: float = 50e9  # bytes a second that a GPU sends to other nodes: one 400 Gb/s adapter each
    reached: float = 0.8  # of a link, by NCCL

    def collective(self, bytes_: float, among: int | None = None) -> float:
        """Seconds of a reduce-scatter or all-gather of so many bytes in all, among so many neighbours, or all:
        (n - 1) / n of them pass every GPU's link; between nodes all adapters of a node work at once."""
        n = self.gpus if among is None else among
        link = self.nvlink if n <= self.per_node else min(self.nvlink, self.network * self.per_node)
        return bytes_ * (n - 1) / n / (link * self.reached)

    def across(self, bytes_: float, among: int) -> float:
        """Seconds of an all-reduce among the GPUs of one place in `among` neighbourhoods: each over its own adapter."""
        copies = self.gpus // among
        link = self.nvlink if self.gpus <= self.per_node else min(self.nvlink, self.network)
        return 2 * bytes_ * (copies - 1) / copies / (link * self.reached)


class Layout(NamedTuple):
    """How weights, gradients and moments lie: in `shards` neighbours a part each, and the same in all other such."""

    name: str
    shards: int = 1
    reshards: bool = False  # let go of a layer's weights after its forward

    def sent(self, parameters: int, gpus: int, weights: int, gathered: int) -> dict[str, float]:
        """Bytes that each GPU sends in a step, by kind. gathered: bytes of a weight as it is gathered."""
        passed, copies = (self.shards - 1) / self.shards, gpus // self.shards
        return {
            "all-gather": (2 if self.reshards else 1) * parameters * gathered * passed,
            "reduce-scatter": parameters * weights * passed,
            "all-reduce": 2 * parameters * weights / self.shards * (copies - 1) / copies,
        }

    def held(self, parameters: int, weights: int) -> float:
        """Bytes of weights, gradients and both moments in each GPU, between steps."""
        return 4 * parameters * weights / self.shards


DDP = Layout("DDP")


def layouts(cluster: Cluster) -> list[Layout]:
    """Those that `fastgpt train` has: with a node's GPUs as neighbours where there are several nodes."""
    found = [DDP, Layout("FSDP2", cluster.gpus)]
    if cluster.gpus > cluster.per_node and cluster.gpus % cluster.per_node == 0:
        found.append(Layout("HSDP", cluster.per_node))
        found.append(Layout("HSDP, resharded", cluster.per_node, True))
    return found


class Plan(NamedTuple):
    forward: float  # seconds, as the next
    backward: float
    optimizer: float
    exposed: float  # of communication, that no computation hides
    sent: float  # seconds of communication in all
    memory: float  # bytes a device, at the peak of a step
    matmul_share: float  # of the computation's time
    tokens: int  # of all devices together

    @property
    def step(self) -> float:
        return self.forward + self.backward + self.optimizer + self.exposed

    @property
    def bottleneck(self) -> str:
        """What a step waits for most: "communication", "matmuls", or "memory" and all else that kernels do."""
        if self.exposed > 0.2 * self.step:
            return "communication"
        return "matmuls" if self.matmul_share > 0.5 else "memory"


def plan(
    config: GPTConfig, batch: int, time: int, card: Card, cluster: Cluster, layout: Layout, weights: int = 4
) -> Plan:
    """batch: rows a device. weights: bytes of a weight, its gradient and each moment; activations are of 2 if that is 4
    on a GPU, for autocast makes them so."""
    e = min(weights, 2)
    lines = work.train_step(config, batch, time, e, adamw_bytes=7 * weights, gradient_bytes=weights)
    optimizer = sum(_seconds(line, card) for line in lines if _in_the_optimizer(line))
    compute = [line for line in lines if not _in_the_optimizer(line)]
    parameters, n = work.parameters(config), cluster.gpus
    cast = parameters * (weights + e) / card.bytes if e != weights else 0.0  # of weights, then of their gradients
    forwards = [(line, _forward_share(line) * _seconds(line, card)) for line in compute]
    repeated = [(line, seconds) for line, seconds in forwards if _computed_again(line, config)]
    forward = cast + sum(seconds for _, seconds in forwards)
    whole = sum(_seconds(line, card) for line in compute)
    backward = 2 * cast + whole - forward + sum(seconds for _, seconds in repeated)
    matmuls = sum(_seconds(line, card) for line in compute if line.kind == "matmul")
    matmuls += sum(seconds for line, seconds in repeated if line.kind == "matmul")
    root = (config.vocab_size + config.block_size + 2) * config.n_embd  # numbers in embeddings and the last norm
    if layout.shards > 1:  # its root and the first block are gathered before anything runs, the root's gradient is last

        def gathered(numbers: float) -> float:
            return cluster.collective(numbers * e, layout.shards)

        def reduced(numbers: float) -> float:
            bytes_ = numbers * weights
            return cluster.collective(bytes_, layout.shards) + cluster.across(bytes_ / layout.shards, layout.shards)

        first, last = gathered(root + (parameters - root) / config.n_layer), reduced(root)
        again = gathered(parameters - root) if layout.reshards else 0.0
        exposed = first + max(0.0, gathered(parameters) - first - forward)
        exposed += last + max(0.0, again + reduced(parameters) - last - backward)
        sent = gathered(parameters) + again + reduced(parameters)
        optimizer /= layout.shards
    else:  # the embedding's gradient is the last, and no bucket is smaller than a gradient
        last, sent = 2 * cluster.collective(max(BUCKET, root * weights)), 2 * cluster.collective(parameters * weights)
        exposed = last + max(0.0, sent - last - backward)
    memory = step_memory(config, batch, time, weights, e, n, layout)
    return Plan(forward, backward, optimizer, exposed, sent, memory, matmuls / (forward + backward), batch * time * n)


def hours(each: Plan, tokens: float) -> float:
    """Of a run of so many tokens, evaluations and checkpoints not counted."""
    return tokens / each.tokens * each.step / 3600


def _seconds(line: Line, card: Card) -> float:
    return line.times * line.work.floor(card.flops[line.kind], card.bytes)


def _in_the_optimizer(line: Line) -> bool:
    return line.part in ("AdamW", "gradient norm")


def _forward_share(line: Line) -> float:
    """A linear layer's three products are one forward and two backward; the head makes all of its in the forward."""
    if "forward and two gradients" in line.part or line.part.endswith("the same"):
        return 1 / 3
    return 0.0 if "backward" in line.part or "bias gradient" in line.part else 1.0


def _computed_again(line: Line, config: GPTConfig) -> bool:
    """Whether activation checkpointing makes the backward do a line's forward once more."""
    once = ("head", "first LayerNorm", "embedding", "cross entropy")
    in_a_block = not any(part in line.part for part in once)
    kind = config.activation_checkpointing
    return (kind == "block" and in_a_block) or (kind == "mlp" and line.part == "GELU, forward")


def step_memory(
    config: GPTConfig, batch: int, time: int, weights: int, e: int, gpus: int = 1, layout: Layout = DDP
) -> float:
    """Bytes at a step's peak on one of so many devices, weights, gradients and both moments included. weights: bytes of
    each of those numbers; e: of an activation's."""
    kept = work.parameters(config) * weights
    held = 3 * kept  # weights and two moments
    if layout.shards > 1:  # a share of each, and the weights that are computed with: of all layers, or of two
        held /= layout.shards
        layer = (work.parameters(config) - config.n_embd * config.vocab_size) / config.n_layer
        numbers = work.parameters(config) - (config.n_layer - 2) * layer if layout.reshards else work.parameters(config)
        return held + numbers * e + call_memory(config, batch, time, weights, e, kept / layout.shards)
    if e != weights:
        held += work.parameters(config) * e  # autocast's copy
    if gpus > 1:  # DDP's buckets are the gradients, and stay
        return held + kept + call_memory(config, batch, time, weights, e, 0.0)
    return held + call_memory(config, batch, time, weights, e)


def call_memory(
    config: GPTConfig, batch: int, time: int, weights: int, e: int, gradients: float | None = None
) -> float:
    """Bytes at the peak of a step beyond what it had before: after the forward, or once all gradients are there.
    gradients: bytes that these take then; if None those of all parameters."""
    rows, V, C = batch * time, config.vocab_size, config.n_embd
    gradients = work.parameters(config) * weights if gradients is None else gradients
    activations = work.kept_activations(config, rows, e)
    head = V * C * weights  # its gradient, which the forward makes; a tied embedding adds one more of this size
    widest = rows * (config.n_inner or 4 * C) * e  # of the gradients inside a layer
    if config.activation_checkpointing == "block":  # one block is whole again
        widest += work.kept_activations(dataclasses.replace(config, n_layer=1, activation_checkpointing="off"), rows, e)
    return max(activations + head, gradients + (head if config.tie else 0)) + widest


class Checked(NamedTuple):
    """A committed training step of fastgpt's, and what this arithmetic says of it."""

    run: str
    case: str
    floor: float
    measured: float
    memory: float  # bytes of a call
    measured_memory: int

    @property
    def holds(self) -> bool:
        """Nothing can be faster than its floor, and the peak is what was counted, to a seventh."""
        return self.floor <= self.measured and abs(self.memory / self.measured_memory - 1) <= 0.15


def check(results=RESULTS) -> list[Checked]:
    """Every committed training step of fastgpt's own model in the operands' dtype."""
    found = []
    for device in sorted(path for path in results.iterdir() if path.is_dir()):
        for file, report in runs(device):
            found += _checked(f"{device.name}, {file.parent.name}", report)
    return found


def _checked(name: str, report: Report) -> list[Checked]:
    rates = report.machine["roofs"]
    card = Card("measured", rates["bytes_a_second"], dict.fromkeys(CARDS["h100"].flops, rates["flops_a_second"]))
    e = {"float32": 4, "bfloat16": 2}[report.machine["dtype"]]
    found = []
    for row in report.rows:
        if row.op != "training step" or row.variant != SUBJECT or row.median is None:
            continue
        config = _config(row.shape)
        lines = work.train_step(config, row.shape["B"], row.shape["T"], e, adamw_bytes=7 * e)
        floor = sum(_seconds(line, card) for line in lines if line.part != "gradient norm")  # it does not clip
        memory = call_memory(config, row.shape["B"], row.shape["T"], e, e)
        found.append(Checked(name, row.case, floor, row.median, memory, row.peak_bytes))
    return found


def _config(shape: dict) -> GPTConfig:
    """Of the model that a row's shape names; the benchmark's shallow ones have 124M's width and 4096 tokens to know."""
    for preset in PRESETS:
        config = GPTConfig.preset(preset)
        if (config.n_layer, config.n_embd) == (shape["L"], shape["C"]):
            return config
    return GPTConfig.preset("gpt2-124M", n_layer=shape["L"], vocab_size=4096)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", choices=PRESETS, default="gpt2-124M")
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--per-node", type=int, default=8)
    parser.add_argument("--batch", type=int, default=8, help="rows a device")
    parser.add_argument("--time", type=int, help="tokens a row; the context if not given")
    parser.add_argument("--card", choices=CARDS, default="h100")
    parser.add_argument("--nvlink", type=float, default=450, help="GB/s that a GPU sends inside a node")
    parser.add_argument("--network", type=float, default=50, help="GB/s that a GPU sends to other nodes")
    parser.add_argument("--reached", type=float, default=0.8, help="the share of a link that collectives reach")
    parser.add_argument("--memory", type=float, default=80, help="GB of a device")
    parser.add_argument("--checkpointing", choices=("off", "mlp", "block"), default="off")
    parser.add_argument("--tokens", type=float, help="of a whole run, whose hours are told")
    parser.add_argument("--price", type=float, help="of a GPU for an hour, for the run's money")
    parser.add_argument("--check", action="store_true", help="against every committed training step instead")


def main(options: argparse.Namespace) -> int:
    """1 if no way has room in the device's memory, or a measurement contradicts the arithmetic."""
    if options.check:
        found = check()
        print(check_table(found))
        return int(not all(each.holds for each in found))
    config = GPTConfig.preset(options.preset, activation_checkpointing=options.checkpointing)
    time = options.time or config.block_size
    for name in ("gpus", "per_node", "batch"):
        if getattr(options, name) < 1:
            raise ValueError(f"plan: {name} is {getattr(options, name)}, not at least 1")
    if not 1 <= time <= config.block_size:
        raise ValueError(f"plan: time is {time}, not from 1 to the context of {config.block_size}")
    if not (options.nvlink > 0 and options.network > 0 and 0 < options.reached <= 1 and options.memory > 0):
        raise ValueError("plan: links and memory are above 0, and what is reached of a link lies in (0, 1]")
    if options.price is not None and options.tokens is None:
        raise ValueError("plan: a price is of a run, whose --tokens are missing")
    for name in ("tokens", "price"):
        if (value := getattr(options, name)) is not None and not 0 < value < float("inf"):
            raise ValueError(f"plan: {name} is {value}, not a finite number above 0")
    cluster = Cluster(options.gpus, options.per_node, 1e9 * options.nvlink, 1e9 * options.network, options.reached)
    card = CARDS[options.card]
    ways = layouts(cluster)
    plans = {layout.name: plan(config, options.batch, time, card, cluster, layout) for layout in ways}
    whole_run = options.tokens, options.price
    print(table(options.preset, config, options.batch, time, card, cluster, plans, 1e9 * options.memory, *whole_run))
    return int(all(each.memory > 1e9 * options.memory for each in plans.values()))


def table(
    preset: str,
    config: GPTConfig,
    batch: int,
    time: int,
    card: Card,
    cluster: Cluster,
    plans: dict,
    memory: float,
    tokens: float | None = None,
    price: float | None = None,
) -> str:
    """tokens: of a whole run. price: of a GPU for an hour."""
    lines = [
        f"{preset}, {work.parameters(config):,} parameters, {cluster.gpus} GPUs, {batch} rows of {time} tokens each",
        "",
        f"{'':24}" + "".join(f"{name:>17}" for name in plans),
    ]
    rows = {
        "forward, ms": lambda p: f"{1e3 * p.forward:.1f}",
        "backward, ms": lambda p: f"{1e3 * p.backward:.1f}",
        "optimizer, ms": lambda p: f"{1e3 * p.optimizer:.1f}",
        "sent, ms": lambda p: f"{1e3 * p.sent:.1f}",
        "of which exposed, ms": lambda p: f"{1e3 * p.exposed:.1f}",
        "step, ms": lambda p: f"{1e3 * p.step:.1f}",
        "tokens a second": lambda p: f"{p.tokens / p.step:,.0f}",
        "GB a device": lambda p: f"{p.memory / 1e9:.1f}" + ("" if p.memory <= memory else " !"),
        "bound by": lambda p: p.bottleneck,
    }
    if tokens is not None:
        rows["hours of the run"] = lambda p: f"{hours(p, tokens):,.2f}"
        rows["GPU-hours of the run"] = lambda p: f"{cluster.gpus * hours(p, tokens):,.1f}"
        if price is not None:
            rows["its price"] = lambda p: f"{price * cluster.gpus * hours(p, tokens):,.0f}"
    for label, cell in rows.items():
        lines.append(f"{label:24}" + "".join(f"{cell(each):>17}" for each in plans.values()))
    if any(each.memory > memory for each in plans.values()):
        lines.append(f"! more than a device's {memory / 1e9:.0f} GB")
    size = 4 * work.parameters(config) / 1e9
    links = f"{cluster.nvlink / 1e9:.0f} GB/s inside a node of {cluster.per_node}, {cluster.network / 1e9:.0f} GB/s"
    assumptions = (
        f"each kernel at its floor on {card.label};",
        "  no gap between kernels, no data to wait for",
        "float32 weights, gradients and moments; products and activations in bfloat16, and a copy of the weights in it",
        f"DDP: two passes of {size:.2f} GB a step, (n - 1) / n of each past every GPU's link; FSDP2: an all-gather of",
        "  weights in bfloat16, a reduce-scatter of gradients in float32; HSDP: these inside a node, and an",
        f"  all-reduce of each shard's gradients between nodes; over {links}",
        f"  a GPU between nodes, {cluster.reached:.0%} of it reached",
        "DDP: beside the backward but for the embeddings' gradient, which is the last; its buckets stay in memory",
        "FSDP2, HSDP: gathered once a step and kept until the backward, or twice where it is resharded, beside the",
        "  forward but for embeddings and first layer; reduced beside the backward but for the embeddings",
        f"activations with activation_checkpointing={config.activation_checkpointing!r}",
        "no latency, of which a collective among hundreds has most",
        "fragmentation and the memory of CUDA and NCCL are not counted",
    )
    marked = (text if text.startswith("  ") else f"- {text}" for text in assumptions)
    measured = (
        "bytes and memory were held to two processes on a CPU by `bench sent`; no time was measured on many GPUs."
    )
    return "\n".join([*lines, "", "It assumes:", *marked, f"None of it was measured on many GPUs: {measured}"])


def check_table(found: list[Checked]) -> str:
    lines = [f"{'committed training step':78}{'floor':>9}{'took':>9}{'':>7}{'planned':>10}{'peak':>10}"]
    for each in found:
        place = f"{each.run}: {each.case}"
        times = f"{1e3 * each.floor:7.0f}ms{1e3 * each.measured:7.0f}ms{each.measured / each.floor:6.2f}x"
        sizes = f"{each.memory / 2**20:7.0f}MiB{each.measured_memory / 2**20:7.0f}MiB"
        lines.append(f"{place[-78:]:78}{times}{sizes}{'' if each.holds else '  CONTRADICTS'}")
    return "\n".join(lines)
