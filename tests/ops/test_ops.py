"""The public functions: every bad argument is met by name and number, and the choice of a backend explains itself."""

import importlib
import inspect
import re
from pathlib import Path

import pytest
import torch

from fastgpt import ops
from fastgpt.ops import pytorch

ROOT = Path(__file__).parents[2]
F16, F32, F64, I64 = torch.float16, torch.float32, torch.float64, torch.int64
FUNCTIONS = [
    ops.layer_norm,
    ops.add_layer_norm,
    ops.causal_attention,
    ops.causal_attention_qkv,
    ops.decode_attention,
    ops.gelu_mlp,
    ops.linear_cross_entropy,
    ops.embedding,
]


def t(*shape, dtype=F32):
    return torch.zeros(shape, dtype=dtype)


def ids(*values):
    return torch.tensor(values)


X, W = t(2, 3, 8), t(8)
Q = t(2, 4, 5, 16)
QKV = t(2, 5, 24)
CACHE = t(2, 4, 9, 16)
MLP = (t(2, 8), t(32, 8), t(32), t(8, 32))
HEAD = (t(2, 8), t(10, 8), torch.zeros(2, dtype=I64))
TABLES = (t(10, 8), t(6, 8))

BAD = {
    "not a tensor": (lambda: ops.layer_norm([1.0], W), TypeError, "layer_norm: x is a list"),
    "None": (lambda: ops.layer_norm(None, W), TypeError, "x is None, not a tensor"),
    "sparse": (
        lambda: ops.gelu_mlp(MLP[0].to_sparse(), *MLP[1:]),
        TypeError,
        "x is a sparse_coo tensor, not a dense one",
    ),
    "nested": (
        lambda: ops.causal_attention(torch.nested.nested_tensor([t(3, 8)]), Q, Q),
        TypeError,
        "q is a nested tensor, not a dense one",
    ),
    "quantised": (
        lambda: ops.layer_norm(torch.quantize_per_tensor(X, 0.1, 0, torch.qint8), W),
        TypeError,
        "x is torch.qint8, not one of float16",
    ),
    "complex": (lambda: ops.layer_norm(X.cfloat(), W), TypeError, "x is torch.complex64, not one of float16"),
    "an integer tensor": (lambda: ops.layer_norm(X.long(), W), TypeError, "x is torch.int64, not one of float16"),
    "weight too short": (lambda: ops.layer_norm(X, t(7)), ValueError, "weight has shape (7,), not (8,)"),
    "bias too long": (lambda: ops.layer_norm(X, W, t(9)), ValueError, "bias has shape (9,), not (8,)"),
    "no channels": (lambda: ops.layer_norm(t(2, 0), t(0)), ValueError, "x has shape (2, 0)"),
    "a scalar": (lambda: ops.layer_norm(t(), W), ValueError, "x has shape ()"),
    "eps zero": (lambda: ops.layer_norm(X, W, eps=0), ValueError, "eps is 0, not a positive number"),
    "eps nan": (lambda: ops.layer_norm(X, W, eps=float("nan")), ValueError, "eps is nan"),
    "other device": (lambda: ops.layer_norm(X, W.to("meta")), ValueError, "weight is on meta, the others on cpu"),
    "unknown backend": (lambda: ops.layer_norm(X, W, backend="cuda"), ValueError, "backend is 'cuda'"),
    "residual of another shape": (
        lambda: ops.add_layer_norm(X, t(2, 3, 9), W),
        ValueError,
        "residual has shape (2, 3, 9), not (2, 3, 8)",
    ),
    "x_bias too short": (lambda: ops.add_layer_norm(X, X, W, x_bias=t(7)), ValueError, "x_bias has shape (7,)"),
    "integer residual_dtype": (
        lambda: ops.add_layer_norm(X, X, W, residual_dtype=torch.int32),
        TypeError,
        "residual_dtype is torch.int32",
    ),
    "dropout above one": (lambda: ops.add_layer_norm(X, X, W, dropout_p=1.5), ValueError, "dropout_p is 1.5"),
    "dropout nan": (lambda: ops.add_layer_norm(X, X, W, dropout_p=float("nan")), ValueError, "dropout_p is nan"),
    "a seed of 65 bits": (lambda: ops.add_layer_norm(X, X, W, seed=2**64), ValueError, "seed is 18446744073709551616"),
    "a seed that is text": (lambda: ops.add_layer_norm(X, X, W, seed="7"), TypeError, "seed is '7'"),
    "a seed of int32": (lambda: ops.add_layer_norm(X, X, W, seed=ids(7).int()), TypeError, "seed is torch.int32"),
    "two seeds": (lambda: ops.add_layer_norm(X, X, W, seed=ids(7, 8)), ValueError, "seed has 2 elements"),
    "q of three axes": (
        lambda: ops.causal_attention(Q[0], Q, Q),
        ValueError,
        "q has shape (4, 5, 16), not (B, H, T, D)",
    ),
    "mixed dtypes": (
        lambda: ops.causal_attention(Q, Q.half(), Q),
        TypeError,
        "q is torch.float32 but k is torch.float16",
    ),
    "v unlike k": (lambda: ops.causal_attention(Q, Q, Q[:, :, :3]), ValueError, "v has shape (2, 4, 3, 16)"),
    "heads do not divide": (lambda: ops.causal_attention(Q, Q[:, :3], Q[:, :3]), ValueError, "(2, 3, 5, 16)"),
    "other head dim": (lambda: ops.causal_attention(Q, Q[..., :8], Q[..., :8]), ValueError, "(2, 4, 5, 8)"),
    "more queries than keys": (
        lambda: ops.causal_attention(Q, Q[:, :, :3], Q[:, :, :3]),
        ValueError,
        "5 queries but only 3 keys",
    ),
    "window zero": (lambda: ops.causal_attention(Q, Q, Q, window=0), ValueError, "window is 0; a query sees 1 key"),
    "window negative": (lambda: ops.causal_attention_qkv(QKV, 2, window=-3), ValueError, "window is -3"),
    "window true": (
        lambda: ops.causal_attention(Q, Q, Q, window=True),
        TypeError,
        "window is True, not a whole number",
    ),
    "window of a float": (
        lambda: ops.causal_attention_qkv(QKV, 2, window=2.0),
        TypeError,
        "window is 2.0, not a whole",
    ),
    "window of a cache": (
        lambda: ops.decode_attention(Q[:, :, :1], CACHE, CACHE, ids(9, 9), window=0),
        ValueError,
        "decode_attention: window is 0",
    ),
    "scale zero": (lambda: ops.causal_attention(Q, Q, Q, scale=0.0), ValueError, "scale is 0.0"),
    "scale negative": (lambda: ops.causal_attention(Q, Q, Q, scale=-1.0), ValueError, "scale is -1.0"),
    "scale infinite": (lambda: ops.causal_attention(Q, Q, Q, scale=float("inf")), ValueError, "scale is inf"),
    "key_mask of floats": (
        lambda: ops.causal_attention(Q, Q, Q, key_mask=t(2, 5)),
        TypeError,
        "key_mask is torch.float32",
    ),
    "key_mask of another shape": (
        lambda: ops.causal_attention(Q, Q, Q, key_mask=t(2, 6, dtype=torch.bool)),
        ValueError,
        "key_mask has shape (2, 6), not (2, 5)",
    ),
    "documents over a cache": (
        lambda: ops.causal_attention(Q[:, :, :3], Q, Q, documents=t(2, 5, dtype=I64)),
        ValueError,
        "as many queries as keys, not 3 and 5",
    ),
    "channels not three fold": (
        lambda: ops.causal_attention_qkv(t(2, 5, 25), 2),
        ValueError,
        "(2, 5, 25), not (B, T, 3C)",
    ),
    "wrong head count": (lambda: ops.causal_attention_qkv(QKV, 3), ValueError, "8 channels do not divide into 3 heads"),
    "no heads": (lambda: ops.causal_attention_qkv(QKV, 0), ValueError, "8 channels do not divide into 0 heads"),
    "17 new tokens": (
        lambda: ops.decode_attention(t(2, 4, 17, 16), CACHE, CACHE, ids(9, 9)),
        ValueError,
        "17 new tokens; from 1 to 16",
    ),
    "a length past the cache": (
        lambda: ops.decode_attention(Q[:, :, :1], CACHE, CACHE, ids(9, 10)),
        ValueError,
        "length 10 at (1,) is outside a cache of 9 slots",
    ),
    "float lengths": (
        lambda: ops.decode_attention(Q[:, :, :1], CACHE, CACHE, t(2)),
        TypeError,
        "lengths is torch.float32, not one of int32, int64",
    ),
    "one length for two rows": (
        lambda: ops.decode_attention(Q[:, :, :1], CACHE, CACHE, ids(9)),
        ValueError,
        "lengths has shape (1,), not (2,)",
    ),
    "w_in of another width": (
        lambda: ops.gelu_mlp(MLP[0], t(32, 7), *MLP[2:]),
        ValueError,
        "w_in has shape (32, 7), not (F, 8)",
    ),
    "w_out not transposed": (
        lambda: ops.gelu_mlp(*MLP[:3], t(32, 8)),
        ValueError,
        "w_out has shape (32, 8), not (8, 32)",
    ),
    "b_in too short": (lambda: ops.gelu_mlp(*MLP[:2], t(31), MLP[3]), ValueError, "b_in has shape (31,), not (32,)"),
    "half weights": (
        lambda: ops.gelu_mlp(*MLP[:3], MLP[3].half()),
        TypeError,
        "x is torch.float32 but w_out is torch.float16",
    ),
    "unknown gelu": (lambda: ops.gelu_mlp(*MLP, approximate="erf"), ValueError, "approximate is 'erf'"),
    "float targets": (lambda: ops.linear_cross_entropy(*HEAD[:2], t(2)), TypeError, "targets is torch.float32"),
    "three targets for two rows": (
        lambda: ops.linear_cross_entropy(*HEAD[:2], ids(1, 2, 3)),
        ValueError,
        "targets has shape (3,), not (2,)",
    ),
    "a target past the vocabulary": (
        lambda: ops.linear_cross_entropy(*HEAD[:2], ids(3, 10)),
        ValueError,
        "target 10 at (1,) is outside a vocabulary of 10",
    ),
    "a negative target": (
        lambda: ops.linear_cross_entropy(*HEAD[:2], ids(-1, 3)),
        ValueError,
        "target -1 at (0,) is outside a vocabulary of 10",
    ),
    "an empty vocabulary": (
        lambda: ops.linear_cross_entropy(HEAD[0], t(0, 8), HEAD[2]),
        ValueError,
        "weight has shape (0, 8)",
    ),
    "unknown reduction": (lambda: ops.linear_cross_entropy(*HEAD, reduction="max"), ValueError, "reduction is 'max'"),
    "smoothing above one": (
        lambda: ops.linear_cross_entropy(*HEAD, label_smoothing=2),
        ValueError,
        "label_smoothing is 2",
    ),
    "a negative z_loss": (lambda: ops.linear_cross_entropy(*HEAD, z_loss=-1), ValueError, "z_loss is -1"),
    "flat ids": (lambda: ops.embedding(ids(1, 2), *TABLES), ValueError, "ids has shape (2,), not (B, T)"),
    "float ids": (lambda: ops.embedding(t(1, 2), *TABLES), TypeError, "ids is torch.float32"),
    "tables of other widths": (lambda: ops.embedding(ids([1]), t(10, 8), t(6, 7)), ValueError, "(10, 8) and (6, 7)"),
    "past the context": (
        lambda: ops.embedding(torch.zeros(1, 7, dtype=I64), *TABLES),
        ValueError,
        "7 tokens are more than the context of 6",
    ),
    "a token past the vocabulary": (
        lambda: ops.embedding(ids([1, 2], [3, 10]), *TABLES),
        ValueError,
        "token 10 at (1, 1) is outside a vocabulary of 10",
    ),
    "a position past the context": (
        lambda: ops.embedding(ids([1, 2]), *TABLES, positions=ids(5, 6)),
        ValueError,
        "position 6 at (1,) is outside a context of 6",
    ),
    "an embedding of integers": (
        lambda: ops.embedding(ids([1, 2]), *TABLES, dtype=torch.int32),
        TypeError,
        "embedding: dtype is torch.int32",
    ),
    "heads of no width": (
        lambda: ops.causal_attention(*[torch.zeros(1, 2, 3, 0)] * 3),
        ValueError,
        "causal_attention: the head dimension is 0",
    ),
    "positions of another shape": (
        lambda: ops.embedding(ids([1, 2]), *TABLES, positions=ids(0, 1, 2)),
        ValueError,
        "positions has shape (3,), ids (1, 2)",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_argument_is_named(case):
    call, kind, message = BAD[case]
    with pytest.raises(kind, match=re.escape(message)):
        call()


def test_an_ignored_target_is_no_bad_one():
    assert ops.linear_cross_entropy(*HEAD[:2], ids(-7, 3), ignore_index=-7).isfinite()


def test_twins_have_the_same_signatures():
    """ops adds `backend`; reference has every function; autograd, where there is a Triton, those that have kernels."""
    kernels = [] if ops.no_triton() else [importlib.import_module("fastgpt.ops.autograd")]
    for function in FUNCTIONS:
        public = inspect.signature(function).parameters
        assert list(public)[-1] == "backend" and public["backend"].default == "auto"
        shape = [(p.name, p.kind, p.default) for p in public.values() if p.name != "backend"]
        for module in (pytorch, *kernels):
            twin = getattr(module, function.__name__, None)
            if twin is None:
                assert module is not pytorch
                continue
            assert [(p.name, p.kind, p.default) for p in inspect.signature(twin).parameters.values()] == shape


def test_lengths_off_the_cpu_are_not_asked_for():
    """That would make the host wait for the device."""
    lengths = torch.tensor([0, 9, 3], device="meta")  # on a CPU an error
    assert ops.document_ids(lengths, 5).shape == (1, 5)
