"""The ways that people take to a kernel, at GPT-2's sizes: training, the three families accelerated, generation, and
calls of the public functions for what no GPT-2 asks of them.

A way makes its model, then does once on device "cuda" what its users do over and over. Two layers stand for all: layers
repeat. Nothing here names a kernel: which are launched, and how, is recorded (bench.gates.record).
"""

import copy
import functools
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import fastgpt
from fastgpt import ops
from fastgpt.data.windows import windows
from fastgpt.fp8 import Fp8
from fastgpt.generation.decoder import Decoder
from fastgpt.model import GPT, GPTConfig
from fastgpt.training.distributed import World
from fastgpt.training.optimizer import adamw
from fastgpt.training.step import Step

VOCAB, CONTEXT, BATCH = 50257, 1024, 32
SIZES = {"124M": (768, 12), "355M": (1024, 16), "774M": (1280, 20), "1558M": (1600, 25)}  # channels, heads
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
_DTYPES = {"bfloat16": BF16, "float16": FP16, "float32": FP32}


class Missing(Exception):
    """A package that a way's users have and this machine has not."""


class Way(NamedTuple):
    prepare: Callable[[], Any]  # on the CPU, where accelerate tries what it replaces
    run: Callable[[Any], object]  # of what that made, on device "cuda"


def _shape(size: str) -> dict[str, int]:
    channels, heads = SIZES[size]
    return dict(vocab_size=VOCAB, block_size=CONTEXT, n_layer=2, n_head=heads, n_embd=channels)


def _gpt(size: str, **changes) -> GPT:
    with torch.device("cuda"):
        return GPT(GPTConfig(**_shape(size), **changes))


def _batch() -> tuple[torch.Tensor, torch.Tensor]:
    tokens = np.arange(CONTEXT + BATCH + 1, dtype=np.uint16)
    return windows(tokens, range(BATCH), CONTEXT, torch.device("cuda"))


# fastgpt train


def _train(_, size: str = "124M", autocast: torch.dtype | None = BF16, end: int | None = None, **changes) -> None:
    model = _gpt(size, **changes).train()
    step = Step(model, adamw(model, 1e-3), World(0, 1, torch.device("cuda")), 1.0, autocast, end=end)
    idx, targets = _batch()
    step(idx.view(-1, *idx.shape), targets.reshape(-1, *targets.shape))
    model.eval()
    with torch.no_grad():
        step.loss(model, idx, targets)


def _train_fp8(_, exact: int = 0, **changes) -> None:
    """exact: passes with scales of their own tensors; without them those are known beforehand. Cards below 8.9 have no
    such matmuls."""
    if torch.cuda.get_device_capability() >= (8, 9):
        with mock.patch.object(Fp8, "exact_passes", exact):
            _train(None, **changes)


# The families


def _hugging_face(size: str, p: float) -> nn.Module:
    if find_spec("transformers") is None:
        raise Missing("transformers is not installed (pip install transformers)")
    from transformers import GPT2Config, GPT2LMHeadModel

    fields = _shape(size)
    fields["n_positions"] = fields.pop("block_size")
    return GPT2LMHeadModel(GPT2Config(**fields, resid_pdrop=p, embd_pdrop=p, attn_pdrop=p))


def _nanogpt(size: str, p: float) -> nn.Module:
    from tests.models import NanoGPT  # of its form: it is no package

    return NanoGPT(SimpleNamespace(**_shape(size), dropout=p, bias=False, flash=True))


def _book(size: str, p: float) -> nn.Module:
    from tests.models import BOOK, ROOT, book_package

    if find_spec("llms_from_scratch") is None and not (ROOT / ".pytest_cache" / BOOK).is_dir():
        raise Missing("llms-from-scratch is not installed (pip install --no-deps llms-from-scratch)")
    shape = _shape(size)
    return book_package("ch04").GPTModel(
        dict(
            vocab_size=VOCAB,
            context_length=CONTEXT,
            emb_dim=shape["n_embd"],
            n_heads=shape["n_head"],
            n_layers=2,
            drop_rate=p,
            qkv_bias=False,
        )
    )


