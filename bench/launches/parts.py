"""Which part of a training step a launch belongs to, told from the operator and from the shapes that it goes over."""

import re
from typing import NamedTuple

from torch import Tensor


class Sizes(NamedTuple):
    """Of the step: rows M = B T, channels C, hidden units F, vocabulary V as the model has it."""

    rows: int
    channels: int
    hidden: int
    vocabulary: int


MATMULS, UNALIGNED = "matmuls", "matmuls over an odd vocabulary"
NUMBERS, SUMS, EMBEDDING, CLIPPING = "numbers and indices", "bias gradients and other sums", "embedding", "clipping"
SCALING, ADDS = "scaling of the loss's gradients", "adds outside LayerNorm"
PARTS = (
    *(MATMULS, UNALIGNED, "attention, forward", "attention, backward", "LayerNorms, forward", "LayerNorms, backward"),
    *("GELU, forward", "GELU, backward", "cross entropy", SUMS, ADDS, "casts of activations", "copies of activations"),
    *("casts of weights", "casts of gradients", "copies of weights", "transposes of gradients"),
    *(EMBEDDING, "memsets", SCALING, CLIPPING, "AdamW", NUMBERS),
)

_BY_NAME = (
    (r"attention_fwd|product\w*attention$", "attention, forward"),
    (r"attention_(dq|dkdv)|product\w*attention_backward", "attention, backward"),
    (r"layer_norm_fwd|native_layer_norm$", "LayerNorms, forward"),
    (r"layer_norm_(bwd|sums)|native_layer_norm_backward", "LayerNorms, backward"),
    (r"gelu_fwd|gelu$", "GELU, forward"),
    (r"gelu_bwd|gelu_backward", "GELU, backward"),
    (r"cross_entropy|log_softmax|nll_loss", "cross entropy"),
    (r"embedding|run_sums|join_runs|index_select|^sort$", EMBEDDING),
    (r"_fused_adam|_foreach_(add|sub)_$", "AdamW"),
    (r"_foreach_(norm|mul)", CLIPPING),
)


def part_of(name: str, phase: str, tensors: list[Tensor], sizes: Sizes) -> str:
    """tensors: what the operator reads and writes."""
    for pattern, part in _BY_NAME:
        if re.search(pattern, name):
            return part
    if name in ("mm", "addmm", "bmm"):
        return MATMULS if all(map(_aligned, tensors)) else UNALIGNED
    if phase == "update":
        return CLIPPING if name in ("linalg_vector_norm", "cat", "mul_") else NUMBERS
    largest = max(tensors, key=Tensor.numel)
    if largest.numel() == 1 or not any(each.is_floating_point() for each in tensors):
        return NUMBERS
    if any(sizes.vocabulary <= each.shape[-1] < sizes.vocabulary + 64 for each in tensors if each.dim()):
        return "cross entropy"  # over logits
    if name in ("fill_", "zero_"):
        return "memsets"
    if name == "sum":
        return SUMS if largest.dim() > 1 else NUMBERS
    if _is_activation(largest, sizes):
        return _of_activations(name, phase, tensors, sizes)
    if name != "copy_":
        return SCALING if name == "mul_" else EMBEDDING  # the tied weight's two gradients are added
    written, read = tensors[:2]
    if written.dtype != read.dtype:
        return "casts of weights" if phase == "forward" else "casts of gradients"
    return "copies of weights" if phase == "forward" else "transposes of gradients"


def _is_activation(tensor: Tensor, sizes: Sizes) -> bool:
    """Or else a weight, a bias, or the gradient of one: by their shapes, of which no activation has one."""
    C, F, V = sizes.channels, sizes.hidden, sizes.vocabulary
    if (tensor.dim() == 2 and {*tensor.shape} <= {C, 3 * C, F}) or V <= tensor.shape[0] < V + 64:
        return False
    return tensor.numel() > sizes.rows / 16 * C  # a sixteenth, for the head's rows go by chunks


def _of_activations(name: str, phase: str, tensors: list[Tensor], sizes: Sizes) -> str:
    casts = name == "copy_" and tensors[0].dtype != tensors[1].dtype
    if any(each.shape[-1:] == (sizes.hidden,) for each in tensors) and (casts or name != "copy_"):
        return f"GELU, {phase}"  # a GELU written out in operators that autocast casts for
    if name == "copy_":
        return f"{'casts' if casts else 'copies'} of activations"
    if name in ("mul_", "mul"):
        return SCALING
    if name not in ("add", "add_"):
        return "copies of activations"
    table = any(each.dim() > 1 and each.numel() < tensors[-1].numel() for each in tensors)  # of positions
    return EMBEDDING if table else ADDS  # of a bias too, where it is a pass of its own


def _aligned(tensor: Tensor) -> bool:
    """Whether each row begins at a multiple of 16 bytes, as cuBLAS's fast kernels need it to."""
    return all(stride == 1 or stride * tensor.element_size() % 16 == 0 for stride in tensor.stride())
