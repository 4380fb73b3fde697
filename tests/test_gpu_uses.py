"""What people do with fastgpt, from one end to the other, on a CPU with small models and on a GPU at GPT-2's width.

The tests of the kernels hold each of them to float64. These hold the ways that lead to them: `fastgpt train` with its
defaults, under autocast and as a CUDA graph; `fastgpt generate`; a Decoder that is kept. The families' steps stand in
swap/test_swap_autocast.py. Each body runs on both devices, so it is known to work before a GPU sees it. No network, no
encoding but "byte".
"""

import copy
import csv
import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

from fastgpt import GPT, GPTConfig, cli, generate
from fastgpt.data.tokenizer import encoding
from fastgpt.generation.decoder import Decoder
from fastgpt.testing import assert_accurate
from fastgpt.training import fit, monitor
from fastgpt.training import run as running
from fastgpt.training.settings import TrainConfig
from fastgpt.weights import load_model

ROOT = Path(__file__).parent.parent
DEVICES = [pytest.param("cpu", id="fallback"), pytest.param("cuda", marks=pytest.mark.gpu, id="gpu")]

# On a GPU the width and the heads are GPT-2's: what is compiled for them is not what serves small ones. A few runs have
# its vocabulary too; the others would only write checkpoints of 650 MB with it.
SMALL = GPTConfig(vocab_size=257, block_size=16, n_layer=2, n_head=2, n_embd=16)
WIDE = GPTConfig(vocab_size=8192, block_size=256, n_layer=2, n_head=12, n_embd=768)
WHOLE = 50304

# All steps are looked at, and the learning rate is the same in a run of any length. It is saved under way, and at last.
STEPS = TrainConfig(
    max_iters=6,
    batch_size=4,
    learning_rate=1e-3,
    warmup_iters=0,
    decay_lr=False,
    eval_interval=1,
    eval_iters=1,
    log_interval=1,
    checkpoint_interval=4,
    sample_tokens=4,
)


@pytest.fixture(autouse=True)
def _no_plot(monkeypatch):
    monkeypatch.setattr(monitor, "plot_losses", lambda rows, path: None)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A folder of two documents."""
    folder = tmp_path_factory.mktemp("texts")
    (folder / "fox.txt").write_text("the quick brown fox jumps over the lazy dog. " * 200)
    (folder / "jabber.txt").write_text("twas brillig, and the slithy toves did gyre and gimble in the wabe. " * 130)
    return folder


def metrics(out):
    """What metrics.csv says of each step: training loss, validation loss, norm of the gradients."""
    names = ("train_loss", "val_loss", "grad_norm")
    with open(out / "metrics.csv") as file:
        return [tuple(float(row[name]) for name in names) for row in csv.DictReader(file)]


def trained(out, texts, device, model=None, resume=False, **changes):
    """Fit in the folder `out`; the metrics of its steps. `model`: fields of GPTConfig."""
    shape = dataclasses.replace(WIDE if device == "cuda" else SMALL, **(model or {}))
    config = dataclasses.replace(STEPS, device=device, **changes)
    fit(shape, config, encoding("byte"), texts, out, resume=resume)
    return metrics(out)


def assert_learned(rows, start):
    """It begins where an untrained model stands, nothing is ever not finite, and it goes down."""
    losses = [train for train, _, _ in rows]
    assert losses[0] == pytest.approx(start, rel=0.05)
    assert all(math.isfinite(number) for row in rows for number in row[:2])
    assert losses[-1] < losses[0] - 0.02 and rows[-1][1] < rows[0][1]


@pytest.mark.parametrize("device", DEVICES)
def test_train_with_its_defaults(device, tmp_path, texts):
    """The command as typed: on a GPU with the built-in corpus and bfloat16, in fewer steps."""
    out = tmp_path / "out"
    few = ["--max_iters", "6", "--eval_interval", "1", "--eval_iters", "1"]
    small = ["--data", texts, "--preset", "byte-0.1M", "--sample_tokens", "8", "--device", "cpu"]
    arguments = ["train", "--out", out, *few, *(small if device == "cpu" else [])]
    assert cli.main(list(map(str, arguments))) == 0
    rows = metrics(out)
    assert len(rows) == 6 and all(math.isfinite(number) for row in rows for number in row)
    # an untrained model with tied weights expects each byte once more, and the corpus, this Python's source, repeats
    # spaces: its loss is below the uniform one by what that Python's source gives, 3% to 6%
    assert rows[0][0] == pytest.approx(math.log(257), rel=0.1)
    assert (out / "samples.txt").read_text().count("--- step") == 6
    assert isinstance(load_model(out)[0], GPT)


WAYS = {
    "bfloat16": dict(dtype="bfloat16"),
    "float16": dict(dtype="float16", max_iters=10),  # its first steps find the scale of the loss
    "float32": dict(dtype="float32"),
    "dropout": dict(dtype="bfloat16", model=dict(dropout=0.2)),
    "documents": dict(dtype="bfloat16", document_mask=True),
    "accumulation": dict(dtype="bfloat16", gradient_accumulation_steps=2),
    "recomputed blocks": dict(dtype="bfloat16", model=dict(activation_checkpointing="block", dropout=0.2)),
    "a float32 stream": dict(dtype="bfloat16", model=dict(residual="float32")),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("device", DEVICES)
def test_every_way_to_train_learns(device, way, tmp_path, texts):
    rows = trained(tmp_path / "out", texts, device, **WAYS[way])
    assert_learned(rows, math.log(WIDE.vocab_size if device == "cuda" else SMALL.vocab_size))


@pytest.mark.gpu
def test_gpt2s_vocabulary_is_learned(tmp_path, texts):
    rows = trained(tmp_path / "out", texts, "cuda", dict(vocab_size=WHOLE), dtype="bfloat16", cuda_graph=True)
    assert_learned(rows, math.log(WHOLE))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("device", DEVICES)
def test_the_kernels_train_as_pytorch_does(device, dtype, tmp_path, texts):
    """The same seed, steps and windows with backend="torch"."""
    found = [
        trained(tmp_path / backend, texts, device, dict(backend=backend), dtype=dtype) for backend in ("auto", "torch")
    ]
    first, last = (0.002, 0.05) if dtype == "bfloat16" else (1e-5, 1e-3)
    for which, close in ((0, first), (-1, last)):
        assert found[0][which][:2] == pytest.approx(found[1][which][:2], rel=close)
    assert found[0][0][2] == pytest.approx(found[1][0][2], rel=10 * first)  # the first gradients


GRAPHED = ("bfloat16", "float32", "float16", "documents", "accumulation", "dropout", "a float32 stream")


@pytest.mark.gpu
@pytest.mark.parametrize("way", GRAPHED)
def test_a_cuda_graph_trains_to_the_same_losses(way, tmp_path, texts):
    """Two steps run as usual, the third is captured, the rest are replays; and each step is evaluated and sampled. To
    the digits of metrics.csv, which are float32's: losses, gradients, what is dropped and where float16 overflows."""
    how = {"max_iters": 8, "decay_lr": True, "warmup_iters": 2, **WAYS[way]}
    plain, graph = (trained(tmp_path / str(graph), texts, "cuda", cuda_graph=graph, **how) for graph in (False, True))
    assert repr(graph) == repr(plain), "the norm of what overflowed, which is NaN, included"
    assert plain[-1][0] < plain[0][0] - 0.02


