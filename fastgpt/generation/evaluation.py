"""What a GPT thinks of a text: its loss, perplexity and bits a byte."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from fastgpt.generation.decoder import Decoder


class Evaluation(NamedTuple):
    loss: float  # nats a token: the mean over all of them
    perplexity: float
    bits_per_byte: float | None  # where the number of bytes is known
    tokens: int  # that were predicted: all but the first
    bytes: int | None  # of those
    losses: tuple[float, ...] | None = None  # of each of them, in nats, where they were asked for


def evaluate(
    model: Any,
    tokens: np.ndarray,
    *,
    count_bytes: Callable[[np.ndarray], int] | None = None,
    window: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
    dtype: torch.dtype | None = None,
    progress: bool = False,
    each: bool = False,
) -> Evaluation:
    """The loss of tokens (N,) under a GPT of any family, each token but the first predicted once.

    window: tokens of a pass, the context if None. stride: of how many new tokens each pass counts the loss, half a
    window if None; the others before them are what they are read after. A stride of the window is the fastest, one of 1
    gives each token all that the window holds. count_bytes: of tokens, for bits a byte. each: keep each token's loss.
    ValueError for tokens that are too few or outside the vocabulary, and for a loss that is not finite.
    """
    decoder = model if isinstance(model, Decoder) else Decoder(model, dtype=dtype)
    decoder.check_unchanged()
    window = decoder.context if window is None else window
    if not 1 <= window <= decoder.context:
        raise ValueError(f"eval: window is {window}, not from 1 to the context of {decoder.context}")
    stride = max(1, window // 2) if stride is None else stride
    if not 1 <= stride <= window:
        raise ValueError(f"eval: stride is {stride}, not from 1 to the window of {window}")
    if batch_size < 1:
        raise ValueError(f"eval: batch_size is {batch_size}, not at least 1")
    if len(tokens) < 2:
        raise ValueError(f"eval: {len(tokens)} tokens leave nothing to predict")
    if int(tokens.min()) < 0 or int(tokens.max()) >= decoder.vocabulary:
        place = int(((tokens < 0) | (tokens >= decoder.vocabulary)).argmax())
        raise ValueError(
            f"eval: token {tokens[place]} at offset {place} is outside a vocabulary of {decoder.vocabulary}"
        )
    losses = np.empty(len(tokens) - 1, dtype=np.float32)
    with tqdm(total=len(tokens) - 1, unit="token", unit_scale=True, disable=None if progress else True) as line:
        for passes in _batches(len(tokens), window, stride, batch_size):
            counted = losses[passes[0][1] - 1 : passes[-1][2] - 1]  # a batch's passes follow each other
            counted[:] = _losses(decoder, tokens, passes)
            line.update(len(counted))
            if not (finite := np.isfinite(counted)).all():
                bad = int(finite.argmin())
                raise ValueError(f"eval: the loss of the token at offset {passes[0][1] + bad} is {counted[bad]}")
    predicted = len(tokens) - 1
    size = None if count_bytes is None else count_bytes(tokens[1:])
    total = math.fsum(losses.tolist())
    loss, kept = total / predicted, tuple(losses.tolist()) if each else None
    perplexity = math.exp(loss) if loss < 700 else math.inf
    return Evaluation(loss, perplexity, total / math.log(2) / size if size else None, predicted, size, kept)


def _batches(count: int, window: int, stride: int, batch_size: int) -> list[list[tuple[int, int, int]]]:
    """Passes (begin, counted, end): tokens begin to end - 1 are read, and the losses of counted to end - 1 count.

    A pass of a batch has as many tokens as the others: the first ones, which are shorter, are alone.
    """
    batches: list[list[tuple[int, int, int]]] = []
    counted = 1
    while counted < count:
        first = counted == 1
        end = min(count, counted + (window if first else stride))
        begin = max(0, end - window - 1)
        same = batches and len(batches[-1]) < batch_size and batches[-1][-1][2] - batches[-1][-1][0] == end - begin
        if same:
            batches[-1].append((begin, counted, end))
        else:
            batches.append([(begin, counted, end)])
        counted = end
    return batches


@torch.no_grad()
def _losses(decoder: Decoder, tokens: np.ndarray, passes: list[tuple[int, int, int]]) -> np.ndarray:
    """Of the tokens that count, pass after pass."""
    rows = np.stack([tokens[begin:end] for begin, _, end in passes]).astype(np.int64)
    ids = torch.from_numpy(rows).to(decoder.device)
    counts = [[begin + i + 1 >= counted for i in range(end - begin - 1)] for begin, counted, end in passes]
    kept = torch.tensor(counts, dtype=torch.bool, device=ids.device)
    x = decoder.features(ids[:, :-1])[kept]  # (N, C): no logits of what does not count
    targets = ids[:, 1:][kept]
    parts = zip(x.split(1024), targets.split(1024), strict=True)
    return (
        torch.cat([F.cross_entropy(decoder.logits(part), aim, reduction="none") for part, aim in parts]).cpu().numpy()
    )
