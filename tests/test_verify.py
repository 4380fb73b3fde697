"""verify: a right model passes, a wrong one fails, as a function, a command and fixtures."""

import contextlib
import inspect
import re
import sys

import pytest
import torch
from torch import nn

from fastgpt import GPT, GPTConfig, ops, verify, weights
from fastgpt.cli import main
from fastgpt.swap import nanogpt as family
from fastgpt.verify import random_ids, verify_functions, verify_model
from tests.models import CONTEXT, FAMILIES, VOCAB, hugging_face, nanogpt, randomised


def wrong(monkeypatch, factor=1 + 1e-5):
    """Attention that is a little off where the trials don't look: in float32, with more rows than one."""
    real = family.ops.causal_attention_qkv

    def attention(qkv, *args, **kwargs):
        tried = qkv.dtype == torch.float64 or len(qkv) == 1
        return real(qkv, *args, **kwargs) * (1 if tried else factor)

    monkeypatch.setattr(family.ops, "causal_attention_qkv", attention)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_passes(name):
    model = FAMILIES[name]().train()
    found = verify_model(model, random_ids(model))
    assert found.passed and str(found).endswith("passed")
    assert [difference.what for difference in found.differences[:2]] == ["logits", "loss"]
    assert "gradient of " in str(found) and "causal_attention" in str(found)
    assert model.training and not any("fastgpt_swap" in module.__dict__ for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_small_error_fails(monkeypatch):
    model = nanogpt()
    wrong(monkeypatch)
    found = verify_model(model, random_ids(model))
    assert not found.passed and "more than 4" in str(found) and str(found).endswith("FAILED")
    assert verify_model(model, random_ids(model), tolerance=1e6).passed
    assert verify_model(model, random_ids(model), attention=False).passed


def test_a_wrong_gradient_alone_fails(monkeypatch):
    class Twisted(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * (1 if grad.dtype == torch.float64 else 1.001)

    real = family.ops.causal_attention_qkv
    monkeypatch.setattr(family.ops, "causal_attention_qkv", lambda qkv, *a, **k: real(Twisted.apply(qkv), *a, **k))
    model = nanogpt()
    logits, loss, gradient = verify_model(model, random_ids(model)).differences
    assert max(logits.ratio, loss.ratio) < 4 < gradient.ratio and "ln_f" not in gradient.what


def test_nan_fails(monkeypatch):
    model = nanogpt()
    wrong(monkeypatch, float("nan"))
    assert not verify_model(model, random_ids(model)).passed


def test_fastgpts_own_model():
    model = randomised(GPT(GPTConfig(vocab_size=VOCAB, block_size=CONTEXT, n_embd=48, n_layer=2, n_head=4)))
    found = verify_model(model, random_ids(model))
    assert found.passed and found.report is None
    assert all(module.backend == "auto" for module in model.modules() if hasattr(module, "backend"))


def test_an_accelerated_model_stays_accelerated():
    from fastgpt import accelerate

    model = nanogpt()
    accelerate(model, mlp=False)
    before = {name: module.__dict__.get("fastgpt_swap") for name, module in model.named_modules()}
    assert verify_model(model, random_ids(model)).passed
    assert {name: module.__dict__.get("fastgpt_swap") for name, module in model.named_modules()} == before


@pytest.mark.parametrize(
    ("ids", "options", "message"),
    [
        (torch.zeros(3, dtype=torch.long), {}, r"of shape \(3,\), not integers \(B, T\), T > 1"),
        (torch.zeros(3, 1, dtype=torch.long), {}, r"of shape \(3, 1\)"),
        (torch.zeros(3, 4), {}, "torch.float32 of shape"),
        (torch.zeros(3, 4, dtype=torch.long), dict(tolerance=0), "tolerance is 0"),
        (torch.zeros(3, 4, dtype=torch.long), dict(backend="gpu"), "backend is 'gpu'"),
    ],
)
def test_bad_arguments(ids, options, message):
    with pytest.raises(ValueError, match=message):
        verify_model(nanogpt(), ids, **options)
    with pytest.raises(ValueError, match="Linear has no embeddings"):
        random_ids(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"Bilinear gives no logits \(B, T, V\) for ids \(B, T\)"):
        verify_model(Bilinear(), torch.zeros(2, 3, dtype=torch.long))


class Bilinear(nn.Bilinear):
    def __init__(self):
        super().__init__(2, 2, 2)

    def forward(self, ids):
        return self.weight.sum() + ids


# The command


def test_the_command_on_folders_of_every_kind(tmp_path, capsys):
    hugging_face().save_pretrained(tmp_path / "hf")
    for to in ("nanogpt", "book", "fastgpt"):
        weights.convert(tmp_path / "hf", tmp_path / to, to)
    for name in ("hf", "nanogpt", "book", "fastgpt"):
        assert main(["verify", str(tmp_path / name), "--rows", "1", "--tokens", "9"]) == 0
        assert capsys.readouterr().out.endswith("passed\n")


def test_the_command_on_a_factory_and_a_text(tmp_path, capsys):
    (tmp_path / "text").write_text("to be, or not to be; " * 9)
    arguments = ["verify", "tests.test_verify:bytes_model", "--text", str(tmp_path / "text"), "--encoding", "byte"]
    assert main([*arguments, "--dtype", "bfloat16", "--device", "cpu"]) == 0
    assert "Block" in capsys.readouterr().out
    assert main([*arguments, "--tokens", "33", "--rows", "9"]) == 2
    assert "holds 189 tokens, fewer than the 297 to compare" in capsys.readouterr().err


def bytes_model():
    return nanogpt(vocab_size=257)


def test_the_command_on_a_module_of_the_folder_it_is_typed_in(tmp_path, monkeypatch):
    (tmp_path / "a_model_of_mine.py").write_text("from tests.models import nanogpt\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert main(["verify", "a_model_of_mine:nanogpt", "--rows", "1", "--tokens", "5"]) == 0


def test_the_command_exits_1_past_the_tolerance(monkeypatch, capsys):
    wrong(monkeypatch)
    assert main(["verify", "tests.models:nanogpt"]) == 1
    assert capsys.readouterr().out.endswith("FAILED\n")
    assert main(["verify", "tests.models:nanogpt", "--tolerance", "1e6"]) == 0


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("gone", "'gone' is no folder and not of the form MODULE:FACTORY"),
        ("tests.models:gone", "can't be had: module 'tests.models' has no attribute 'gone'"),
        ("no_such_module:make", "can't be had: No module named 'no_such_module'"),
        ("tests.models:Path", "not an nn.Module"),
    ],
)
def test_the_commands_bad_sources(source, message, capsys):
    assert main(["verify", source]) == 2
    assert message in capsys.readouterr().err


def test_convert_from_the_command_line(tmp_path, capsys):
    hugging_face().save_pretrained(tmp_path / "a")
    assert main(["convert", str(tmp_path / "a"), str(tmp_path / "b"), "--to", "nanogpt"]) == 0
    out = capsys.readouterr().out
    assert "note: nanoGPT computes the exact GELU" in out and out.endswith(f"saved in {tmp_path / 'b'}\n")
    assert main(["convert", str(tmp_path / "a"), str(tmp_path / "b"), "--to", "nanogpt"]) == 2
    assert "ckpt.pt already" in capsys.readouterr().err
    command = ["convert", str(tmp_path / "b"), str(tmp_path / "c"), "--to", "fastgpt", "--gelu", "tanh"]
    assert main([*command, "--vocab_size", "257", "--encoding", "byte"]) == 0
    model, config = weights.load_model(tmp_path / "c")
    assert (model.config.vocab_size, model.config.gelu, config["encoding"]) == (257, "tanh", "byte")


# The plugin

SUITE = """
import pytest, torch
from tests.models import nanogpt, book

@pytest.mark.parametrize("make", [nanogpt, book])
def test_right(verify_accelerated, make):
    assert verify_accelerated(make()).passed
    verify_accelerated(make(), torch.zeros(1, 5, dtype=torch.long), mlp=False)

def test_wrong(verify_accelerated):
    verify_accelerated(nanogpt(), tolerance=1e-3)

def test_rule(assert_accurate):
    x = torch.randn(4, 4, dtype=torch.float64)
    assert assert_accurate(x.float(), x) < 1
"""


def test_the_plugins_fixtures(tmp_path, capsys):
    (tmp_path / "test_suite.py").write_text(SUITE)
    options = ["-p", "fastgpt.pytest_plugin", "-p", "no:cacheprovider", "-q", "--tb=line", f"--rootdir={tmp_path}"]
    assert pytest.main([*options, str(tmp_path)]) == 1
    output = capsys.readouterr().out
    assert "1 failed, 3 passed" in output and re.search(r"FAILED .*test_wrong", output), output
    assert verify.TOLERANCE == 4


def test_the_functions_of_this_machine(capsys):
    assert main(["verify"]) == 0
    out = capsys.readouterr().out
    assert out.endswith("passed\n")
    for name in (function.__name__ for function in ops.FUNCTIONS):
        assert f"\n{name}" in out


def test_the_functions_and_a_tolerance(capsys, monkeypatch):
    """On a CPU only float32 is asked of the fallback; no rounding is small enough for a tolerance of nothing."""
    monkeypatch.setattr(verify, "SIZES", verify.Sizes(2, 2, 8, 4, 16, 12))
    found = verify_functions("cpu")
    assert {difference.what.rpartition(", ")[2] for difference in found.differences} == {"float32"}
    assert main(["verify", "--device", "cpu", "--tolerance", "1e-9"]) == 1
    out = capsys.readouterr().out
    assert out.endswith("FAILED\n") and "more than 1e-09" in out


@pytest.mark.slow
@pytest.mark.interpreter
def test_the_kernels_in_the_interpreter():
    """Sanitized, so in half precision too: what tests/accuracy.txt says."""
    found = verify_functions("cpu")
    assert found.passed and len(found.differences) == 27


@pytest.mark.interpreter
def test_in_the_interpreter_it_is_sanitized(monkeypatch):
    """For only then is half precision what a GPU would make of it."""
    from fastgpt import sanitizer

    steps = []

    @contextlib.contextmanager
    def recorded():
        steps.append("sanitized")
        yield
        steps.append("no more")

    monkeypatch.setattr(sanitizer, "sanitized", recorded)
    monkeypatch.setattr(verify, "_verify_functions", lambda *call: steps.append(call[:3]))
    verify_functions("cpu")
    assert steps == ["sanitized", (torch.device("cpu"), True, verify.TOLERANCE), "no more"]


def test_options_of_a_model_without_one(capsys):
    assert main(["verify", "--dtype", "bfloat16"]) == 2
    assert "--text and --dtype are of a MODEL, and none was given" in capsys.readouterr().err


@pytest.mark.parametrize("name", [function.__name__ for function in ops.FUNCTIONS])
@pytest.mark.parametrize("factor", [1 + 1e-4, float("nan")])
def test_a_function_that_is_off_fails(monkeypatch, name, factor):
    right = getattr(ops, name)

    def off(*args, **kwargs):
        outs = right(*args, **kwargs)
        return tuple(out * factor for out in outs) if isinstance(outs, tuple) else outs * factor

    off.__name__, off.__signature__ = name, inspect.signature(right)
    monkeypatch.setattr(ops, name, off)
    found = verify_functions("cpu")
    assert not found.passed
    failed = [difference.what for difference in found.differences if difference.ratio > found.tolerance]
    assert failed and all(what.startswith(name) for what in failed)


@pytest.mark.gpu
def test_the_functions_of_a_gpu():
    found = verify_functions("cuda")
    assert found.passed and len(found.differences) == 27, str(found)


@pytest.mark.parametrize("text", ["import no_such_module", "1 .gone"])
def test_what_is_wrong_inside_their_module_is_shown_as_it_is(text, tmp_path, monkeypatch):
    (tmp_path / "theirs.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises((ModuleNotFoundError, AttributeError)):
        verify.load("theirs:make")


@pytest.mark.parametrize("what", ["functions", "model"])
def test_a_device_without_float64_is_compared_on_the_cpu(monkeypatch, what):
    """A stand-in for such a device, untried on a Mac: what was not fetched by cpu() can't be made float64."""
    fetched, plain_cpu, plain_double = set(), torch.Tensor.cpu, torch.Tensor.double

    def cpu(tensor):
        found = plain_cpu(tensor).clone()
        fetched.add(found.data_ptr())
        return found

    def double(tensor):
        if tensor.dtype == torch.float32 and tensor.dim() > 1 and tensor.data_ptr() not in fetched:
            raise TypeError("Cannot convert a MPS Tensor to float64")
        return plain_double(tensor)

    monkeypatch.setattr(torch.Tensor, "cpu", cpu)
    monkeypatch.setattr(torch.Tensor, "double", double)
    monkeypatch.setattr(verify, "WITHOUT_FLOAT64", ("cpu",))
    if what == "functions":
        assert verify_functions("cpu").passed
    else:
        model = hugging_face()
        assert verify_model(model, random_ids(model)).passed
