"""Tokens from a GPT, one after another: of fastgpt's, Hugging Face's, nanoGPT's or the book's."""

import codecs
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from fastgpt import memory
from fastgpt.data.tokenizer import undecodable
from fastgpt.generation.ahead import EVERY, Told, told
from fastgpt.generation.batch import Batch, Plan, plan
from fastgpt.generation.cache import Cache
from fastgpt.generation.decoder import MAX_STEP, Decoder
from fastgpt.generation.given import at_least_1, prompts_of, stop_ids_of, strings_of, whole_number
from fastgpt.generation.kept import clear_all, keep, kept_of, passing
from fastgpt.generation.sampling import Sampling
from fastgpt.generation.speculative import Speculation

Reason = Literal["length", "stop_id", "stop_string"]
DRAFT_TOKENS = 4


class Generation(NamedTuple):
    """What generate made of each row; row p * num_samples + s is sample s of prompt p."""

    tokens: list[list[int]]  # the new ones, with the stop id that ended a row
    reasons: list[Reason]  # why each row ended
    texts: list[str] | None  # of the new tokens, up to a stop string and without a stop id; with an encoding
    logprobs: list[list[float]] | None  # of each new token: its natural logarithm of the model's own probability


class Step(NamedTuple):
    """What stream yields: each row's news, empty for a row that has ended."""

    tokens: list[list[int]]
    texts: list[str] | None  # whole characters; joined, a row's are Generation's text
    logprobs: list[list[float]] | None
    reasons: list[Reason | None]  # of rows that have ended, then or before


def generate(model: nn.Module | Decoder, ids: Any, max_new_tokens: int, **options) -> Generation:
    """Continue the prompts `ids` by up to max_new_tokens tokens each; all of them at the end. The options are stream's.

    ids: (B, T) integers, or a list of prompts of any lengths, each a list of token ids. The model is fastgpt's GPT, or
    a live GPT-2 of Hugging Face, nanoGPT or the book, accelerated or not; it is left as it is.
    `generate(model, ids, 20, temperature=0).tokens`
    """
    steps = list(stream(model, ids, max_new_tokens, **options))
    first, rows = steps[0], range(len(steps[0].tokens))
    return Generation(
        [[token for step in steps for token in step.tokens[row]] for row in rows],
        [reason for reason in steps[-1].reasons if reason is not None],
        None if first.texts is None else ["".join(step.texts[row] for step in steps if step.texts) for row in rows],
        None if first.logprobs is None else [[p for s in steps if s.logprobs for p in s.logprobs[row]] for row in rows],
    )


