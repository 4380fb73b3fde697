"""Hugging Face's Trainer on a GPT-2 that fastgpt has accelerated: nothing else of the script changes.

    python examples/trainer.py text.txt --steps 100 --out trained

Without a GPU the model does what transformers wrote, at its speed.
"""

import argparse
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

import fastgpt
from fastgpt.data.tokenizer import encoding


class Windows(torch.utils.data.Dataset):
    """Windows of a text's bytes, one after the other."""

    def __init__(self, text: str, length: int):
        ids = torch.tensor(encoding("byte").encode(text, disallowed_special=()))
        self.windows = ids[: len(ids) // length * length].view(-1, length)

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, place: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.windows[place], "labels": self.windows[place]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text", type=Path)
    parser.add_argument("--out", default="trained")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    options = parser.parse_args()

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=257,
        n_positions=256,
        n_layer=options.layers,
        n_head=options.width // 64,
        n_embd=options.width,
        bos_token_id=256,
        eos_token_id=256,
    )
    model = GPT2LMHeadModel(config)
    print(fastgpt.accelerate(model, loss=True))  # the one line

    arguments = TrainingArguments(
        options.out, max_steps=options.steps, per_device_train_batch_size=8, learning_rate=1e-3, report_to=[]
    )
    data = Windows(options.text.read_text(encoding="utf-8"), config.n_positions)
    result = Trainer(model, arguments, train_dataset=data).train()
    print(f"loss {result.training_loss:.3f} over {options.steps} steps")
    fastgpt.restore(model)  # what is saved is transformers' own, either way
    model.save_pretrained(options.out)


if __name__ == "__main__":
    main()
