"""The sequences of one call of generate, on the model's device: changed in place, and told to the host later."""

import collections
import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgpt.cuda_graph import captured, warmed
from fastgpt.generation.decoder import Decoder
from fastgpt.generation.sampling import Sampling

SMALL = 1 << 19  # multiplications in a step's largest matmul, up to which a CPU's second thread gains nothing
AHEAD = 4  # steps that a GPU is given before the host waits for the first of them
GRAPH_FROM = 16  # tokens that make a capture worth while


class Told(NamedTuple):
    """One step's news, on the host."""

    ids: list[list[int]]  # new ones of each row; -1 where the logits were not finite
    logprobs: list[list[float]] | None


class Batch:
    """Rows of tokens that grow by one a step, all at once.

    Every tensor is allocated here and changed in place, so on a GPU a step is one CUDA graph from the second on, which
    embeds, decodes, samples and writes the token down without the host.
    """

    def __init__(
        self,
        decoder: Decoder,
        prompts: list[list[int]],
        samples: int,
        new_tokens: int,
        sampling: Sampling,
        generator: torch.Generator | None,
        vocab_size: int,
        logprobs: bool,
        spare: int = 0,
        never: Sequence[int] = (),
    ):
        """spare: tokens beyond new_tokens that may be written and not kept. never: ids that are not drawn."""
        self.decoder, self.sampling, self.generator, self.vocab_size = decoder, sampling, generator, vocab_size
        device, longest = decoder.device, max(map(len, prompts))
        self.samples, self.steps, self.filled = samples, 0, longest  # tokens of the longest row
        self.rows = len(prompts) * samples
        self.cache = decoder.cache(self.rows, slots(decoder, longest, new_tokens + spare))
        host: Any = dict(dtype=torch.int64, device="cpu")
        padded = torch.tensor([ids + [0] * (longest - len(ids)) for ids in prompts], **host)
        lengths = torch.tensor([len(ids) for ids in prompts], **host)
        self.history = torch.zeros(self.rows, longest + new_tokens + spare, dtype=torch.int64, device=device)
        self.history[:, :longest] = padded.repeat_interleave(samples, 0).to(device)
        self.lengths = lengths.repeat_interleave(samples, 0).to(device)
        self.seen = None
        if sampling.repetition_penalty != 1:
            inside = torch.arange(longest, **host) < lengths[:, None]
            most = max(decoder.outputs, decoder.vocabulary)
            seen = torch.zeros(len(prompts), most, dtype=torch.bool, device="cpu")
            seen[torch.nonzero(inside)[:, 0], padded[inside]] = True
            self.seen = seen[:, :vocab_size].repeat_interleave(samples, 0).to(device)
        never = [token for token in never if token < vocab_size]
        self._never = torch.zeros(vocab_size, dtype=torch.bool, device=device) if never else None
        if self._never is not None:
            self._never[never] = True
        self.ids = torch.zeros(self.rows, dtype=torch.int64, device=device)
        statistics = torch.promote_types(decoder.dtype, torch.float32)
        self.logprobs = torch.zeros(self.rows, dtype=statistics, device=device) if logprobs else None
        plain = sampling.greedy and self.seen is None and self.logprobs is None and decoder.dtype != torch.float64
        self._likeliest = plain and decoder.on_kernels  # by one kernel
        self._graph: torch.cuda.CUDAGraph | None = None
        self._graphs = device.type == "cuda" and not decoder.calls and new_tokens >= GRAPH_FROM

    def advance(self) -> None:
        """One token more for every row. ValueError where the model was moved since the last one."""
        now = self.decoder.anatomy.tokens.weight.device
        if now != self.decoder.device:
            raise ValueError(f"generate: the model was moved from {self.decoder.device} to {now} between two tokens")
        with device_of(self.decoder), self._threads():
            self._advance()
        self.steps += 1
        self.filled += 1

    def _threads(self) -> contextlib.AbstractContextManager:
        """Of this step, which reads all tokens of a window or one of each row."""
        reads_all = self.steps == 0 or self.filled > self.cache.slots
        return threads_for(self.decoder, self.rows * (min(self.filled, self.decoder.context) if reads_all else 1))

    def _advance(self) -> None:
        if self.steps == 0:
            self._take(self.first_logits())
        elif self.filled > self.cache.slots:  # past the context
            self._take(self._window())
        elif not self._graphs:
            self._step()
        elif self._graph is None and self.steps == 1:
            warmed(self.decoder.device, self._step)
        else:
            if self._graph is None:
                self._graph, _ = captured(self.decoder.device, self._step, self.generator)
            self._graph.replay()

    def first_logits(self) -> Tensor:
        """(rows, V) after the prompts, which go into the cache, each once."""
        if self.filled > self.cache.slots:
            return self._window()
        prompts, lengths = self.history[:: self.samples, : self.filled], self.lengths[:: self.samples]
        return self.decoder.prefill(prompts, lengths, self.cache).repeat_interleave(self.samples, 0)

    def _window(self) -> Tensor:
        """The logits after the last tokens that the context holds, from the beginning: no position stays the same."""
        context = self.decoder.context
        starts = (self.lengths - context).clamp(min=0)
        width = min(self.filled, context)
        places = starts[:, None] + torch.arange(width, dtype=torch.int64, device=starts.device)
        return self.decoder.prefill(self.history.gather(1, places), self.lengths.clamp(max=context), self.cache)

    def _step(self) -> None:
        last = self.history.gather(1, self.lengths[:, None] - 1)
        self._take(self.decoder.decode(last, self.lengths, self.cache)[:, 0])

    def _take(self, logits: Tensor) -> None:
        """Sample from (rows, V) and write it down."""
        with torch.no_grad():
            logits = self.allowed(logits)
            if self._likeliest:
                self.decoder.steps.take_likeliest(logits, self.history, self.lengths, self.ids)
                return
            ids = self.sampling.draw(logits, self.seen, self.generator)[:, None]
            if self.logprobs is not None:
                self.logprobs.copy_(logits.log_softmax(-1).gather(1, ids)[:, 0])
            if self.seen is not None:
                self.seen.scatter_(1, ids, True)
            self.history.scatter_(1, self.lengths[:, None], ids)
            self.lengths += 1
            if not self._finite_at_a_glance(logits):
                extremes = logits.amin(-1), logits.amax(-1)  # NaN is both
                ids = torch.where(torch.stack(extremes).isfinite().all(0)[:, None], ids, -1)
            self.ids.copy_(ids[:, 0])

    def allowed(self, logits: Tensor) -> Tensor:
        """(…, V) of all outputs -> (…, vocab_size), where ids that are never drawn have the least finite logit: their
        probability is 0, and the row's news stay good."""
        logits = logits[..., : self.vocab_size]
        return logits if self._never is None else logits.masked_fill(self._never, torch.finfo(logits.dtype).min)

    def _finite_at_a_glance(self, logits: Tensor) -> bool:
        """On a CPU, which need not be waited for: a sum is finite only if all of its terms are."""
        return logits.device.type == "cpu" and math.isfinite(logits.sum().item())


