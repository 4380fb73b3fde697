"""The fallback's way over the logits of linear_cross_entropy: some rows at a time, in passes over what caches hold."""

import torch
from torch import Tensor

from fastgpt.ops import loss

_AT_ONCE = 256 * 2**20  # bytes of logits that are made at once however few they are: larger matmuls, fewer of them
_IN_CACHE = 2**20  # bytes of logits that a pass reads and writes again and again


def rows_at_once(rows: int, vocab: int, dtype: torch.dtype) -> int:
    """Whose logits take a quarter of the bytes of all, or 256 MiB where that is more."""
    most = max(rows * vocab * dtype.itemsize // 4, _AT_ONCE)
    return max(1, min(rows, most // (vocab * dtype.itemsize)))


def _go_over_logits(x, weight, targets, row_grads, settings, *outputs):
    rows = rows_at_once(len(x), weight.shape[0], settings.dtype)
    loss.by_rows(pass_over_rows, rows, False, x, weight, targets, row_grads, settings, *outputs)


class _Rows:
    """What the loss of some rows and its gradient need to know of their logits."""

    def __init__(self, targets: Tensor, vocab: int, settings: loss.LossSettings):
        self.targets, self.vocab, self.settings = targets.long(), vocab, settings
        self.place = self.targets.clamp(0, vocab - 1)[:, None]  # never out of bounds

    def read(self, z: Tensor) -> None:
        """z (N, V), overwritten by exp(z - top). Sums without the top keep the digits of a loss near zero."""
        self.top = z.amax(1)
        z.sub_(self.top[:, None])
        self.z_target = z.gather(1, self.place)[:, 0]
        self.below = z.sum(1) if self.settings.label_smoothing else 0
        self.total = z.exp_().sum(1)

    def finish(self, losses: Tensor, row_grads: Tensor | None) -> None:
        """Write the losses. An ignored row's is 0, NaN that of a target out of range."""
        ignored = self.targets == self.settings.ignore_index
        outside = (self.targets < 0) | (self.targets >= self.vocab)
        smoothing, z_loss = self.settings.label_smoothing, self.settings.z_loss
        log_total = self.total.log()
        lse = log_total + self.top
        loss = log_total - (1 - smoothing) * self.z_target - smoothing / self.vocab * self.below
        loss += z_loss * lse**2
        losses.copy_(loss.masked_fill_(outside, torch.nan).masked_fill_(ignored, 0))
        if row_grads is not None:
            self.grads = row_grads.to(lse.dtype).masked_fill(outside, torch.nan).masked_fill_(ignored, 0)
            self.factors = self.grads * (1 + 2 * z_loss * lse) / self.total

    def gradient(self, e: Tensor) -> None:
        """e (N, V), exp(z - top), overwritten by the gradient of the logits."""
        smoothing = self.settings.label_smoothing
        e.mul_(self.factors[:, None])
        if smoothing:
            e.sub_((smoothing / self.vocab * self.grads)[:, None])
        at_target = e.gather(1, self.place) - ((1 - smoothing) * self.grads)[:, None]
        e.scatter_(1, self.place, at_target)  # one place a row: scatter_add_ would be refused as nondeterministic


def pass_over_rows(logits, vocab, targets, row_grads, ignore_index, label_smoothing, z_loss, losses):
    """loss.by_rows' pass, in place."""
    settings = loss.LossSettings(ignore_index, label_smoothing, z_loss, logits.dtype)
    step = max(1, _IN_CACHE // (vocab * losses.dtype.itemsize)) if logits.is_cpu else max(1, len(logits))
    for start in range(0, len(logits), step):
        part = slice(start, start + step)
        rows, z = _Rows(targets[part], vocab, settings), logits[part].to(losses.dtype)
        rows.read(z)
        rows.finish(losses[part], None if row_grads is None else row_grads[part])
        if row_grads is not None:
            rows.gradient(z)
            if z.dtype != logits.dtype:
                logits[part] = z
    return logits


chunked_losses = loss.chunked_op("chunked_losses", _go_over_logits)
