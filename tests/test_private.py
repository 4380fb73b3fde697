"""Each of PyTorch's private names that fastgpt relies on does what fastgpt takes it to do."""

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastgpt import private


def test_a_transform_is_seen_and_its_tensors_are_found():
    x, seen = torch.arange(6.0).view(2, 3), []

    def function(row):
        seen.append((private.transformed(), private.unwrapped(row).shape))
        return row.sum()

    torch.vmap(torch.func.grad(function))(x)
    assert seen == [(True, x.shape)]
    assert not private.transformed() and private.unwrapped(x) is x


def test_a_batch_of_gradients_is_seen():
    x, seen = torch.ones(3, requires_grad=True), []
    y = x * 2
    y.register_hook(lambda gradient: seen.append(private.is_batch(gradient)))
    torch.autograd.grad(y, x, torch.eye(3), is_grads_batched=True)
    torch.autograd.grad(x * 2, x, torch.ones(3))
    assert seen == [True] and not private.is_batch(x)


def test_forward_mode_is_seen():
    assert not private.is_forward_mode()
    with forward_ad.dual_level():
        assert private.is_forward_mode()
    assert not private.is_forward_mode()


def test_modes_are_counted():
    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    assert private.dispatch_modes() == 0
    with Mode():
        assert private.dispatch_modes() == 1


def test_fake_tensors_have_no_data():
    with private.FakeTensorMode():
        assert torch.empty(2**40, dtype=torch.float32, device="cpu").shape == (2**40,)


def test_a_list_is_multiplied_in_place():
    tensors = [torch.ones(2), torch.ones(3)]
    private.multiply_(tensors, torch.tensor(0.5))
    assert [tensor.tolist() for tensor in tensors] == [[0.5] * 2, [0.5] * 3]


def test_writes_are_counted():
    x = torch.zeros(2)
    before = private.version(x)
    x.add_(1)
    assert private.version(x) == before + 1
    with torch.inference_mode():
        assert private.version(torch.zeros(2)) == 0


def test_a_modules_own():
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    assert list(private.children(module)) == ["0", "1"] and not private.parameters(module)
    assert list(private.parameters(module[1])) == ["weight", "bias"]
    assert list(private.buffers(module[1])) == ["running_mean", "running_var", "num_batches_tracked"]
    private.children(module)["1"] = nn.ReLU()
    private.parameters(module[0])["weight"] = None
    assert isinstance(module[1], nn.ReLU) and module[0].weight is None


@pytest.mark.parametrize(
    ("register", "forward", "backward"),
    [
        ("register_forward_hook", 1, False),
        ("register_forward_pre_hook", 1, False),
        ("register_full_backward_hook", 0, True),
        ("register_full_backward_pre_hook", 0, True),
    ],
)
def test_hooks(register, forward, backward):
    module = nn.Linear(2, 2)
    assert not private.has_hooks(vars(module))
    handle = getattr(module, register)(lambda *args: None)
    assert private.has_hooks(vars(module))
    assert (len(private.hooks(module)), private.has_backward_hooks(module)) == (forward, backward)
    handle.remove()
    assert not private.has_hooks(vars(module))


def test_a_hook_on_all_modules():
    handle = nn.modules.module.register_module_forward_hook(lambda *args: None)
    try:
        assert private.has_hooks(vars(nn.Linear(2, 2)))
    finally:
        handle.remove()
    assert not private.has_hooks(vars(nn.Linear(2, 2)))


def test_compiled_modules():
    module = nn.Linear(2, 2)
    assert private.compiled_from(torch.compile(module)) is module and private.compiled_from(module) is None
    assert not private.is_compiled(vars(module))
    module.compile()
    assert private.is_compiled(vars(module))


def test_the_largest_magnitude_of_each_of_a_list():
    found = private.magnitudes([torch.tensor([1.0, -3.0]), torch.tensor([[2.0]])], torch.inf)
    assert [float(each) for each in found] == [3.0, 2.0]


def test_a_product_of_8_bit_floats_has_two_scales_and_a_bias():
    """By both names that PyTorch has for it: test_fp8.py takes away the public one."""
    a, b = torch.eye(16).to(torch.float8_e4m3fn), torch.full((16, 16), 2.0).to(torch.float8_e5m2)
    two, four, bias = torch.tensor(2.0), torch.tensor(4.0), torch.ones(16, dtype=torch.bfloat16)
    found = private.scaled_mm(a, b.t(), two, four, bias, torch.bfloat16, False)
    assert found.dtype == torch.bfloat16 and torch.equal(found, torch.full((16, 16), 17.0, dtype=torch.bfloat16))