def device_of(decoder: Decoder):
    """A context in which the decoder's device is the current one: a graph is captured there, and an event recorded."""
    return torch.cuda.device(decoder.device) if decoder.device.type == "cuda" else contextlib.nullcontext()


@contextlib.contextmanager
def threads_for(decoder: Decoder, tokens: int) -> Iterator[None]:
    """On a CPU, one thread for a pass of so few tokens through so small a model that a second one gains nothing.

    The others spin while they wait for work, and on a busy machine each wait is for a processor: docs/generation.md has
    what was measured. The user's number is set again after each pass.
    """
    width = decoder.gpt.config.n_embd
    threads = torch.get_num_threads()
    if decoder.device.type != "cpu" or threads == 1 or tokens * width * max(4 * width, decoder.outputs) > SMALL:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def slots(decoder: Decoder, longest: int, new_tokens: int) -> int:
    """Of the cache: the last token is never fed back."""
    return min(decoder.context, longest + new_tokens - 1)


class Readback:
    """What steps tell, on its way to the host: copied beside the computation, and waited for AHEAD steps later."""

    def __init__(self, device: torch.device):
        self._asynchronous = device.type == "cuda"
        self.ahead = AHEAD if self._asynchronous else 0
        self._queue: collections.deque = collections.deque()

    def __len__(self) -> int:
        return len(self._queue)

    def put(self, ids: Tensor, logprobs: Tensor | None) -> None:
        copies = [None if t is None else self._copy(t) for t in (ids, logprobs)]
        event = torch.cuda.Event() if self._asynchronous else None
        if event is not None:
            event.record(torch.cuda.current_stream(ids.device))
        self._queue.append((event, *copies))

    def _copy(self, tensor: Tensor) -> Tensor:
        if not self._asynchronous:  # it is taken before the next step
            return tensor
        return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)

    def take(self) -> Told:
        """The oldest step's."""
        event, ids, logprobs = self._queue.popleft()
        if event is not None:
            event.synchronize()
        return Told(ids[:, None].tolist(), None if logprobs is None else logprobs[:, None].tolist())
