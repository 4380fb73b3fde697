"""A GPT's matmuls in 8-bit floats while it trains: the scales of all copies from step to step, and a block's and the
head's way with them. ops/fp8.py has the numbers.

    mode      forward of         gradients of the inputs of
    head      the head           the head
    forward   head, qkv, MLP     the head
    all       head, qkv, MLP     the head, the MLP

What no pass writes in 8 bits anyway stays in the compute dtype, for a pass that only casts takes what the product
saves: the output projection of attention and the gradient of qkv's input; and the gradients of weights, for which both
operands would be transposed. Evaluation and generation know nothing of this: they run the weights' own dtype.

For the first 16 passes each scale is of the very tensor that it scales. From then on it is of the largest magnitude
in the HISTORY passes before, for a producer must know it beforehand. A pass is a forward in training and its backward,
of which a step has one or, where gradients add up, more.
"""

import functools
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from fastgpt import ops, private
from fastgpt.modules import attention_makes_bias, free_linear, occupied, plain

Mode = Literal["none", "head", "forward", "all"]
HISTORY = 16


class Layer(NamedTuple):
    """What a block knows of its model's copies."""

    fp8: "Fp8"
    number: int

    def slot(self, name: str) -> Any:
        return self.fp8.slots[f"{self.number}.{name}"]

    def weight(self, name: str) -> Any:
        return self.fp8.weights[f"{self.number}.{name}"]


