"""The commands `fastgpt generate` and `fastgpt eval`: a model writes text, or reads one."""

import argparse
import contextlib
import functools
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken
import torch

from fastgpt.atomic import replacing
from fastgpt.cli.surprise import page
from fastgpt.data import holds_tokens, read_tokens
from fastgpt.data.tokenizer import Named, Unavailable, beginning, encoding, end_of_text, has_end_of_text, named
from fastgpt.data.tokens import meta_beside, meta_of
from fastgpt.generation import generate, stream
from fastgpt.generation.decoder import Decoder
from fastgpt.generation.evaluation import evaluate
from fastgpt.model import GPT
from fastgpt.training.distributed import device_named
from fastgpt.weights import load_named

DTYPES = ("float32", "bfloat16", "float16")


def add_generate(commands: Any) -> None:
    write = commands.add_parser("generate", help="write text with a trained GPT", allow_abbrev=False)
    write.set_defaults(run=_generate)
    given = write.add_mutually_exclusive_group()
    given.add_argument("--prompt", help="what to continue (default: a new document, or, on a terminal, ask for it)")
    given.add_argument("--prompt_file", metavar="FILE", help="continue what this file holds; - is standard input")
    given.add_argument("--interactive", action="store_true", help="ask for one prompt after another")
    _add_model(write)
    write.add_argument("--max_new_tokens", type=int, default=400, metavar="N")
    write.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest (default: 0.8)")
    write.add_argument("--top_k", type=int, metavar="K", help="sample among the K likeliest")
    write.add_argument("--top_p", type=float, default=1.0, metavar="P", help="… among the fewest that reach P together")
    write.add_argument("--min_p", type=float, default=0.0, metavar="P", help="… among those of P times the likeliest's")
    write.add_argument("--repetition_penalty", type=float, default=1.0, metavar="R", help="above 1 shuns repetition")
    write.add_argument("--num_samples", type=int, default=1, metavar="N", help="texts of the one prompt")
    write.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before it; may be given again")
    write.add_argument("--seed", type=int, help="makes the text repeatable")
    write.add_argument(
        "--overflow", choices=("slide", "error"), default="slide", help="past the context (default: slide)"
    )
    write.add_argument("--draft", metavar="PATH", help="a smaller model of the same vocabulary, to propose tokens")
    write.add_argument("--json", action="store_true", help="one JSON object instead of text")


def add_eval(commands: Any) -> None:
    read = commands.add_parser("eval", help="loss, perplexity and bits a byte of a text", allow_abbrev=False)
    read.set_defaults(run=_evaluate)
    read.add_argument("data", metavar="FILE", help="text, a folder of it, or tokens: a .bin, or a folder's val.bin")
    _add_model(read)
    read.add_argument("--window", type=int, metavar="N", help="tokens of a pass (default: the context)")
    read.add_argument("--stride", type=int, metavar="N", help="new tokens of a pass (default: half a window)")
    read.add_argument("--batch_size", type=int, default=8, metavar="N", help="passes at once (default: 8)")
    read.add_argument("--html", metavar="FILE", help="also write a page that colours each token by its surprise")
    read.add_argument("--json", action="store_true", help="one JSON object instead of text")


def _add_model(parser: argparse.ArgumentParser) -> None:
    model = parser.add_argument_group("the model")
    model.add_argument(
        "--checkpoint", default="out", metavar="PATH", help="a folder or file of any family, or gpt2 (default: out)"
    )
    model.add_argument("--encoding", help="byte, gpt2, … (default: the model's)")
    model.add_argument("--n_head", type=int, metavar="N", help="heads, where nothing in PATH says how many")
    model.add_argument("--device", default="auto", help="cpu, cuda, mps, … (default: cuda where there is one)")
    model.add_argument("--dtype", choices=DTYPES, help="of weights and activations (default: the model's)")


def load(path: str, name: str | None, n_head: int | None = None) -> tuple[GPT, tiktoken.Encoding]:
    """The model at `path`, of any family, and its encoding, or the one of that name.

    ValueError where none is named and nothing tells it.
    """
    model, name = named_model(path, name, n_head)
    return model, encoding(name)


