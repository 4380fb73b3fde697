"""When the steps of a run are one CUDA graph, what is said where they are not, and that none of them needs the host."""

import dataclasses
import math
import warnings

import pytest
import torch

from bench.gates import feign
from fastgpt import GPT, GPTConfig
from fastgpt.data.tokenizer import encoding
from fastgpt.fp8 import Fp8
from fastgpt.training import fit, monitor
from fastgpt.training.capture import out_of_memory_told, why_no_graph
from fastgpt.training.distributed import World
from fastgpt.training.optimizer import adamw, set_learning_rate
from fastgpt.training.settings import TrainConfig
from fastgpt.training.step import Step

SHAPE = GPTConfig(vocab_size=257, block_size=16, n_layer=2, n_head=2, n_embd=16)
CARD = World(0, 1, torch.device("cuda"))
BFLOAT16 = TrainConfig(dtype="bfloat16")  # whatever the card


def test_one_gpu_takes_a_graph_by_itself_where_that_was_tried():
    for fields in (dict(), dict(dtype="float32"), dict(gradient_accumulation_steps=4)):
        assert why_no_graph(SHAPE, dataclasses.replace(BFLOAT16, **fields), CARD, GPT(SHAPE)) is None
    for what, fields in (
        ("torch.compile", dict(compile=True)),
        ("float16", dict(dtype="float16")),
        ("document_mask", dict(document_mask=True)),
    ):
        config = dataclasses.replace(BFLOAT16, **fields)
        said = why_no_graph(SHAPE, config, CARD, GPT(SHAPE)) or ""
        assert said.startswith(f"{what}, with which a graph was not tried on a GPU yet; cuda_graph = true")
        assert why_no_graph(SHAPE, dataclasses.replace(config, cuda_graph=True), CARD, GPT(SHAPE)) is None
    eight_bits = dataclasses.replace(SHAPE, fp8="head")
    assert (why_no_graph(eight_bits, BFLOAT16, CARD) or "").startswith("fp8, with which a graph was not tried")


OBSTACLES = [
    (World(0, 1, torch.device("cpu")), {}, "the device is cpu"),
    (World(0, 1, torch.device("mps")), {}, "the device is mps"),
    (World(1, 2, torch.device("cuda", 1)), {}, "2 processes"),
    (CARD, dict(activation_checkpointing="block"), "activation_checkpointing = 'block' keeps the generator's state"),
]


@pytest.mark.parametrize(("world", "changes", "why"), OBSTACLES)
def test_what_stands_in_the_way_is_named_or_an_error_where_it_was_asked_for(world, changes, why):
    shape = dataclasses.replace(SHAPE, **changes)
    assert (why_no_graph(shape, TrainConfig(), world) or "").startswith(why)
    assert why_no_graph(shape, TrainConfig(cuda_graph=False), world) == "cuda_graph = false"
    with pytest.raises(ValueError, match=f"cuda_graph is true, and a CUDA graph can't be: {why}"):
        why_no_graph(shape, TrainConfig(cuda_graph=True), world)


