"""What a training step must compute, by GPT-2 of the naive reference's functions, a row of the batch at a time; and how
far a right row may be from it. It shares nothing with what is measured."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.steps.entries import BETAS, CLIP, LEARNING_RATE, WEIGHT_DECAY, Problem
from fastgpt.model import GPT, GPTConfig
from fastgpt.ops import reference as naive

# Steps whose losses are compared: a CUDA graph runs two as usual, and its second replay shows what its first updated.
COMPARED = 4


class Expected(NamedTuple):
    """What the reference computes."""

    losses: list[float]  # of the first COMPARED steps
    norm: float  # of all gradients of the first


def reference(model: GPT, p: Problem, vocabulary: int, gelu: str, tied: bool, dtype: torch.dtype) -> Expected:
    """The first COMPARED steps in `dtype`, without autocast. tied: the head's weight is the embedding's, and not
    another one that begins as it does."""
    weights = {name: tensor.detach().to(dtype) for name, tensor in model.state_dict().items()}
    weights["wte.weight"] = F.pad(weights["wte.weight"], (0, 0, 0, vocabulary - model.config.vocab_size))
    if not tied:
        weights["lm_head.weight"] = weights["wte.weight"]
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in weights.items()}
    optimizer = torch.optim.AdamW(leaves.values(), LEARNING_RATE, BETAS, weight_decay=WEIGHT_DECAY)
    count = int((p.targets >= 0).sum())
    losses, norms = [], []
    for _ in range(COMPARED):
        optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), dtype=dtype, device=p.idx.device)
        for idx, targets in zip(p.idx, p.targets, strict=True):
            loss = _summed_loss(leaves, model.config, gelu, idx, targets) / count
            loss.backward()
            total += loss.detach()
        losses.append(total.item())
        norms.append(nn.utils.clip_grad_norm_(leaves.values(), CLIP).item())
        optimizer.step()
    return Expected(losses, norms[0])


def _summed_loss(weights: dict[str, Tensor], config: GPTConfig, gelu: str, idx: Tensor, targets: Tensor) -> Tensor:
    """Of one row: idx, targets (T,)."""

    def linear(x, name):
        return naive.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def norm(x, name):
        return naive.layer_norm(x, weights[f"{name}.weight"], weights[f"{name}.bias"], config.layer_norm_eps)

    x = naive.embedding(idx[None], weights["wte.weight"], weights["wpe.weight"])[0]  # (T, C)
    for layer in range(config.n_layer):
        name = f"h.{layer}"
        qkv = linear(norm(x, f"{name}.ln_1"), f"{name}.attn.c_attn")
        attended = naive.causal_attention_qkv(qkv[None], config.n_head)[0]
        x = x + linear(attended, f"{name}.attn.c_proj")
        hidden = naive.gelu(linear(norm(x, f"{name}.ln_2"), f"{name}.mlp.c_fc"), gelu)
        x = x + linear(hidden, f"{name}.mlp.c_proj")
    head = weights.get("lm_head.weight", weights["wte.weight"])
    return naive.linear_cross_entropy(norm(x, "ln_f"), head, targets, reduction="sum")


class Allowed(NamedTuple):
    """How far a right row may be from the reference, relatively."""

    loss: float
    norm: float
    descent: float  # of what the loss went down by in the compared steps


# Some ten times what right rows were seen to be off by, at 124M with 512 tokens on a CPU: in bfloat16 5e-5 of the loss,
# 0.13% of the norm and 0.5% of the descent.
ALLOWED = {
    None: Allowed(1e-5, 1e-3, 0.02),
    torch.bfloat16: Allowed(5e-4, 0.02, 0.1),
    torch.float16: Allowed(5e-4, 0.02, 0.1),
}
EIGHT_BITS = Allowed(4e-3, 0.02, 0.12)  # simulated, 4 layers of 768: 4e-4 of the loss, 0.17% and 1.2%


def wrong(
    losses: list[float], norm: float, expected: Expected, autocast: torch.dtype | None, eight_bits: bool = False
) -> str:
    """Why a row's first losses and gradients are not the reference's, or ""."""
    allowed = EIGHT_BITS if eight_bits else ALLOWED[autocast]
    theirs = expected.losses
    found = []
    if not abs(losses[0] - theirs[0]) <= allowed.loss * abs(theirs[0]):  # NaN is wrong too
        found.append(f"its first loss is {losses[0]:.6g}, the reference's {theirs[0]:.6g}")
    if not abs(norm - expected.norm) <= allowed.norm * expected.norm:
        found.append(f"its gradients have the norm {norm:.6g}, the reference's {expected.norm:.6g}")
    down, should = losses[0] - losses[-1], theirs[0] - theirs[-1]
    if not abs(down - should) <= allowed.descent * abs(should) + allowed.loss * abs(theirs[0]):
        found.append(f"its loss went down by {down:.4g} in {len(losses)} steps, the reference's by {should:.4g}")
    return "; ".join(found)
