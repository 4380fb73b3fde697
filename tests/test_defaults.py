"""A default dtype or a default device that the user set reaches no tensor of fastgpt's own: the same bits come out as
under PyTorch's usual defaults. The device "meta" stands for any that is not the tensors' own, as "cuda" would be."""

import contextlib
import copy
import dataclasses

import numpy as np
import pytest
import torch
from torch.func import functional_call, grad

from fastgpt import GPTConfig, ops
from fastgpt.data.tokenizer import encoding
from fastgpt.generation import generate
from fastgpt.generation.evaluation import evaluate
from fastgpt.ops import reference
from fastgpt.training import fit
from fastgpt.training.optimizer import TrainingStep, adamw
from fastgpt.training.settings import TrainConfig
from fastgpt.verify import random_ids, verify_functions, verify_model
from fastgpt.weights import convert, from_pretrained
from tests.generation.small_gpt import gpt
from tests.models import book
from tests.swap.swapped import accelerate, batch, results
from tests.torch_defaults import default_device, default_dtype

WORLDS = {
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float16": lambda: default_dtype(torch.float16),
    "float64": lambda: default_dtype(torch.float64),
    "meta": lambda: default_device("meta"),
}
worlds = pytest.mark.parametrize("world", WORLDS.values(), ids=WORLDS)


def the_same_bits(world, work):
    """work() gives tensors or numbers, in lists and dicts; it draws from one seed."""
    found = []
    for here in (contextlib.nullcontext, world):
        torch.manual_seed(7)
        with here():
            found.append(work())
    assert_same(*found)
    return found[0]


def assert_same(expected, got):
    if isinstance(expected, dict):
        assert list(expected) == list(got)
        expected, got = list(expected.values()), list(got.values())
    if isinstance(expected, list | tuple):
        assert len(expected) == len(got)
        for a, b in zip(expected, got, strict=True):
            assert_same(a, b)
    elif isinstance(expected, torch.Tensor):
        assert got.dtype == expected.dtype and got.device == expected.device
        assert torch.equal(got.nan_to_num(7e7), expected.nan_to_num(7e7))
    else:
        assert got == expected


# The functions


def calls(dtype):
    """By label: a function's name, its floating-point operands and what else it takes."""

    def leaf(*shape, scale=1.0):
        return (torch.randn(shape) * scale).to(dtype)

    x, heads = leaf(2, 32, 48), [leaf(2, 4, 32, 12) for _ in range(3)]
    ids, drops = torch.randint(0, 300, (2, 32)), dict(dropout_p=0.2, seed=5)
    mask = torch.arange(32) >= torch.tensor([[0], [3]])
    documents = ops.document_ids(torch.tensor([0, 9, 20]), 32).expand(2, -1)
    mlp = [x, leaf(1536, 48, scale=0.2), leaf(1536), leaf(48, 1536, scale=0.1), leaf(48)]  # 98,304 hidden units
    head = [x, leaf(300, 48, scale=0.3)]
    return {
        "layer_norm": ("layer_norm", [x, leaf(48), leaf(48)], {}),
        "add_layer_norm": ("add_layer_norm", [x, leaf(2, 32, 48), leaf(48), leaf(48)], {**drops, "x_bias": leaf(48)}),
        "causal_attention": ("causal_attention", heads, {}),
        "masked": ("causal_attention", heads, dict(key_mask=mask, documents=documents, **drops)),
        "causal_attention_qkv": ("causal_attention_qkv", [leaf(2, 32, 144)], dict(heads=4, **drops)),
        "decode": ("decode_attention", [heads[0][:, :, :2], *heads[1:]], dict(lengths=torch.tensor([9, 32]))),
        "gelu_mlp": ("gelu_mlp", mlp, {}),
        "exact": ("gelu_mlp", mlp, dict(approximate="none")),
        "recomputed": ("gelu_mlp", mlp, dict(recompute=True)),
        "linear_cross_entropy": ("linear_cross_entropy", head, dict(targets=ids)),
        "smoothed": (
            "linear_cross_entropy",
            head,
            dict(targets=ids, reduction="none", label_smoothing=0.1, z_loss=0.1),
        ),
        "embedding": ("embedding", [leaf(300, 48), leaf(32, 48)], dict(ids=ids, **drops)),
    }


def called(module, name, operands, options):
    if name == "embedding":  # whose ids come first
        options = dict(options)
        operands = [options.pop("ids"), *operands]
    outs = getattr(module, name)(*operands, **options)
    return outs if isinstance(outs, tuple) else (outs,)


def total(outs):
    return sum(out.square().sum() for out in outs)


def forward_and_backward(module, name, operands, options):
    leaves = [operand.detach().requires_grad_() for operand in operands]
    outs = called(module, name, leaves, options)
    return [*(out.detach() for out in outs), *torch.autograd.grad(total(outs), leaves)]


