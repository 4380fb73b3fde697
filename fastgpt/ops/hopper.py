"""Which calls Hopper's own kernels (kernels/hopper) serve, and why the others keep the Triton kernel or cuBLAS.

The launchers here have their twins' names and signatures in kernels/, and are what the custom ops launch: they ask the
table, on the tensors themselves, and hand the call on. What the table does not hold was not measured, or lost.
"""

import functools
from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from fastgpt.kernels import attention, attention_backward, mlp
from fastgpt.private import FakeTensor

INTERPRETED = triton.knobs.runtime.interpret  # which knows no Gluon
TRITONS = ("3.6.0", "3.7.1")  # that `python -m bench compile` compiles these kernels with: Gluon moves between Tritons
# With which of them tests/kernels/test_hopper_gpu.py has passed on a card, by kernel. Until a version is entered, no
# call is served there, for what never ran may hang. docs/kernels.md has what was measured.
RAN: dict[str, tuple[str, ...]] = {
    "attention_fwd": ("3.6.0",),
    "attention_bwd": ("3.6.0",),
    "attention_bwd_sums": ("3.6.0",),  # the same with the sums of a packed projection's gradient, for its bias
    "linear_gelu_fwd": ("3.6.0",),
    "linear_gelu_bwd": ("3.6.0",),
}


class Measured(NamedTuple):
    """A kernel, and calls for which it was faster on an H100 or H200: docs/kernels.md has figures and circumstances."""

    kernel: str
    dtype: torch.dtype
    sizes: tuple[int, ...]  # D of attention; C and F of the matmuls
    times: range  # T of attention
    least: int  # queries over batch and heads, or rows: with fewer, programs are left over when others are done
    gain: str  # times the speed of what else serves such a call
    block_m: int = 0  # queries of a program of attention's forward
    approximate: str = ""  # of the GELU
    capability: tuple[int, int] = (9, 0)


def has_a_known_triton() -> bool:
    return triton.__version__ in TRITONS


_ANY = range(0)  # these have no T
TABLE = (
    Measured("attention_fwd", torch.bfloat16, (64,), range(1024, 4096), 393_216, "1.09 to 1.15", 128),
    Measured("attention_fwd", torch.bfloat16, (64,), range(4096, 4097), 393_216, "1.19 to 1.22", 192),
    Measured("attention_fwd", torch.bfloat16, (128,), range(1024, 4097), 196_608, "1.31 to 1.46", 128),
    Measured("attention_bwd", torch.bfloat16, (64,), range(1024, 4097), 393_216, "1.35 to 1.38"),
    Measured("attention_bwd", torch.bfloat16, (128,), range(1024, 4097), 196_608, "1.64 to 1.67"),
    Measured("linear_gelu_fwd", torch.bfloat16, (768, 3072), _ANY, 32_768, "1.19 to 1.25", approximate="tanh"),
    Measured("linear_gelu_bwd", torch.bfloat16, (768, 3072), _ANY, 32_768, "1.21 to 1.41", approximate="tanh"),
)


class Form(NamedTuple):
    """What the table says of a call: a row of it, or why there is none; neither on other cards than Hopper."""

    row: Measured | None
    why_not: str = ""


_OTHER_CARD = Form(None)


def _lookup(
    kernel: str, operand: Tensor, sizes: tuple[int, ...], count: int, *, time: int = 0, approximate: str = ""
) -> Form:
    """count: queries over batch and heads, or rows."""
    dtype, capability = operand.dtype, torch.cuda.get_device_capability(operand.device)
    rows = [row for row in TABLE if row.kernel == kernel and row.capability == capability]
    if not rows:
        return _OTHER_CARD
    if not has_a_known_triton():
        return Form(None, f"Triton is {triton.__version__}, it was compiled with {' and '.join(TRITONS)} alone")
    if triton.__version__ not in RAN[kernel]:
        return Form(None, f"it has not yet run on a card with Triton {triton.__version__}")
    rows = [row for row in rows if row.dtype == dtype and row.sizes == sizes]
    if not rows:
        of = f"heads of {sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} channels and {sizes[1]} hidden units"
        return Form(None, f"it was not measured for {of} in {dtype}")
    rows = [row for row in rows if row.approximate == approximate]
    if not rows:
        return Form(None, f"it was not measured for approximate={approximate!r}")
    rows = [row for row in rows if row.times is _ANY or time in row.times]
    if not rows:
        return Form(None, f"it was not measured for {time} tokens")
    if count < rows[0].least:
        what = "rows" if rows[0].times is _ANY else "queries over batch and heads"
        return Form(None, f"{count:,} {what} are fewer than the {rows[0].least:,} it was measured with")
    if count >= 2**31:
        return Form(None, f"{count:,} rows are more than 32 bits count")
    return Form(rows[0])


