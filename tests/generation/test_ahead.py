"""Steps that a device has before the host has seen the last ones' tokens, on a device that works when it likes."""

import gc
import random
import weakref
from types import SimpleNamespace

import pytest
import torch

from fastgpt import generate, memory, private, stream
from fastgpt.generation import ahead, batch, kept
from fastgpt.generation.ahead import AHEAD
from fastgpt.generation.decoder import Decoder
from fastgpt.generation.kept import release
from fastgpt.generation.sampling import Sampling
from tests.generation.feigned import card
from tests.generation.small_gpt import gpt, recomputed

PROMPTS = [[3, 1, 4], [7], [1, 5, 9, 2, 6]]
WAYS = (
    dict(temperature=0),
    dict(temperature=0, stop_ids=[2, 5]),
    dict(seed=3, stop_ids=4, logprobs=True),
    dict(seed=5, top_k=5, top_p=0.9, repetition_penalty=1.2, num_samples=2),
    dict(temperature=0, overflow="slide", stop_ids=7),
)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return gpt(64)


@pytest.mark.parametrize("seed", range(10))
def test_a_device_of_any_pace_gives_the_tokens_of_steps_in_turn(model, seed):
    """None lost, none twice, none after a row's end; and the lag is what docs say."""
    drawn = random.Random(seed)
    way, prompts = WAYS[seed % len(WAYS)], PROMPTS[: drawn.randint(1, 3)]
    new = 70 if "overflow" in way else drawn.choice((1, 2, 5, 16, 17, 30))
    expected = list(stream(model, prompts, new, **way))
    with card(seed) as device:
        found, most = [], 0
        for step in stream(model, prompts, new, **way):
            found.append(step)
            most = max(most, device.steps - len(found))
        device.drain()
    assert [each._replace(logprobs=None) for each in found] == [each._replace(logprobs=None) for each in expected]
    if way.get("logprobs"):
        flat = [[p for each in steps for row in each.logprobs for p in row] for steps in (found, expected)]
        torch.testing.assert_close(*map(torch.tensor, flat))
    assert most <= AHEAD and device.steps <= new


def test_the_first_token_is_not_waited_for_behind_others(model):
    with card(1) as device:
        next(stream(model, PROMPTS, 40, temperature=0))
        assert device.steps == 1


@pytest.mark.parametrize("seed", range(4))
def test_calls_that_follow_one_that_was_left_in_the_middle(model, seed):
    """Of one Decoder, whose batch and captures they share; what the device still has to do spoils nothing."""
    drawn = random.Random(seed)
    decoder = Decoder(model)
    with card(seed) as device:
        for _ in range(3):
            way = drawn.choice(WAYS[:4])
            prompts = drawn.sample(PROMPTS, 2)
            expected = generate(Decoder(model), prompts, 24, **way)
            steps = stream(decoder, prompts, 24, **way)
            for _ in range(drawn.randint(0, 9)):
                next(steps, None)
            steps.close()
            assert generate(decoder, prompts, 24, **way).tokens == expected.tokens
    assert "replay" in device.log


def test_a_later_call_captures_nothing(model):
    """A prompt's pass is captured where it is the second of about that length, a step once, and four of them once."""
    model, logs = gpt(256), []
    decoder, long = Decoder(model), [3, 1, 4] * 25  # wider than the others
    with card() as device:
        for prompt, new in [
            *[([3, 1, 4], 89), ([3, 5], 90), ([7] * 60, 40)],
            *[(long, 23), ([1, 2], 80), (long[:-1], 25), (long[:70], 50), ([4, 4], 99)],
        ]:
            found = generate(decoder, [prompt], new, temperature=0).tokens
            assert found == [recomputed(model, prompt, new, context=256)]
            device.drain()
            logs.append([each for each in device.log if each not in ("begin", "replay")])
            device.log.clear()
    assert logs == [["warm", "capture", "capture"], ["capture"], [], [], [], ["capture"], [], []]


def test_the_graphs_of_prompts_that_are_kept_are_few(model, monkeypatch):
    """The latest widths'."""
    monkeypatch.setattr(batch, "CAPTURED_WIDTHS", 2)
    decoder, logs = Decoder(gpt(256)), []
    with card() as device:
        for length in (3, 70, 4, 71, 130, 4, 130):
            generate(decoder, [[1] * length], 250 - length, temperature=0)
            device.drain()
            logs.append(device.log.count("capture"))
            device.log.clear()
    assert logs == [2, 0, 1, 1, 0, 0, 1]


