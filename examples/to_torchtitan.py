"""Weights for torchtitan, which reads Hugging Face's safetensors through torch.distributed.checkpoint.

    python examples/to_torchtitan.py trained weights-for-titan

Its models are not GPT-2: none has learned positions, LayerNorm with biases and GELU. So this writes the weights as
Hugging Face's GPT-2 has them, whole and in the form that its `checkpoint.initial_load_in_hf` reads, and a model of
yours there must take those names. What it reads with is what this script then reads back with, and compares.
"""

import sys
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file

from fastgpt import GPT


def main(source: str, target: str) -> int:
    model = GPT.from_pretrained(source)
    model.save_pretrained(target)
    written = load_file(Path(target) / "model.safetensors")
    found = {name: torch.empty_like(tensor) for name, tensor in written.items()}
    dcp.load(found, storage_reader=dcp.HuggingFaceStorageReader(target), no_dist=True)
    wrong = [name for name in written if not torch.equal(found[name], written[name])]
    print(f"{len(found)} tensors, {sum(tensor.numel() for tensor in found.values()):,} numbers, {len(wrong)} wrong")
    return len(wrong)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
