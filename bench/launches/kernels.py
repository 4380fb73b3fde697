"""Bytes and flops of fastgpt's own kernels' launches, from their arguments, by the formulas of bench.work where it has
one; else each tensor read or written once."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from bench import work
from bench.launches.operators import memory
from bench.work import Work


def work_of(name: str, given: dict[str, Tensor]) -> Work:
    """given: the tensors of a launch, by the names that the kernel gives them."""
    return _WORK.get(name, _once)(given)


def described(value: Any) -> Any:
    """What one of Triton's tensor descriptors describes, as a tensor; anything else as it is."""
    return value.base.as_strided(value.shape, value.strides) if hasattr(value, "block_shape") else value


def _once(given: dict[str, Tensor]) -> Work:
    """A pointer that a launch has no use for repeats another one."""
    return Work(0, sum(memory(each) for each in {id(each): each for each in given.values()}.values()))


def _attention(given: dict[str, Tensor], products: int = 5, backward: bool = True) -> Work:
    """Of the backward, whose five products two kernels share: what both compute is counted once, what both read
    twice."""
    q = given["q_ptr"]
    if not backward:
        return work.attention_fwd(*q.shape, q.element_size())
    whole = work.attention_bwd(*q.shape, q.element_size())
    moved = ("q_ptr", "k_ptr", "v_ptr", "do_ptr", "o_ptr", "dq_ptr", "dk_ptr", "dv_ptr", "lse_ptr", "delta_ptr")
    moved += ("stats_ptr", "sums_ptr")  # of Hopper's own: lse and Δ; of both, partial sums for a bias
    return Work(whole.flops * products / 5, sum(memory(given[name]) for name in moved if name in given))


def _hopper_attention(given: dict[str, Tensor], *which) -> Work:
    """Of descriptors of (B, T, H, D), by the names that the Triton kernels give them."""
    given = {name: each.transpose(1, 2) if each.dim() == 4 else each for name, each in given.items()}
    return _attention({name.replace("_desc", "_ptr"): each for name, each in given.items()}, *which)


def _embedding(given: dict[str, Tensor]) -> Work:
    """Rows of one table, all of the other's that there are positions for, and what they add up to."""
    token, position, ids, out = (given[name] for name in ("token_ptr", "position_ptr", "ids_ptr", "out_ptr"))
    rows = ids.numel() * token.shape[1] * token.element_size()
    return Work(0, rows + memory(position[: ids.shape[1]]) + memory(ids) + memory(out))


def _joined(given: dict[str, Tensor]) -> Work:
    """Of the gradient only the rows between chunks are written, as many as there are tails."""
    return Work(0, memory(given["keys_ptr"]) + 2 * memory(given["heads_ptr"]) + memory(given["tails_ptr"]))


def _activation_gradient(given: dict[str, Tensor]) -> Work:
    """Written over what was read."""
    return Work(0, 2 * memory(given["dact_ptr"]) + memory(given["pre_ptr"]) + memory(given["partials_ptr"]))


_WORK: dict[str, Callable[[dict[str, Tensor]], Work]] = {
    "append_kernel": lambda given: Work(0, 2 * memory(given["qkv_ptr"]) * 2 / 3),  # of q, k and v the last two
    "attention_fwd_kernel": lambda given: _attention(given, backward=False),
    "attention_dq_kernel": lambda given: _attention(given, 1),
    "attention_dkdv_kernel": lambda given: _attention(given, 4),
    "cross_entropy_kernel": lambda given: Work(0, 2 * memory(given["logits_ptr"])),
    "embedding_fwd_kernel": _embedding,
    "gelu_bwd_kernel": _activation_gradient,
    "hopper_attention_fwd_kernel": lambda given: _hopper_attention(given, 5, False),
    "hopper_attention_dq_kernel": lambda given: _hopper_attention(given, 1),
    "hopper_attention_dkdv_kernel": lambda given: _hopper_attention(given, 4),
    "join_runs_kernel": _joined,
}
