"""After a call everything is as it was, but for what docs say that it changes: every public function and command, in a
process and with a model as they usually are, and as a user may have set them; and after an error in the middle."""

import contextlib
import os
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch

import fastgpt
from fastgpt import GPT, GPTConfig, accelerate, cli, data, doctor, generate, ops, restore, training, verify, weights
from fastgpt.data.tokenizer import encoding
from fastgpt.generation.decoder import Decoder
from fastgpt.generation.evaluation import evaluate
from fastgpt.testing import on_reference
from fastgpt.training.settings import TrainConfig
from tests import calls
from tests.generation.small_gpt import CONTEXT, VOCABULARY, gpt
from tests.models import book
from tests.state import unchanged
from tests.torch_defaults import default_dtype

DRAWS = ("torch's generator",)
SHORT = dict(max_iters=2, batch_size=2, eval_iters=1, sample_tokens=3, device="cpu")
SHAPE = dict(vocab_size=257, block_size=16, n_layer=1, n_head=2, n_embd=16)
TINY = ["--block_size=16", "--n_layer=1", "--n_embd=16", *(f"--{name}={value}" for name, value in SHORT.items())]


class Row(NamedTuple):
    """A call in a World; what it may change, which it must; and which files it leaves in the working folder."""

    call: object
    but: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    trains: bool = False  # and so needs gradients


def operands(name):
    found, options = getattr(calls, name)(torch.device("cpu"), torch.float32)
    return {key: value for key, value in found.items() if key not in ("d0", "d1")}, options


def op(name, **more):
    def call(world):
        found, options = operands(name)
        return lambda: getattr(ops, name)(**found, **{**options, **more})

    return call


def command(*arguments):
    def call(world):
        given = [str(getattr(world, each[1:])) if each.startswith("@") else each for each in arguments]

        def run():
            assert cli.main(given) == 0

        return run

    return call


def here(function):
    """A call that needs nothing made before it."""
    return lambda world: lambda: function(world)


def made(name):
    Path(name).mkdir()
    return Path(name)


def step(world):
    training_step = training.TrainingStep(world.model, training.adamw(world.model, 0.1))
    return lambda: training_step(world.ids, world.ids)


def fitted(world):
    return lambda: training.fit(GPTConfig(**SHAPE), TrainConfig(**SHORT), "byte", world.text, "out")


def trained(world):
    plan = training.plan_run(GPTConfig(**SHAPE), TrainConfig(**SHORT), "byte", world.text, "out")
    return lambda: training.train(plan)


def swapped(world):
    """accelerate and restore: what the first changes the second puts back."""

    def run():
        accelerate(world.book, backend="torch")
        restore(world.book)

    return run


def within(world):
    def run():
        with fastgpt.accelerated(world.book, backend="torch"):
            world.book(world.ids)

    return run


def streamed(name, *more):
    def of(world):
        load = world.model.state_dict().__getitem__
        getattr(weights, name)(world.model.config, torch.float32, load, made("out"), *more)

    return here(of)