def test_an_amd_gpu_takes_none(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert why_no_graph(SHAPE, BFLOAT16, CARD) == "the GPU is AMD's"


def test_a_hook_would_run_at_the_capture_alone():
    model, seen = GPT(SHAPE), []
    handle = model.h[1].mlp.register_forward_hook(lambda *given: seen.append(given))
    assert why_no_graph(SHAPE, BFLOAT16, CARD, model) == "h.1.mlp has hooks"
    with pytest.raises(ValueError, match=r"can't be: h\.1\.mlp has hooks"):
        why_no_graph(SHAPE, TrainConfig(cuda_graph=True), CARD, model)
    handle.remove()
    assert why_no_graph(SHAPE, BFLOAT16, CARD, model) is None


def test_out_of_memory_says_what_would_need_less():
    full = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nand more")
    said = r"2 GiB \(a CUDA graph keeps .* cuda_graph = false does not\)$"
    with pytest.raises(torch.OutOfMemoryError, match=said), out_of_memory_told(True):
        raise full
    with pytest.raises(torch.OutOfMemoryError, match=r"and more$"), out_of_memory_told(False):
        raise full


# On a card that isn't there, where what needs the host is an error while a graph is captured, as on a card.


@pytest.fixture
def unlaunched(monkeypatch):
    """No Triton kernel is launched."""
    launcher = pytest.importorskip("triton.runtime.jit", reason="Triton is not to be had on this platform")
    monkeypatch.setattr(launcher.JITFunction, "run", lambda *args, **kwargs: None)


def step_on_a_card(autocast=None, end=None, skips=False, **changes):
    """Of two batches, and what it is given."""
    with torch.device("cuda"):
        model = GPT(dataclasses.replace(SHAPE, **changes)).train()
    idx = torch.zeros(2, 4, 16, dtype=torch.int64, device="cuda")
    return Step(model, adamw(model, 1e-3, graph=True), CARD, 1.0, autocast, True, end, skips), idx


@pytest.mark.parametrize(
    "how",
    [
        dict(autocast=torch.bfloat16, end=256, dropout=0.1),
        dict(autocast=torch.float16, activation_checkpointing="mlp"),
        dict(autocast=torch.float16, end=256, dropout=0.1, backend="torch"),
        dict(skips=True, residual="float32"),
        dict(autocast=torch.bfloat16, fp8="all"),
    ],
    ids=["bfloat16, documents, dropout", "float16", "float16, PyTorch's functions", "float32", "fp8"],
)
def test_no_captured_step_needs_the_host(unlaunched, monkeypatch, how):
    monkeypatch.setattr(Fp8, "exact_passes", 3)  # of which each step has two
    with feign.card(90):
        step, idx = step_on_a_card(**how)
        for number in range(4):
            set_learning_rate(step.optimizer, 0.1 * number)
            step(idx, idx)
        step.scaler.state_dict()  # a checkpoint is written between steps, where the host may ask


@pytest.mark.parametrize(
    "asks",
    [
        lambda loss: loss.item(),
        lambda loss: loss.cpu(),
        lambda loss: bool(loss.isfinite()),
        lambda loss: torch.zeros(()).to("cuda"),
        lambda loss: torch.tensor(1.0, device="cuda"),
        lambda loss: torch.utils.checkpoint.checkpoint(torch.square, loss, use_reentrant=False),
    ],
    ids=["item", "cpu", "bool", "to", "tensor", "checkpoint"],
)
def test_a_captured_step_that_needs_the_host_is_an_error(unlaunched, asks):
    with feign.card(90):
        step, idx = step_on_a_card()
        update = step.update
        step.update = lambda total: (asks(total), update(total))[1]
        step(idx, idx)
        step(idx, idx)
        with pytest.raises(RuntimeError, match="which a capture can't wait for"):
            step(idx, idx)
        asks(torch.zeros((), device="cuda"))  # and afterwards it may be asked


RUN = TrainConfig(device="cuda", max_iters=5, batch_size=2, eval_interval=4, eval_iters=1, sample_tokens=0)
RUNS = {
    "alone": (dict(), dict(), "one CUDA graph a step"),
    "all together": (
        dict(dropout=0.1, activation_checkpointing="mlp"),
        dict(gradient_accumulation_steps=3, document_mask=True, dtype="float16", skip_nonfinite=2, cuda_graph=True),
        "one CUDA graph a step",
    ),
    "false": (dict(), dict(cuda_graph=False), "no CUDA graph: cuda_graph = false"),
    "block": (dict(activation_checkpointing="block"), dict(), "no CUDA graph: activation_checkpointing = 'block'"),
}


@pytest.fixture
def train(unlaunched, tmp_path, monkeypatch, capsys):
    """What a run on a card says, in the folder `out`."""
    monkeypatch.setattr(monitor, "plot_losses", lambda rows, path: None)
    text = tmp_path / "fox.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 50)

    def train(model=None, resume=False, **changes):
        with feign.card(90):
            shape, config = dataclasses.replace(SHAPE, **(model or {})), dataclasses.replace(RUN, **changes)
            fit(shape, config, encoding("byte"), text, tmp_path / "out", resume=resume)
        return capsys.readouterr().out

    return train


@pytest.mark.parametrize("name", RUNS)
def test_a_run_takes_a_graph_by_itself_and_says_so(train, name):
    """Evaluated and saved between replays, of which none needs the host."""
    model, changes, said = RUNS[name]
    assert said in train(model, **changes)


def test_a_run_from_before_there_was_a_choice_goes_on_as_a_graph(train):
    """Its weights are the same with a graph and without one: nothing is told to differ."""
    assert "no CUDA graph" in train(cuda_graph=False, max_iters=3)
    said = train(resume=True)
    assert "resuming from" in said and "one CUDA graph a step" in said and "not to the bit" not in said


# A graph that is none: what is captured runs at each replay, and not before.


@pytest.fixture
def replayed(monkeypatch):
    """Makes of a step on a CPU one that is captured and replayed."""

    def of(step):
        class Graph:
            def replay(self):
                for static, new in zip(step._outputs, step._step(*step._inputs), strict=True):
                    static.copy_(new)

        def captured(device, run):
            tensors = [*step.model.state_dict().values(), *step.model.buffers()]
            scratch = [t.detach().clone() for t in tensors], step.optimizer.state_dict()
            moments = [{k: t.clone() for k, t in each.items()} for each in scratch[1]["state"].values()]
            random, scaler, stopped = torch.get_rng_state(), step.scaler.state_dict(), step.stopped.clone()
            result = run()
            with torch.no_grad():
                for old, new in zip(scratch[0], tensors, strict=True):
                    new.copy_(old)
                for old, new in zip(moments, step.optimizer.state.values(), strict=True):
                    for key, value in old.items():
                        new[key].copy_(value)
            torch.set_rng_state(random)
            step.scaler.load_state_dict(scaler)
            step.stopped.copy_(stopped)
            return Graph(), result

        monkeypatch.setattr("fastgpt.training.optimizer.captured", captured)
        monkeypatch.setattr("fastgpt.training.optimizer.warmed", lambda device, run: run())
        step.graph = True
        return step

    return of


def test_the_first_steps_warn_of_nothing(replayed, monkeypatch):
    """PyTorch warns where an optimizer that was made for a graph runs without one."""
    model = GPT(SHAPE)
    step = replayed(Step(model, adamw(model, 1e-3, graph=True), World(0, 1, torch.device("cpu")), 1.0))
    words = "This instance was constructed with capturable=True, but step() is running without a graph"
    update = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: (warnings.warn(words, stacklevel=2), update(self))[1])
    idx = torch.zeros(1, 2, 16, dtype=torch.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(idx, idx)
        step(idx, idx)
        with pytest.raises(UserWarning, match="capturable"):
            step.optimizer.step()


def test_a_graph_waits_until_scales_of_8_bit_floats_are_delayed(replayed, monkeypatch):
    """And one pass had such, whose kernels no capture could compile. With it and without, the weights are the same."""
    monkeypatch.setattr(Fp8, "exact_passes", 5)
    idx, weights, calls = torch.randint(257, (1, 2, 16)), [], []
    for graph in (False, True):
        torch.manual_seed(3)
        model = GPT(dataclasses.replace(SHAPE, fp8="all", fp8_simulate=True)).train()
        step = Step(model, adamw(model, 1e-2), World(0, 1, torch.device("cpu")), 1.0)
        step = replayed(step) if graph else step
        capture = step._capture
        step._capture = lambda step=step, capture=capture: (calls.append(step._calls), capture())
        for _ in range(8):
            step(idx, idx.roll(-1))
        weights.append([p.detach() for p in model.parameters()])
    assert calls == [6] and all(map(torch.equal, *weights))


@pytest.mark.gpu
@pytest.mark.parametrize("end", [None, 7])
def test_a_graph_finds_float16s_scale_as_the_plain_step_does(monkeypatch, end):
    """From a scale at which the first replays overflow, and change nothing."""
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda device, enabled: scaler(device, 2.0**40, enabled=enabled))
    idx, targets = torch.randint(257, (2, 3, 2, 16), device="cuda")
    results = []
    for graph in (False, True):
        torch.manual_seed(3)
        model = GPT(SHAPE).cuda().train()
        step = Step(model, adamw(model, 1e-2, graph=graph), CARD, 1.0, torch.float16, graph, end)
        found = [(loss.item(), norm.item(), step.scaler.get_scale()) for loss, norm in _steps(step, idx, targets, 60)]
        results.append((found, [p.detach().clone() for p in model.parameters()]))
    (plain, weights), (graphed, weights_graphed) = results
    assert repr(plain) == repr(graphed), "NaN, the norm of what overflowed, included"
    assert all(map(torch.equal, weights, weights_graphed))
    overflowed = [not math.isfinite(norm) for _, norm, _ in plain]
    assert overflowed[4] and not overflowed[-1]
    assert plain[4][0] == plain[0][0] > plain[-1][0] and plain[-1][2] < 2.0**40


