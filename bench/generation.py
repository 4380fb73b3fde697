"""Prompts read and tokens written: fastgpt's cache, Hugging Face's, and loops that compute all of it anew a token."""

import copy
import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from bench import baselines, families, work
from bench.case import EAGER, SUBJECT, Case, Subject
from bench.compiled_loop import CompiledLoop
from bench.families import BOOK, HUGGING_FACE, NANOGPT
from bench.machine import Machine
from bench.models import gpt, with_backend
from fastgpt.generation import generate
from fastgpt.generation.decoder import Decoder
from fastgpt.model import GPT, GPTConfig
from fastgpt.testing import on_reference

KEPT, BOOK_CACHED = f"{SUBJECT}, a Decoder kept", "the book, its cached file"
STATIC = f"{HUGGING_FACE}, static cache"  # which its generate compiles on a GPU
LOOP = "a plain loop, static cache, torch.compile"
HUGGING_FACE_FLOAT32 = f"{HUGGING_FACE}, float32"
_TO_BE_WRITTEN = 10_000  # by a decoder that is kept
_RECOMPUTED = 16  # tokens at most, on a CPU, of a loop that computes all of it anew a token


def generation(
    machine: Machine,
    B: int,
    prompt: int,
    new: int,
    config: dict,
    tier: int,
    dtype: torch.dtype | None = None,
    only: tuple[str, ...] = (),
) -> list[Case]:
    """Greedy tokens after a prompt; one alone is the prefill. Checked: the logits after the prompt. dtype: what all
    weights are cast to, if not None. only: these variants, or all."""
    shape = GPTConfig(**config)

    def problem():
        model = gpt(machine, config).eval()
        return model, torch.arange(B * prompt, device=machine.device).view(B, prompt) * 7919 % shape.vocab_size

    def exact(p, **changes):
        return _ours(on_reference(with_backend(p[0], "torch", **changes)).double(), p[1], new).results()

    def recomputing(model: nn.Module, p) -> Subject:
        if machine.kind == "cpu" and new > _RECOMPUTED:
            raise baselines.Unavailable("it computes all of it anew a token: minutes of this benchmark on a CPU")
        return _recomputing(model, p[1], new)

    def nanogpt(p):
        model = families.nanogpt(p[0], machine.nanogpt)
        return recomputing(model, p)._replace(expected=lambda: exact(p, gelu="none"))

    def cast(build: Callable[..., Subject], p) -> Subject:
        """The same at weights of that dtype."""
        return build((copy.deepcopy(p[0]).to(dtype), p[1])).judged_as(dtype, lambda: exact(p))

    variants: dict[str, Callable] = {
        SUBJECT: lambda p: _ours(*p, new),
        KEPT: lambda p: _kept(*p, new),
    }
    if machine.kind != "cpu":
        variants[EAGER] = lambda p: _ours(with_backend(p[0], "torch"), p[1], new)
    variants |= {
        HUGGING_FACE: lambda p: _hugging_face(*p, new),
        **({STATIC: lambda p: _hugging_face(*p, new, static=True)} if new > 1 else {}),
        NANOGPT: nanogpt,
        BOOK: lambda p: recomputing(families.book(p[0]), p),
    }
    if new > 1:
        variants[LOOP] = lambda p: _compiled_loop(machine, *p, new)
    if new > 1 and dtype is None:  # its cache is float32
        variants[BOOK_CACHED] = lambda p: _cached(*families.book_cached(p[0], machine.book), p[1], new)
    variants = {name: build for name, build in variants.items() if not only or name in (*only, EAGER)}  # the judge
    if dtype is not None:
        variants = {name: functools.partial(cast, build) for name, build in variants.items()}
        if new > 1 and machine.kind == "cpu":  # what a cast is held against, in the same turns
            variants[HUGGING_FACE_FLOAT32] = lambda p: _hugging_face(*p, new)
    floor = work.generation(shape, B, prompt, new, (dtype or machine.dtype).itemsize)
    if dtype is not None:  # the roof that was measured is not this dtype's
        floor = work.Work(0, floor.bytes)
    numbers = dict(B=B, prompt=prompt, new=new, L=shape.n_layer, C=shape.n_embd)
    op = ("prefill" if new == 1 else "generate") + (f", {dtype}".replace("torch.", "") if dtype else "")
    memory = work.parameters(shape) * (machine.dtype.itemsize + max(8, machine.dtype.itemsize * len(variants)))
    options = dict(capture=False, memory=memory, peak=machine.kind != "cpu" or new == 1)
    setting = f"all in {dtype}".replace("torch.", "") if dtype else ""
    return [Case(op, numbers, tier, floor, problem, variants, exact, setting=setting, **options)]


def _ours(model: GPT, ids: Tensor, new: int) -> Subject:
    @torch.no_grad()
    def logits():
        return (model.head(model.features(ids)[:, -1]),)

    return Subject(lambda: generate(model, ids, new, temperature=0), logits)


def _kept(model: GPT, ids: Tensor, new: int) -> Subject:
    """What a later call costs: the weights are cast and laid out already."""
    decoder = Decoder(model, tokens=_TO_BE_WRITTEN)
    return Subject(
        lambda: generate(decoder, ids, new, temperature=0), lambda: (decoder.logits(decoder.features(ids)[:, -1]),)
    )


def _hugging_face(ours: GPT, ids: Tensor, new: int, static: bool = False) -> Subject:
    """Its generate, with the cache that grows or, static, with one of a fixed size."""
    model = families.hugging_face(ours)
    options: dict = dict(attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0)
    if static:
        options["cache_implementation"] = "static"

    @torch.no_grad()
    def logits():
        if not static:
            return (model(ids).logits[:, -1],)
        one = dict(max_new_tokens=1, output_logits=True, return_dict_in_generate=True)  # through its cache
        return (model.generate(ids, **options, **one).logits[0].to(model.dtype),)

    return Subject(lambda: model.generate(ids, **options, max_new_tokens=new, min_new_tokens=new), logits)


def _compiled_loop(machine: Machine, model: GPT, ids: Tensor, new: int) -> Subject:
    baselines.compiles_models(machine)
    loop = CompiledLoop(model, len(ids), ids.shape[1] + new, machine)

    @torch.no_grad()
    def logits():
        return (loop(ids, torch.arange(ids.shape[1], device=ids.device)),)

    return Subject(lambda: loop.generate(ids, new), logits)


def _cached(model: nn.Module, continued: Callable, ids: Tensor, new: int) -> Subject:
    @torch.no_grad()
    def logits():
        return (model(ids)[:, -1],)

    return Subject(lambda: continued(model, ids, new), logits)


def _recomputing(model: nn.Module, ids: Tensor, new: int) -> Subject:
    """Every token from the whole of what came before, as nanoGPT's and the book's own loops do."""

    def last(seen: Tensor) -> Tensor:
        output = model(seen)
        return (output[0] if isinstance(output, tuple) else output)[:, -1]

    @torch.no_grad()
    def run():
        seen = ids
        for _ in range(new):
            seen = torch.cat((seen, last(seen).argmax(-1, keepdim=True)), dim=1)
        return seen

    @torch.no_grad()
    def logits():
        return (last(ids),)

    return Subject(run, logits)
