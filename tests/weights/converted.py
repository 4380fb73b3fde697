"""Small models to convert, what they compute, and nanoGPT's file of one."""

import torch

from fastgpt import GPT, GPTConfig
from tests.models import CONTEXT, VOCAB, randomised

IDX = torch.randint(0, VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))
SHAPE = dict(vocab_size=VOCAB, block_size=CONTEXT, n_embd=48, n_layer=2, n_head=4)


def ours(**changes):
    return randomised(GPT(GPTConfig(**{**SHAPE, **changes}))).eval()


def logits(model):
    with torch.no_grad():
        found = model.eval()(IDX)
    return getattr(found, "logits", found)


def same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


def save_nanogpt(model, path):
    args = {name: getattr(model.config, name) for name in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")}
    args.update(bias=model.config.bias, dropout=model.config.dropout)
    content = {"model": model.state_dict(), "optimizer": {"state": {}}, "model_args": args, "iter_num": 3}
    torch.save({**content, "best_val_loss": torch.tensor(2.0), "config": {"dataset": "x"}}, path)
