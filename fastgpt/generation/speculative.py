"""Speculative decoding: a small model proposes a few tokens, the large one judges them in one pass.

What comes out has the large model's distribution, whatever the small one proposes: a proposal d is taken with
probability min(1, p(d) / q(d)), and the first that is not is replaced by a draw from max(0, p - q).
Source: Leviathan, Kalman, Matias, "Fast Inference from Transformers via Speculative Decoding", 2023, section 2.3.
"""

import torch
from torch import Tensor

from fastgpt.generation.ahead import Told
from fastgpt.generation.batch import Batch
from fastgpt.generation.decoder import Decoder
from fastgpt.generation.sampling import race
from fastgpt.generation.threads import threads_for


class Speculation:
    """Rounds over a Batch; each gives every row from one token to `count` + 1. A round waits for the device once."""

    def __init__(self, batch: Batch, draft: Decoder, count: int):
        self.batch, self.draft, self.count = batch, draft, count
        self.cache = draft.cache(batch.rows, batch.cache.slots)
        self.lengths = [batch.filled] * batch.rows  # as the host knows them; the longest is what matters
        self.active = [True] * batch.rows

    def start(self) -> Told:
        """The first token of each row, which no draft is needed for."""
        batch = self.batch
        rows, lengths = batch.history[:: batch.samples, : batch.filled], batch.lengths[:: batch.samples]
        self.draft.prefill(rows, lengths, self.cache)
        batch.advance()
        self.lengths = batch.lengths.tolist()
        return Told(batch.news.tolist(), None if batch.logprobs is None else batch.logprobs.tolist())

    @torch.no_grad()
    def round(self, most: int | None = None) -> Told:
        """most: proposals, fewer than usual."""
        batch = self.batch
        longest = max(length for length, active in zip(self.lengths, self.active, strict=True) if active)
        count = min(self.count if most is None else most, batch.cache.slots - longest)
        lengths = batch.lengths.clamp(max=longest)  # a row that has ended goes along, and writes nothing down
        proposals, guesses, seen = self._propose(count, lengths)
        last = batch.history.gather(1, lengths[:, None] - 1)
        ids = torch.cat((last, proposals), dim=1)
        with threads_for(batch.decoder, ids.numel()):
            logits = batch.decoder.decode(ids, lengths + count, batch.cache)
        logits = batch.allowed(logits)  # (B, count + 1, V)
        if count and not logits[torch.tensor(self.active, dtype=torch.bool, device=logits.device)].isfinite().all():
            return self.round(0)  # a proposal's NaN is in its whole pass, and it may not be taken
        wanted = torch.stack([batch.sampling.probabilities(logits[:, i], seen[i]) for i in range(count + 1)], dim=1)
        taken = self._taken(proposals, guesses, wanted)  # (B,)
        row = torch.arange(batch.rows, dtype=torch.int64, device=taken.device)
        rest = wanted[row, taken]
        if count:
            guess = guesses[row, taken.clamp(max=count - 1)].masked_fill((taken == count)[:, None], 0.0)
            left = (rest - guess).clamp(min=0)
            rest = torch.where(left.sum(-1, keepdim=True) > 0, left, rest)  # both alike, but for rounding
        new = torch.cat((proposals, proposals.new_zeros(batch.rows, 1)), dim=1)
        new[row, taken] = race(rest, batch.generator)
        return self._write(new, taken, logits)

    def _propose(self, count: int, lengths: Tensor) -> tuple[Tensor, Tensor, list[Tensor | None]]:
        """Tokens (B, count), what they were drawn from (B, count, V), and what each row had seen before each."""
        batch, draft = self.batch, self.draft
        proposals = lengths.new_zeros(batch.rows, count)
        guesses, seen = [], [batch.seen]
        for i in range(count):
            if i == 0:  # two: the last round may have taken a token that the draft was not given
                places = lengths[:, None] - 2 + torch.arange(2, dtype=torch.int64, device=lengths.device)
                ids = batch.history.gather(1, places)
            else:
                ids = proposals[:, i - 1 : i]
            with threads_for(draft, ids.numel()):
                logits = draft.decode(ids, lengths + i, self.cache)[:, -1]
            logits = batch.allowed(logits)
            guess = batch.sampling.probabilities(logits, seen[-1])
            if not logits.isfinite().all():
                raise ValueError("generate: the draft's logits are not finite")
            proposals[:, i] = race(guess, batch.generator)
            guesses.append(guess)
            before = seen[-1]
            seen.append(None if before is None else before.scatter(1, proposals[:, i : i + 1], True))
        return proposals, torch.stack(guesses, dim=1) if guesses else proposals, seen

    def _taken(self, proposals: Tensor, guesses: Tensor, wanted: Tensor) -> Tensor:
        """How many proposals of each row are taken: all before the first that is not."""
        count = proposals.shape[1]
        if count == 0:
            return proposals.new_zeros(len(proposals))
        chance = torch.rand(
            proposals.shape, generator=self.batch.generator, dtype=torch.float32, device=proposals.device
        )
        q = guesses.gather(2, proposals[..., None])[..., 0]
        p = wanted[:, :count].gather(2, proposals[..., None])[..., 0]
        return (chance * q < p).long().cumprod(dim=1).sum(dim=1)

    def _write(self, new: Tensor, taken: Tensor, logits: Tensor) -> Told:
        """new: (B, count + 1), of which taken + 1 are good."""
        batch = self.batch
        active = torch.tensor(self.active, dtype=torch.bool, device=new.device)
        steps = torch.arange(new.shape[1], dtype=torch.int64, device=new.device)
        good = (steps <= taken[:, None]) & active[:, None]
        batch.history.scatter_(1, batch.lengths[:, None] + steps, new)
        if batch.seen is not None:
            rows, places = good.nonzero(as_tuple=True)
            batch.seen[rows, new[rows, places]] = True
        batch.lengths += good.sum(dim=1)
        self.lengths = batch.lengths.tolist()
        told = torch.where(logits.isfinite().all(-1), new, -1)
        ids = [row[:count] for row, count in zip(told.tolist(), good.sum(dim=1).tolist(), strict=True)]
        logprobs = None
        if batch.logprobs is not None:
            logprobs = logits.log_softmax(-1).gather(2, new[..., None])[..., 0].tolist()
        return Told(ids, logprobs)
