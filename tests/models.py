"""The models of the families that the swap and the weights are tested with: small, and nowhere at their defaults."""

import contextlib
import functools
import importlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

ROOT = Path(__file__).parent.parent
VOCAB, CONTEXT = 61, 32
BOOK = "llms-from-scratch==1.0.19"


def randomised(model):
    """The model with every weight, bias and norm away from its default."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            deviation = 0.3 if parameter.dim() < 2 else 1.5 * max(parameter.shape) ** -0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * deviation + 0.1)
    return model


# Hugging Face


def hugging_face(**changes):
    transformers = pytest.importorskip("transformers", reason="the extra `test` brings transformers")
    shape = dict(vocab_size=VOCAB, n_positions=CONTEXT, n_embd=48, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
    off = dict(embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0)
    implementation = changes.pop("attn_implementation", "sdpa")
    config = transformers.GPT2Config(**{**shape, **off, **changes}, attn_implementation=implementation)
    return randomised(transformers.GPT2LMHeadModel(config))


# nanoGPT: its module tree, names, signatures and behaviour, written for these tests


class LayerNorm(nn.Module):
    def __init__(self, width, bias):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, x):
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.attn_dropout, self.resid_dropout = nn.Dropout(config.dropout), nn.Dropout(config.dropout)
        self.n_head, self.n_embd, self.dropout, self.flash = config.n_head, config.n_embd, config.dropout, config.flash
        if not self.flash:  # as on a PyTorch without scaled_dot_product_attention: the mask is a buffer
            self.register_buffer("bias", torch.ones(config.block_size, config.block_size).tril()[None, None])

    def forward(self, x):
        batch, time, width = x.shape
        q, k, v = (
            t.view(batch, time, self.n_head, width // self.n_head).transpose(1, 2)
            for t in self.c_attn(x).split(self.n_embd, dim=2)
        )
        if self.flash:
            p = self.dropout if self.training else 0
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=True)
        else:
            scores = (q @ k.transpose(-2, -1)) / k.shape[-1] ** 0.5
            scores = scores.masked_fill(self.bias[:, :, :time, :time] == 0, float("-inf"))
            y = self.attn_dropout(scores.softmax(-1)) @ v
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).reshape(batch, time, width)))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.gelu = nn.GELU()
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(self.gelu(self.c_fc(x))))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1, self.attn = LayerNorm(config.n_embd, config.bias), CausalSelfAttention(config)
        self.ln_2, self.mlp = LayerNorm(config.n_embd, config.bias), MLP(config)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class NanoGPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        parts = dict(
            wte=nn.Embedding(config.vocab_size, config.n_embd),
            wpe=nn.Embedding(config.block_size, config.n_embd),
            drop=nn.Dropout(config.dropout),
            h=nn.ModuleList(Block(config) for _ in range(config.n_layer)),
            ln_f=LayerNorm(config.n_embd, config.bias),
        )
        self.transformer = nn.ModuleDict(parts)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight

    def forward(self, idx, targets=None):
        time = idx.shape[1]
        assert time <= self.config.block_size
        x = self.transformer.wte(idx) + self.transformer.wpe(torch.arange(time, device=idx.device))
        x = self.transformer.drop(x)
        for block in self.transformer.h:
            x = block(x)
        x = self.transformer.ln_f(x)
        if targets is None:
            return self.lm_head(x[:, [-1]]), None
        logits = self.lm_head(x)
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)


def nanogpt(**changes):
    shape = dict(vocab_size=VOCAB, block_size=CONTEXT, n_embd=48, n_layer=2, n_head=4)
    return randomised(NanoGPT(SimpleNamespace(**{**shape, **dict(bias=True, dropout=0.0, flash=True), **changes})))


# The book's


@functools.cache
def book_package(module="ch04"):
    """A module of llms-from-scratch.

    Its declared dependencies are 2.5 GB (TensorFlow, JupyterLab) that none of its models needs, so no extra of ours can
    name it: unless it is installed, its one small wheel is put into a folder of the checkout's test cache, once.
    """
    if importlib.util.find_spec("llms_from_scratch") is None:
        folder = ROOT / ".pytest_cache" / BOOK
        if not folder.is_dir():
            folder.parent.mkdir(exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder.parent) as new:
                command = [
                    sys.executable,
                    "-m",
                    "pip",
                    "install",
                    "--quiet",
                    "--no-deps",
                    "--target",
                    f"{new}/it",
                    BOOK,
                ]
                result = subprocess.run(command, capture_output=True, text=True)
                if result.returncode:
                    pytest.fail(f"{BOOK} is not to be had, install it by hand, with --no-deps: {result.stderr[-500:]}")
                with contextlib.suppress(OSError):  # another process of this run was first
                    os.rename(f"{new}/it", folder)
        sys.path.append(str(folder))
    return importlib.import_module(f"llms_from_scratch.{module}")


def book(kind="GPTModel", module="ch04", **changes):
    shape = dict(vocab_size=VOCAB, context_length=CONTEXT, emb_dim=48, n_layers=2, n_heads=4)
    config = {**shape, **dict(drop_rate=0.0, qkv_bias=True), **changes}
    return randomised(getattr(book_package(module), kind)(config))


# One way to ask all of them


def logits_and_loss(model, idx, targets):
    """(B, T, V) and a scalar; a target of -100 is ignored."""
    if hasattr(model, "generate"):  # Hugging Face shifts labels itself
        logits = model(idx).logits
    elif hasattr(model, "transformer"):
        return model(idx, torch.where(targets == -100, -1, targets))
    else:
        logits = model(idx)
        logits = logits[0] if isinstance(logits, tuple) else logits
    return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())


FAMILIES = {
    "hugging face": hugging_face,
    "nanogpt": nanogpt,
    "nanogpt without bias": lambda **changes: nanogpt(bias=False, **changes),
    "book": book,
    "book, fast": lambda **changes: book("GPTModelFast", **changes),
    "book, cache": lambda **changes: book(module="kv_cache.gpt2", **changes),
}