def test_a_few_tokens_are_captured_the_second_time(model):
    decoder, logs = Decoder(model), []
    with card() as device:
        for prompt in ([3, 1, 4], [1, 5, 9], [2, 6, 5]):
            assert generate(decoder, [prompt], 3, temperature=0).tokens == [recomputed(model, prompt, 3, context=64)]
            device.drain()
            logs.append([each for each in device.log if each != "begin"])
            device.log.clear()
    assert logs == [["warm"] * 2, ["capture", "replay", "capture", "replay", "replay"], ["replay"] * 3]


def test_a_model_that_is_given_itself_keeps_its_captures_while_it_is_the_same(model):
    """And each call has the tokens of the model as it is then."""
    model, logs = gpt(64), []
    with card() as device:

        def tokens(**how):
            device.log.clear()
            found = generate(model, [[3, 1, 4]], 16, temperature=0, **how).tokens
            device.drain()
            logs.append("capture" in device.log)
            assert how or found == [recomputed(model, [3, 1, 4], 16, context=64)]
            return found

        tokens()
        tokens()  # which captures the prompt's pass
        first = tokens()
        with torch.no_grad():
            model.h[0].mlp.c_fc.weight.neg_()
        assert tokens() != first  # trained in place: the captured steps read what is there
        model.h[1].attn.scale = 0.3
        tokens()
        model.h[1].mlp.c_fc.weight = torch.nn.Parameter(-model.h[1].mlp.c_fc.weight.detach())
        tokens()
        tokens(dtype=torch.bfloat16)
        tokens(dtype=torch.bfloat16)  # copies of weights are not kept, nor what reads them
    assert logs == [True, True, False, False, True, True, True, True]


def changed_part(model, what):
    """Changes a model so that its tokens are others; what must live on meanwhile."""
    mlp, attn = model.h[0].mlp, model.h[1].attn
    if what == "a parameter's numbers":
        mlp.c_fc.weight.data.neg_()
    elif what == "a parameter":
        mlp.c_fc.weight = torch.nn.Parameter(-mlp.c_fc.weight.detach())
    elif what == "a parameter's tensor":
        mlp.c_fc.weight.data = -mlp.c_fc.weight.data
    elif what == "a parameter's tensor, which lives on":
        before = mlp.c_fc.weight.data
        mlp.c_fc.weight.data = -before
        return before
    elif what == "a parameter's place":
        mlp.c_fc.bias, attn.c_proj.bias = torch.nn.Parameter(torch.full((64,), 2.0)), None
    elif what == "a number":
        attn.scale = 0.01
    elif what == "a word":
        mlp.gelu = "none"
        mlp.c_fc.weight.data *= 0.1
    elif what == "a norm's eps":
        model.h[0].ln_1.eps = model.h[0].ln_2.eps = 1000.0
    elif what == "a part":
        model.h[0].mlp = gpt(64).h[0].mlp
    elif what == "the order of parts":
        model.h[0].mlp, model.h[1].mlp = model.h[1].mlp, model.h[0].mlp
    elif what == "a hook":
        mlp.register_forward_hook(lambda module, args, output: -output)
    else:
        attn.c_proj.__class__ = type("Negative", (torch.nn.Linear,), dict(forward=lambda self, x: -x @ self.weight.T))
    return None


CHANGES = (
    "a parameter's tensor, which lives on",
    *("a parameter's numbers", "a parameter", "a parameter's tensor", "a parameter's place", "a number", "a word"),
    *("a norm's eps", "a part", "the order of parts", "a hook", "a class"),
)


@pytest.mark.parametrize("what", CHANGES)
def test_a_model_that_changed_between_two_calls_is_read_anew(what):
    """One that was found to be as before twice."""
    torch.manual_seed(1)
    model = gpt(64)

    def tokens(given):
        try:
            return generate(given, [[3, 1, 4]], 16, temperature=0).tokens
        except ValueError as error:  # where a change was seen too late
            return str(error)

    with card() as device:
        first = [tokens(model) for _ in range(3)]
        alive = changed_part(model, what)
        found = [tokens(model) for _ in range(3)]
        device.queue.clear()
        expected = tokens(Decoder(model))
        del alive
    assert found == [expected] * 3 and expected != first[0] and first == [first[0]] * 3


