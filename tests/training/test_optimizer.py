"""AdamW's groups, clipping inside its step, and the training step as a whole."""

import contextlib
import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fastgpt import GPT, GPTConfig
from fastgpt.training import optimizer as optimizer_module
from fastgpt.training.optimizer import TrainingStep, adamw, clipped_step, set_learning_rate


def model(**changes):
    torch.manual_seed(1)
    return GPT(GPTConfig.preset("byte-0.1M", n_layer=1, block_size=8, **changes))


def batch(*shape, device="cpu"):
    return torch.randint(257, shape, device=device), torch.randint(257, shape, device=device)


def test_matrices_decay_and_vectors_do_not():
    gpt = model()
    gpt.wpe.weight.requires_grad_(False)
    optimizer = adamw(gpt, 1e-3, weight_decay=0.3)
    decayed, plain = optimizer.param_groups
    assert decayed["weight_decay"] == 0.3 and plain["weight_decay"] == 0
    assert {p.dim() for p in decayed["params"]} == {2} and {p.dim() for p in plain["params"]} == {1}
    trained = {id(p) for p in gpt.parameters() if p.requires_grad}
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == trained
    assert optimizer.defaults["fused"]


@pytest.mark.parametrize("max_norm", [1e-3, 0.5, 1e6])
def test_clipping_in_the_step_is_clipping_before_it(max_norm):
    """What reaches the moments, against gradients that PyTorch clipped first; a bound not reached changes nothing."""
    ours, theirs = model(), model()
    optimizers = [adamw(gpt, 1e-2) for gpt in (ours, theirs)]
    idx, targets = batch(2, 8)
    for gpt, optimizer in zip((ours, theirs), optimizers, strict=True):
        optimizer.zero_grad()
        (100 * gpt(idx, targets)).backward()
    norm = clipped_step(optimizers[0], max_norm)
    torch.testing.assert_close(norm, nn.utils.clip_grad_norm_(theirs.parameters(), max_norm))
    optimizers[1].step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        for moment in ("exp_avg", "exp_avg_sq"):
            first, second = optimizers[0].state[a][moment], optimizers[1].state[b][moment]
            torch.testing.assert_close(first, second, rtol=1e-5, atol=0)


def test_gradients_that_are_not_finite_change_nothing():
    gpt = model()
    optimizer = adamw(gpt, 1e-2)
    step = TrainingStep(gpt, optimizer)
    step(*batch(2, 8))
    before = copy.deepcopy((gpt.state_dict(), optimizer.state_dict()["state"]))
    gpt(*batch(2, 8)).backward()
    gpt.ln_f.weight.grad[3] = torch.nan
    assert clipped_step(optimizer, 1.0).isnan()
    after = (gpt.state_dict(), optimizer.state_dict()["state"])
    assert all(torch.equal(a, b) for a, b in zip(before[0].values(), after[0].values(), strict=True))
    for old, new in zip(before[1].values(), after[1].values(), strict=True):
        assert all(torch.equal(old[key], new[key]) for key in old)


@pytest.fixture
def deaf(monkeypatch):
    """An AdamW that does not hear grad_scale and found_inf, as MPS's before it learned to; untried on a Mac."""
    hearing = torch.optim.AdamW.step

    def step(self, *given):
        for name in ("grad_scale", "found_inf"):
            self.__dict__.pop(name, None)
        return hearing(self, *given)

    monkeypatch.setattr(optimizer_module, "SCALING", ("cuda",))
    monkeypatch.setattr(torch.optim.AdamW, "step", step)


@pytest.mark.parametrize("max_norm", [1e-3, 1e6])
def test_a_device_whose_step_scales_nothing_clips_all_the_same(deaf, max_norm):
    test_clipping_in_the_step_is_clipping_before_it(max_norm)


def test_a_device_whose_step_scales_nothing_is_guarded_all_the_same(deaf):
    test_gradients_that_are_not_finite_change_nothing()
    gpt = model()
    before = copy.deepcopy(gpt.state_dict())
    gpt(*batch(2, 8)).backward()
    assert clipped_step(adamw(gpt, 1e-2), 1.0, skip=torch.ones(())).isfinite()
    assert all(map(torch.equal, before.values(), gpt.state_dict().values()))


def test_only_a_fused_optimizer_clips():
    gpt = model()
    with pytest.raises(ValueError, match="not fused"):
        clipped_step(torch.optim.AdamW(gpt.parameters(), fused=False), 1.0)