def _begins_aligned(t: Tensor) -> bool:
    """At a multiple of 16 bytes, as the copy engine wants it; a tensor without memory begins where it would in one."""
    begin = t.storage_offset() * t.element_size() if isinstance(t, FakeTensor) else t.data_ptr()
    return begin % 16 == 0


@functools.cache
def _kernels(name: str) -> Any:
    """A module of kernels/hopper, which no other Triton than those of the table may import."""
    return import_module(f"fastgpt.kernels.hopper.{name}")


# Attention

_LAYOUT = "its operands' heads do not lie side by side in rows at multiples of 16 bytes"


def _beyond(key_mask: Any, documents: Any, dropout_p: float, window: int | None) -> str:
    """What the call asks for that these kernels lack."""
    if window is not None:
        return f"there is a window of {window} keys"
    if dropout_p != 0.0:
        return f"dropout_p is {dropout_p}"
    return "there is a key mask" if key_mask is not None else "there are documents" if documents is not None else ""


def attention_form(
    kernel: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Any,
    documents: Any,
    dropout_p: float,
    window: Any,
    *others: Any,
) -> Form:
    """Of q, k, v (B, H, T, D); others: what the backward reads beside them, do and o."""
    batch, heads, time, dim = q.shape
    form = _lookup(kernel, q, (dim,), batch * heads * time, time=time)
    if form is _OTHER_CARD:
        return form
    if beyond := _beyond(key_mask, documents, dropout_p, window):
        return Form(None, beyond)
    if k.shape[1] != heads:
        return Form(None, f"{heads} query heads share {k.shape[1]} key heads")
    if k.shape[2] != time:
        return Form(None, f"{time} queries have {k.shape[2]} keys")
    if form.row is not None and not all(map(_is_nested, (q, k, v, *others))):
        return Form(None, _LAYOUT)
    return form


