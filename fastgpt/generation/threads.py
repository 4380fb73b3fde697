"""Where a pass runs: which device is the current one, and how many of a CPU's threads it takes."""

import contextlib
from collections.abc import Iterator

import torch

from fastgpt.generation.decoder import Decoder

SMALL = 1 << 19  # multiplications in a step's largest matmul, up to which a CPU's second thread gains nothing


def device_of(decoder: Decoder):
    """A context in which the decoder's device is the current one: a graph is captured there, and an event recorded."""
    return torch.cuda.device(decoder.device) if decoder.device.type == "cuda" else contextlib.nullcontext()


@contextlib.contextmanager
def threads_for(decoder: Decoder, tokens: int) -> Iterator[None]:
    """On a CPU, one thread for a pass of so few tokens through so small a model that a second one gains nothing.

    The others spin while they wait for work, and on a busy machine each wait is for a processor: docs/generation.md has
    what was measured. The user's number is set again after each pass.
    """
    threads = torch.get_num_threads()
    if decoder.device.type != "cpu" or threads == 1 or _work(decoder, tokens) > SMALL:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _work(decoder: Decoder, tokens: int) -> int:
    width = decoder.gpt.config.n_embd
    return tokens * width * max(4 * width, decoder.outputs)
