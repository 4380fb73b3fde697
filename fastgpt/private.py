"""PyTorch's private names that fastgpt relies on, all of them: a release that moves one is mended here, and a test of
each says which."""

from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import _len_torch_dispatch_stack as dispatch_modes

# Tensors without data; how many modes see an operation; whether a storage is still there.
__all__ = ["FakeTensor", "FakeTensorMode", "StorageWeakRef", "dispatch_modes"]

transformed = torch._C._are_functorch_transforms_active  # whether a transform of torch.func is at work
is_batch = torch._C._functorch.is_legacy_batchedtensor  # of autograd.grad's is_grads_batched, an older way than vmap
multiply_ = torch._foreach_mul_  # each of a list of tensors, in place


def unwrapped(x: Tensor) -> Tensor:
    """The tensor that transforms of torch.func wrap."""
    while torch._C._functorch.is_functorch_wrapped_tensor(x):
        x = torch._C._functorch.get_unwrapped(x)
    return x


def is_forward_mode() -> bool:
    """Whether forward-mode differentiation is on."""
    return forward_ad._current_level >= 0


def version(tensor: Tensor) -> int:
    """How often it was written to in place, as far as PyTorch counts that."""
    return 0 if tensor.is_inference() else tensor._version


# Of modules, whose attributes are found more slowly, and on some of which a getattr may be a stranger's.


def children(module: nn.Module) -> dict[str, Any]:
    """By name, and theirs to be changed."""
    return module._modules


def parameters(module: nn.Module) -> dict[str, Any]:
    """Its own by name, not its children's, and theirs to be changed."""
    return module._parameters


def buffers(module: nn.Module) -> dict[str, Tensor | None]:
    """Its own by name, not its children's."""
    return module._buffers


def hooks(module: nn.Module) -> list[Any]:
    """That see its forward."""
    return [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]


def has_backward_hooks(module: nn.Module) -> bool:
    return bool(module._backward_hooks or module._backward_pre_hooks)


def has_hooks(state: dict[str, Any]) -> bool:
    """Of a module's __dict__, or of all modules."""
    return bool(
        state["_forward_hooks"] or state["_forward_pre_hooks"] or state["_backward_hooks"]
        or state["_backward_pre_hooks"] or nn.modules.module._has_any_global_hook()
    )  # fmt: skip


def is_compiled(state: dict[str, Any]) -> bool:
    """Whether the module with this __dict__ was compiled in place, by its own compile()."""
    return state.get("_compiled_call_impl") is not None


def compiled_from(module: Any) -> nn.Module | None:
    """What torch.compile was given to make this module."""
    found = getattr(module, "_orig_mod", None)
    return found if isinstance(found, nn.Module) else None


# The product of 8-bit floats (M, K) and (K, N), the second in columns, with a scale each: a public function of newer
# PyTorches, and under a private name everywhere.
_scaled_mm = torch._scaled_mm
magnitudes = torch._foreach_norm  # of each of a list of tensors, with ord inf the largest; one pass for all


def scaled_mm(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, bias: Any, dtype: Any, fast: bool) -> Tensor:
    public = getattr(nn.functional, "scaled_mm", None)
    if public is None:
        return _scaled_mm(a, b, scale_a, scale_b, bias, out_dtype=dtype, use_fast_accum=fast)
    kind = nn.functional.ScalingType.TensorWise
    return public(a, b, scale_a, kind, scale_b, kind, bias=bias, output_dtype=dtype, use_fast_accum=fast)