@pytest.mark.gpu
@pytest.mark.slow
def test_a_cuda_graph_of_a_compiled_model_trains_to_the_same_losses(tmp_path, texts):
    how = dict(compile=True, max_iters=8)
    plain, graph = (trained(tmp_path / str(graph), texts, "cuda", cuda_graph=graph, **how) for graph in (False, True))
    for ours, theirs in zip(graph, plain, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3)


SAID = {
    "auto": (dict(), "one CUDA graph a step"),
    "false": (dict(cuda_graph=False), "no CUDA graph: cuda_graph = false"),
    "recomputed blocks": (
        dict(model=dict(activation_checkpointing="block")),
        "no CUDA graph: activation_checkpointing = 'block'",
    ),
}


@pytest.mark.gpu
@pytest.mark.parametrize("way", SAID)
def test_a_cuda_graph_is_chosen_by_itself_and_said(way, tmp_path, texts, capsys, monkeypatch, recwarn):
    replays, replay = [], torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda self: (replays.append(self), replay(self))[1])
    how, said = SAID[way]
    trained(tmp_path / "out", texts, "cuda", sample_tokens=0, **how)
    assert said in capsys.readouterr().out
    assert len(replays) == (STEPS.max_iters - 2 if way == "auto" else 0)
    assert not [each for each in recwarn if "capturable" in str(each.message)]


@pytest.mark.parametrize("device", DEVICES)
def test_a_loss_that_is_not_finite_stops_where_it_came_from(device, tmp_path, texts, monkeypatch):
    """On a GPU it is a replay's, and the second pass that finds it runs as usual."""
    step = running.Run.step

    def poisoned(self):
        if self.steps_done == 4:
            with torch.no_grad():
                self.model.h[1].mlp.c_fc.bias[3] = math.nan
        return step(self)

    monkeypatch.setattr(running.Run, "step", poisoned)
    said = r"the loss of step 5 is nan on rank 0; the first bad tensor is the weight h\.1\.mlp\.c_fc\.bias"
    with pytest.raises(FloatingPointError, match=said):
        trained(tmp_path / "out", texts, device)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("device", DEVICES)
def test_a_resumed_run_has_the_same_losses(device, dropout, tmp_path, texts):
    how = dict(model=dict(dropout=dropout), dtype="bfloat16")
    expected = trained(tmp_path / "whole", texts, device, **how)
    trained(tmp_path / "two", texts, device, **how, max_iters=3)
    assert trained(tmp_path / "two", texts, device, **how, resume=True) == expected