def _steps(step, idx, targets, count):
    for _ in range(count):
        yield step(idx, targets)  # read before the next replay writes over it


@pytest.mark.parametrize("dtype", [None, torch.float16])
@pytest.mark.parametrize("batches", [1, 3])
def test_replays_are_the_steps_to_the_bit(replayed, batches, dtype):
    """Accumulated, with documents, dropout and a learning rate of each step, from windows that overlap in memory."""
    results = []
    for graph in (False, True):
        torch.manual_seed(3)
        model = GPT(dataclasses.replace(SHAPE, dropout=0.2)).train()
        optimizer = adamw(model, 1e-3, graph=graph)
        step = Step(model, optimizer, World(0, 1, torch.device("cpu")), 1.0, dtype, end=7)
        step = replayed(step) if graph else step
        found = []
        for number in range(6):
            set_learning_rate(optimizer, 1e-2 / (number + 1))
            rows = torch.randint(257, (batches * 2, 17))
            idx, targets = (rows[:, begin : begin + 16].view(batches, 2, 16) for begin in (0, 1))
            found += [t.item() for t in (*step(idx, targets), step.own)]
        results.append((found, [p.detach().clone() for p in model.parameters()], step.scaler.state_dict()))
    (plain, weights, scale), (graphed, weights_graphed, scale_graphed) = results
    assert plain == graphed and scale == scale_graphed
    assert all(map(torch.equal, weights, weights_graphed))
    assert len(set(plain)) > 6