class Fp8(nn.Module):
    """Of one model. Its buffers are in no state dict; `state` and `load` are for checkpoints."""

    exact_passes = HISTORY
    amax: Tensor  # (slots, PLACES) float32: magnitudes of the pass that is under way, or of the last one
    history: Tensor  # (HISTORY, slots): of the passes before, the newest first
    largest: Tensor  # (slots,): of each one's format

    def __init__(self, config: Any, blocks: Iterable[Any]):
        """Of a model of this GPTConfig, whose blocks are told."""
        super().__init__()
        self.mode, self.simulate, self.backend = config.fp8, config.fp8_simulate, config.backend
        self.formats = dict(_slots(self.mode, config.n_layer))
        self.passes = 0  # begun, up to exact_passes + 1: from there on scales are delayed
        self.slots: dict[str, ops.eight_bits.Slot] = {}
        self.weights: dict[str, ops.eight_bits.Weight] = {}
        self._reset(None)
        for number, block in enumerate(blocks if self.mode != "head" else ()):
            block.copies = Layer(self, number)

    def _reset(self, device: torch.device | None) -> None:
        count = len(self.formats)
        for name, shape in dict(amax=(count, ops.eight_bits.PLACES), history=(HISTORY, count)).items():
            zeros = torch.zeros(shape, dtype=torch.float32, device=device)
            self.register_buffer(name, zeros, persistent=False)
        largest = [format.largest for format in self.formats.values()]
        self.register_buffer("largest", torch.tensor(largest, dtype=torch.float32, device=device), persistent=False)
        self.passes = 0

    def _apply(self, fn, recurse=True):
        """To another device with the model; magnitudes stay float32 whatever the model becomes."""
        for name, buffer in self.named_buffers():
            setattr(self, name, buffer.to(fn(buffer).device))
        self.slots, self.weights = {}, {}
        return self

    @property
    def settled(self) -> bool:
        """Whether the last pass had delayed scales, as all that follow: a CUDA graph may hold the next one, for which
        every kernel has been compiled then."""
        return self.passes > self.exact_passes

    @property
    def makes(self) -> Any:
        """What makes the copies there."""
        return ops.fp8_producers(self.backend, self.amax)

    def begin(self, model: Any) -> None:
        """Before each forward in training: new scales, and copies of the weights. Nothing tells whether those changed,
        for a fused optimizer does not count what it writes. RuntimeError or ValueError for what 8 bits are not for."""
        weights = dict(_weights(model, self.mode))
        if torch.compiler.is_compiling():
            raise RuntimeError(f"fp8={self.mode!r} does not run under torch.compile yet; fp8='none' does")
        if (follows := ops.watcher()) is not None:
            raise RuntimeError(f"fp8={self.mode!r} can't be had: {follows}; fp8='none' can")
        self._check(weights)
        device = next(iter(weights.values()))[0].device
        if self.amax.device != device:  # made on "meta"
            self._reset(device)
        if self.passes:
            newest = self.amax.amax(1)
            self.history.copy_(torch.cat([newest[None], self.history[:-1]]))
            self.amax.zero_()
        self.passes = min(self.passes + 1, self.exact_passes + 1)
        self._make_slots()
        self._copy(weights)

    def _check(self, weights: dict[str, tuple[Tensor, bool]]) -> None:
        first = weights["head"][0]
        if not plain(*(weight for weight, _ in weights.values())):
            kinds = sorted({type(weight).__name__ for weight, _ in weights.values()})
            raise ValueError(f"fp8={self.mode!r} needs ordinary weights, not {', '.join(kinds)}")
        if self.simulate:
            return
        if (obstacle := ops.fp8_obstacle(first.device)) is not None:
            simulated = "fp8_simulate=True computes the same numbers, slowly"
            raise ValueError(f"fp8={self.mode!r} can't be had: {obstacle}; {simulated}")
        if (dtype := ops.eight_bits.compute_dtype(first)) != torch.bfloat16:
            raise ValueError(f"fp8={self.mode!r} is for training in bfloat16, these matmuls are in {dtype}")

    def _make_slots(self) -> None:
        formats, amax = self.formats.values(), self.amax.unbind()
        if self.passes <= self.exact_passes:
            made = map(ops.eight_bits.Slot, formats, amax)
        else:
            both = ops.eight_bits.scales(self.history.amax(0), self.largest)
            made = map(ops.eight_bits.Slot, formats, amax, *(each.unbind() for each in both))
        self.slots = dict(zip(self.formats, made, strict=True))

    def _copy(self, weights: dict[str, tuple[Tensor, bool]]) -> None:
        format = ops.eight_bits.E4M3
        tensors = [weight.detach() for weight, _ in weights.values()]
        scales, inverses = ops.eight_bits.scales(torch.stack(private.magnitudes(tensors, torch.inf)), format.largest)
        makes = self.makes
        for number, (name, (_, transposes)) in enumerate(weights.items()):
            weight, old = tensors[number], self.weights.get(name)
            if old is None:
                made = functools.partial(torch.zeros, dtype=format.dtype, device=weight.device)
                rows, columns = ops.eight_bits.padded(len(weight)), weight.shape[1]
                old = ops.eight_bits.Weight(made(rows, columns), made(columns, rows) if transposes else None, scales)
            self.weights[name] = old._replace(scale=scales[number])
            makes.weight(weight, inverses[number], format, old.values, old.transposed)

    def state(self) -> dict[str, Tensor]:
        """For a checkpoint, on the CPU: with it and the weights training goes on to the bit."""
        passes = torch.tensor(self.passes, dtype=torch.int64, device="cpu")
        found = {"amax": self.amax.amax(1), "history": self.history, "passes": passes}
        return {name: tensor.detach().cpu().clone() for name, tensor in found.items()}

    def load(self, state: Mapping[str, Tensor], device: torch.device) -> None:
        """What `state` gave; without it, or of another mode, which has other slots, the scales begin anew."""
        self._reset(device)
        if {name: tensor.shape for name, tensor in state.items()} == {n: t.shape for n, t in self.state().items()}:
            self.amax[:, 0] = state["amax"].to(device)
            self.history.copy_(state["history"])
            self.passes = int(state["passes"])


def check_sizes(config: Any) -> None:
    """ValueError for a GPTConfig with sizes that no library multiplies in 8 bits."""
    for name, value in dict(n_embd=config.n_embd, n_inner=config.n_inner or 4 * config.n_embd).items():
        if config.fp8 != "none" and value % ops.eight_bits.MULTIPLE:
            raise ValueError(f"GPTConfig: fp8 needs a multiple of {ops.eight_bits.MULTIPLE}, {name} is {value}")


