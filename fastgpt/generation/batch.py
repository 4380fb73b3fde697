"""The sequences of one call of generate, on the model's device: changed in place, and told to the host later."""

import contextlib
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgpt.cuda_graph import captured, warmed
from fastgpt.generation.ahead import EVERY, Copy, Readback
from fastgpt.generation.decoder import Decoder
from fastgpt.generation.sampling import Sampling, draw_clocks
from fastgpt.generation.threads import device_of, threads_for

GRAPH_FROM = 16  # tokens of one call that make a step's capture worth while; fewer do in the second one
BLOCKS_FROM = 256  # steps after which EVERY of them in one graph are worth a capture, where each is many launches
ROOM = 64  # tokens that a captured batch's room is a multiple of, so that calls of about as many share it
CAPTURED_PROMPTS = 8192  # tokens of all prompts, up to which a GPU would wait for the host that launches their pass
CAPTURED_WIDTHS = 4  # of prompts, at most, that a batch keeps a graph of


class Plan(NamedTuple):
    """What a batch's tensors and its captured steps depend on: a call of the same may have them after another."""

    rows: int
    samples: int
    room: int  # tokens of a row
    slots: int  # of the cache
    sampling: Sampling
    vocab_size: int
    logprobs: bool
    never: tuple[int, ...]
    seeded: bool
    captures: bool
    ring: int  # tokens of a row that are kept for the host
    settings: tuple  # of PyTorch's, that a capture holds on to
    stream: int  # on which the tensors are allocated, and freed