def stream(
    model: nn.Module | Decoder,
    ids: Any,
    max_new_tokens: int,
    *,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    num_samples: int | None = None,
    seed: int | None = None,
    stop_ids: int | Sequence[int] | None = None,
    stop_strings: str | Sequence[str] | None = None,
    encoding: Any = None,
    attention_mask: Any = None,
    vocab_size: int | None = None,
    logprobs: bool = False,
    overflow: Literal["error", "slide"] = "error",
    dtype: torch.dtype | None = None,
    draft: nn.Module | Decoder | None = None,
    draft_tokens: int | None = None,
) -> Iterator[Step]:
    """Continue prompts, and yield each step's tokens when they are there.

    model, ids: as generate's. A Decoder is a model made ready once, for several calls. None for an option is its
    default.
    temperature, top_k, top_p, min_p, repetition_penalty: see Sampling. num_samples: rows of each prompt, read once; 1.
    seed: makes the draws repeatable and leaves torch's generators alone.
    stop_ids, stop_strings: each row ends by itself, at whichever comes first; strings are found across tokens.
    encoding: tiktoken's, for texts and stop_strings; an id that it can't decode is not drawn. vocab_size: sample among
    the ids below it; the encoding's if None.
    attention_mask: a tensor or lists, 0 where ids is padding, on either side, else 1.
    logprobs: of each token that was chosen.
    overflow: past the context, "error" raises before the first token; "slide" forgets the oldest, and reads the window
    anew for each token, since no position stays the same.
    dtype: of weights and activations, such as torch.bfloat16; the model's own if None. On a CPU one row alone is faster
    so, but without AVX-512 not for fewer than 32 tokens; more rows may be slower.
    draft: a smaller GPT of the same vocabulary that proposes draft_tokens (4, up to 15) at a time, for the model to
    judge: the distribution stays the model's.

    On a GPU no step waits for the host: a step is one CUDA graph, and tokens come to the host four steps at a time,
    while the device has at most seven more steps to do. The first token comes by itself. What a step writes beyond a
    row's end is not told. With a draft, a round of tokens waits once.
    A stream that is closed before its end may be followed by any other call.
    TypeError and ValueError for bad arguments, before any work. ValueError for logits that are not finite: it names
    their position and the first part of the model that made such a number.
    """
    filters = dict(temperature=temperature, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty)
    given: dict[str, Any] = {name: value for name, value in filters.items() if value is not None}
    sampling = Sampling(top_k=None if top_k is None else whole_number("top_k", top_k), **given)
    max_new_tokens = at_least_1("max_new_tokens", max_new_tokens)
    num_samples = 1 if num_samples is None else at_least_1("num_samples", num_samples)
    draft_tokens = DRAFT_TOKENS if draft_tokens is None else whole_number("draft_tokens", draft_tokens)
    vocab_size = None if vocab_size is None else whole_number("vocab_size", vocab_size)
    seed = None if seed is None else whole_number("seed", seed)
    if seed is not None and not -(2**63) <= seed < 2**63:
        raise ValueError(f"generate: seed is {seed!r}, not a 64-bit integer")
    if overflow not in ("error", "slide"):
        raise ValueError(f"generate: overflow is {overflow!r}, not 'error' or 'slide'")
    if draft is not None and not 1 <= draft_tokens < MAX_STEP:
        raise ValueError(f"generate: draft_tokens is {draft_tokens}, not from 1 to {MAX_STEP - 1}")
    if draft is not None and overflow == "slide":
        raise ValueError("generate: overflow='slide' does not go with a draft")
    prompts = prompts_of(ids, attention_mask)
    stops = _Stops(stop_ids_of(stop_ids), strings_of(stop_strings), encoding)
    rows = len(prompts) * num_samples
    decoder = _ready(model, dtype, max_new_tokens, rows if draft is None else rows * (draft_tokens + 1))
    helper = None if draft is None else _ready(draft, dtype, max_new_tokens, rows)
    vocab_size = _vocabulary(decoder, helper, vocab_size, encoding)
    _check_tokens(prompts, decoder)
    longest = max(map(len, prompts))
    _check_context(decoder, longest, max_new_tokens, overflow)
    if helper is not None and helper.context < longest + max_new_tokens - 1:
        raise ValueError(f"generate: the draft's context is {helper.context}, the model's {decoder.context}")
    options: dict[str, Any] = dict(samples=num_samples, vocab_size=vocab_size, logprobs=logprobs)
    options |= dict(seeded=seed is not None, never=() if encoding is None else undecodable(encoding))
    spare = 0 if helper is None else MAX_STEP  # what a round may write beyond the tokens asked for
    planned = plan(decoder, longest, rows, max_new_tokens, sampling, spare=spare, **options)
    batch = kept_of(decoder).take(planned) if planned.captures else None
    if batch is None:
        _check_memory(decoder, planned, helper)
        batch = Batch(decoder, planned)
    batch.begin(decoder, prompts, seed, max_new_tokens)
    speculation = None if helper is None else Speculation(batch, helper, draft_tokens)
    repeated = [prompt for prompt in prompts for _ in range(num_samples)]
    return _continue(batch, speculation, [_Row(prompt, max_new_tokens, stops) for prompt in repeated], stops)


# The checks.


def _ready(model: Any, dtype: torch.dtype | None, tokens: int, rows: int) -> Decoder:
    if not isinstance(model, Decoder):
        return passing(model, dtype, tokens, rows)
    model.check_unchanged()
    return model


def _vocabulary(decoder: Decoder, helper: Decoder | None, asked: int | None, encoding: Any) -> int:
    size = decoder.outputs
    if encoding is not None and encoding.n_vocab > size:
        raise ValueError(f"generate: the encoding {encoding.name!r} has {encoding.n_vocab} ids, the model {size}")
    if asked is not None and not 1 <= asked <= size:
        raise ValueError(f"generate: vocab_size is {asked}, not from 1 to the model's {size}")
    if helper is not None and (helper.outputs, helper.vocabulary) != (size, decoder.vocabulary):
        raise ValueError(f"generate: the draft's vocabulary is {helper.outputs}, the model's {size}")
    if encoding is None:
        return asked or size
    return min(asked or encoding.n_vocab, encoding.n_vocab)  # what lies above, a padded head has and no text


def _check_tokens(prompts: list[list[int]], decoder: Decoder) -> None:
    for number, prompt in enumerate(prompts):
        if min(prompt) < 0 or max(prompt) >= decoder.vocabulary:
            place, token = next((i, t) for i, t in enumerate(prompt) if not 0 <= t < decoder.vocabulary)
            raise ValueError(
                f"generate: token {token} at {place} of prompt {number} is outside a vocabulary of {decoder.vocabulary}"
            )


def _check_context(decoder: Decoder, longest: int, new: int, overflow: str) -> None:
    if overflow == "error" and longest + new > decoder.context + 1:  # the last token is never fed back
        raise ValueError(
            f"generate: {longest} + {new} tokens pass the context of {decoder.context}; overflow='slide' forgets the "
            f"oldest"
        )


