"""fastgpt doctor on machines that are not this one: only what it looks at is replaced."""

import json
import sysconfig
from types import SimpleNamespace

import pytest
import torch

from fastgpt import cli, doctor, ops
from fastgpt.ops import choice

needs_triton = pytest.mark.skipif(ops.no_triton() is not None, reason="Triton is not to be had on this platform")


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """An H100 with all that it needs; a function that takes one thing away or changes it."""
    driver = tmp_path / "version"
    driver.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.00\nGCC version:\n")
    headers = tmp_path / "include"
    headers.mkdir()
    (headers / "Python.h").touch()
    monkeypatch.setattr(doctor, "DRIVER", driver)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(headers))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name in ("CC", "CUDA_VISIBLE_DEVICES", "TRITON_PTXAS_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "a" / "cache"))

    def card(name, major, minor):
        properties = SimpleNamespace(name=name, major=major, minor=minor, total_memory=80 * 2**30)
        properties.shared_memory_per_block_optin, properties.multi_processor_count = 232_448, 132
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, minor))

    card("NVIDIA H100", 9, 0)
    return SimpleNamespace(card=card, driver=driver, headers=headers, folder=tmp_path)


def problems():
    diagnosis = doctor.examine()
    found = [finding for finding in diagnosis.findings if finding.problem]
    assert all(finding.remedy for finding in found)
    assert diagnosis.healthy == (not found)
    return [finding.problem for finding in found], diagnosis


@needs_triton
def test_a_machine_that_has_all(machine):
    found, diagnosis = problems()
    assert found == []
    facts = {finding.what: finding.found for finding in diagnosis.findings}
    assert facts["GPU 0"] == "NVIDIA H100, compute capability 9.0, 80 GiB, 227 KiB shared memory a block"
    assert facts["driver"] == "NVIDIA UNIX x86_64 Kernel Module  580.00"
    assert facts["kernel cache"] == str(machine.folder / "a" / "cache")
    assert not (machine.folder / "a").exists(), "looking leaves nothing behind"
    assert set(diagnosis.functions) == {function.__name__ for function in ops.FUNCTIONS}
    assert all("Triton kernel on cuda:0" in sentence for sentence in diagnosis.functions.values())
    assert str(diagnosis).endswith("nothing is wrong")


def test_what_is_the_same_for_all_functions_is_said_once(machine):
    """On an H100 each runs on its kernel; that is one line, and so is any other reason that they share."""
    pytest.importorskip("triton", reason="Triton is not to be had on this platform")
    _, diagnosis = problems()
    assert (
        str(diagnosis).count("layer_norm") == 0 and str(diagnosis).count("every function of fastgpt.ops runs on") == 1
    )
    functions = {**diagnosis.functions, "layer_norm": "layer_norm runs on PyTorch: another reason"}
    said = str(diagnosis._replace(functions=functions))
    assert all(sentence in said for sentence in functions.values())


@needs_triton
def test_hoppers_own_kernels_are_told_of(machine, monkeypatch):
    """For the tensors of a training step; on another Triton, why not."""
    hopper = pytest.importorskip("fastgpt.ops.hopper")
    monkeypatch.setattr(hopper.triton, "__version__", "3.7.1")
    monkeypatch.setattr(hopper, "RAN", dict.fromkeys(hopper.RAN, ("3.7.1",)))
    lines = str(problems()[1]).splitlines()
    attention = [line for line in lines if line.startswith("causal_attention")]
    for which in ("forward", "backward"):
        assert sum(f"its {which} runs on Hopper's own kernel" in line for line in attention) == 2
    assert any(line.startswith("gelu_mlp: its first matmul with the GELU runs on Hopper's own") for line in lines)
    monkeypatch.setattr(hopper.triton, "__version__", "3.9.0")
    assert str(problems()[1]).count("does not take Hopper's own kernel: Triton is 3.9.0") == 6
    machine.card("NVIDIA A100", 8, 0)
    assert "Hopper" not in str(problems()[1])


def test_no_gpu_is_no_problem(machine, monkeypatch):
    machine.driver.unlink()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    found, diagnosis = problems()
    assert found == []
    assert all("PyTorch" in sentence for sentence in diagnosis.functions.values())


def test_no_triton(machine, monkeypatch):
    monkeypatch.setattr(choice, "autograd", None)
    monkeypatch.setattr(choice, "NO_TRITON", "Triton is 3.5.1, the kernels need 3.6 or newer")
    found, diagnosis = problems()
    assert found == ["Triton is 3.5.1, the kernels need 3.6 or newer, so PyTorch serves on the GPU too"]
    assert all("Triton is 3.5.1" in sentence for sentence in diagnosis.functions.values())


@needs_triton
def test_an_old_card(machine):
    machine.card("Tesla T4", 7, 5)
    found, diagnosis = problems()
    assert found == ["Tesla T4 has compute capability 7.5, the kernels need 8.0 or newer"]
    assert all("7.5" in sentence for sentence in diagnosis.functions.values())
    assert "train takes float16 with loss scaling" in str(diagnosis) and "accelerate leaves models" in str(diagnosis)