TOKENS = np.arange(40) % VOCABULARY
FUNCTIONS = {
    "fastgpt.GPT": Row(here(lambda w: GPT(GPTConfig(**SHAPE))), DRAWS),
    "fastgpt.GPTConfig": Row(here(lambda w: GPTConfig.preset("byte-0.1M"))),
    "fastgpt.Report": Row(here(lambda w: str(fastgpt.Report((), "")))),
    "fastgpt.accelerate": Row(swapped),
    "fastgpt.accelerated": Row(within),
    "fastgpt.restore": Row(here(lambda w: restore(w.book))),
    "fastgpt.explain": Row(here(lambda w: fastgpt.explain(ops.layer_norm, torch.ones(2, 4), torch.ones(4)))),
    "fastgpt.generate": Row(here(lambda w: generate(w.model, w.ids, 2, seed=1))),
    "fastgpt.generate, no seed": Row(here(lambda w: generate(w.model, w.ids, 2)), DRAWS),
    "fastgpt.generate, book": Row(here(lambda w: generate(w.book, w.ids, 2, seed=1, top_k=3, logprobs=True))),
    "fastgpt.generate, draft": Row(here(lambda w: generate(w.model, w.ids, 4, seed=1, draft=w.draft))),
    "fastgpt.stream": Row(here(lambda w: next(fastgpt.stream(w.model, w.ids, 3, seed=1)))),
    **{f"fastgpt.ops.{name}": Row(op(name)) for name in ("layer_norm", "decode_attention", "gelu_mlp")},
    **{f"fastgpt.ops.{name}": Row(op(name)) for name in ("causal_attention_qkv", "linear_cross_entropy")},
    "fastgpt.ops.add_layer_norm": Row(op("add_layer_norm")),
    "fastgpt.ops.add_layer_norm, no seed": Row(op("add_layer_norm", seed=None), DRAWS),
    "fastgpt.ops.causal_attention": Row(op("causal_attention")),
    "fastgpt.ops.causal_attention, dropout": Row(op("causal_attention", dropout_p=0.3, seed=3)),
    "fastgpt.ops.causal_attention, no seed": Row(op("causal_attention", dropout_p=0.3), DRAWS),
    "fastgpt.ops.embedding": Row(op("embedding")),
    "fastgpt.ops.embedding, no seed": Row(op("embedding", seed=None), DRAWS),
    "fastgpt.ops.document_ids": Row(here(lambda w: ops.document_ids(torch.tensor([0, 3]), 5))),
    "fastgpt.ops.explain": Row(here(lambda w: ops.explain(ops.layer_norm, torch.ones(2, 4), torch.ones(4)))),
    "fastgpt.ops.backend_in_words": Row(here(lambda w: ops.backend_in_words("auto", torch.ones(1)))),
    "fastgpt.ops.decoding_steps": Row(here(lambda w: ops.decoding_steps("auto", torch.ones(1)))),
    "fastgpt.ops.DecodingSteps": Row(here(lambda w: ops.DecodingSteps())),
    "fastgpt.ops.explain_token": Row(here(lambda w: ops.explain_token(torch.ones(50, 8), 2, 32, 16))),
    "fastgpt.ops.interpreted": Row(here(lambda w: ops.interpreted())),
    "fastgpt.ops.kernels_run_on": Row(here(lambda w: ops.kernels_run_on(torch.device("cpu")))),
    "fastgpt.ops.fp8_obstacle": Row(here(lambda w: ops.fp8_obstacle(torch.device("cpu")))),
    "fastgpt.ops.fp8_producers": Row(here(lambda w: ops.fp8_producers("auto", torch.ones(2)))),
    "fastgpt.ops.no_triton": Row(here(lambda w: ops.no_triton())),
    "fastgpt.ops.watcher": Row(here(lambda w: ops.watcher())),
    "fastgpt.training.TrainConfig": Row(here(lambda w: TrainConfig())),
    "fastgpt.training.TrainingStep": Row(step, (*DRAWS, "numbers", "gradients"), trains=True),
    "fastgpt.training.adamw": Row(here(lambda w: training.adamw(w.model, 0.1))),
    "fastgpt.training.Plan": Row(here(lambda w: training.Plan(None, None, None, None, Path("out"), False))),
    "fastgpt.training.plan_run": Row(here(lambda w: training.plan_run({}, {"device": "cpu"}, "byte", w.text, "out"))),
    "fastgpt.training.pretrained": Row(here(lambda w: training.pretrained(str(w.checkpoint)))),
    "fastgpt.training.fit": Row(fitted, DRAWS, ("out",), trains=True),
    "fastgpt.training.train": Row(trained, DRAWS, ("out",), trains=True),
    "fastgpt.weights.from_pretrained": Row(here(lambda w: weights.from_pretrained(w.checkpoint))),
    "fastgpt.weights.load_model": Row(here(lambda w: weights.load_model(w.checkpoint))),
    "fastgpt.weights.load_named": Row(here(lambda w: weights.load_named(w.checkpoint))),
    "fastgpt.weights.save_model": Row(here(lambda w: weights.save_model(w.draft, made("out"), "byte")), files=("out",)),
    "fastgpt.weights.save_pretrained": Row(here(lambda w: weights.save_pretrained(w.model, "out")), files=("out",)),
    "fastgpt.weights.stream_model": Row(streamed("stream_model", "byte"), files=("out",)),
    "fastgpt.weights.stream_pretrained": Row(streamed("stream_pretrained"), files=("out",)),
    "fastgpt.weights.convert": Row(here(lambda w: weights.convert(w.checkpoint, "out", "book")), files=("out",)),
    "fastgpt.data.Corpus": Row(here(lambda w: data.Corpus([1], [2], "few", "").facts())),
    "fastgpt.data.Order": Row(here(lambda w: data.Order(TOKENS, 4, "epoch", 3).starts(0, 5))),
    "fastgpt.data.builtin_documents": Row(here(lambda w: data.builtin_documents())),
    "fastgpt.data.documents": Row(here(lambda w: data.documents(w.ids, 3))),
    "fastgpt.data.holds_tokens": Row(here(lambda w: data.holds_tokens(w.text))),
    "fastgpt.data.load_corpus": Row(here(lambda w: data.load_corpus(w.text, encoding("byte"), 16))),
    "fastgpt.data.read_tokens": Row(here(lambda w: data.read_tokens(w.text, encoding("byte")))),
    "fastgpt.data.tokenize": Row(here(lambda w: data.tokenize([w.text], encoding("byte"), "out")), files=("out",)),
    "fastgpt.data.windows": Row(here(lambda w: data.windows(TOKENS, [0, 3], 4, torch.device("cpu")))),
    "Decoder": Row(here(lambda w: Decoder(w.book, tokens=100))),
    "evaluate": Row(here(lambda w: evaluate(w.model, TOKENS, each=True))),
    "verify_model": Row(here(lambda w: verify.verify_model(w.model, w.ids))),
    "verify_model, book": Row(here(lambda w: verify.verify_model(w.book, w.ids))),
    "verify_functions": Row(here(lambda w: verify.verify_functions("cpu"))),
    "random_ids": Row(here(lambda w: verify.random_ids(w.model))),
    "on_reference": Row(here(lambda w: on_reference(w.model))),
    "examine": Row(here(lambda w: doctor.examine())),
    "fastgpt train": Row(command("train", "--data", "@text", "--out=out", *TINY), DRAWS, ("out",), trains=True),
    "fastgpt tokenize": Row(command("tokenize", "@text", "-o", "out", "--encoding", "byte"), files=("out",)),
    "fastgpt generate": Row(
        command("generate", "--checkpoint", "@checkpoint", "--prompt=a", "--max_new_tokens=3", "--seed=1")
    ),
    "fastgpt generate, no seed": Row(
        command("generate", "--checkpoint", "@checkpoint", "--max_new_tokens=3", "--prompt=a", "--json"), DRAWS
    ),
    "fastgpt eval": Row(
        command("eval", "@text", "--checkpoint", "@checkpoint", "--html", "page.html"), files=("page.html",)
    ),
    "fastgpt convert": Row(command("convert", "@checkpoint", "out", "--to", "nanogpt"), files=("out",)),
    "fastgpt verify": Row(command("verify", "@checkpoint", "--tokens=5", "--device=cpu")),
    "fastgpt doctor": Row(command("doctor", "--json")),
}
# Data, types, modules.
NOT_CALLED = {"fastgpt.ops.FUNCTIONS", "fastgpt.ops.Backend", "fastgpt.ops.autograd", "fastgpt.ops.eight_bits"}


