"""The rows of a call on the device: steps that wait for nothing, and one graph of them."""

import contextlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastgpt import cuda_graph, generate, stream
from fastgpt.generation import batch, cache
from fastgpt.generation.ahead import Readback
from fastgpt.generation.batch import Batch, plan
from fastgpt.generation.decoder import Decoder
from fastgpt.generation.sampling import Sampling
from fastgpt.ops import checks, pytorch
from tests.generation.small_gpt import PROMPT, gpt


@pytest.fixture
def model():
    return gpt()


def as_on_a_gpu(monkeypatch):
    """But that the host waits for each copy."""
    monkeypatch.setattr(batch, "is_queued", lambda device: True)
    monkeypatch.setattr(batch, "Readback", lambda news, logprobs, asynchronous: Readback(news, logprobs, False))


def begun(model, prompts, new, sampling, samples=1, logprobs=False):
    decoder, rows = Decoder(model), len(prompts) * samples
    planned = plan(decoder, max(map(len, prompts)), rows, new, sampling, samples=samples, logprobs=logprobs)
    return Batch(decoder, planned).begin(decoder, prompts)


def test_no_step_waits_for_the_device(model, monkeypatch):
    """On a GPU nothing between the prompt and the readback may ask a tensor for its value."""
    as_on_a_gpu(monkeypatch)
    sampling = Sampling(top_k=5, top_p=0.9, repetition_penalty=1.2)
    rows = begun(model, [[3, 1, 4], [7]], 5, sampling, samples=2, logprobs=True)
    monkeypatch.setattr(pytorch, "_full", lambda *_: False)  # these four ask on a CPU alone
    monkeypatch.setattr(checks, "in_range", lambda *_: None)
    monkeypatch.setattr(cache, "_on_the_host", lambda *_: None)
    monkeypatch.setattr(Batch, "_finite_at_a_glance", lambda *_: False)
    for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "nonzero"):
        monkeypatch.setattr(torch.Tensor, name, lambda *_, name=name: pytest.fail(f"{name} waits for the device"))
    rows.advance()
    rows._step()
    rows._step()


def test_finite_logits_whose_sum_is_not(model):
    rows = begun(model, [[3, 1, 4]], 5, Sampling(temperature=0))
    rows.advance()
    for value, token in ((3e38, 0), (float("inf"), -1), (float("nan"), -1)):
        rows._take(torch.full((1, 13), 3e38).index_fill(1, torch.tensor(0), value), 0)
        assert rows.news.tolist() == [[token]]
        rows.lengths -= 1


