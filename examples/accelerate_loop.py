"""Hugging Face Accelerate around fastgpt's GPT, on one device or many; nothing of fastgpt's trainer.

    accelerate launch --num_processes 2 examples/accelerate_loop.py text.txt --steps 100

Its mixed_precision, gradient accumulation and DDP go with it. FSDP2 must wrap Blocks, and each block adds the last bias
of the one before: have it keep weights until the backward (fsdp_reshard_after_forward false), or set
`model.blocks_alone = True`.
A model of Hugging Face's goes in as well, after `fastgpt.accelerate(model, loss=True)`.
"""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator

from fastgpt import GPT, GPTConfig
from fastgpt.data.tokenizer import encoding

LENGTH = 64


def main(text: str, steps: int) -> float:
    torch.manual_seed(0)
    ids = torch.tensor(encoding("byte").encode(Path(text).read_text("utf-8"), disallowed_special=()))
    windows = ids[: len(ids) // (LENGTH + 1) * (LENGTH + 1)].view(-1, LENGTH + 1)
    model = GPT(GPTConfig.preset("byte-0.1M"))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    accelerator = Accelerator()
    data = torch.utils.data.DataLoader(windows, batch_size=4, shuffle=True)
    model, optimizer, data = accelerator.prepare(model, optimizer, data)
    batches = iter(data)
    for _ in range(steps):
        window = next(batches, None)
        if window is None:
            batches = iter(data)
            window = next(batches)
        loss = model(window[:, :-1], window[:, 1:])
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    mean = accelerator.gather(loss.detach()).mean().item()
    accelerator.end_training()  # ends the processes' group too, without which one may abort as it leaves
    return mean


if __name__ == "__main__":
    print(f"loss {main(sys.argv[1], int(sys.argv[3])):.3f}")