@needs_triton
@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (12, 0)])
def test_a_card_that_nothing_was_timed_on(machine, capability):
    """The kernels serve, and the line that is about all of them says what their tiles are worth."""
    machine.card("a card at home", *capability)
    found, diagnosis = problems()
    assert found == []
    said = "with tiles chosen by arithmetic: none was timed on compute capability {}.{}".format(*capability)
    assert str(diagnosis).count(said) == 1 and all(said in each for each in diagnosis.functions.values())
    machine.card("NVIDIA H100", 9, 0)
    assert "arithmetic" not in str(problems()[1])


@needs_triton
@pytest.mark.parametrize("hidden", [None, ""])
def test_a_gpu_that_pytorch_cannot_use(machine, monkeypatch, hidden):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    if hidden is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    (problem,) = problems()[0]
    assert ("older than its CUDA" if hidden is None else "CUDA_VISIBLE_DEVICES is ''") in problem


@needs_triton
def test_a_pytorch_without_cuda(machine, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert problems()[0] == ["an NVIDIA driver is loaded, but this PyTorch is built without CUDA"]


@needs_triton
@pytest.mark.parametrize("asked", [None, "nvcc99"])
def test_no_compiler(machine, monkeypatch, asked):
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    if asked:
        monkeypatch.setenv("CC", asked)
    found, diagnosis = problems()
    assert found == ["Triton finds no C compiler for what launches its kernels"]
    assert asked is None or "CC is 'nvcc99', which is not there" in str(diagnosis)


@needs_triton
def test_no_headers(machine):
    (machine.headers / "Python.h").unlink()
    assert problems()[0] == [f"Triton needs Python's headers, there is no {machine.headers / 'Python.h'}"]


@needs_triton
def test_a_cache_that_cannot_be_written(machine, monkeypatch):
    """A file stands where the folder should be: root, who may write anywhere, can't write there either."""
    (machine.folder / "file").touch()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(machine.folder / "file" / "cache"))
    (problem,) = problems()[0]
    assert problem.startswith("compiled kernels can't be kept in") and "Not a directory" in problem


@needs_triton
def test_kernels_that_would_be_interpreted(machine, monkeypatch):
    monkeypatch.setattr(ops.autograd, "INTERPRETED", True)
    assert problems()[0] == ["TRITON_INTERPRET is set: kernels run in Python, not on the GPU"]


def test_what_cannot_be_looked_at_is_a_finding(machine, monkeypatch):
    def broken(index):
        raise RuntimeError("CUDA error: unknown error")

    monkeypatch.setattr(torch.cuda, "get_device_properties", broken)
    monkeypatch.setattr(torch.cuda, "get_device_capability", broken)
    found, diagnosis = problems()
    assert "GPU: RuntimeError: CUDA error: unknown error" in found
    assert "RuntimeError" in diagnosis.functions["layer_norm"] or ops.no_triton()


def test_the_command(machine, monkeypatch, capsys):
    machine.card("Tesla T4", 7, 5)
    assert cli.main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "PROBLEM: Tesla T4 has compute capability 7.5" in out and "what to do: " in out
    assert cli.main(["doctor", "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["healthy"] is False
    assert next(f for f in told["findings"] if f["what"] == "GPU 0")["problem"].startswith("Tesla T4")
    machine.card("NVIDIA A100", 8, 0)
    assert cli.main(["doctor"]) == int(ops.no_triton() is not None)
    assert capsys.readouterr().err == ""


def told_of_a_token():
    return next(finding.found for finding in doctor.examine().findings if finding.what == "a token")


@needs_triton
def test_how_a_token_will_be_written(machine, monkeypatch):
    token = pytest.importorskip("fastgpt.ops.token")
    monkeypatch.setattr(token, "TRITONS", (token.triton.__version__,))
    monkeypatch.setattr(token, "RAN", (token.triton.__version__,))
    assert told_of_a_token().startswith("one launch of a kernel for all layers")
    monkeypatch.setattr(token.launch, "multiprocessors", lambda weight: 114)
    many = "many launches of kernels, replayed as one CUDA graph; not one launch: "
    assert told_of_a_token() == many + "it was not measured on 114 multiprocessors"
    machine.card("NVIDIA A100", 8, 0)
    assert told_of_a_token() == many + "it was not measured for 768 channels on this device"
    machine.card("Tesla T4", 7, 5)
    assert told_of_a_token() == "PyTorch's operators, replayed as one CUDA graph"


def test_how_a_cpu_writes_a_token():
    if not torch.cuda.is_available() and not ops.interpreted():
        assert told_of_a_token() == "PyTorch's operators, one after another"


def test_what_to_do_is_told_of_problems_alone():
    assert all(bool(each.problem) == bool(each.remedy) for each in doctor.examine().findings)
