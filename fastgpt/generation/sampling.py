"""From logits to a token: penalty, temperature, filters, a draw. All on the logits' device, with no wait for it."""

import dataclasses
import math
import numbers

import torch
import torch.nn.functional as F
from torch import Tensor

_ONE = 2**40  # a probability of 1, where probabilities are counted


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; in this order:

    repetition_penalty: of a token that is in the row already, a positive logit is divided by it and a negative one
        multiplied (Keskar et al., "CTRL", 2019, section 4.1). 1 is none.
    temperature: divides the logits. 0 takes the likeliest token.
    top_k: the k likeliest are left; all of them where the vocabulary is smaller.
    top_p: the fewest likeliest that reach this probability together (Holtzman et al., 2020, section 3.1). 1 is all.
    min_p: what has at least this share of the likeliest's probability (Nguyen et al., 2024). 0 is all.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self):
        for name in ("temperature", "top_p", "min_p", "repetition_penalty"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, numbers.Real):  # NumPy's are Real too
                raise ValueError(f"generate: {name} is {value!r}, not a number")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"generate: temperature is {self.temperature}, not a finite number of at least 0")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"generate: top_k is {self.top_k}, not at least 1")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"generate: top_p is {self.top_p}, not in (0, 1]")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"generate: min_p is {self.min_p}, not in [0, 1]")
        if not 0 < self.repetition_penalty < math.inf:
            raise ValueError(f"generate: repetition_penalty is {self.repetition_penalty}, not a positive number")

    @property
    def greedy(self) -> bool:
        return self.temperature < torch.finfo(torch.float32).tiny  # 0, as far as float32 can tell

    @property
    def filters(self) -> tuple[float, float, float]:
        """Of what top_k leaves: temperature, top_p, min_p."""
        return float(self.temperature), float(self.top_p), float(self.min_p)

    def clocks(self, vocab_size: int) -> int:
        """How many a draw among so many tokens takes; 0 where there is none."""
        return 0 if self.greedy else min(self.top_k or vocab_size, vocab_size)

    def draw(self, logits: Tensor, seen: Tensor | None, clocks: Tensor | None) -> Tensor:
        """Logits (B, V) -> token ids (B,). seen: (B, V), True for the tokens of each row, if there is a penalty.
        clocks: as `draw_clocks` draws them, (B, self.clocks(V)) of the logits' dtype; of tokens in the order of
        likelihood where there is a top_k below V or else a top_p, or in their own. None where there is no draw."""
        if clocks is None:
            return self.penalised(logits, seen).max(-1).indices  # on a CPU a third of argmax's time
        weights, ids = self._candidates(logits, seen)
        chosen = (weights / clocks).argmax(-1)
        return chosen if ids is None else ids.gather(-1, chosen[:, None])[:, 0]

    def probabilities(self, logits: Tensor, seen: Tensor | None) -> Tensor:
        """(B, V) -> (B, V): what draw draws from."""
        if self.greedy:
            likeliest = self.penalised(logits, seen).argmax(-1, keepdim=True)
            return torch.zeros_like(logits).scatter_(-1, likeliest, 1.0)
        weights, ids = self._candidates(logits, seen)
        weights = weights / weights.sum(-1, keepdim=True)
        return weights if ids is None else torch.zeros_like(logits).scatter_(-1, ids, weights)

    def penalised(self, logits: Tensor, seen: Tensor | None) -> Tensor:
        """(B, V), by the repetition penalty for the tokens (B, V) of each row."""
        if seen is None:
            return logits
        penalty = self.repetition_penalty
        return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)

    def _candidates(self, logits: Tensor, seen: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Weights (B, K), not normalised, of the tokens (B, K), or of all tokens in order where that is None."""
        logits = self.penalised(logits, seen)
        logits = (logits - logits.amax(-1, keepdim=True)) / self.temperature  # a small one would make them infinite
        ids = None
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            logits, ids = logits.topk(self.top_k)
        elif self.top_p < 1:
            logits, ids = logits.sort(descending=True)
        weights = logits.softmax(-1)
        if self.top_p < 1:  # counted in whole numbers: a GPU may add floating-point ones up in another order each time
            counts = (weights * _ONE).to(torch.int64)
            before = F.pad(counts.cumsum(-1)[:, :-1], (1, 0))  # of the likelier ones
            weights = weights.masked_fill(before >= max(1, int(self.top_p * _ONE)), 0.0)
        if self.min_p > 0:
            weights = weights.masked_fill(weights < self.min_p * weights.amax(-1, keepdim=True), 0.0)
        return weights, ids


# Devices whose exponential_ leaves 0 out. MPS's is 0 once in 2^24 draws, and a token that can't be drawn would then be.
_NEVER_ZERO = ("cpu", "cuda")
_LEAST_CLOCK = 2.0**-25


def draw_clocks(clocks: Tensor, generator: torch.Generator | None) -> Tensor:
    """Exponentially distributed numbers, none of them 0, in their place."""
    clocks.exponential_(generator=generator)
    return clocks if clocks.device.type in _NEVER_ZERO else clocks.clamp_(min=_LEAST_CLOCK)


def race(weights: Tensor, generator: torch.Generator | None) -> Tensor:
    """A draw a row of (B, K) by these weights: exponential clocks of these rates, and the first that rings.

    torch.multinomial does the same, but asks the device first whether the weights are well.
    """
    return (weights / draw_clocks(torch.empty_like(weights), generator)).argmax(-1)