def attention_qkv_form(
    kernel: str, qkv: Tensor, key_mask: Any, documents: Any, heads: int, dropout_p: float, window: Any, *others: Any
) -> Form:
    """Of the packed projection qkv (B, T, 3C); others: what the backward reads beside it, dout and out."""
    batch, time, packed = qkv.shape
    form = _lookup(kernel, qkv, (packed // 3 // heads,), batch * heads * time, time=time)
    if form is _OTHER_CARD:
        return form
    if beyond := _beyond(key_mask, documents, dropout_p, window):
        return Form(None, beyond)
    if form.row is not None and not all(t.is_contiguous() and _begins_aligned(t) for t in (qkv, *others)):
        return Form(None, _LAYOUT)
    return form


def _is_nested(t: Tensor) -> bool:
    """Whether (B, H, T, D) as (B, T, H, D) has strides each of which is a multiple of the next, which the driver's
    documentation asks of a tensor map, and none overlaps."""
    batch, heads, time, _ = t.shape
    of_batch, of_time, of_head, one = _kernels("attention").nested_strides(t)
    nested = of_head % t.shape[3] == 0 and of_time % max(1, of_head) == 0 and of_batch % max(1, of_time) == 0
    apart = of_head >= t.shape[3] and of_time >= heads * of_head and of_batch >= time * of_time
    return one == t.stride(3) and nested and apart and batch > 0 and _begins_aligned(t)


def attention_fwd(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seed: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    documents: torch.Tensor | None,
    scale: float,
    dropout_p: float,
    window: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As kernels/attention.py has it."""
    if q.is_cuda and not INTERPRETED:
        row = attention_form("attention_fwd", q, k, v, key_mask, documents, dropout_p, window).row
        if row is not None:
            o, lse = attention.attention_fwd_outputs(q, k, v)
            _kernels("attention").attention_fwd(q, k, v, o, lse, scale, row.block_m)
            return o, lse
    return attention.attention_fwd(q, k, v, seed, key_mask, documents, scale, dropout_p, window)


def attention_qkv_fwd(
    qkv: torch.Tensor,
    seed: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    documents: torch.Tensor | None,
    heads: int,
    scale: float,
    dropout_p: float,
    window: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As kernels/attention.py has it."""
    if qkv.is_cuda and not INTERPRETED:
        row = attention_qkv_form("attention_fwd", qkv, key_mask, documents, heads, dropout_p, window).row
        if row is not None:
            out, lse = attention.attention_qkv_fwd_outputs(qkv, None, None, None, heads)
            _kernels("attention").attention_qkv_fwd(qkv, out, lse, heads, scale, row.block_m)
            return out, lse
    return attention.attention_qkv_fwd(qkv, seed, key_mask, documents, heads, scale, dropout_p, window)


def attention_bwd(
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    seed: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    documents: torch.Tensor | None,
    scale: float,
    dropout_p: float,
    window: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As kernels/attention_backward.py has it."""
    if q.is_cuda and not INTERPRETED:
        form = attention_form("attention_bwd", q, k, v, key_mask, documents, dropout_p, window, do, o)
        if form.row is not None:
            dq, dk, dv = attention_backward.attention_bwd_outputs(do, q, k, v, o, lse, None, None, None, scale, 0.0)
            _kernels("attention_backward").attention_bwd(do, q, k, v, o, lse, dq, dk, dv, scale)
            return dq, dk, dv
    return attention_backward.attention_bwd(do, q, k, v, o, lse, seed, key_mask, documents, scale, dropout_p, window)


def attention_qkv_bwd(
    dout: torch.Tensor,
    qkv: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    seed: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    documents: torch.Tensor | None,
    heads: int,
    scale: float,
    dropout_p: float,
    window: int | None = None,
    needs_bias: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As kernels/attention_backward.py has it."""
    options = seed, key_mask, documents, heads, scale, dropout_p, window, needs_bias
    if qkv.is_cuda and not INTERPRETED:
        form = attention_qkv_form("attention_bwd", qkv, key_mask, documents, heads, dropout_p, window, dout, out)
        if form.row is not None:
            dqkv, sums = attention_backward.attention_qkv_bwd_outputs(dout, qkv, out, lse, *options)
            inside = needs_bias and _sums_inside(*form.row.sizes)
            partials = _kernels("attention_backward").attention_qkv_bwd(dout, qkv, out, lse, dqkv, heads, scale, inside)
            if needs_bias:  # by a pass over dqkv where they are not there: the kernel is worth more than that
                torch.sum(dqkv.flatten(0, 1) if partials is None else partials, dim=0, dtype=sums.dtype, out=sums)
            return dqkv, sums
    return attention_backward.attention_qkv_bwd(dout, qkv, out, lse, *options)


# The MLP


def _rows_are_aligned(*matrices: Tensor) -> bool:
    return all(t.is_contiguous() and t.shape[1] % 8 == 0 and _begins_aligned(t) for t in matrices)


_ROWS = "a matrix does not lie in rows at multiples of 16 bytes"


def _gelu(tanh: bool) -> str:
    return "tanh" if tanh else "none"


def linear_gelu_form(x: Tensor, w_in: Tensor, b_in: Tensor | None, tanh: bool) -> Form:
    """Of x (M, C), w_in (F, C)."""
    form = _lookup("linear_gelu_fwd", x, (x.shape[1], w_in.shape[0]), len(x), approximate=_gelu(tanh))
    if form.row is None:
        return form
    if b_in is None:
        return Form(None, "there is no bias")
    return form if _rows_are_aligned(x, w_in) else Form(None, _ROWS)


def linear_gelu_bwd_form(dy: Tensor, w_out: Tensor, tanh: bool, recompute: bool) -> Form:
    """Of dy (M, C), w_out (C, F); pre (M, F) is the forward's own."""
    form = _lookup("linear_gelu_bwd", dy, tuple(w_out.shape), len(dy), approximate=_gelu(tanh))
    if form.row is None:
        return form
    if recompute:
        return Form(None, "the hidden units are computed again")
    return form if _rows_are_aligned(dy, w_out) else Form(None, _ROWS)


def gelu_mlp_fwd(
    x: torch.Tensor,
    w_in: torch.Tensor,
    b_in: torch.Tensor | None,
    w_out: torch.Tensor,
    b_out: torch.Tensor | None,
    tanh: bool,
    recompute: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As kernels/mlp.py has it."""
    first = mlp.linear_gelu
    if x.is_cuda and not INTERPRETED and linear_gelu_form(x, w_in, b_in, tanh).row is not None:
        first = _kernels("linear_gelu").linear_gelu_fwd
    return mlp.gelu_mlp_fwd(x, w_in, b_in, w_out, b_out, tanh, recompute, first)


def gelu_mlp_bwd(
    dy: torch.Tensor,
    x: torch.Tensor,
    w_in: torch.Tensor,
    w_out: torch.Tensor,
    pre: torch.Tensor,
    act: torch.Tensor,
    tanh: bool,
    needs: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """As kernels/mlp.py has it."""
    first = mlp.linear_gelu_backward
    if dy.is_cuda and not INTERPRETED:
        form = linear_gelu_bwd_form(dy, w_out, tanh, act.numel() == 0 and needs[3])
        if form.row is not None:
            first = _kernels("linear_gelu_backward").linear_gelu_bwd
    return mlp.gelu_mlp_bwd(dy, x, w_in, w_out, pre, act, tanh, needs, first)


# In words


def in_words(name: str, operands: tuple, arguments: dict) -> str:
    """What the table says of a call of a public function on a GPU, as the end of a sentence; "" on other cards.

    operands: its tensors as autocast casts them. A backward's gradient is taken to lie as the result does.
    """
    if name != "gelu_mlp":
        asked = [arguments[label] for label in ("key_mask", "documents", "dropout_p", "window")]
        form_of: Callable[..., Form] = attention_form
        if name == "causal_attention_qkv":
            form_of = attention_qkv_form
            asked.insert(2, arguments["heads"])
        forward, backward = (form_of(kernel, *operands, *asked) for kernel in ("attention_fwd", "attention_bwd"))
        said = [_said("its forward", forward), _said("its backward", backward)]
        if backward.row is not None and arguments.get("qkv_bias") is not None:
            said.append("which sums the bias's gradient too" if _sums_inside(*backward.row.sizes) else _SUMMED_AFTER)
        return "; ".join(filter(None, said))
    x, w_in, b_in, w_out, _ = operands
    tanh, x = arguments["approximate"] == "tanh", x.reshape(-1, x.shape[-1])
    backward = linear_gelu_bwd_form(x, w_out, tanh, arguments["recompute"])
    forward = linear_gelu_form(x, w_in, b_in, tanh)
    said = [_said("its first matmul with the GELU", forward), _said("that of its backward", backward)]
    return "; ".join(filter(None, said))


_SUMMED_AFTER = "the bias's gradient is summed by PyTorch after it"


def _sums_inside(head_dim: int) -> bool:
    """Whether the backward's kernels that have run make the sums for a packed projection's bias."""
    has_room = _kernels("attention_backward").FORMS[head_dim].sums
    return has_room and triton.__version__ in RAN["attention_bwd_sums"]


def _said(what: str, form: Form) -> str:
    if form.row is not None:
        return f"{what} runs on Hopper's own kernel, measured at {form.row.gain} times the other's speed"
    return f"{what} does not take Hopper's own kernel: {form.why_not}" if form.why_not else ""
