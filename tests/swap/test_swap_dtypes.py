"""A swapped model computes in the dtypes that it did before: its own, autocast's on a CPU, and CUDA's autocast, which
takes norms to float32, on a card that is feigned."""

import contextlib

import pytest
import torch
from torch import nn

from bench.gates import feign
from fastgpt import restore
from fastgpt.modules import swap_of
from tests.models import VOCAB
from tests.swap.swapped import accelerate

HALF = torch.bfloat16


@contextlib.contextmanager
def device_of(name):
    with feign.card(90) if name == "cuda" else contextlib.nullcontext(), torch.no_grad():
        yield


def dtypes(output):
    """Of all tensors in what a module returns."""
    if isinstance(output, torch.Tensor):
        return output.dtype
    if isinstance(output, dict):  # transformers' outputs too
        output = tuple(output.values())
    return tuple(dtypes(each) for each in output if each is not None) if isinstance(output, tuple | list) else None


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("weights", [torch.float32, HALF], ids=str)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_part_gives_what_it_gave(family, device, weights, autocast):
    """The whole model, and each swapped module of its first layer by itself, of inputs of every dtype that it takes."""
    with device_of(device):
        model = family().eval().to(weights)
        accelerate(model, backend="torch")  # where the trial finds buffers' contents
        model.to(device)
        swapped = [(n, module) for n, module in model.named_modules() if ".0" in n and swap_of(module) is not None]
        assert len(swapped) >= 5
        given = [torch.float32, HALF] if autocast and weights == torch.float32 else [weights]
        found = []
        for after in (True, False):
            if not after:
                restore(model)
            with torch.autocast(device, HALF, enabled=autocast):
                ids = torch.zeros(2, 7, dtype=torch.int64, device=device)
                told = {"model": dtypes(model(ids))}
                for name, module in swapped:
                    for dtype in given:
                        told[name, dtype] = dtypes(module(torch.ones(2, 7, 48, dtype=dtype, device=device)))
            found.append(told)
    assert found[0] == found[1]


@pytest.mark.parametrize("dtype", [torch.float16, HALF], ids=str)
@pytest.mark.parametrize(("device", "expected"), [("cpu", None), ("cuda", torch.float32)])
def test_any_layer_norm_of_halves_under_autocast(device, expected, dtype):
    """On a CPU it is a half's (autocast leaves norms), on a CUDA device float32's."""
    with device_of(device):
        model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)).to(device)
        x = torch.ones(3, 8, device=device)
        with torch.autocast(device, dtype):
            before = model(x).dtype
            assert all(row.now for row in accelerate(model, backend="torch").rows)
            assert model(x).dtype == before == (expected or dtype)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("served", [True, False])
def test_what_an_mlp_is_given_under_autocast(family, device, served):
    """One that is not ours gets its norm in the stream's dtype, as before; to ours it makes no difference."""
    with device_of(device):
        model = family().eval()
        name = next(n for n, _ in model.named_modules() if n.endswith((".mlp", ".ff")))
        given = []
        accelerate(model, mlp=served, backend="torch")
        model.to(device)
        hook = model.get_submodule(name).register_forward_pre_hook(lambda _, args: given.append(args[0].dtype))
        for after in (True, False):
            if not after:
                restore(model)
            with torch.autocast(device, HALF):
                model(torch.randint(0, VOCAB, (2, 7)).to(device))
        hook.remove()
    assert given == [torch.float32] * 2
