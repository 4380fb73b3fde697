"""Tokens from a GPT, one after another."""

import math
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from fastgpt.model import GPT


def generate(
    model: GPT,
    ids: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int | None = None,
    vocab_size: int | None = None,
    overflow: Literal["error", "slide"] = "error",
) -> Iterator[Tensor]:
    """Continue the prompts `ids` (B, T): yields the next ids (B,), max_new_tokens times.

    temperature 0 takes the likeliest token. top_k samples among the k likeliest, vocab_size among the ids below it
    (a tokenizer smaller than the head). seed makes the draws repeatable and leaves torch's generators alone. Past the
    context, overflow="error" raises before the first token and "slide" forgets the oldest ones.
    ValueError for a bad argument, and for logits that are not finite.
    """
    context, size = model.config.block_size, model.config.vocab_size
    if ids.dim() != 2 or ids.shape[1] == 0:
        raise ValueError(f"generate: ids has shape {tuple(ids.shape)}, not (B, T) with T at least 1")
    if max_new_tokens < 1:
        raise ValueError(f"generate: max_new_tokens is {max_new_tokens}, not at least 1")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"generate: temperature is {temperature}, not a finite number of at least 0")
    if top_k is not None and top_k < 1:
        raise ValueError(f"generate: top_k is {top_k}, not at least 1")
    if vocab_size is not None and not 1 <= vocab_size <= size:
        raise ValueError(f"generate: vocab_size is {vocab_size}, not from 1 to the model's {size}")
    if seed is not None and not -(2**63) <= seed < 2**63:
        raise ValueError(f"generate: seed is {seed}, not a 64-bit integer")
    if overflow not in ("error", "slide"):
        raise ValueError(f"generate: overflow is {overflow!r}, not 'error' or 'slide'")
    if overflow == "error" and ids.shape[1] + max_new_tokens > context + 1:  # the last token is never fed back
        total = f"{ids.shape[1]} + {max_new_tokens}"
        raise ValueError(f"generate: {total} tokens pass the context of {context}; overflow='slide' forgets the oldest")
    generator = None
    if seed is not None:
        generator = torch.Generator(ids.device).manual_seed(seed)
    return _continue(model, ids, max_new_tokens, temperature, top_k, generator, vocab_size)


def _continue(model, ids, max_new_tokens, temperature, top_k, generator, vocab_size) -> Iterator[Tensor]:
    """A generator of its own, so that generate's checks run when it is called, not at the first token."""
    training = model.training
    model.eval()
    try:
        for _ in range(max_new_tokens):
            with torch.no_grad():  # inference tensors could not be trained on
                features = model.features(ids[:, -model.config.block_size :])
                logits = model.head(features[:, -1]).float()[:, :vocab_size]  # (B, V)
                if not logits.isfinite().all():
                    raise ValueError(f"generate: the model's logits at position {ids.shape[1] - 1} are not finite")
                next_ids = _sample(logits, temperature, top_k, generator)
                ids = torch.cat((ids, next_ids[:, None]), dim=1)
            yield next_ids
    finally:
        model.train(training)


def _sample(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None) -> Tensor:
    if temperature < torch.finfo(torch.float32).tiny:  # 0, as far as float32 can tell
        return logits.argmax(-1)
    if top_k is not None and top_k < logits.shape[-1]:
        least = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    logits = logits - logits.amax(-1, keepdim=True)  # or a small temperature would make them infinite
    return torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)[:, 0]
