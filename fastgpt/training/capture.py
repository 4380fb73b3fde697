"""Whether the steps of a run are captured as a CUDA graph: TrainConfig.cuda_graph, decided here alone.

A replay computes what the step computed when it was captured, to the bit, and the host launches once a step. What the
host would have to do or to know inside a step stands in the way.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from fastgpt import private
from fastgpt.model import GPTConfig
from fastgpt.training.distributed import World
from fastgpt.training.settings import TrainConfig, autocast_dtype


def why_no_graph(shape: GPTConfig, config: TrainConfig, world: World, model: nn.Module | None = None) -> str | None:
    """Why the steps are no CUDA graph, None where they are one. model: None before there is one, which is asked last.

    ValueError where config.cuda_graph is True and there can be none.
    """
    if config.cuda_graph is False:
        return "cuda_graph = false"
    reason = _obstacle(shape, config, world, model)
    if reason is not None and config.cuda_graph is True:
        raise ValueError(f"cuda_graph is true, and a CUDA graph can't be: {reason}")
    if reason is None and config.cuda_graph == "auto" and (untried := _untried(shape, config, world)) is not None:
        return f"{untried}, with which a graph was not tried on a GPU yet; cuda_graph = true takes both"
    return reason


def _untried(shape: GPTConfig, config: TrainConfig, world: World) -> str | None:
    """What nobody has seen run in a graph on a card: that is not done unasked."""
    if shape.fp8 != "none":
        return "fp8"
    if config.compile:
        return "torch.compile"
    if autocast_dtype(config, world.device) == torch.float16:
        return "float16"
    return "document_mask" if config.document_mask else None


def _obstacle(shape: GPTConfig, config: TrainConfig, world: World, model: nn.Module | None) -> str | None:
    """What a capture can't be made of."""
    if world.device.type != "cuda":
        return f"the device is {world.device.type}"
    if torch.version.hip is not None:
        return "the GPU is AMD's"
    if world.size > 1:
        return f"{world.size} processes"
    if config.optimizer == "muon":  # torch.optim.Muon's alpha: a graph would keep the rate of its capture
        return "Muon takes its learning rate from the host at each step"
    if shape.activation_checkpointing == "block":  # torch.utils.checkpoint asks for the generator's state
        return "activation_checkpointing = 'block' keeps the generator's state on the host"
    modules = () if model is None else model.named_modules()
    for name, module in modules:  # they would run once, as the graph is captured
        if private.has_hooks(vars(module)):
            return f"{name or 'the model'} has hooks"
    return None


@contextlib.contextmanager
def out_of_memory_told(graph: bool) -> Iterator[None]:
    """What would have needed less, in the error: nobody may have asked for the graph."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        if not graph:
            raise
        why = "a CUDA graph keeps the memory of a step while the run evaluates; cuda_graph = false does not"
        raise torch.OutOfMemoryError(f"{str(error).splitlines()[0]} ({why})") from error