def test_a_model_that_changes_after_the_call_began_is_told():
    """Where the model must be read after all."""
    model = gpt(64)
    with card() as device:
        for _ in range(3):
            generate(model, [[3, 1, 4]], 16, temperature=0)
        steps = stream(model, [[3, 1, 4]], 16, temperature=0)
        model.h[0].mlp.c_fc.weight = torch.nn.Parameter(-model.h[0].mlp.c_fc.weight.detach())
        with pytest.raises(ValueError, match="generate: the model has changed since this call began"):
            list(steps)
        device.queue.clear()


def test_what_is_remembered_of_a_model_keeps_no_weights():
    model = gpt(64)
    with card():
        for _ in range(3):
            generate(model, [[3, 1, 4]], 16, temperature=0)
        held = [weakref.ref(each) for each in (model.h[0].mlp.c_fc.weight, model.h[1], model.wte)]
        gc.disable()
        try:
            model.h[0].mlp.c_fc.weight = model.wte = None
            del model.h[1]
            assert [each() for each in held] == [None] * 3
        finally:
            gc.enable()


def test_what_is_kept_goes_with_the_model(model):
    model = gpt(64)
    with card():
        generate(model, [[3, 1, 4]], 16, temperature=0)
        held = [weakref.ref(each) for each in model.modules()]
        gc.disable()
        try:
            del model
            assert not any(each() for each in held)
        finally:
            gc.enable()


def test_memory_that_was_given_back_since_is_another_tensors():
    """Though what lies there now lies as what was read did."""
    weight = torch.zeros(3)
    found = kept.Kept(("where it lies",), (private.StorageWeakRef(weight.untyped_storage()),))
    assert found.holds(("where it lies",)) and not found.holds(("elsewhere",))
    del weight
    assert not found.holds(("where it lies",))


def test_the_next_call_waits_on_its_stream_for_what_the_last_one_left(model, monkeypatch):
    decoder, waited = Decoder(model), []
    used = object()
    planned = batch.plan(decoder, 3, 1, 16, Sampling())
    left = batch.Batch(decoder, planned)
    found = kept.Kept()
    found.give(left, used, 2**30)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(wait_event=waited.append))
    assert found.take(planned) is left and waited == [used]
    assert found.take(planned) is None


def test_what_is_kept_can_be_given_back(model):
    decoder = Decoder(model)
    with card() as device:
        for given in (decoder, model):
            for _ in range(2):
                generate(given, [[3, 1, 4]], 16, temperature=0)
                release(given)
                device.drain()
    assert device.log.count("warm") == 4


def test_of_what_is_kept_the_latest_has_the_room(model, monkeypatch):
    """Two caches of 64 tokens, 2 layers and 16 channels find room here, and not three."""
    monkeypatch.setattr(kept, "most_bytes", lambda device: 2.5 * (2 * 2 * 64 * 16 * 4))
    monkeypatch.setattr(batch, "CAPTURED_PROMPTS", 0)
    decoder = Decoder(model)
    warm = []
    with card() as device:
        for temperature in (1.0, 2.0, 3.0, 3.0, 2.0, 1.0):
            device.log.clear()
            generate(decoder, [[3, 1, 4]], 16, temperature=temperature, seed=1)
            device.drain()
            warm.append("warm" in device.log)
        assert len(decoder.kept) == 2
    assert warm == [True, True, True, False, False, True]


def test_a_call_that_finds_no_memory_takes_what_is_kept(model, monkeypatch):
    decoder, room = Decoder(model), 10**9
    with card():
        generate(decoder, [[3, 1, 4]], 16, temperature=0)
        assert len(decoder.kept) == 1
        monkeypatch.setattr(memory, "available_bytes", lambda device: 0 if len(decoder.kept) else room)
        generate(decoder, [[3, 1, 4]], 16, temperature=0, num_samples=2)
        assert len(decoder.kept) == 1


def test_two_streams_of_one_decoder_at_once(model):
    decoder, way = Decoder(model), dict(seed=2)
    expected = [list(stream(model, [prompt], 20, **way)) for prompt in ([3, 1, 4], [2, 7, 1])]
    with card(4):
        generate(decoder, [[1, 1, 1]], 20, **way)
        streams = [stream(decoder, [prompt], 20, **way) for prompt in ([3, 1, 4], [2, 7, 1])]
        assert [list(pair) for pair in zip(*streams, strict=True)] == [list(p) for p in zip(*expected, strict=True)]