def _slots(mode: Mode, layers: int):
    """The name and the format of each tensor whose copies have delayed scales. The gradient of the logits is not among
    them: its bound is known beforehand."""
    for number in range(layers if mode != "head" else 0):
        for name in ("ln_1", "ln_2", "act"):
            yield f"{number}.{name}", ops.eight_bits.E4M3
        for name in ("dy", "dpre") if mode == "all" else ():
            yield f"{number}.{name}", ops.eight_bits.E5M2
    yield "ln_f", ops.eight_bits.E4M3


def _weights(model: Any, mode: Mode):
    """The name of each weight that has a copy, the weight, and whether the transpose is needed."""
    yield "head", (model.head_weight, True)
    for number, block in enumerate(model.h if mode != "head" else ()):
        if serves(block):
            yield f"{number}.qkv", (block.attn.c_attn.weight, False)
            yield f"{number}.fc", (block.mlp.c_fc.weight, mode == "all")
            yield f"{number}.fc2", (block.mlp.c_proj.weight, mode == "all")


def serves(block: Any) -> bool:
    """Whether nothing hangs on the block's parts: a hook, an adapter. Else the block is called as ever."""
    parts = block.ln_1, block.ln_2, block.attn, block.mlp
    linears = block.attn.c_attn, block.mlp.c_fc, block.mlp.c_proj
    return not any(map(occupied, parts)) and all(map(free_linear, linears))


def block_of_copies(
    block: Any, layer: Layer, x: Tensor, branch, branch_bias, documents, add_bias: bool
) -> tuple[Tensor, Tensor]:
    """model.Block.forward, of copies."""
    fp8, attn, mlp = layer.fp8, block.attn, block.mlp
    makes, simulate = fp8.makes, fp8.simulate
    normed, x, copy = _norm(block.ln_1, makes, branch, x, branch_bias, layer.slot("ln_1"))
    bias, apart = attn.c_attn.bias, attention_makes_bias(attn.c_attn, x.device, attn.backend)
    qkv = ops.eight_bits.linear(
        normed, attn.c_attn.weight, bias.detach() if apart else bias, copy, layer.weight("qkv"), simulate
    )
    leaves_bias = free_linear(attn.c_proj)
    branch = attn.attend(qkv, bias if apart else None, not leaves_bias, documents)
    normed, x, copy = _norm(block.ln_2, makes, branch, x, attn.c_proj.bias if leaves_bias else None, layer.slot("ln_2"))
    gradients = tuple(map(layer.slot, ("dy", "dpre"))) if fp8.mode == "all" else None
    weights = layer.weight("fc"), layer.weight("fc2")
    how = ops.eight_bits.Mlp(*weights, layer.slot("act"), gradients, mlp.gelu == "tanh", mlp.recompute)
    given = mlp.c_fc.weight, mlp.c_fc.bias, mlp.c_proj.weight, mlp.c_proj.bias if add_bias else None
    return x, ops.eight_bits.gelu_mlp(normed, *given, copy, how, makes, simulate)


def loss_of_copies(model: Any, x: Tensor, branch, branch_bias, targets: Tensor) -> Tensor:
    """The mean loss of what the blocks give: model.GPT.forward from the last norm on, of copies."""
    fp8 = model.fp8
    makes = fp8.makes
    normed, _, copy = _norm(model.ln_f, makes, branch, x, branch_bias, fp8.slots["ln_f"])
    how = copy, fp8.weights["head"], ops.eight_bits.E5M2, makes, fp8.simulate
    return ops.eight_bits.linear_cross_entropy(normed, model.head_weight, targets, *how)


def _norm(norm: Any, makes: Any, branch, x: Tensor, branch_bias, slot) -> tuple[Tensor, Tensor, Any]:
    p = norm.dropout if norm.training else 0.0
    if branch is None:
        return makes.norm(x, None, norm.weight, norm.bias, norm.eps, slot)
    return makes.norm(branch, x, norm.weight, norm.bias, norm.eps, slot, x_bias=branch_bias, dropout_p=p)
