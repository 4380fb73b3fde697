"""Whether something follows a call operation by operation, and so needs PyTorch's own, which can be differentiated in
every way, mapped and recorded: a kernel, an autograd.Function of ours and what is written in place can't.
"""

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

transformed = torch._C._are_functorch_transforms_active
is_batch = torch._C._functorch.is_legacy_batchedtensor  # see mapped


def mapped(gradient: Tensor) -> bool:
    """Whether a backward is given several gradients at once: by torch.func.vmap, or by autograd.grad's
    is_grads_batched, whose way is an older one."""
    return transformed() or (not torch.compiler.is_compiling() and is_batch(gradient))


def watcher() -> str | None:
    """What follows each operation now, in words, or None. 0.1 µs: every call asks."""
    if transformed():
        return "a transform of torch.func is at work"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation is on"
    if torch.jit.is_tracing():
        return "torch.jit.trace records the call"
    return None


def unwrapped(x: Tensor) -> Tensor:
    """The tensor that a transform of torch.func wraps, with the axes over which it is mapped; x itself elsewhere."""
    if transformed() and not torch.compiler.is_compiling():
        while torch._C._functorch.is_functorch_wrapped_tensor(x):
            x = torch._C._functorch.get_unwrapped(x)
    return x