def named_model(path: str, name: str | None, n_head: int | None = None) -> tuple[GPT, str]:
    """load with no more of the encoding than its name."""
    model, told = load_named(path, n_head=n_head)
    name = name or told
    if name is None:
        raise ValueError(f"{path} has a vocabulary of {model.config.vocab_size}: name its --encoding")
    return model, name


def _model(options: argparse.Namespace) -> tuple[GPT, tiktoken.Encoding]:
    model, tokens = load(options.checkpoint, options.encoding, options.n_head)
    return model.to(device_named(options.device)), tokens


def _generate(options: argparse.Namespace) -> None:
    model, tokens = _model(options)
    dtype = None if options.dtype is None else getattr(torch, options.dtype)
    decoder = Decoder(model, dtype=dtype, tokens=options.max_new_tokens)
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "num_samples", "seed", "overflow")
    how: dict = {name: getattr(options, name) for name in names}
    how["stop_strings"] = options.stop
    if options.draft is not None:
        draft, _ = load(options.draft, tokens.name, options.n_head)
        how.update(draft=draft.to(decoder.device), overflow="error")
    nothing = options.prompt is None and options.prompt_file is None
    if options.interactive or (nothing and not options.json and sys.stdin.isatty() and sys.stdout.isatty()):
        _converse(decoder, tokens, options.max_new_tokens, how)
    elif options.json:
        _write_json(decoder, tokens, _prompt(options), options.max_new_tokens, how)
    else:
        write(decoder, tokens, _prompt(options), options.max_new_tokens, **how)


def _prompt(options: argparse.Namespace) -> str:
    """Bytes that are no UTF-8 become the replacement character, as they do in what a model writes."""
    if options.prompt_file is None:
        return (options.prompt or "").encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    if options.prompt_file == "-":
        return sys.stdin.buffer.read().decode("utf-8-sig", "replace")
    return Path(options.prompt_file).read_bytes().decode("utf-8-sig", "replace")


def _ids(tokens: tiktoken.Encoding, prompt: str) -> list[list[int]]:
    """Text that spells a special token stays text; no text is a new document."""
    return [tokens.encode(prompt, disallowed_special=()) or [beginning(tokens)]]


def _end(tokens: tiktoken.Encoding) -> int | None:
    return end_of_text(tokens) if has_end_of_text(tokens) else None


def write(
    model: GPT | Decoder, tokens: tiktoken.Encoding, prompt: str, max_new_tokens: int, *, speed: bool = True, **how
) -> None:
    """Print the prompt and its continuation as it comes; several samples one after another. `how` is stream's."""
    started, count = time.perf_counter(), 0
    if how.get("num_samples", 1) == 1:
        steps = stream(model, _ids(tokens, prompt), max_new_tokens, encoding=tokens, stop_ids=_end(tokens), **how)
        print(prompt, end="", flush=True)
        for step in steps:
            print(step.texts[0] if step.texts else "", end="", flush=True)
            count += len(step.tokens[0])
        print(flush=True)
    else:
        found = generate(model, _ids(tokens, prompt), max_new_tokens, encoding=tokens, stop_ids=_end(tokens), **how)
        for number, text in enumerate(found.texts or (), 1):
            print(f"--- {number}\n{prompt}{text}", flush=True)
        count = sum(map(len, found.tokens))
    if speed:
        _tell_speed(count, time.perf_counter() - started)


def _tell_speed(count: int, seconds: float) -> None:
    print(f"{count} tokens in {seconds:.2f} s, {count / seconds:,.1f} tokens/s", file=sys.stderr)


