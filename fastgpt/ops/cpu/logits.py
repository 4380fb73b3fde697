"""The fallback's two ways over the logits of linear_cross_entropy: by rows, and for few rows by the vocabulary."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fastgpt.ops import loss

_FEWEST_ROWS = 160  # of a chunk: with fewer the matmuls wait for weight and dweight to be read and written


class Way(NamedTuple):
    kind: Literal["at once", "by rows", "by vocabulary"]
    rows: int  # of a chunk, or of the part that is gone over by the vocabulary


def way(rows: int, weight_shape: torch.Size, dtype: torch.dtype, needs_weight: bool) -> Way:
    """In chunks of rows or of the vocabulary, whichever leaves the matmuls large; none needs a tenth of the logits.

    (256 rows of GPT-2 124M's head take 2.7 times as long by rows as by the vocabulary, on a CPU of two cores.) Logits
    that are no wider than an MLP's hidden units are not worth a chunk: a model holds more than that for every layer.
    """
    vocab, channels = weight_shape
    copies = dtype in (torch.float16, torch.bfloat16)  # a chunk is worked on in a float32 copy, three times it
    if vocab <= 4 * channels:
        return Way("at once", max(1, rows))
    chunk = -(-rows // (40 if copies else 12))
    if chunk >= _FEWEST_ROWS and (copies or not (needs_weight and _fit_in_gradient(rows, channels))):
        return Way("by rows", chunk)
    parts = max(1, -(-rows // channels))  # the first has room in dweight
    if copies:  # dx is summed up in float32, and x copied where halves are not multiplied: a part's copies are small
        parts = -(-40 * channels // vocab) if loss.multiplies(dtype) else 4
    return Way("by vocabulary", max(1, -(-rows // parts)))


def _go_over_logits(x, weight, targets, row_grads, settings, losses, dx, dweight):
    kind, rows = way(len(x), weight.shape, settings.dtype, dweight is not None)
    if kind != "by vocabulary":
        loss.by_rows(_pass_over_rows, rows, False, x, weight, targets, row_grads, settings, losses, dx, dweight)
        return
    for start in range(0, len(x), rows):
        part = slice(start, start + rows)
        grads, dx_part = (None if t is None else t[part] for t in (row_grads, dx))
        _by_vocabulary(
            x[part], weight, targets[part], grads, settings, losses[part], dx_part, dweight, first=start == 0
        )


def _fit_in_gradient(rows: int, channels: int) -> bool:
    """Whether dweight (V, C) can keep the logits (N, V), transposed, until it is itself written."""
    return rows <= channels


class _Rows:
    """What the loss of each row and its gradient need to know of all its logits, read a slice at a time."""

    def __init__(self, targets: Tensor, vocab: int, settings: loss.LossSettings, dtype: torch.dtype):
        self.targets, self.vocab, self.settings = targets.long(), vocab, settings
        self.top = torch.full(targets.shape, torch.finfo(dtype).min, dtype=dtype, device=targets.device)
        # below: Σ (z - top), for smoothing. Sums of what is left without the top keep the digits of a loss near zero.
        self.total, self.z_target, self.below = torch.zeros(3, len(targets), dtype=dtype, device=targets.device)

    def read(self, z: Tensor, start: int) -> None:
        """z (N, n), of the ids from `start` on; overwritten by exp(z - top)."""
        inside, index = self._place(z, start)
        self.z_target += torch.where(inside, z.gather(1, index)[:, 0], 0)
        top = torch.maximum(self.top, z.amax(1))
        self.total *= (self.top - top).exp_()
        z.sub_(top[:, None])
        if self.settings.label_smoothing:
            if start:
                self.below += start * (self.top - top)
            self.below += z.sum(1)
        self.total += z.exp_().sum(1)
        self.top = top

    def finish(self, losses: Tensor, row_grads: Tensor | None) -> None:
        """All is read: write the losses. An ignored row's is 0, NaN that of a target out of range."""
        ignored = self.targets == self.settings.ignore_index
        outside = (self.targets < 0) | (self.targets >= self.vocab)
        smoothing, z_loss = self.settings.label_smoothing, self.settings.z_loss
        log_total = self.total.log()
        lse = log_total + self.top
        loss = log_total + (1 - smoothing) * (self.top - self.z_target) - smoothing / self.vocab * self.below
        loss += z_loss * lse**2
        losses.copy_(loss.masked_fill_(outside, torch.nan).masked_fill_(ignored, 0))
        if row_grads is not None:
            self.grads = row_grads.to(lse.dtype).masked_fill(outside, torch.nan).masked_fill_(ignored, 0)
            self.factors = self.grads * (1 + 2 * z_loss * lse) / self.total

    def gradient(self, e: Tensor, start: int) -> Tensor:
        """e (N, n), exp(z - top) of the ids from `start` on; overwritten by the gradient of their logits."""
        inside, index = self._place(e, start)
        smoothing = self.settings.label_smoothing
        e.mul_(self.factors[:, None])
        if smoothing:
            e.sub_((smoothing / self.vocab * self.grads)[:, None])
        at_target = e.gather(1, index) - torch.where(inside, (1 - smoothing) * self.grads, 0)[:, None]
        return e.scatter_(1, index, at_target)  # one place a row: scatter_add_ would be refused as nondeterministic

    def _place(self, z: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """Which targets are among the n ids, (N,), and where, (N, 1); never out of bounds."""
        local = self.targets - start
        return (local >= 0) & (local < z.shape[1]), local.clamp(0, z.shape[1] - 1)[:, None]


def _pass_over_rows(logits, vocab, targets, row_grads, ignore_index, label_smoothing, z_loss, losses):
    """loss.by_rows' pass, in place in float32. The gradient comes back in float32."""
    settings = loss.LossSettings(ignore_index, label_smoothing, z_loss, logits.dtype)
    rows, z = _Rows(targets, vocab, settings, losses.dtype), logits.to(losses.dtype)
    rows.read(z, 0)
    rows.finish(losses, row_grads)
    return z if row_grads is None else rows.gradient(z, 0)


def _by_vocabulary(x, weight, targets, row_grads, settings, losses, dx, dweight, first):
    """All rows against a slice of the vocabulary at a time, twice: for the sums of exp(z), and for the gradients.

    The second time the logits are computed again, unless dweight's memory kept them: its rows of a slice are written
    when nothing needs that slice's logits any more.
    """
    vocab, dtype, wide = weight.shape[0], settings.dtype, losses.dtype
    keeps = first and row_grads is not None and dweight is not None and _fit_in_gradient(*x.shape)
    fast = dtype != wide and loss.multiplies(dtype)
    step = -(-vocab // (24 if dtype == wide else 96 if fast else 48))
    slices = [slice(start, min(start + step, vocab)) for start in range(0, vocab, step)]
    buffer = torch.empty(step, len(x), dtype=wide, device=x.device)
    x = x.to(dtype)

    def compute(part: slice, out: Tensor) -> None:
        if dtype == wide:
            torch.mm(weight[part], x.t(), out=out)
        else:
            out.copy_(weight[part].to(dtype) @ x.t())

    rows = _Rows(targets, vocab, settings, wide)
    for part in slices:
        z = buffer[: part.stop - part.start]  # (n, N), the transpose of logits
        compute(part, dweight[part, : len(x)] if keeps else z)
        rows.read((z.copy_(dweight[part, : len(x)]) if keeps else z).t(), part.start)
    rows.finish(losses, row_grads)
    if row_grads is None:
        return

    factor = x if fast else x.to(wide)
    total = x.new_zeros(0) if dx is None else dx.zero_() if dx.dtype == wide else torch.zeros_like(x, dtype=wide)
    for part in slices:
        z = buffer[: part.stop - part.start]
        if keeps:
            z.copy_(dweight[part, : len(x)])
        else:
            compute(part, z)
        dlogits = rows.gradient(z.sub_(rows.top).exp_().t(), part.start)
        halves = dlogits.to(dtype)
        if dx is not None and dtype == wide:
            total.addmm_(dlogits, weight[part])
        elif dx is not None:
            total += halves @ weight[part].to(dtype)
        dlogits = halves if fast else dlogits
        if dweight is not None:
            loss.add_product(dweight[part], dlogits.t(), factor, first)
    if dx is not None and total is not dx:
        dx.copy_(total)


chunked_losses = loss.chunked_op("chunked_losses", _go_over_logits)
