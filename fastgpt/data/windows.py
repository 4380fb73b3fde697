"""Which windows of the tokens a step sees, and the batches made of them."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fastgpt.data.tokens import Tokens


class Order:
    """Which windows of `block` tokens a run sees, one after another, each a function of its number alone: a run that is
    resumed, or shared by another number of processes, sees what it would have seen.

    "random": anywhere, as Philox with the seed as its key draws them. "epoch": every window of the tokens once, in an
    order that each epoch shuffles anew.
    """

    def __init__(self, tokens: Tokens, block: int, order: Literal["random", "epoch"], seed: int):
        self.tokens, self.block, self.order, self.seed = len(tokens), block, order, seed
        self._epoch, self._shuffled = -1, np.empty(0, dtype=np.int64)

    def starts(self, first: int, count: int) -> np.ndarray:
        """Offsets (count,) of the windows of the run with the numbers first, first + 1, …"""
        if self.order == "random":
            draws = np.random.Philox(key=self.seed, counter=first).random_raw(4 * count)[::4]  # 4 of a count
            return (draws % np.uint64(self.tokens - self.block)).astype(np.int64)
        return np.array([self._in_epoch(*divmod(number, self.windows)) for number in range(first, first + count)])

    @property
    def windows(self) -> int:
        """Of an epoch."""
        return (self.tokens - 1) // self.block

    def _in_epoch(self, epoch: int, number: int) -> int:
        if epoch != self._epoch:
            shuffle = np.random.Generator(np.random.Philox(key=np.array([self.seed, epoch + 1], dtype=np.uint64)))
            self._epoch, self._shuffled = epoch, shuffle.permutation(self.windows)
        return int(self._shuffled[number]) * self.block


def windows(
    tokens: Tokens, starts: Sequence[int] | np.ndarray, length: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Inputs and targets (len(starts), length) int64: the windows at `starts`, and the same shifted by one."""
    rows = np.stack([tokens[start : start + length + 1] for start in starts]).astype(np.int64)
    batch = torch.from_numpy(rows)
    beside = device.type == "cuda"  # from pinned memory the copy runs beside what the GPU has to do
    if beside:
        batch = batch.pin_memory()
    batch = batch.to(device, non_blocking=beside)  # MPS would read when these rows are gone (pytorch issue 189690)
    return batch[:, :-1], batch[:, 1:]


def documents(idx: Tensor, end: int) -> Tensor:
    """(B, T) ids -> (B, T) numbers of the documents they are of. The end-of-text token `end` begins the next one, as
    the prompt of a new document does in generation."""
    return (idx == end).cumsum(1)