def plan(
    decoder: Decoder,
    longest: int,
    rows: int,
    new_tokens: int,
    sampling: Sampling,
    *,
    samples: int = 1,
    vocab_size: int | None = None,
    logprobs: bool = False,
    seeded: bool = False,
    spare: int = 0,
    never: Sequence[int] = (),
) -> Plan:
    """For so many rows, whose longest prompt is given. spare: tokens beyond new_tokens that may be written and not
    kept. never: ids that are not drawn."""
    vocab_size = decoder.outputs if vocab_size is None else vocab_size
    queued = is_queued(decoder.device) and spare == 0
    captures = queued and not decoder.calls
    room = longest + new_tokens + spare
    if captures:
        room = -(-room // ROOM) * ROOM
    slots = min(decoder.context, room - (not captures))  # the last token is never fed back
    never = tuple(token for token in never if token < vocab_size)
    ring = EVERY if queued else 1
    on_a_card = captures and decoder.device.type == "cuda"
    stream = torch.cuda.current_stream(decoder.device).cuda_stream if on_a_card else 0
    shape = rows, samples, room, slots
    return Plan(*shape, sampling, vocab_size, logprobs, never, seeded, captures, ring, _settings(), stream)


def _settings() -> tuple:
    """PyTorch's own that choose among kernels."""
    cuda = torch.backends.cuda
    attention = cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled()
    sums = cuda.matmul.allow_bf16_reduced_precision_reduction, cuda.matmul.allow_fp16_reduced_precision_reduction
    exact = cuda.matmul.fp32_precision, torch.are_deterministic_algorithms_enabled()
    return (*attention, cuda.cudnn_sdp_enabled(), *map(str, sums), *exact)


def is_queued(device: torch.device) -> bool:
    """Whether the host goes on while the device works."""
    return device.type == "cuda"


class Batch:
    """Rows of tokens that grow by one a step, all at once.

    Every tensor is allocated here and changed in place, so on a GPU a step is one CUDA graph, which embeds, decodes,
    samples and writes the token down without the host: captured at the second step of the first call, and replayed in
    later calls of the same plan too, each of which begins anew. Four steps that follow each other are one graph more,
    for to start a graph takes the card some time; and so is the pass over the prompts, whose padding to a few widths
    makes them share it. What is drawn at random is drawn before a graph, whose replay would fill two tensors for it.
    """

    decoder: Decoder

    def __init__(self, decoder: Decoder, plan: Plan):
        self.plan, self.rows, self.samples, self.sampling = plan, plan.rows, plan.samples, plan.sampling
        self.vocab_size = plan.vocab_size
        device, self.config = decoder.device, decoder.gpt.config
        self.cache = decoder.cache(plan.rows, plan.slots)
        ints: Any = dict(dtype=torch.int64, device=device)
        self.history = torch.zeros(plan.rows, plan.room, **ints)
        self.lengths = torch.zeros(plan.rows, **ints)
        self.last = torch.zeros(plan.rows, 1, **ints)
        self.news = torch.zeros(plan.rows, plan.ring, **ints)  # the token of place n at n modulo ring
        most = max(decoder.outputs, decoder.vocabulary)
        penalised = plan.sampling.repetition_penalty != 1
        whole = torch.zeros(plan.rows, most, dtype=torch.bool, device=device) if penalised else None
        self._seen_whole, self.seen = whole, None if whole is None else whole[:, : plan.vocab_size]
        self._never = torch.zeros(plan.vocab_size, dtype=torch.bool, device=device) if plan.never else None
        if self._never is not None:
            self._never[list(plan.never)] = True
        statistics = torch.promote_types(decoder.dtype, torch.float32)
        self.logprobs = torch.zeros(plan.rows, plan.ring, dtype=statistics, device=device) if plan.logprobs else None
        self.generator = torch.Generator(device) if plan.seeded else None
        self.readback = Readback(self.news, self.logprobs, is_queued(device) and plan.ring > 1)
        self.every, self.depth = plan.ring, self.readback.depth
        clocks = plan.sampling.clocks(plan.vocab_size)
        drawn = EVERY if plan.captures else 1, plan.rows, clocks  # of each step of a block
        self._clocks = torch.empty(drawn, dtype=statistics, device=device) if clocks else None
        plain = plan.sampling.greedy and self.seen is None and self.logprobs is None
        self._likeliest = plain and decoder.dtype != torch.float64 and decoder.on_kernels  # by one kernel
        self._draws = self._drawn_by_kernels(decoder)
        # the dtype that holds the logits of a kernel that writes them in a wider one
        self._rounded = decoder.dtype if self.cache.words is not None and self.seen is None else None
        self._wide = not (self._likeliest or (self._draws is not None and self.seen is None))  # kernels read any logits
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}  # of so many steps
        self._prompts: dict[int, torch.cuda.CUDAGraph | None] = {}  # by their width, the latest last; None: read once
        self._used, self._warm, self._replayed = False, False, 0
        self._alive: list[Any] = []  # what captured steps read and this batch does not own

    def _drawn_by_kernels(self, decoder: Decoder) -> Any:
        """What draws the next tokens and writes them down; None where PyTorch does."""
        k = self.sampling.clocks(self.vocab_size)
        if (
            self.sampling.greedy
            or self.logprobs is not None
            or decoder.dtype == torch.float64
            or not decoder.on_kernels
        ):
            return None
        if k < self.vocab_size:
            return decoder.steps.take_drawn if k <= decoder.steps.most_drawn else None
        return decoder.steps.take_raced if self.sampling.top_p == 1 else None

    def begin(
        self, decoder: Decoder, prompts: list[list[int]], seed: int | None = None, new_tokens: int = GRAPH_FROM
    ) -> "Batch":
        """Itself, with these prompts, each `samples` times in a row, and nothing of what it was before."""
        longest, samples = max(map(len, prompts)), self.samples
        self.decoder, self.steps, self.filled = decoder, 0, longest  # tokens of the longest row
        self._many = new_tokens >= GRAPH_FROM or self._warm
        self._width = width = self._width_of(longest)
        host: Any = dict(dtype=torch.int64, device="cpu")
        padded = torch.tensor([ids + ids[-1:] * (width - len(ids)) for ids in prompts], **host)
        lengths = torch.tensor([len(ids) for ids in prompts], **host)
        self.readback.starts = [len(ids) for ids in prompts for _ in range(samples)]
        if self._used:
            self.cache.clear()
            self.history.zero_()
        self._used = True
        self.history[:, :width] = padded.repeat_interleave(samples, 0).to(self.history.device)
        self.lengths.copy_(lengths.repeat_interleave(samples, 0))
        if self._seen_whole is not None:
            inside = torch.arange(width, **host) < lengths[:, None]
            seen = torch.zeros(len(prompts), self._seen_whole.shape[1], dtype=torch.bool, device="cpu")
            seen[torch.nonzero(inside)[:, 0], padded[inside]] = True
            self._seen_whole.copy_(seen.repeat_interleave(samples, 0))
        if self.generator is not None:
            self.generator.manual_seed(0 if seed is None else seed)
        return self

    def send(self, first: int, count: int) -> Copy:
        """As ahead.Device has it."""
        with device_of(self.decoder):
            return self.readback.send(first, count)

    def _width_of(self, longest: int) -> int:
        """Tokens that prompts are padded to, by their last ones, so that those of about one length share a graph: a
        later token changes nothing before it, and what it leaves in the cache is written over before it is read."""
        if not self.plan.captures or longest > self.cache.slots:
            return longest
        width = max(ROOM, 1 << max(0, (longest - 1).bit_length() - 4))
        return min(-(-longest // width) * width, self.cache.slots)

    @property
    def bytes(self) -> int:
        """Nearly: of the cache, the clocks, and what the pass over a prompt holds at once in its graph's own memory."""
        config, cache = self.config, self.cache
        tokens = self.rows // self.samples * sum(width for width, graph in self._prompts.items() if graph is not None)
        passes = tokens * (2 * (config.n_inner or 4 * config.n_embd) + 5 * config.n_embd) * cache.whole.itemsize
        own = (cache.whole, cache.round, self._clocks)
        return passes + sum(tensor.nbytes for tensor in own if tensor is not None)

    def advance(self, count: int = 1) -> None:
        """So many tokens more for every row. ValueError where the model was moved since the last one."""
        now = self.decoder.tokens.weight.device
        if now != self.decoder.device:
            raise ValueError(f"generate: the model was moved from {self.decoder.device} to {now} between two tokens")
        with device_of(self.decoder):
            self._advance(count)

    def _advance(self, count: int) -> None:
        while count > 0:
            done = EVERY if count >= EVERY and self._block_serves() else 1
            for turn in range(done):
                self._draw_clocks(turn)
            if done > 1:
                self._replay(done)
            else:
                with self._threads():
                    self._one()
            self.steps, self.filled, count = self.steps + done, self.filled + done, count - done

    def _threads(self) -> contextlib.AbstractContextManager:
        """Of this step, which reads all tokens of a window or one of each row."""
        reads_all = self.steps == 0 or self.filled > self.cache.slots
        return threads_for(self.decoder, self.rows * (min(self.filled, self.decoder.context) if reads_all else 1))

    def _block_serves(self) -> bool:
        """Whether the next steps may be a block: none is of another kind, and it has paid or will pay to capture it."""
        if 1 not in self._graphs or self.filled + EVERY - 1 > self.cache.slots or self.steps == 0:
            return False
        return self.cache.words is not None or self._replayed >= BLOCKS_FROM

    def _one(self) -> None:
        if self.steps == 0:
            self._first()
        elif self.filled > self.cache.slots:  # past the context
            self._take(self._window(), 0)
        elif not self.plan.captures:
            self._step()
        elif 1 not in self._graphs and not (self._warm and self._many):
            self._warm = True
            warmed(self.decoder.device, self._step)
        else:
            self._replay(1)

    def _replay(self, count: int) -> None:
        """So many steps."""
        if count not in self._graphs:
            self._graphs[count] = self._captured(lambda: self._steps_of(count))
            self._alive.append(self.decoder.own_tensors())
        self._graphs[count].replay()
        self._replayed += count

    def _steps_of(self, block: int) -> None:
        for turn in range(block):
            self._step(turn)

    def _captured(self, step: Any) -> torch.cuda.CUDAGraph:
        self.decoder.ready()
        return captured(self.decoder.device, step)[0]

    def _first(self) -> None:
        """The prompts, and the first token after them: in a graph from the second time on that they are as wide."""
        width = self._width

        def read() -> None:
            self._take(self.first_logits(width), 0)

        small = self.rows // self.samples * width <= CAPTURED_PROMPTS and width <= self.cache.slots
        if not (self.plan.captures and small):
            read()
            return
        again = width in self._prompts
        graph = self._prompts.pop(width, None)
        if again and graph is None:
            graph = self._captured(read)
        self._prompts[width] = graph  # the latest last
        if len(self._prompts) > CAPTURED_WIDTHS:
            del self._prompts[next(iter(self._prompts))]
        if graph is None:
            read()
        else:
            graph.replay()

    def first_logits(self, width: int) -> Tensor:
        """(rows, V) after the prompts, padded to this width, which go into the cache, each once."""
        if width > self.cache.slots:
            return self._window()
        prompts, lengths = self.history[:: self.samples, :width], self.lengths[:: self.samples]
        logits = self.decoder.prefill(prompts, lengths, self.cache, self._wide)
        return logits if self.samples == 1 else logits.repeat_interleave(self.samples, 0)

    def _window(self) -> Tensor:
        """The logits after the last tokens that the context holds, from the beginning: no position stays the same."""
        context = self.decoder.context
        starts = (self.lengths - context).clamp(min=0)
        width = min(self.filled, context)
        places = starts[:, None] + torch.arange(width, dtype=torch.int64, device=starts.device)
        ids, lengths = self.history.gather(1, places), self.lengths.clamp(max=context)
        return self.decoder.prefill(ids, lengths, self.cache, self._wide)

    def _step(self, turn: int = 0) -> None:
        """turn: of a block's steps."""
        self._take(self.decoder.decode(self.last, self.lengths, self.cache, self._wide)[:, 0], turn)

    def _take(self, logits: Tensor, turn: int) -> None:
        """Sample from (rows, V), by the clocks of this turn, and write it down."""
        with torch.no_grad():
            logits, clocks = self.allowed(logits), None if self._clocks is None else self._clocks[turn]
            if self._likeliest:
                self.decoder.steps.take_likeliest(logits, self.history, self.lengths, self.news, self.last)
                return
            if self._draws is not None:
                given = self.sampling.penalised(logits, self.seen), clocks, self.sampling.filters, self._rounded
                self._draws(*given, self.history, self.lengths, self.news, self.last)
                if self.seen is not None:
                    self.seen.scatter_(1, self.last, True)
                return
            ids = self.sampling.draw(logits, self.seen, clocks)[:, None]
            places = self.lengths[:, None]
            self.history.scatter_(1, places, ids)
            self.last.copy_(ids)
            if self.seen is not None:
                self.seen.scatter_(1, ids, True)
            place = places % self.plan.ring if self.plan.ring > 1 else None
            if self.logprobs is not None:
                _put(self.logprobs, place, logits.log_softmax(-1).gather(1, ids))
            if not self._finite_at_a_glance(logits):
                low, high = logits.aminmax(dim=-1, keepdim=True)  # NaN is both
                ids = ids.masked_fill(low * 0 != high * 0, -1)  # NaN of what is not finite
            _put(self.news, place, ids)
            self.lengths += 1

    def _draw_clocks(self, turn: int) -> None:
        if self._clocks is not None:
            draw_clocks(self._clocks[turn], self.generator)

    def allowed(self, logits: Tensor) -> Tensor:
        """(…, V) of all outputs -> (…, vocab_size), where ids that are never drawn have the least finite logit: their
        probability is 0, and the row's news stay good."""
        logits = logits[..., : self.vocab_size]
        return logits if self._never is None else logits.masked_fill(self._never, torch.finfo(logits.dtype).min)

    def _finite_at_a_glance(self, logits: Tensor) -> bool:
        """On a CPU, which need not be waited for: a sum is finite only if all of its terms are."""
        return logits.device.type == "cpu" and math.isfinite(logits.sum().item())


def _put(into: Tensor, place: Tensor | None, values: Tensor) -> None:
    """(rows, 1) into (rows, ring) at place (rows, 1), or into (rows, 1)."""
    if place is None:
        into.copy_(values)
    else:
        into.scatter_(1, place, values)