FAMILIES: dict[str, tuple[Callable, Callable]] = {  # the model, and its loss
    "Hugging Face": (_hugging_face, lambda model, idx, targets: model(idx, labels=idx).loss),
    "nanoGPT": (_nanogpt, lambda model, idx, targets: model(idx, targets)[1]),
    "the book": (
        _book,
        lambda model, idx, targets: F.cross_entropy(model(idx).flatten(0, 1).float(), targets.flatten()),
    ),
}


def _built(family: str, size: str, p: float) -> nn.Module:
    """With zeros where its author draws weights, which takes seconds, and nobody looks at them."""
    zeros = dict.fromkeys(("normal_", "uniform_"), lambda tensor, *_, **__: tensor.zero_())
    with mock.patch.multiple(torch.Tensor, **zeros):
        return FAMILIES[family][0](size, p)


@functools.lru_cache(maxsize=2)
def _accelerated(family: str, size: str, p: float, loss: bool) -> nn.Module:
    """Whoever runs it copies it: to try what it replaces takes longer."""
    model = _built(family, size, p)
    fastgpt.accelerate(model, loss=loss)
    return model


def _step_of(model: nn.Module, family: str, dtype: torch.dtype, autocast: bool) -> None:
    model = copy.deepcopy(model).to("cuda", FP32 if autocast else dtype).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    idx, targets = _batch()
    with torch.autocast("cuda", dtype, enabled=autocast):
        loss = FAMILIES[family][1](model, idx.contiguous(), targets.contiguous())
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    model.eval()
    with torch.no_grad(), torch.autocast("cuda", dtype, enabled=autocast):
        FAMILIES[family][1](model, idx.contiguous(), targets.contiguous())


def _padded_step_of(model: nn.Module) -> None:
    model = copy.deepcopy(model).to("cuda").train()
    idx, _ = _batch()
    mask = torch.ones_like(idx)
    mask[0, -100:] = 0  # transformers drops one that is 1 everywhere, which only a card that is there can tell
    with torch.autocast("cuda", BF16):
        loss = model(idx, attention_mask=mask, labels=idx).loss
    loss.backward()


# fastgpt generate


def _generate(model: Any, rows: int, prompt: int = 16, dtype: torch.dtype | None = None, size: str = "", **how) -> None:
    model = _gpt(size) if model is None else copy.deepcopy(model).to("cuda")
    prompts = [[1] * (prompt - row % 2) for row in range(rows)]
    fastgpt.generate(model, prompts, 4, dtype=dtype, **how)


def _generate_windowed(_, rows: int, prompt: int, **how) -> None:
    """From rings, which the prompts fill."""
    _generate(_gpt("124M", window=256), rows, prompt, **how)


def _several_at_once(_, **changes) -> None:
    """Tokens of a row that a draft proposed."""
    decoder = Decoder(_gpt("124M", **changes), dtype=BF16)
    ids = torch.zeros(1, 5, dtype=torch.int64, device="cuda")
    decoder.decode(ids, torch.full((1,), 5, device="cuda"), decoder.cache(1, 512))


def _token_in_one_launch(model: Any, dtype: torch.dtype | None = BF16) -> None:
    """Of a kernel that no table chooses yet on every Triton. On other cards there is nothing to launch. dtype: None for
    a model whose norms and embeddings are halves too, for they are not cast."""
    from fastgpt.ops import token  # needs a Triton

    if torch.cuda.get_device_capability() == (9, 0) and token.triton.__version__ in token.TRITONS:
        model = _gpt("124M").bfloat16() if dtype is None else model
        with mock.patch.object(token, "RAN", token.TRITONS):
            _generate(model, 1, dtype=dtype, size="124M", temperature=0.0)


# The public functions