@worlds
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("label", calls(torch.float32))
def test_a_function(label, dtype, world):
    """Forward and backward, and under torch.func and without gradients; in float32 also held to the reference."""
    name, operands, options = calls(dtype)[label]
    first = the_same_bits(world, lambda: forward_and_backward(ops, name, operands, options))
    if dtype == torch.float32:
        floats = {label: t.double() for label, t in options.items() if label == "x_bias"}
        wide = [t.double() for t in operands], {**options, **floats}
        for a, b in zip(first, forward_and_backward(reference, name, *wide), strict=True):
            assert (a - b).norm() <= 1e-5 * b.norm()
    with torch.no_grad():
        the_same_bits(world, lambda: called(ops, name, operands, options))
    the_same_bits(world, lambda: grad(lambda *leaves: total(called(ops, name, leaves, options)))(*operands))


@worlds
def test_document_ids_and_dropout_without_a_seed(world):
    lengths, q, x = torch.tensor([0, 3, 7]), torch.randn(1, 2, 8, 4), torch.randn(3, 8)
    the_same_bits(world, lambda: ops.document_ids(lengths, 9))
    the_same_bits(world, lambda: ops.causal_attention(q, q, q, dropout_p=0.4))
    the_same_bits(world, lambda: ops.add_layer_norm(x, x, x[0], dropout_p=0.4))


# Models


@worlds
@pytest.mark.parametrize("changes", [{}, dict(activation_checkpointing="block", dropout=0.3), dict(residual="float32")])
def test_a_training_step_of_a_gpt(changes, world):
    model, idx = gpt(**changes).train(), torch.randint(0, 13, (2, 8))
    weights = copy.deepcopy(model.state_dict())

    def work():
        model.load_state_dict(weights)
        step = TrainingStep(model, adamw(model, 1e-2))
        told = [each.clone() for _ in range(3) for each in step(idx, idx)]
        return [*told, *(parameter.detach().clone() for parameter in model.parameters())]

    the_same_bits(world, work)


@worlds
def test_an_accelerated_model(family, world):
    model = family()
    accelerate(model)
    inputs = batch(9)
    the_same_bits(world, lambda: results(model, *inputs))
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    if "cache" not in model.__module__:

        def loss(parameters):
            y = functional_call(model, parameters, (inputs[0],))
            y = getattr(y, "logits", y[0] if isinstance(y, tuple) else y)
            return y.square().mean()

        the_same_bits(world, lambda: grad(loss)(parameters))


@worlds
@pytest.mark.parametrize("kind", ["fastgpt", "fastgpt, float64", "accelerated"])
def test_what_is_generated(kind, world):
    model, draft = gpt(128) if kind != "accelerated" else book(context_length=128), gpt(128)
    if kind == "accelerated":
        accelerate(model)
    model = model.double() if "float64" in kind else model
    prompts = [[3, 1, 4], [1, 5]]
    more = dict(seed=3, logprobs=True, num_samples=2)
    for options in (
        dict(temperature=0.0),
        dict(top_k=5, repetition_penalty=1.2, **more),
        dict(top_p=0.9, min_p=0.01, vocab_size=11, **more),
        *([dict(draft=draft, **more)] if kind != "accelerated" else []),
    ):
        made = the_same_bits(world, lambda options=options: generate(model, prompts, 6, **options))
        if kind == "fastgpt, float64" and made.logprobs:
            assert any(p != torch.tensor(p, dtype=torch.float32).item() for row in made.logprobs for p in row)
    the_same_bits(world, lambda: evaluate(model, np.arange(200) % 13))


# Training, files and what proves them


@worlds
def test_a_short_fit_and_its_files(world, tmp_path):
    text = tmp_path / "fox.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 50)
    shape = GPTConfig(vocab_size=257, block_size=16, n_layer=1, n_head=2, n_embd=16, dropout=0.1)
    few = TrainConfig(max_iters=4, batch_size=4, eval_interval=2, eval_iters=2, sample_tokens=4, device="cpu")
    for again in (few, dataclasses.replace(few, max_iters=6)):
        folders = iter(("usual", "odd"))

        def work(again=again, folders=folders):
            folder = tmp_path / next(folders)
            fit(shape, again, encoding("byte"), text, folder, resume=again is not few)
            return [
                (folder / "model.safetensors").read_bytes(),
                [line.split(",")[:4] for line in (folder / "metrics.csv").read_text().splitlines()],
            ]

        the_same_bits(world, work)
    model = the_same_bits(world, lambda: list(from_pretrained(tmp_path / "usual").state_dict().values()))
    assert {tensor.dtype for tensor in model} == {torch.float32}
    for kind in ("book", "nanogpt", "huggingface"):
        numbers = iter("12")

        def converted(kind=kind, numbers=numbers):
            folder = tmp_path / f"{kind}{next(numbers)}"
            convert(tmp_path / "usual", folder, kind)
            return [path.read_bytes() for path in sorted(folder.iterdir()) if path.suffix == ".safetensors"]

        the_same_bits(world, converted)


@worlds
def test_verify(world):
    model = gpt()
    ids = the_same_bits(world, lambda: random_ids(model))
    the_same_bits(world, lambda: str(verify_model(model, ids)))
    the_same_bits(world, lambda: str(verify_functions("cpu")))
