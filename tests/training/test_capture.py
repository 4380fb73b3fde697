"""When the steps of a run are one CUDA graph, what is said where they are not, and that nothing in them needs the host."""

import dataclasses

import pytest
import torch

from fastgpt import GPT, GPTConfig
from fastgpt.training.capture import out_of_memory_told, why_no_graph
from fastgpt.training.distributed import World
from fastgpt.training.settings import TrainConfig

SHAPE = GPTConfig(vocab_size=257, block_size=16, n_layer=2, n_head=2, n_embd=16)
CARD = World(0, 1, torch.device("cuda"))


@pytest.mark.parametrize(
    "fields",
    [
        dict(),
        dict(gradient_accumulation_steps=4),
        dict(document_mask=True),
        dict(dtype="float16"),
        dict(cuda_graph=True, compile=True),
    ],
)
def test_one_gpu_takes_a_graph_by_itself(fields):
    assert why_no_graph(SHAPE, TrainConfig(**fields), CARD, GPT(SHAPE)) is None


OBSTACLES = [
    (World(0, 1, torch.device("cpu")), {}, "the device is cpu"),
    (World(0, 1, torch.device("mps")), {}, "the device is mps"),
    (World(1, 2, torch.device("cuda", 1)), {}, "2 processes"),
    (CARD, dict(activation_checkpointing="block"), "activation_checkpointing = 'block' keeps the generator's state"),
]


@pytest.mark.parametrize(("world", "changes", "why"), OBSTACLES)
def test_what_stands_in_the_way_is_named_or_an_error_where_it_was_asked_for(world, changes, why):
    shape = dataclasses.replace(SHAPE, **changes)
    assert why_no_graph(shape, TrainConfig(), world).startswith(why)
    assert why_no_graph(shape, TrainConfig(cuda_graph=False), world) == "cuda_graph = false"
    with pytest.raises(ValueError, match=f"cuda_graph is true, and a CUDA graph can't be: {why}"):
        why_no_graph(shape, TrainConfig(cuda_graph=True), world)


def test_an_amd_gpu_takes_none(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert why_no_graph(SHAPE, TrainConfig(), CARD) == "the GPU is AMD's"


def test_a_hook_would_run_at_the_capture_alone():
    model, seen = GPT(SHAPE), []
    handle = model.h[1].mlp.register_forward_hook(lambda *given: seen.append(given))
    assert why_no_graph(SHAPE, TrainConfig(), CARD, model) == "h.1.mlp has hooks"
    with pytest.raises(ValueError, match="can't be: h.1.mlp has hooks"):
        why_no_graph(SHAPE, TrainConfig(cuda_graph=True), CARD, model)
    handle.remove()
    assert why_no_graph(SHAPE, TrainConfig(), CARD, model) is None


def test_torch_compile_is_not_tried_unasked():
    assert why_no_graph(SHAPE, TrainConfig(compile=True), CARD).startswith("torch.compile, with which it was not tried")


def test_out_of_memory_says_what_would_need_less():
    full = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nand more")
    with pytest.raises(torch.OutOfMemoryError, match=r"2 GiB \(a CUDA graph keeps .* cuda_graph = false does not\)$"):
        with out_of_memory_told(True):
            raise full
    with pytest.raises(torch.OutOfMemoryError, match="and more$"), out_of_memory_told(False):
        raise full
