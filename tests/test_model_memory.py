"""What a layer of GPT keeps and launches, and what activation checkpointing changes: no gradient."""

import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fastgpt import GPT
from fastgpt.model import Block
from tests.test_model import tiny


def training_block(**changes):
    """A block of C = 32 with two heads, and a stream, a branch and its bias that are within a model, not before it."""
    block = Block(tiny(n_embd=32, n_head=2, n_layer=1, **changes))
    leaves = [torch.randn(shape, requires_grad=True) for shape in ((2, 16, 32), (2, 16, 32), (32,))]
    return block, leaves


@pytest.mark.interpreter
@pytest.mark.parametrize(("choice", "elements"), [("off", 16), ("mlp", 12), ("block", 2)])
def test_a_layer_keeps_what_its_docstring_says(choice, elements):
    block, leaves = training_block(activation_checkpointing=choice)
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    known = {t.untyped_storage().data_ptr() for t in (*block.parameters(), leaves[2])}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        if choice == "block":
            stream, branch = checkpoint(block, *leaves, use_reentrant=False)
            kept |= {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in leaves[:2]}
        else:
            stream, branch = block(*leaves)
    statistics = 0 if choice == "block" else 6 + 2
    bytes_a_token = 4 * (elements * 32 + statistics)
    assert sum(size for place, size in kept.items() if place not in known) == 32 * bytes_a_token
    assert stream.requires_grad and branch.requires_grad


@pytest.mark.interpreter
def test_a_layer_launches_what_its_docstring_lists(monkeypatch):
    """Kernels by name; and of PyTorch's operations, those that touch as much as the activations (2 * 16 * 32)."""
    from triton.runtime import interpreter

    block, leaves = training_block()
    torch.use_deterministic_algorithms(False)  # it would fill what is only allocated
    execute = interpreter.GridExecutor.__call__

    def launch(self, *args, **kwargs):
        with torch.profiler.record_function(f"kernel {self.fn.__name__}"):
            return execute(self, *args, **kwargs)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", launch)
    ways = []
    grads = [torch.randn(2, 16, 32), torch.randn(2, 16, 32)]
    for way in (lambda: ways.append(block(*leaves)), lambda: torch.autograd.backward(ways[0], grads)):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
            way()
        ways.append(launched(profile))
    listed = Block.__doc__.split("backward   ")
    assert ways[1] == listed[0].split("forward    ")[1].split()
    assert sorted(ways[2]) == sorted(listed[1].split("Under autocast")[0].split())


def launched(profile):
    """The kernels and large operations of a profile, in order, as Block's docstring writes them."""
    names = []
    for event in sorted(profile.events(), key=lambda event: event.time_range.start):
        parents, parent = [], event.cpu_parent
        while parent is not None:
            parents.append(parent.name)
            parent = parent.cpu_parent
        others = ("aten::mm", "aten::addmm", "aten::sum", "torch::autograd::AccumulateGrad")  # the last is the leaves'
        inside = any(name.startswith("kernel ") or name in others for name in parents)
        large = any(math.prod(shape) >= 2 * 16 * 32 for shape in event.input_shapes if shape)
        if event.name.startswith("kernel "):
            names.append(event.name.removeprefix("kernel _").removesuffix("_kernel"))
        elif event.name.startswith("aten::") and not inside and (large or event.name == "aten::sum"):
            names.append(event.name.removeprefix("aten::"))
    free = ("t", "view", "reshape", "transpose", "permute", "unflatten", "unbind", "select", "as_strided", "detach")
    free += ("linear", "matmul", "_unsafe_view", "expand", "to", "empty_like", "resolve_conj", "alias")
    return [name for name in names if name not in free]


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpointed_block_has_the_same_gradients(reentrant):
    model, x = GPT(tiny(n_layer=1)), torch.randn(2, 9, 48, requires_grad=True)
    results = []
    for call in (model.h[0], lambda *a: checkpoint(model.h[0], *a, use_reentrant=reentrant)):
        model.zero_grad()
        stream, branch = call(x, None, None)
        (stream * branch).sum().backward()
        results.append([p.grad for p in model.h[0].parameters() if p.grad is not None])
    assert model.h[0].mlp.c_proj.bias.is_leaf
    assert len(results[0]) == len(results[1]) == 11  # all but mlp.c_proj.bias, which the next norm adds
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