def test_a_call_that_failed_leaves_nothing(model):
    """NaN may stand in its cache."""
    model = gpt(64)
    decoder = Decoder(model)
    with card() as device:
        row = model.wpe.weight.data[9].clone()
        model.wpe.weight.data[9] = float("nan")
        with pytest.raises(ValueError, match="position 9 are not finite"):
            generate(decoder, [[3, 1, 4]], 16, temperature=0)
        model.wpe.weight.data[9] = row
        device.log.clear()
        expected = [recomputed(model, [3, 1, 4], 16, context=64)]
        assert generate(decoder, [[3, 1, 4]], 16, temperature=0).tokens == expected
    assert "warm" in device.log


class Pretended:
    """A device of which each step tells its number."""

    def __init__(self, every, depth):
        self.every, self.depth, self.begun, self.sent = every, depth, 0, []

    def advance(self, count):
        self.begun += count

    def send(self, first, count):
        self.sent.append((first, count))
        return type("Arriving", (), {"wait": lambda _: list(range(first, first + count))})()


@pytest.mark.parametrize("every", [1, 3, 4])
@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("limit", [1, 2, 4, 5, 9, 23])
def test_every_step_is_told_once_and_in_order(every, depth, limit):
    for end in (None, 0, 1, limit // 2):
        device, found = Pretended(every, depth), []

        def ended(found=found, end=end):
            return end is not None and len(found) > end

        for each in ahead.told(device, limit, ended):
            found.append(each)
            assert device.begun - len(found) <= depth * every - 1
        assert found == list(range(limit if end is None else min(limit, end + 1)))
        assert device.begun <= limit and sum(count for _, count in device.sent) == device.begun


# On a card.


def captures(monkeypatch):
    """A list that grows with each capture."""
    made, captured = [], batch.captured

    def noted(*given):
        made.append(given)
        return captured(*given)

    monkeypatch.setattr(batch, "captured", noted)
    return made


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", WAYS[:4], ids=str)
def test_on_a_gpu_calls_of_one_decoder_write_what_each_writes_alone(dtype, way, monkeypatch):
    """Prompts of one length and of others, one call left in the middle, one on a stream of its own."""
    model = gpt(128, n_embd=64).to("cuda", dtype)
    decoder, side = Decoder(model), torch.cuda.Stream()
    calls = [[3, 1, 4], [1, 5, 9], [2, 6, 5], [3, 5], [8, 9, 7], [9, 3, 2]]
    expected = [generate(Decoder(model), [prompt], 40, **way).tokens for prompt in calls]
    made = captures(monkeypatch)
    for number, (prompt, tokens) in enumerate(zip(calls, expected, strict=True)):
        left = stream(decoder, [[1, 1, 1]], 40, **way)
        for _ in range(number):
            next(left, None)
        left.close()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side if number % 2 else torch.cuda.current_stream()):
            assert generate(decoder, [prompt], 40, **way).tokens == tokens
    assert len(made) <= 4, "of a step, and of prompts of two lengths"


@pytest.mark.gpu
def test_on_a_gpu_a_model_keeps_its_captures_while_it_is_the_same(monkeypatch):
    model = gpt(128, n_embd=64).to("cuda")
    made = captures(monkeypatch)

    def tokens():
        found = generate(model, [[3, 1, 4]], 40, temperature=0).tokens
        assert found == generate(Decoder(model), [[3, 1, 4]], 40, temperature=0).tokens
        return found

    first = tokens(), tokens(), tokens()
    assert first[0] == first[1] == first[2] and len(made) == 1 + 1 + 3, "a step and a prompt, and each Decoder's own"
    with torch.no_grad():
        model.h[0].mlp.c_fc.weight.neg_()
    assert tokens() != first[0] and len(made) == 6
    model.h[0].mlp.c_fc.weight = torch.nn.Parameter(-model.h[0].mlp.c_fc.weight.detach())
    assert tokens() == first[0] and len(made) == 8
    release(model)
    assert tokens() == first[0] and len(made) == 10


@pytest.mark.gpu
def test_on_a_gpu_a_models_captures_go_with_it():
    generate(gpt(128, n_embd=64).to("cuda"), [[3, 1, 4]], 40)  # cuBLAS has its workspace
    gc.collect()
    gc.disable()
    try:
        before = torch.cuda.memory_allocated()
        model = gpt(128, n_embd=64).to("cuda")
        for _ in range(3):
            generate(model, [[3, 1, 4]], 40, temperature=0)
        assert torch.cuda.memory_allocated() > before
        del model
        assert torch.cuda.memory_allocated() == before
    finally:
        gc.enable()
