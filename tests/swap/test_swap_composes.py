"""An accelerated model under torch.compile, checkpointing, DistributedDataParallel and fully_shard, in either order."""

import os

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from fastgpt import ops, restore
from tests.models import FAMILIES, VOCAB, book, hugging_face, logits_and_loss, nanogpt
from tests.swap.swapped import accelerate

IDX = torch.randint(0, VOCAB, (2, 7), generator=torch.Generator().manual_seed(0))


def blocks(model):
    return next(m for name, m in model.named_modules() if name.split(".")[-1] in ("h", "trf_blocks"))


def swapped(model):
    return sum("fastgpt_swap" in module.__dict__ for module in model.modules())


def results(model):
    model.zero_grad()
    logits, loss = logits_and_loss(model, IDX, IDX)
    loss.backward()
    return {"logits": logits.detach(), "loss": loss.detach(), **grads(model)}


def grads(model):
    full = {name: getattr(p.grad, "full_tensor", lambda p=p: p.grad)() for name, p in model.named_parameters()}
    return {name.replace("_orig_mod.", "").removeprefix("module."): grad.clone() for name, grad in full.items()}


def assert_same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("name", "layers", "order"),
    [
        ("hugging face", "n_layer", "accelerate first"),
        ("nanogpt", "n_layer", "compile first"),
        ("book", "n_layers", "accelerate first"),
        ("book, fast", "n_layers", "compile first"),
    ],
)
def test_compiled(name, layers, order):
    """As one graph; a compiled model that has run already is compiled anew."""
    model = FAMILIES[name](**{layers: 1}).double()
    expected = results(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    if order == "compile first":
        logits_and_loss(compiled, IDX, IDX)
    count = len(accelerate(compiled if order == "compile first" else model).rows)
    assert swapped(model) == count > 0
    actual = results(Forwarding(compiled, model))
    assert_same(actual, expected)
    torch._dynamo.reset()


def test_compiled_code_changes_with_the_model():
    model, calls = nanogpt(n_layer=1), []
    backend = lambda graph, _: (calls.append([str(node.target) for node in graph.graph.nodes]), graph.forward)[1]  # noqa: E731
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    compiled(IDX)
    accelerate(model)
    compiled(IDX)
    restore(model)
    compiled(IDX)
    assert len(calls) >= 2 and calls[0] != calls[1], "accelerate was noticed"
    torch._dynamo.reset()


class Forwarding(nn.Module):
    """A compiled model that is asked as the family is."""

    def __init__(self, compiled, model):
        super().__init__()
        self.__dict__.update(compiled=compiled, model=model)
        for name in ("generate", "transformer"):
            if hasattr(model, name):
                self.__dict__[name] = None

    def forward(self, *args, **kwargs):
        return self.compiled(*args, **kwargs)

    def named_parameters(self, *args, **kwargs):
        return self.model.named_parameters()

    def zero_grad(self, *args):
        self.model.zero_grad()


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("reentrant", [False, True])
def test_hugging_faces_gradient_checkpointing(reentrant, dropout):
    model = hugging_face(attn_pdrop=dropout, resid_pdrop=dropout).double().train()
    torch.manual_seed(1)
    expected = results(model)
    for order in ("accelerate first", "checkpointing first"):
        model = hugging_face(attn_pdrop=dropout, resid_pdrop=dropout).double().train()
        steps = [lambda m: accelerate(m), lambda m: m.gradient_checkpointing_enable(dict(use_reentrant=reentrant))]
        for step in steps if order == "accelerate first" else steps[::-1]:
            step(model)
        torch.manual_seed(1)
        assert_same(results(model), expected)


def test_checkpointing_happens(monkeypatch):
    """Every MLP is computed again in the backward."""
    model, calls = hugging_face().train(), []
    accelerate(model)
    model.gradient_checkpointing_enable(dict(use_reentrant=False))
    gelu_mlp = ops.gelu_mlp
    monkeypatch.setattr(ops, "gelu_mlp", lambda *args, **kwargs: (calls.append(1), gelu_mlp(*args, **kwargs))[1])
    loss = model(IDX, labels=IDX).loss
    assert len(calls) == 2
    loss.backward()
    assert len(calls) == 4


class Checkpointed(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x):
        return checkpoint(self.block, x, use_reentrant=False)


@pytest.mark.parametrize("make", [nanogpt, book])
def test_checkpointed_blocks(make):
    model = make(**{"dropout" if make is nanogpt else "drop_rate": 0.3}).double()
    torch.manual_seed(1)
    expected = results(model)
    accelerate(model)
    for i, block in enumerate(list(blocks(model))):
        blocks(model)[i] = Checkpointed(block)
    torch.manual_seed(1)
    actual = {name.replace(".block", ""): value for name, value in results(model).items()}
    assert_same(actual, expected)


def test_a_model_on_the_meta_device_is_accelerated_before_it_is_made():
    with torch.device("meta"):
        model = nanogpt()
    assert all(row.now for row in accelerate(model).rows)
    model.to_empty(device="cpu").load_state_dict(nanogpt().state_dict())
    model.transformer.wte.weight = model.lm_head.weight  # to_empty unties them
    assert_same(results(model.double()), results(nanogpt().double()))


# Parallel


def distributed(rank, size, file):
    """Two families under DDP and fully_shard, in both orders, against itself alone."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=size)
    mesh = init_device_mesh("cpu", (size,))
    try:
        for name in ("hugging face", "nanogpt"):
            expected = results(FAMILIES[name]().double())
            for parallel in (DistributedDataParallel, lambda model: shard(model, mesh)):
                model = FAMILIES[name]().double()
                accelerate(model)
                assert_same(results(Forwarding(parallel(model), model)), expected)

                model = FAMILIES[name]().double()
                wrapped = parallel(model)
                report = accelerate(wrapped)
                assert report.rows and all(row.now for row in report.rows), str(report)
                assert_same(results(Forwarding(wrapped, model)), expected)
    finally:
        dist.destroy_process_group()
    os._exit(0)  # threads of gloo may outlive the group, and abort the process as it ends


def shard(model, mesh):
    for block in blocks(model):
        fully_shard(block.mlp if hasattr(block, "mlp") else block.ff, mesh=mesh)  # a child with hooks of its own
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def test_parallel_in_two_processes(tmp_path):
    try:
        torch.multiprocessing.spawn(distributed, args=(2, tmp_path / "meeting"), nprocs=2)
    except torch.multiprocessing.ProcessExitedException as error:
        if error.signal_name not in ("SIGSEGV", "SIGABRT"):  # a thread of gloo's, rarely: tests/training/ranks.py
            raise
        torch.multiprocessing.spawn(distributed, args=(2, tmp_path / "again"), nprocs=2)