@pytest.mark.gpu
@pytest.mark.parametrize("way", ["bfloat16", "float16", "dropout"])
def test_a_resumed_cuda_graph_goes_on(way, tmp_path, texts):
    """A resumed run begins with two steps without a graph: they too draw, scale and compute what the replays did."""
    how = {**WAYS[way], "max_iters": 10, "cuda_graph": True}
    expected = trained(tmp_path / "whole", texts, "cuda", **how)
    trained(tmp_path / "two", texts, "cuda", **{**how, "max_iters": 5})
    assert repr(trained(tmp_path / "two", texts, "cuda", **how, resume=True)) == repr(expected)


# Text from a model that was trained.


@pytest.fixture(scope="module", params=DEVICES)
def folder(request, tmp_path_factory, texts):
    """Of a model that learned the texts a little, and the device that it was trained on."""
    out = tmp_path_factory.mktemp("trained") / "out"
    with mock.patch.object(monitor, "plot_losses", lambda rows, path: None):
        rate = 1e-3 if request.param == "cuda" else 1e-2
        model = dict(vocab_size=WHOLE) if request.param == "cuda" else {}
        many = dict(max_iters=60, eval_interval=60, checkpoint_interval=60, learning_rate=rate)
        trained(out, texts, request.param, model, **many)
    return out, request.param


PROMPT = "the qu"
GREEDY = ("--temperature", "0")
SAMPLED = ("--temperature", "0.9", "--top_k", "20", "--top_p", "0.95", "--seed", "5")


def arguments(out, device, *more):
    """Of a command that goes on after six letters; ten more fit into the smaller context."""
    words = ["generate", "--checkpoint", out, "--prompt", PROMPT, "--max_new_tokens", "10", "--device", device]
    return list(map(str, (*words, *more)))


def written(capsys, out, device, *more):
    """The tokens of each sample, by the command in this process."""
    capsys.readouterr()
    assert cli.main(arguments(out, device, "--json", *more)) == 0
    return [sample["tokens"] for sample in json.loads(capsys.readouterr().out)["samples"]]


def assert_likeliest(model, ids, count, slack):
    """Each of the last `count` ids is the likeliest in float64 after those before it, but for `slack`, a share of what
    the logits span. model: on the CPU."""
    with torch.no_grad():
        logits = copy.deepcopy(model).double()(torch.tensor([ids]))[0, -count - 1 : -1, : encoding("byte").n_vocab]
    chosen = logits.gather(1, torch.tensor(ids[-count:])[:, None])[:, 0]
    behind = (logits.amax(1) - chosen) / (logits.amax(1) - logits.amin(1))
    assert behind.max() <= slack, f"a token is behind the likeliest one by {behind.max():.2g} of the logits' span"


@pytest.mark.parametrize(("dtype", "slack"), [("float32", 1e-4), ("bfloat16", 0.05)])
def test_generate_writes_the_likeliest_tokens(folder, dtype, slack, capsys):
    out, device = folder
    (tokens,) = written(capsys, out, device, *GREEDY, "--dtype", dtype)
    assert_likeliest(load_model(out)[0], [*PROMPT.encode(), *tokens], 10, slack)


@pytest.mark.parametrize("how", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_generate_says_the_same_in_a_process_of_its_own(folder, how, capsys):
    out, device = folder
    capsys.readouterr()
    assert cli.main(arguments(out, device, *how)) == 0
    expected = capsys.readouterr().out
    command = [sys.executable, "-m", "fastgpt", *arguments(out, device, *how)]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, errors="replace", timeout=300)
    assert found.returncode == 0, found.stderr
    assert found.stdout == expected and expected.startswith(PROMPT)


def test_a_seed_repeats_what_is_sampled(folder, capsys):
    out, device = folder
    first, again = (written(capsys, out, device, *SAMPLED, "--num_samples", "3") for _ in range(2))
    assert first == again and len(set(map(tuple, first))) > 1


@pytest.mark.parametrize("rows", [1, 3])
def test_a_kept_decoder_in_bfloat16(folder, rows):
    out, device = folder
    model = load_model(out)[0].to(device).eval()
    prompts = torch.randint(97, 123, (rows, 5), device=device)
    decoder = Decoder(model, dtype=torch.bfloat16, tokens=1000, rows=rows)

    plain = GPT(dataclasses.replace(model.config, backend="torch")).to(device)
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():
        exact = copy.deepcopy(plain).double()(prompts)
        theirs = copy.deepcopy(plain).bfloat16()(prompts)
        logits = decoder.logits(decoder.features(prompts))
    assert_accurate(logits.bfloat16(), exact, theirs, name="logits")

    first, again = (generate(decoder, prompts, 10, temperature=0).tokens for _ in range(2))
    assert first == again
    for prompt, tokens in zip(prompts.tolist(), first, strict=True):
        assert_likeliest(copy.deepcopy(model).cpu(), [*prompt, *tokens], 10, 0.05)
    drawn = generate(decoder, prompts, 10, temperature=0.8, top_k=50, seed=1).tokens
    assert drawn == generate(decoder, prompts, 10, temperature=0.8, top_k=50, seed=1).tokens
    with torch.no_grad():
        model.h[0].mlp.c_fc.weight.mul_(2)  # of which it has a copy in bfloat16
    with pytest.raises(ValueError, match="the model has changed since this Decoder"):
        generate(decoder, prompts, 1)