def test_the_learning_rate_of_all_groups():
    gpt = model()
    optimizer = adamw(gpt, 1e-3)
    set_learning_rate(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(1e-3)
    rates = [group["lr"] for group in optimizer.param_groups]
    set_learning_rate(optimizer, 0.5)
    assert [rate.item() for rate in rates] == [0.5, 0.5]  # the tensors that a graph reads


def test_several_batches_are_one_large_one():
    """Four batches of two rows, as the mean of eight rows would have it."""
    idx, targets = batch(4, 2, 8)
    results = []
    for shape in ((4, 2, 8), (8, 8)):
        gpt = model()
        loss, norm = TrainingStep(gpt, adamw(gpt, 1e-2))(idx.view(shape), targets.view(shape))
        results.append([loss, norm, *(p.grad for p in gpt.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_without_a_bound_the_step_is_plain():
    ours, theirs = model(), model()
    idx, targets = batch(2, 8)
    _, norm = TrainingStep(ours, adamw(ours, 1e-2), max_norm=None)(idx, targets)
    optimizer = adamw(theirs, 1e-2)
    theirs(idx, targets).backward()
    optimizer.step()
    assert norm.isnan()
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_autocast_reaches_the_matmuls():
    gpt, seen = model(), []
    gpt.h[0].mlp.register_forward_hook(lambda _, args, output: seen.append(output.dtype))
    TrainingStep(gpt, adamw(gpt, 1e-2), autocast=torch.bfloat16)(*batch(2, 8))
    assert seen == [torch.bfloat16] and gpt.wte.weight.grad.dtype == torch.float32


def test_a_graph_that_cannot_be_is_refused():
    gpt = model()
    with pytest.raises(ValueError, match="the model is on cpu, a CUDA graph needs an NVIDIA GPU"):
        TrainingStep(gpt, adamw(gpt, 1e-2), graph=True)


def test_a_step_is_captured_once_and_replayed(monkeypatch):
    """The order of things on a GPU, with a graph that is none: what is captured runs at each replay, and not before."""
    batches = [batch(2, 8) for _ in range(5)]
    plain, captured = model(), model()
    expected = TrainingStep(plain, adamw(plain, 1e-2))
    step, log = TrainingStep(captured, adamw(captured, 1e-2)), []

    class Stream:
        def __init__(self, device=None):
            self.wait_stream = lambda other: log.append("waits")

    class Graph:
        def replay(self):
            log.append("replay")
            for static, new in zip(step._outputs, step._step(*step._inputs), strict=True):
                static.copy_(new)

    @contextlib.contextmanager
    def graph(_, stream, capture_error_mode):
        before = copy.deepcopy((captured.state_dict(), step.optimizer.state_dict()))
        yield log.append("capture")
        captured.load_state_dict(before[0])
        step.optimizer.load_state_dict(before[1])

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    step.graph = True
    for each in batches:
        assert [t.item() for t in step(*each)] == [t.item() for t in expected(*each)]
    assert log == ["waits"] * 4 + ["capture"] + ["replay"] * 3
    assert all(torch.equal(a, b) for a, b in zip(captured.parameters(), plain.parameters(), strict=True))
    with pytest.raises(ValueError, match=r"a batch of shape \(1, 8\), the graph is for \(2, 8\)"):
        step(*batch(1, 8))


@pytest.mark.gpu
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_graph_trains_as_the_plain_step_does(dropout):
    batches = [batch(2, 2, 8, device="cuda") for _ in range(6)]
    losses = []
    for graph in (False, True):
        gpt = model(dropout=dropout).cuda()
        step = TrainingStep(gpt, adamw(gpt, 1e-2, graph=True), autocast=torch.bfloat16, graph=graph)
        losses.append([step(*b)[0].item() for b in batches])
    assert losses[0] == losses[1]
    same = [step(*batches[0])[0].item() for _ in range(3)]
    assert len(set(same)) == 3  # the weights move, and each replay draws its own mask
    with pytest.raises(ValueError, match=r"a batch of shape \(1, 8\), the graph is for \(2, 2, 8\)"):
        step(*batch(1, 8, device="cuda"))


@pytest.mark.gpu
def test_each_replay_draws_its_own_mask_and_a_seed_repeats_it():
    """With weights that stay: only what is dropped differs."""
    idx, targets = batch(2, 2, 8, device="cuda")
    losses = {}
    for graph, dropout in ((True, 0.2), (False, 0.2), (True, 0.0)):
        gpt = model(dropout=dropout).cuda()
        torch.manual_seed(7)
        step = TrainingStep(gpt, adamw(gpt, 0.0, graph=graph), graph=graph)
        losses[graph, dropout] = [step(idx, targets)[0].item() for _ in range(7)]
    assert len(set(losses[True, 0.2])) == 7 and len(set(losses[True, 0.0])) == 1
    assert losses[True, 0.2] == losses[False, 0.2]


def test_a_graph_wants_an_optimizer_made_for_it():
    there = SimpleNamespace(parameters=lambda: iter([SimpleNamespace(device=torch.device("cuda"))]))
    with pytest.raises(ValueError, match=r"adamw\(graph=True\)"):
        TrainingStep(there, adamw(model(), 1e-2), graph=True)