def _write_json(decoder: Decoder, tokens: tiktoken.Encoding, prompt: str, max_new_tokens: int, how: dict) -> None:
    started = time.perf_counter()
    ids = _ids(tokens, prompt)
    found = generate(
        decoder, ids, max_new_tokens, encoding=tokens, stop_ids=_end(tokens), logprobs=True, **how
    )  # fmt: skip
    seconds, count = time.perf_counter() - started, sum(map(len, found.tokens))
    rows = zip(found.texts or (), found.tokens, found.reasons, found.logprobs or (), strict=True)
    samples = [dict(text=text, tokens=row, reason=why, logprobs=logs) for text, row, why, logs in rows]
    told = dict(prompt=prompt, prompt_tokens=len(ids[0]), samples=samples, seconds=seconds)
    print(json.dumps({**told, "tokens_per_second": count / seconds}))


def _converse(decoder: Decoder, tokens: tiktoken.Encoding, max_new_tokens: int, how: dict) -> None:
    """A prompt a line, until the end of the input. Ctrl-C ends a text, not the conversation. On a terminal a line can
    be edited, and earlier ones come back by the arrow keys."""
    with contextlib.suppress(ModuleNotFoundError):  # Windows has none, and its terminal edits by itself
        import readline  # noqa: F401, input() takes it
    while True:
        try:
            prompt = input("prompt> ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:  # a line that is given up
            print()
            continue
        try:
            write(decoder, tokens, prompt, max_new_tokens, **how)
        except KeyboardInterrupt:
            print()
        except ValueError as error:
            print(error, file=sys.stderr)


def _evaluate(options: argparse.Namespace) -> None:
    model, name = named_model(options.checkpoint, options.encoding, options.n_head)
    model = model.to(device_named(options.device))
    tokens = _encoding_of(name, options)
    if options.html is not None and isinstance(tokens, Named):
        raise ValueError(f"--html shows text, and the encoding's files can't be had: {tokens.why}")
    ids = read_tokens(options.data, tokens)
    text = not options.data.endswith(".bin")
    if text and (isinstance(tokens, Named) or has_end_of_text(tokens)):  # behind it, so that the first is predicted too
        ids = np.concatenate((ids[-1:], ids[:-1]))
    found = evaluate(
        model,
        ids,
        count_bytes=None if isinstance(tokens, Named) else functools.partial(_bytes, tokens=tokens),
        window=options.window,
        stride=options.stride,
        batch_size=options.batch_size,
        dtype=None if options.dtype is None else getattr(torch, options.dtype),
        progress=True,
        each=options.html is not None,
    )
    said = f"loss {found.loss:.4f} nats a token, perplexity {found.perplexity:.3f}"
    if found.bits_per_byte is None:
        said += f" ({found.tokens:,} tokens)"
    else:
        said += f", {found.bits_per_byte:.4f} bits a byte ({found.tokens:,} tokens, {found.bytes:,} bytes)"
    if found.losses is not None and isinstance(tokens, tiktoken.Encoding):
        title = f"{Path(options.data).name}, as {options.checkpoint} reads it"
        with replacing(Path(options.html)) as new:
            new.write_text(page(title, f"{said}.", ids[1:].tolist(), found.losses, tokens), encoding="utf-8")
    numbers = {name: value for name, value in found._asdict().items() if name != "losses"}
    print(json.dumps(numbers) if options.json else said)


def _encoding_of(name: str, options: argparse.Namespace) -> tiktoken.Encoding | Named:
    """The encoding; of tokens, where its files can't be had and it was not asked for, what is known without them."""
    try:
        return encoding(name)
    except Unavailable as error:
        source = Path(options.data)
        meta = meta_beside(source) if source.suffix == ".bin" else meta_of(source)
        without = named(name, meta, str(error)) if options.encoding is None and holds_tokens(source) else None
        if without is None:
            raise
        print(f"bits a byte are left out: {error}", file=sys.stderr)
        return without


def _bytes(ids: np.ndarray, tokens: tiktoken.Encoding) -> int:
    """Of the text that these tokens spell; the end of a document is none."""
    sizes = np.zeros(tokens.n_vocab, dtype=np.int64)
    for token in np.unique(ids).tolist():
        sizes[token] = 0 if token == _end(tokens) else len(tokens.decode_single_token_bytes(token))
    counts = np.bincount(np.asarray(ids), minlength=tokens.n_vocab)
    return int((counts * sizes).sum())
