"""Lightning Fabric around fastgpt's GPT, in a loop as nanoGPT's.

    python examples/fabric_loop.py text.txt --steps 100

Fabric's precision casts, its strategies copy or shard: `Fabric(devices=8, strategy="ddp", precision="bf16-mixed")`.
What accelerate_loop.py says of FSDP2 holds here. Plugins that replace linear layers keep the fused MLP from running.
"""

import sys
from pathlib import Path

import torch
from lightning.fabric import Fabric

from fastgpt import GPT, GPTConfig
from fastgpt.data.tokenizer import encoding

LENGTH = 64


def main(text: str, steps: int) -> float:
    fabric = Fabric(accelerator="auto", devices=1)
    fabric.launch()
    fabric.seed_everything(0)
    ids = torch.tensor(encoding("byte").encode(Path(text).read_text("utf-8"), disallowed_special=()))
    model = GPT(GPTConfig.preset("byte-0.1M"))
    model, optimizer = fabric.setup(model, torch.optim.AdamW(model.parameters(), 1e-3))
    for _ in range(steps):
        starts = torch.randint(len(ids) - LENGTH, (4,)).tolist()
        window = fabric.to_device(torch.stack([ids[start : start + LENGTH + 1] for start in starts]))
        loss = model(window[:, :-1], window[:, 1:])
        fabric.backward(loss)
        fabric.clip_gradients(model, optimizer, max_norm=1.0)
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


if __name__ == "__main__":
    print(f"loss {main(sys.argv[1], int(sys.argv[3])):.3f}")
