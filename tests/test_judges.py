"""verify, bench and the tests' own comparisons each see every function of every backend that is off by a hundredth."""

import dataclasses

import pytest
import torch

from bench import cases, dry, measure, models
from bench.case import EAGER, SUBJECT
from bench.machine import Machine
from bench.timing import DeviceClock
from fastgpt import ops, verify
from fastgpt.cli import main
from tests.broken import BREAKS, CHOSEN, SHARED, backend, break_function  # noqa: F401, the last two are fixtures

# verify runs what auto chooses, on a GPU the kernels; and the fallback's tests are on a CPU
chosen = pytest.mark.parametrize("backend", CHOSEN, indirect=True)

SMALL = verify.Sizes(rows=2, heads=2, tokens=9, channels=8, hidden=12, vocabulary=19)


@pytest.fixture
def small(backend, monkeypatch):  # noqa: F811
    """A function that leaves verify the calls of one function, of few numbers."""
    monkeypatch.setattr(verify, "SIZES", SMALL)
    every = verify._calls

    def only(name):
        name = "linear_cross_entropy" if name == "shared loss" else name
        monkeypatch.setattr(
            verify, "_calls", lambda device: {label: call for label, call in every(device).items() if call[0] == name}
        )
        return ["verify", "--device", backend[1]]

    return only


@pytest.mark.parametrize("name", [function.__name__ for function in ops.FUNCTIONS])
@chosen
def test_verify_passes_what_is_right(name, small, capsys):
    assert main(small(name)) == 0 and capsys.readouterr().out.endswith("passed\n")


@pytest.mark.parametrize(("name", "part"), [*BREAKS, *SHARED])
@chosen
def test_verify_sees_it(name, part, small, break_function, capsys):  # noqa: F811
    command = small(name)
    break_function(name, part)
    assert main(command) == 1 and capsys.readouterr().out.endswith("FAILED\n")


TINY = dict(vocab_size=19, block_size=8, n_layer=1, n_head=2, n_embd=8)


def benched(machine, name):
    """Cases of the function alone, or where bench has none, of a model that calls it."""
    makers = {
        "add_layer_norm": lambda: cases.add_layer_norm(machine, 6, 8, 0),
        "causal_attention": lambda: cases.attention(machine, 1, 2, 8, 4, 0),
        "decode_attention": lambda: cases.decode(machine, 1, 2, 8, 4, 0),
        "gelu_mlp": lambda: cases.gelu_mlp(machine, 6, 4, 12, 0),
        "linear_cross_entropy": lambda: cases.linear_cross_entropy(machine, 6, 8, 19, 0),
        "shared loss": lambda: cases.linear_cross_entropy(machine, 6, 8, 19, 0),
        "embedding": lambda: cases.embedding(machine, 2, 4, 8, 19, 0),
    }
    return makers[name]() if name in makers else models.train_step(machine, 2, 8, TINY, 0, only=(SUBJECT,))


ROOFS = {"flops_a_second": 1e11, "bytes_a_second": 1e10}


def statuses(backend, name):  # noqa: F811
    """What bench says of that backend in each case, and whether it timed it."""
    device, variant = backend[1], EAGER if backend[0] == "torch" else SUBJECT
    clock = DeviceClock(torch.cuda if device == "cuda" else dry.FakeCuda(), device)
    machine = Machine("cuda" if device == "cuda" else "dry", device, torch.float32, clock, "eager", 0.0, (2, 2))
    found = []
    for case in benched(machine, name):
        rows, _ = measure.measure(dataclasses.replace(case, variants={variant: case.variants[variant]}), machine, ROOFS)
        found.append((rows[0].status, rows[0].median is not None))
    return found


@pytest.mark.parametrize("name", [function.__name__ for function in ops.FUNCTIONS])
def test_bench_times_what_is_right(name, backend):  # noqa: F811
    assert set(statuses(backend, name)) == {("ok", True)}


@pytest.mark.parametrize(("name", "part"), [*BREAKS, *SHARED])
def test_bench_sees_it(name, part, backend, break_function):  # noqa: F811
    break_function(name, part)
    assert ("WRONG", False) in statuses(backend, name)


def of_the_fallback():
    """By function, a test of it."""
    from tests.ops import test_loss, test_mlp_fallback, test_pytorch

    return {
        "layer_norm": test_pytorch.test_the_norms,
        "add_layer_norm": test_pytorch.test_the_norms,
        "causal_attention": lambda: test_pytorch.test_shapes_of_attention(dict(kv_heads=2)),
        "causal_attention_qkv": lambda: test_pytorch.test_packed_attention({}),
        "decode_attention": lambda: test_pytorch.test_decode(1, 4),
        "gelu_mlp": lambda: test_mlp_fallback.test_gelu_mlp("tanh", (True, True)),
        "linear_cross_entropy": test_loss.test_the_real_vocabulary,
        "embedding": test_pytorch.test_embedding,
    }


def of_the_kernels(device):
    from tests.kernels import test_attention, test_cross_entropy, test_decode, test_embedding, test_layernorm, test_mlp

    return {
        "layer_norm": lambda: test_layernorm.test_plain_layer_norm_is_the_same_without_a_residual(device),
        "add_layer_norm": lambda: test_layernorm.test_row_counts((1,), device),
        "causal_attention": lambda: test_attention.test_lengths(7, device),
        "causal_attention_qkv": lambda: test_attention.test_packed_attention_has_the_bits_of_the_unpacked(
            3, 20, device
        ),
        "decode_attention": lambda: test_decode.test_scale_is_heard(device),
        "gelu_mlp": lambda: test_mlp.test_row_counts((1,), device),
        "linear_cross_entropy": lambda: test_cross_entropy.test_smoothing_and_z_loss(0.1, 0.0, "mean", device),
        "embedding": lambda: test_embedding.test_row_counts((1, 7), device),
    }


@pytest.mark.parametrize(("name", "part"), [*BREAKS, *SHARED])
@chosen
def test_the_suite_sees_it(name, part, backend, break_function):  # noqa: F811
    """What passes is run by the suite itself."""
    tests = of_the_fallback() if backend[0] == "torch" else of_the_kernels(torch.device(backend[1]))
    break_function(name, part)
    with pytest.raises(AssertionError):
        tests["linear_cross_entropy" if name == "shared loss" else name]()