def test_every_token_costs_the_same_and_the_cache_stays_where_it_is():
    """Operators are counted, not timed."""

    class Counter(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.count += 1
            return function(*args, **(kwargs or {}))

    rows = begun(gpt(128), [[3, 1, 4]], 100, Sampling(), logprobs=True)
    rows.advance()
    counts, places = set(), set()
    for _ in range(99):
        with Counter() as counter:
            counter.count = 0
            rows.advance()
        counts.add(counter.count)
        places.add((rows.cache.k[0].data_ptr(), rows.cache.v[-1].data_ptr(), rows.history.data_ptr()))
    assert len(counts) == 1 and len(places) == 1


def test_a_step_is_captured_once_and_replayed(model, monkeypatch):
    """The order of things on a GPU, with a graph that is none: what is captured runs at each replay, and not before."""
    told = dict(temperature=2.0, seed=3, repetition_penalty=1.2, logprobs=True)
    model = gpt(64)
    expected = generate(model, [[3, 1, 4], [7]], 40, **told)
    log, made = [], []

    class Graph:
        def replay(self):
            log.append("replay")
            made[0]._step()

    @contextlib.contextmanager
    def graph(captured, stream, capture_error_mode):
        assert getattr(stream, "device", None) == made[0].decoder.device and capture_error_mode == "thread_local"
        held = [t for t in (*vars(made[0]).values(), *vars(made[0].cache).values()) if isinstance(t, torch.Tensor)]
        kept, state = [tensor.clone() for tensor in held], made[0].generator.get_state()
        yield log.append("capture")
        for tensor, before in zip(held, kept, strict=True):
            tensor.copy_(before)
        made[0].generator.set_state(state)

    class Captured(Batch):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(self)

    class Stream:
        def __init__(self, device=None):
            self.device, self.wait_stream = device, lambda other: log.append("waits")

    cuda_graph._stream.cache_clear()
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr("fastgpt.generation.Batch", Captured)
    as_on_a_gpu(monkeypatch)
    assert generate(model, [[3, 1, 4], [7]], 40, **told).tokens == expected.tokens
    assert log == ["waits", "waits", "capture", *["replay"] * 38]


def test_what_a_gpu_tells_is_waited_for_some_steps_later(monkeypatch):
    """With events that are none: the host reads four steps' ids while the next ones run, and loses none at the end."""
    log = []

    class Event:
        made = 0

        def __init__(self):
            Event.made += 1
            self.number = Event.made

        def record(self, stream):
            assert stream == "of the ids' device"
            log.append(f"record {self.number}")

        def synchronize(self):
            log.append(f"wait {self.number}")

    model = gpt(64)
    expected = generate(model, [[3, 1, 4], [7]], 14, seed=1)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "of the ids' device")
    monkeypatch.setattr(Readback, "_buffer", lambda self, tensor: torch.empty_like(tensor))
    monkeypatch.setattr(batch, "is_queued", lambda device: True)
    monkeypatch.setattr(batch, "warmed", lambda device, step: step())
    assert generate(model, [[3, 1, 4], [7]], 14, seed=1) == expected
    assert log == [
        *("record 1", "wait 1", "record 2", "record 1", "wait 2", "record 2", "wait 1", "record 1", "wait 2", "wait 1"),
    ]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_graph_gives_the_steps_tokens(dtype, monkeypatch):
    """On a GPU: a captured step against the same steps one launch at a time, greedy and drawn."""
    model = gpt(128, n_embd=64).to("cuda", dtype)
    drawn = dict(seed=3, temperature=0.8)
    for options in (
        dict(temperature=0, stop_ids=[2, 5]),
        dict(**drawn),
        dict(**drawn, top_k=5, min_p=0.01),
        dict(**drawn, top_p=0.9, repetition_penalty=1.1, logprobs=True),
    ):
        decoder = Decoder(model)  # its second call reads the prompts by a graph, and steps in blocks
        monkeypatch.setattr(batch, "BLOCKS_FROM", 50)
        captured = [generate(decoder, [[3, 1, 4], [7]], 100, **options).tokens for _ in range(2)]
        monkeypatch.setattr(batch, "GRAPH_FROM", 10**9)
        assert [generate(Decoder(model), [[3, 1, 4], [7]], 100, **options).tokens] * 2 == captured
        monkeypatch.undo()


@pytest.fixture
def two_threads():
    """As many as a user may have set."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("draft", [False, True])
def test_a_small_model_takes_one_thread_a_token_and_gives_the_others_back(two_threads, draft):
    """A large pass, as over a long prompt, has them all; so has whoever reads the stream."""
    model, passes = gpt(1024), []
    model.h[0].mlp.register_forward_hook(
        lambda module, args, out: passes.append((len(out[0]), torch.get_num_threads()))
    )
    helper = gpt(1024) if draft else None
    for _ in stream(model, [[3, 1, 4] * 200], 3, draft=helper, draft_tokens=2):
        assert torch.get_num_threads() == 2
    assert {threads for tokens, threads in passes if tokens == 600} == {2}
    assert {threads for tokens, threads in passes if tokens < 4} == {1}


def test_a_step_that_fails_gives_the_threads_back(two_threads):
    def fails(module, args, out):
        if torch.get_num_threads() == 1:
            raise MemoryError

    model = gpt()
    model.h[0].mlp.register_forward_hook(fails)
    with pytest.raises(MemoryError):
        generate(model, PROMPT, 3)
    assert torch.get_num_threads() == 2


def test_a_model_that_is_moved_between_two_tokens(model):
    steps = stream(model, PROMPT, 4)
    next(steps)
    model.to("meta")
    with pytest.raises(ValueError, match="generate: the model was moved from cpu to meta between two tokens"):
        next(steps)