def _check_memory(decoder: Decoder, planned: Plan, helper: Decoder | None) -> None:
    """ValueError for what the memory of the device does not hold, once what calls before left there is given back."""
    pairs = [decoder] if helper is None else [decoder, helper]
    caches = [Cache.size(each.gpt.config, planned.rows, planned.slots, each.dtype, each.windows) for each in pairs]
    clocks = planned.sampling.clocks(planned.vocab_size) * (EVERY if planned.captures else 1)
    needed = sum(caches) + planned.rows * (planned.room * 8 + (decoder.outputs + clocks) * 4)
    there = memory.available_bytes(decoder.device)
    if there is not None and needed > there:
        clear_all()
        there = memory.available_bytes(decoder.device)
    if there is not None and needed > there:
        raise ValueError(
            f"generate: {planned.rows} rows of {planned.slots} tokens need about {needed / 2**30:,.1f} GiB, "
            f"{decoder.device} has {there / 2**30:,.1f}"
        )


# The host's side: what the tokens of a row say, and when it ends.


class _Stops:
    def __init__(self, ids: frozenset[int], strings: list[str], encoding: Any):
        if strings and encoding is None:
            raise ValueError("generate: stop_strings need an encoding, to read the tokens with")
        for string in strings:
            if not isinstance(string, str) or not string:
                raise ValueError(f"generate: stop_strings holds {string!r}, not a string of at least one character")
        if encoding is not None and not hasattr(encoding, "decode_single_token_bytes"):
            raise TypeError(f"generate: encoding is a {type(encoding).__name__}, not a tiktoken.Encoding")
        self.ids, self.strings, self.encoding = ids, strings, encoding


class _Row:
    """One row's tokens so far, its text that is certain, and why it ended."""

    def __init__(self, prompt: list[int], limit: int, stops: _Stops):
        self.prompt, self.limit, self.stops = prompt, limit, stops
        self.tokens: list[int] = []
        self.reason: Reason | None = None
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""  # what may be the beginning of a stop string

    def take(self, ids: list[int]) -> tuple[list[int], str]:
        """The ids that count, and the text that has become certain."""
        kept, text = [], ""
        for token in ids:
            if self.reason is not None:
                break
            kept.append(token)
            self.tokens.append(token)
            if token in self.stops.ids:
                self.reason = "stop_id"
            elif self.stops.encoding is not None:
                text += self._read(self.stops.encoding.decode_single_token_bytes(token))
            if self.reason is None and len(self.tokens) == self.limit:
                self.reason = "length"
            if self.reason in ("stop_id", "length"):
                text += self._read(b"", final=True)
        return kept, text

    def _read(self, data: bytes, final: bool = False) -> str:
        """Whole characters, but for those that a stop string may begin with."""
        text = self._held + self._decoder.decode(data, final)
        places = [place for string in self.stops.strings if (place := text.find(string)) >= 0]
        if places:
            self.reason, self._held = "stop_string", ""
            return text[: min(places)]
        held = 0 if final else max((_overlap(text, string) for string in self.stops.strings), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, string: str) -> int:
    """The most characters of the end of `text` that `string` begins with, short of all."""
    return next((n for n in range(min(len(text), len(string) - 1), 0, -1) if text.endswith(string[:n])), 0)


def _continue(batch: Batch, speculation: Speculation | None, rows: list[_Row], stops: _Stops) -> Iterator[Step]:
    """A generator of its own, so that stream's checks run when it is called, not at the first token."""
    try:
        yield from _steps(batch, speculation, rows, stops)
    except GeneratorExit:  # closed before its end: what the device still writes is nobody's
        keep(batch)
        raise
    keep(batch)


def _steps(batch: Batch, speculation: Speculation | None, rows: list[_Row], stops: _Stops) -> Iterator[Step]:
    for each in _told(batch, speculation, rows):
        tokens, texts, logprobs = [], [], []
        for number, row in enumerate(rows):
            if row.reason is None and -1 in each.ids[number]:
                row.take(each.ids[number][: each.ids[number].index(-1)])
                raise ValueError(_not_finite(batch.decoder, row))
            kept, text = row.take(each.ids[number]) if row.reason is None else ([], "")
            tokens.append(kept)
            texts.append(text)
            logprobs.append(each.logprobs[number][: len(kept)] if each.logprobs is not None else [])
        yield Step(
            tokens,
            None if stops.encoding is None else texts,
            None if each.logprobs is None else logprobs,
            [row.reason for row in rows],
        )


def _told(batch: Batch, speculation: Speculation | None, rows: list[_Row]) -> Iterator[Told]:
    """What each step tells, until all rows have ended."""

    def ended() -> bool:
        return all(row.reason is not None for row in rows)

    if speculation is None:
        yield from told(batch, rows[0].limit, ended)
        return
    yield speculation.start()
    while not ended():
        speculation.active = [row.reason is None for row in rows]
        yield speculation.round()


def _not_finite(decoder: Decoder, row: _Row) -> str:
    ids = row.prompt + row.tokens
    window = torch.tensor(ids[-decoder.context :], dtype=torch.int64, device=decoder.device)
    part = decoder.first_not_finite(window)
    where = f"first in {part}" if part else "and a second pass over its tokens finds them finite"
    return f"generate: the model's logits at position {len(ids) - 1} are not finite, {where}"