def _tensors(dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
    return [torch.randn(shape, device="cuda").to(dtype).requires_grad_() for shape in shapes]


def _backward(*outputs: torch.Tensor) -> None:
    torch.autograd.backward(outputs, [torch.ones_like(out) for out in outputs])


def _norms(_, columns: int, dtype: torch.dtype, p: float) -> None:
    x, residual, weight, bias, x_bias = _tensors(dtype, (4096, columns), (4096, columns), *[(columns,)] * 3)
    _backward(
        ops.layer_norm(x, weight, bias), *ops.add_layer_norm(x, residual, weight, bias, x_bias=x_bias, dropout_p=p)
    )


def _attention(
    _, dim: int, dtype: torch.dtype, heads: int = 12, extras: str = "", packed: bool = True, window: int | None = None
) -> None:
    mask = torch.ones(2, 1024, dtype=torch.bool, device="cuda") if "mask" in extras else None
    ids = torch.zeros(2, 1024, dtype=torch.int32, device="cuda") if "documents" in extras else None
    options: dict = dict(key_mask=mask, documents=ids, dropout_p=0.1 if "dropout" in extras else 0.0, window=window)
    if packed:
        qkv, bias = _tensors(dtype, (2, 1024, 3 * heads * dim), (3 * heads * dim,))
        options["qkv_bias"] = bias if "bias" in extras else None
        _backward(ops.causal_attention_qkv(qkv, heads, **options))
    else:
        _backward(ops.causal_attention(*_tensors(dtype, *[(2, heads, 1024, dim)] * 3), **options))


def _decoding(_, dim: int, dtype: torch.dtype, steps: int = 1, window: int | None = None) -> None:
    q, cache = torch.zeros(32, 12, steps, dim, device="cuda"), torch.zeros(32, 12, 1024, dim, device="cuda")
    lengths = torch.full((32,), 1024, device="cuda")
    ops.decode_attention(q.to(dtype), cache.to(dtype), cache.to(dtype), lengths, window=window)


def _mlp(_, dtype: torch.dtype, approximate: Any, recompute: bool) -> None:
    operands = _tensors(dtype, (4096, 768), (3072, 768), (3072,), (768, 3072), (768,))
    _backward(ops.gelu_mlp(*operands, approximate=approximate, recompute=recompute))


def _head(_, dtype: torch.dtype, **options) -> None:
    x, weight = _tensors(dtype, (4096, 768), (VOCAB, 768))
    loss = ops.linear_cross_entropy(x, weight, torch.zeros(4096, dtype=torch.int64, device="cuda"), **options)
    _backward(loss)


def _embedding(_, dtype: torch.dtype, p: float, out: torch.dtype, columns: int = 768) -> None:
    token, position = _tensors(dtype, (VOCAB, columns), (CONTEXT, columns))
    ids = torch.zeros(4, CONTEXT, dtype=torch.int64, device="cuda")
    places = torch.zeros(CONTEXT, dtype=torch.int64, device="cuda")
    for positions in (None, places):
        _backward(ops.embedding(ids, token, position, positions, dropout_p=p, dtype=out))


def _on_hopper(_, call: Callable[[ModuleType], object], module: str) -> None:
    """Of a kernel in Gluon a form that no table chooses yet. On other cards there is nothing to launch."""
    from fastgpt.ops import hopper  # needs a Triton

    if torch.cuda.get_device_capability() == (9, 0) and hopper.has_a_known_triton():
        call(import_module(f"fastgpt.kernels.hopper.{module}"))


def _hopper_attention(kernels: ModuleType, dim: int, dtype: torch.dtype, block_m: int) -> None:
    q, k, v, o = torch.empty(4, 8, 1024, 6, dim, dtype=dtype, device="cuda").transpose(2, 3)
    kernels.attention_fwd(q, k, v, o, torch.empty(8, 6, 1024, device="cuda"), 1.0, block_m)


def _hopper_attention_bwd(kernels: ModuleType, dim: int, dtype: torch.dtype) -> None:
    q, k, v, o, do, dq, dk, dv = torch.empty(8, 8, 1024, 6, dim, dtype=dtype, device="cuda").transpose(2, 3)
    kernels.attention_bwd(do, q, k, v, o, torch.empty(8, 6, 1024, device="cuda"), dq, dk, dv, 1.0)


def _hopper_attention_sums(kernels: ModuleType, dtype: torch.dtype) -> None:
    qkv, dout = (torch.empty(8, 1024, columns, dtype=dtype, device="cuda") for columns in (2304, 768))
    lse = torch.empty(8, 12, 1024, device="cuda")
    kernels.attention_qkv_bwd(dout, qkv, dout, lse, torch.empty_like(qkv), 12, 0.125, True)


def _hopper_linear_gelu(kernels: ModuleType, dtype: torch.dtype, tanh: bool) -> None:
    x, pre, act = (torch.empty(32768, columns, dtype=dtype, device="cuda") for columns in (768, 3072, 3072))
    w_in = torch.empty(3072, 768, dtype=dtype, device="cuda")
    kernels.linear_gelu_fwd(x, w_in, w_in[:, 0].contiguous(), tanh, pre, act)


def _hopper_linear_gelu_bwd(kernels: ModuleType, dtype: torch.dtype, tanh: bool) -> None:
    dy, pre = (torch.empty(32768, columns, dtype=dtype, device="cuda") for columns in (768, 3072))
    kernels.linear_gelu_bwd(dy, torch.empty(768, 3072, dtype=dtype, device="cuda"), pre, tanh)


def _nothing() -> None:
    return None


def ways() -> dict[str, Way]:
    """All of them by name, those that most people take first."""
    found: dict[str, Way] = {}

    def add(name: str, run: Callable, *args, prepare: Callable[[], Any] = _nothing, **kwargs) -> None:
        found[name] = Way(prepare, functools.partial(_with, run, args, kwargs))

    for size in SIZES:
        add(f"train {size}", _train, size)
    add("train, dropout", _train, dropout=0.1)
    add("train, float16", _train, autocast=FP16)
    add("train, float32", _train, autocast=None)
    add("train, float32, dropout", _train, autocast=None, dropout=0.1)
    add("train, document masks", _train, end=50256)
    add("train, document masks, dropout", _train, end=50256, dropout=0.1)
    add("train, residual float32", _train, residual="float32")
    add("train, windows", _train, window=256)
    add("train, windows, dropout", _train, window=256, dropout=0.1)
    add("train, windows, document masks", _train, window=256, end=50256)
    add("train, windows, float32", _train, autocast=None, window=256)
    for mode in ("forward", "all"):
        add(f"train, fp8 {mode}", _train_fp8, fp8=mode)
    add("train, fp8 all, first passes", _train_fp8, exact=1, fp8="all")
    add("train, fp8 all, dropout", _train_fp8, fp8="all", dropout=0.1)
    add("train, fp8 all, hidden units again", _train_fp8, fp8="all", activation_checkpointing="mlp")
    add("train 1558M, fp8 all", _train_fp8, size="1558M", fp8="all")
    for family in FAMILIES:
        for p in (0.0, 0.1):
            for loss in (False, True):
                if loss and family == "the book":  # it leaves its loss to its caller
                    continue
                words = f"{family}{', dropout' if p else ''}{', loss=True' if loss else ''}"
                prepare = functools.partial(_accelerated, family, "124M", p, loss)
                add(f"{words}, autocast", _step_of, family, BF16, True, prepare=prepare)
                if not p:
                    add(f"{words}, bfloat16", _step_of, family, BF16, False, prepare=prepare)
                if not p and loss:
                    add(f"{words}, float16", _step_of, family, FP16, False, prepare=prepare)
    prepare = functools.partial(_accelerated, "Hugging Face", "124M", 0.1, True)
    add("Hugging Face, padded, autocast", _padded_step_of, prepare=prepare)
    for rows in (1, 4, 64):
        for name, dtype in (("bfloat16", BF16), ("float32", FP32)):
            add(f"generate {rows}, {name}", _generate, rows, size="124M", dtype=dtype, temperature=0.0)
    add("generate 1, float16", _generate, 1, size="124M", dtype=FP16, temperature=0.0)
    for rows in (1, 64):
        add(f"generate {rows}, sampled", _generate, rows, size="124M", dtype=BF16, top_k=50)
        add(f"generate {rows}, among all", _generate, rows, size="124M", dtype=BF16, min_p=0.1)
    add("generate 1, sampled, float32", _generate, 1, size="124M", dtype=FP32, top_k=50)
    add("generate 1, the most sampled", _generate, 1, size="124M", dtype=BF16, top_k=128, top_p=0.9)
    add("generate 1, long", _generate, 1, 1000, size="124M", dtype=BF16, temperature=0.0)
    add("generate 64, long", _generate, 64, 1000, size="124M", dtype=BF16, temperature=0.0)
    for size in list(SIZES)[1:]:
        add(f"generate 1, {size}", _generate, 1, size=size, dtype=BF16, temperature=0.0)
    add("generate 64, 1558M", _generate, 64, size="1558M", dtype=BF16, temperature=0.0)
    for family in FAMILIES:
        prepare = functools.partial(_built, family, "124M", 0.0)
        add(f"generate 1, {family}", _generate, 1, prepare=prepare, dtype=BF16, temperature=0.0)
    for columns in (64, 1600, 4096, 8192, 16384):
        for name, dtype in _DTYPES.items():
            for p in (0.0, 0.1):
                add(f"layer_norm C {columns} {name}{' dropout' if p else ''}", _norms, columns, dtype, p)
    for dim in (64, 80, 128, 256):
        for name, dtype in _DTYPES.items():
            if dim == 64 or dtype != FP16:
                add(f"attention D {dim} {name}", _attention, dim, dtype)
        add(f"attention D {dim} bias", _attention, dim, BF16, extras="bias")
        for extras in ("dropout", "documents", "dropout, mask, documents")[2 if dim == 256 else 0 :]:
            if dim != 80:
                add(f"attention D {dim} {extras}", _attention, dim, BF16, extras=extras)
        add(f"decode_attention D {dim}", _decoding, dim, BF16)
        add(f"decode_attention D {dim} float32", _decoding, dim, FP32)
    add("attention, separate", _attention, 64, BF16, packed=False)
    add("attention, mask", _attention, 64, BF16, extras="mask")
    add("attention, 25 heads", _attention, 64, BF16, 25)
    add("decode_attention, 5 tokens", _decoding, 64, BF16, 5)
    for dim in (80, 128, 256):
        add(f"attention D {dim} window", _attention, dim, BF16, window=256)
    add(
        "attention D 128 window, dropout, mask, documents",
        _attention,
        128,
        BF16,
        extras="dropout, mask, documents",
        window=256,
    )
    add("decode_attention D 128 window", _decoding, 128, BF16, window=256)
    add("decode_attention window, 5 tokens", _decoding, 64, BF16, 5, window=900)
    add("generate 1, a draft's tokens", _several_at_once)
    add("generate 1, a draft's tokens, windows", _several_at_once, window=256)
    add("generate 1, windows", _generate_windowed, 1, 600, dtype=BF16, temperature=0.0)
    for name, dtype in _DTYPES.items():
        for approximate in ("tanh", "none"):
            add(f"gelu_mlp {approximate} {name}", _mlp, dtype, approximate, False)
        add(f"gelu_mlp recompute {name}", _mlp, dtype, "tanh", True)
        add(f"linear_cross_entropy {name}", _head, dtype)
        add(f"linear_cross_entropy none {name}", _head, dtype, reduction="none")
        for p in (0.0, 0.1):
            for out_name, out in _DTYPES.items():
                add(f"embedding {name} to {out_name}{' dropout' if p else ''}", _embedding, dtype, p, out)
    for name, dtype in (("bfloat16", BF16), ("float16", FP16)):
        for dim, block_m in ((64, 128), (64, 192), (128, 128)):
            call = functools.partial(_hopper_attention, dim=dim, dtype=dtype, block_m=block_m)
            add(f"Hopper's attention D {dim}, {block_m} queries, {name}", _on_hopper, call, "attention")
        for dim in (64, 128):
            call = functools.partial(_hopper_attention_bwd, dim=dim, dtype=dtype)
            add(f"Hopper's attention_backward D {dim} {name}", _on_hopper, call, "attention_backward")
        call = functools.partial(_hopper_attention_sums, dtype=dtype)
        add(f"Hopper's attention_backward with a bias {name}", _on_hopper, call, "attention_backward")
        for gelu, tanh in (("tanh", True), ("none", False)):
            for module, run in (
                ("linear_gelu", _hopper_linear_gelu),
                ("linear_gelu_backward", _hopper_linear_gelu_bwd),
            ):
                call = functools.partial(run, dtype=dtype, tanh=tanh)
                add(f"Hopper's {module} {gelu} {name}", _on_hopper, call, module)
    add("a token in one launch, 124M", _token_in_one_launch)
    add("a token in one launch, 124M in bfloat16", _token_in_one_launch, dtype=None)
    prepare = functools.partial(_built, "nanoGPT", "124M", 0.0)
    add("a token in one launch, nanoGPT", _token_in_one_launch, prepare=prepare)
    return found


def _with(run: Callable, args: tuple, kwargs: dict, prepared: Any) -> object:
    return run(prepared, *args, **kwargs)