def test_every_public_name_has_its_row():
    public = {
        f"{module.__name__}.{name}"
        for module in (fastgpt, ops, training, weights, data)
        for name in module.__all__
        if not isinstance(getattr(module, name), str | tuple | dict)
    }
    named = {name.partition(",")[0] for name in FUNCTIONS}
    assert public - NOT_CALLED - named == set()
    assert {f"fastgpt {name}" for name in cli.COMMANDS} - named == set()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A text and a checkpoint."""
    folder = tmp_path_factory.mktemp("files")
    text = folder / "fox.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 30)
    training.fit(GPTConfig(**SHAPE), TrainConfig(**SHORT), "byte", text, folder / "run")
    return SimpleNamespace(text=text, checkpoint=folder / "run")


@pytest.fixture
def world(request, files, tmp_path, monkeypatch):
    """Models, ids and files in an empty working folder; in the odd one all is as people may have set theirs."""
    monkeypatch.chdir(tmp_path)
    model, draft = gpt().train(), gpt()
    family = book(context_length=CONTEXT, vocab_size=VOCABULARY).train()
    odd = request.param == "odd"
    if odd:
        for part in (model.ln_f, model.h[0].mlp, family.trf_blocks[1]):
            part.eval()
        for weight in (model.wpe.weight, family.final_norm.scale):
            weight.requires_grad_(False)
        draft.h[1].train()
    torch.manual_seed(11)
    there = dict(model=model, draft=draft, book=family, ids=torch.randint(VOCABULARY, (2, 4)), **vars(files))
    with contextlib.ExitStack() as settings:
        if odd:
            settings.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", message="one of the user's own")
            monkeypatch.setenv("OMP_NUM_THREADS", "3")
            settings.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(2)
            settings.enter_context(default_dtype(torch.float64))
        yield SimpleNamespace(odd=odd, **there)


def both(cases):
    """In the odd world, and those that a model is given to in the usual one too."""
    models = ("accelerate", "restore", "generate", "stream", "TrainingStep", "Decoder", "evaluate", "verify_model")
    usual = [("usual", name) for name in cases if any(each in name for each in models) and " " not in name]
    return pytest.mark.parametrize(("world", "name"), [*usual, *(("odd", name) for name in cases)], indirect=["world"])


@both(FUNCTIONS)
def test_what_a_call_leaves_behind(name, world, capsys):
    row = FUNCTIONS[name]
    call = row.call(world)
    expected = (*row.but, "its files") if row.files else row.but
    grad = torch.set_grad_enabled(row.trains or not world.odd)
    with grad, unchanged(world.model, world.draft, world.book, but=expected):
        call()
    assert sorted(os.listdir()) == sorted(row.files)


def spoiled(world):
    """A part in the middle whose numbers are not finite."""
    with torch.no_grad():
        world.model.h[1].mlp.c_fc.bias[3] = torch.nan
    return world.model


def interrupted(world):
    with fastgpt.accelerated(world.book, backend="torch"):
        world.book(world.ids)
        raise KeyError("the body's own")


def left_early(world):
    steps = fastgpt.stream(world.draft, world.ids, 3, seed=1)
    next(steps)
    steps.close()
    raise KeyError("the reader's own")


LONG = torch.zeros(1, CONTEXT + 9, dtype=torch.int64)
SHORT_TEXT = GPTConfig(**{**SHAPE, "block_size": 4096})
ERRORS = {
    "generate": (ValueError, lambda w: generate(spoiled(w), w.ids, 2, seed=1)),
    "generate, draft": (ValueError, lambda w: generate(w.draft, w.ids, 2, seed=1, draft=spoiled(w))),
    "stream": (KeyError, left_early),
    "evaluate": (ValueError, lambda w: evaluate(spoiled(w), TOKENS)),
    "accelerate": (ValueError, lambda w: accelerate(w.book, backend="gpu")),
    "accelerated": (KeyError, interrupted),
    "verify_model": (ValueError, lambda w: verify.verify_model(w.model, LONG)),
    "verify_model, book": (IndexError, lambda w: verify.verify_model(w.book, LONG)),
    "fit": (ValueError, lambda w: training.fit(SHORT_TEXT, TrainConfig(**SHORT), "byte", w.text, "out")),
    "convert": (ValueError, lambda w: weights.convert(w.checkpoint, "out", "book", vocab_size=0)),
    "tokenize": (FileNotFoundError, lambda w: data.tokenize([w.text, "gone"], encoding("byte"), "out")),
}


@both(ERRORS)
def test_what_an_error_leaves_behind(name, world):
    kind, call = ERRORS[name]
    spoiled(world)
    with unchanged(world.model, world.draft, world.book), torch.set_grad_enabled(not world.odd), pytest.raises(kind):
        call(world)
