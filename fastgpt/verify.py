"""A model before and after accelerate: how far its logits, loss and gradients are from float64, by its own error.

What is compared with shares nothing with what is compared: a stranger's model is compared with itself as it was,
fastgpt's own GPT and the functions of fastgpt.ops with the naive reference (fastgpt.ops.reference).

`fastgpt verify FOLDER` or `fastgpt verify MODULE:FACTORY` on the command line, `verify_model` in Python, and the
fixtures of fastgpt.pytest_plugin in a test suite. `fastgpt verify` alone is `verify_functions`: fastgpt.ops as this
machine runs it, by the error of the naive reference in the same dtype.
"""

import copy
import importlib
import inspect
import os
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgpt import ops
from fastgpt.atomic import read_json
from fastgpt.model import GPT
from fastgpt.ops import reference
from fastgpt.swap import Report, accelerate, accelerated
from fastgpt.testing import on_reference
from fastgpt.training.distributed import device_named
from fastgpt.weights import from_pretrained
from fastgpt.weights.files import CONFIG

TOLERANCE = 4.0  # as assert_accurate's for float32: two roundings of the same formula differ by less


class Sizes(NamedTuple):
    """Of the functions' operands."""

    rows: int
    heads: int
    tokens: int
    channels: int  # of a head
    hidden: int
    vocabulary: int


SIZES = Sizes(rows=2, heads=2, tokens=70, channels=64, hidden=512, vocabulary=1000)  # heads are GPT-2's


class Difference(NamedTuple):
    """The largest distance from float64 before and after, and after's in units of what before excuses."""

    what: str
    before: float
    after: float
    ratio: float


class Verification(NamedTuple):
    report: Report | None  # of accelerate; None for fastgpt's own GPT
    differences: tuple[Difference, ...]
    tolerance: float

    @property
    def passed(self) -> bool:
        return all(difference.ratio <= self.tolerance for difference in self.differences)

    @property
    def verdict(self) -> str:
        return "passed" if self.passed else "FAILED"

    def __str__(self) -> str:
        lines = [] if self.report is None else [str(self.report), ""]
        rows = [f"{each.what:42}{_numbers(each, self.tolerance)}" for each in self.differences]
        return "\n".join([*lines, HEADING, *rows, self.verdict])


WITHOUT_FLOAT64 = ("mps",)  # devices whose comparison with float64 is made on the CPU
HEADING = f"{'largest distance from float64':42} {'before':>10} {'after':>10} {'ratio':>7}"


def _numbers(difference: Difference, tolerance: float) -> str:
    """A row of the table behind its name."""
    _, before, after, ratio = difference
    return f" {before:10.2e} {after:10.2e} {ratio:7.2f}" + ("" if ratio <= tolerance else f"  more than {tolerance:g}")


def _unheard(text: str) -> None:
    pass


def verify_model(
    model: nn.Module,
    ids: Tensor,
    *,
    tolerance: float = TOLERANCE,
    write: Callable[[str], object] = _unheard,
    **options,
) -> Verification:
    """Compare `model` in eval mode before and after accelerate(model, **options) on token ids (B, T), T at least 2.

    Each token's target is the next one. The ratio is the distance after by the distance before, or by a few units in
    the last place of the largest value where before happens to be closer. The model is left as it was, but for the
    gradients, which are cleared. write: gets what is being computed, as words of one line. ValueError for ids or a
    model that can't be asked.
    """
    if ids.dim() != 2 or ids.shape[1] < 2 or ids.is_floating_point():
        raise ValueError(f"verify_model: ids are {ids.dtype} of shape {tuple(ids.shape)}, not integers (B, T), T > 1")
    if not 0 < tolerance < float("inf"):
        raise ValueError(f"verify_model: tolerance is {tolerance}, not a positive number")
    modes = {module: module.training for module in model.modules()}
    model.eval()
    name, size = type(model).__name__, f"{ids.shape[0]} x {ids.shape[1]} tokens"
    none = torch.empty(1, dtype=torch.float32, device="cpu")
    weight = next((parameter for parameter in model.parameters() if parameter.is_floating_point()), none)
    try:
        write(f"{name} on {size}: in float64 … ")
        twin = copy.deepcopy(model)
        twin = (twin.cpu() if weight.device.type in WITHOUT_FLOAT64 else twin).double()
        with accelerated(twin, attention=False, layer_norm=False, mlp=False) as plain:
            right = _ask(on_reference(plain) if isinstance(plain, GPT) else plain, _computable(ids))
        report = None
        served = f"{_place(weight.device)}, {ops.backend_in_words(options.get('backend', 'auto'), weight)}"
        if not ops.kernels_run_on(weight.device):  # where accelerate would leave each forward to its class
            options.setdefault("backend", "torch")
        write("before … ")
        if isinstance(model, GPT):
            before = _ask(on_reference(model), ids)
            write(f"after, {served}\n")
            after = _ask(model, ids)
        else:
            with accelerated(model, attention=False, layer_norm=False, mlp=False):
                before = _ask(model, ids)
                write(f"after, {served}\n")
                report = accelerate(model, **options)
                after = _ask(model, ids)
    finally:
        for module, training in modes.items():  # a part may be in another mode than the whole, as frozen ones are
            module.training = training
        model.zero_grad()
    return Verification(report, _differences(right, before, after), tolerance)


def verify_functions(
    device: str = "auto", *, tolerance: float = TOLERANCE, write: Callable[[str], object] = _unheard
) -> Verification:
    """Every function of fastgpt.ops, values and gradients, in the dtypes of the device: before is the naive reference's
    error in that dtype, after fastgpt's, each the largest of that call; dropout and masks included.

    device: "auto" is cuda where there is one. On a cpu only float32 is asked of the fallback, all three of the kernels
    in Triton's interpreter (TRITON_INTERPRET=1), which is sanitized for it. write: gets the table as it grows, a row's
    name before the row is computed: a kernel's first call compiles it, which may take a while.
    """
    place = device_named(device)
    if ops.interpreted():
        from fastgpt.sanitizer import sanitized  # needs Triton

        with sanitized():
            return _verify_functions(place, True, tolerance, write)
    return _verify_functions(place, place.type == "cuda", tolerance, write)


def _verify_functions(
    place: torch.device, half: bool, tolerance: float, write: Callable[[str], object]
) -> Verification:
    halves = (torch.bfloat16, torch.float16) if half else ()
    found = []
    on_kernels = not ops.interpreted() and place.type == "cuda" and ops.no_triton() is None
    note = "; each is compiled at its first call" if on_kernels else ""
    backend = ops.backend_in_words("auto", torch.empty(1, dtype=torch.float32, device=place))
    write(f"{_place(place)}, {backend}{note}\n{HEADING}\n")
    for dtype in (torch.float32, *halves):
        for label, (name, floats, options) in _calls(place).items():
            what = f"{label}, {str(dtype).removeprefix('torch.')}"
            write(f"{what:42}")
            rounded = [tensor.to(dtype) for tensor in floats]
            exact = {n: _computable(v) if isinstance(v, Tensor) else v for n, v in options.items()}
            right = _results(getattr(reference, name), [_computable(tensor).double() for tensor in rounded], exact)
            theirs = _results(getattr(reference, name), rounded, options)
            ours = _results(getattr(ops, name), rounded, options)
            worst = max(
                (_difference(label, *three, 0.0) for three in zip(right, theirs, ours, strict=True)),
                key=lambda difference: difference.ratio,
            )
            found.append(worst._replace(what=what))
            write(f"{_numbers(found[-1], tolerance)}\n")
    return Verification(None, tuple(found), tolerance)


def _computable(tensor: Tensor) -> Tensor:
    """The tensor where float64 can be had."""
    return tensor.cpu() if tensor.device.type in WITHOUT_FLOAT64 else tensor


def _place(device: torch.device) -> str:
    return "on the CPU" if device.type == "cpu" else f"on {device}"


def _calls(device: torch.device) -> dict[str, tuple[str, list[Tensor], dict[str, Any]]]:
    """By label: a function's name, its floating-point operands, and what else it takes."""
    generator = torch.Generator().manual_seed(0)

    def floats(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu") * scale).to(device)

    def numbers(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=generator, dtype=torch.int64, device="cpu").to(device)

    (B, H, T, D, F, V), C = SIZES, SIZES.heads * SIZES.channels
    x, heads = floats(B, T, C), [floats(B, H, T, D) for _ in range(3)]
    dropped: dict[str, Any] = dict(dropout_p=0.1, seed=1)
    whole: Any = dict(dtype=torch.int64, device=device)
    padding = torch.arange(T, **whole) >= torch.tensor([[0], [T // 8]], **whole)
    lengths = torch.tensor([T, T // 2], **whole)
    mlp = [x, floats(F, C, scale=C**-0.5), floats(F), floats(C, F, scale=F**-0.5), floats(C)]
    ids = dict(ids=numbers(V, B, T))
    targets = dict(targets=numbers(V, B, T))
    return {
        "layer_norm": ("layer_norm", [x, floats(C), floats(C)], {}),
        "add_layer_norm with dropout": ("add_layer_norm", [x, floats(B, T, C), floats(C), floats(C)], dropped),
        "causal_attention": ("causal_attention", heads, {}),
        "causal_attention, padded, dropout": ("causal_attention", heads, {"key_mask": padding, **dropped}),
        "causal_attention_qkv": ("causal_attention_qkv", [floats(B, T, 3 * C)], {"heads": H}),
        "decode_attention": ("decode_attention", [floats(B, H, 1, D), *heads[1:]], {"lengths": lengths}),
        "gelu_mlp": ("gelu_mlp", mlp, {}),
        "linear_cross_entropy": ("linear_cross_entropy", [x, floats(V, C, scale=C**-0.5)], targets),
        "embedding": ("embedding", [floats(V, C), floats(T, C)], ids),
    }


@torch.enable_grad()  # whatever the caller has set
def _results(function: Any, floats: list[Tensor], options: dict[str, Any]) -> list[Tensor]:
    """What comes out, and the gradients of what went in; decoding has none."""
    names = [name for name in inspect.signature(function).parameters if name not in options]
    trained = function.__name__ != "decode_attention"
    leaves = [tensor.detach().requires_grad_(trained) for tensor in floats]
    outs = function(**dict(zip(names, leaves, strict=False)), **options)
    outs = outs if isinstance(outs, tuple) else (outs,)
    if not trained:
        return [out.detach() for out in outs]
    evenly: Any = dict(dtype=torch.float32, device=outs[0].device)
    upstream = [torch.linspace(-1, 2, out.numel(), **evenly).view(out.shape).to(out.dtype) for out in outs]
    return [*(out.detach() for out in outs), *torch.autograd.grad(outs, leaves, upstream)]


@torch.enable_grad()  # whatever the caller has set
def _ask(model: Any, ids: Tensor) -> dict[str, Tensor]:
    """Logits (B, T, V), the loss, and every gradient by its parameter's name."""
    model.zero_grad()
    targets = ids[:, 1:]
    more = (targets,) if "targets" in inspect.signature(type(model).forward).parameters else ()
    output = model(ids[:, :-1]) if isinstance(model, GPT) else model(ids[:, :-1], *more)
    logits = getattr(output, "logits", output[0] if isinstance(output, tuple) else output)
    if not isinstance(logits, Tensor) or logits.dim() != 3 or logits.shape[:2] != targets.shape:
        raise ValueError(f"{type(model).__name__} gives no logits (B, T, V) for ids (B, T)")
    dtype = torch.promote_types(logits.dtype, torch.float32)
    if isinstance(model, GPT):  # the head that training runs on
        loss = model(ids[:, :-1], targets)
    else:
        loss = F.cross_entropy(logits.to(dtype).flatten(0, 1), targets.flatten())
    loss.backward()
    grads = {n: p.grad.detach().clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), "loss": loss.detach(), **grads}


def _differences(right: dict, before: dict, after: dict) -> tuple[Difference, ...]:
    logits, loss = (_difference(name, right[name], before[name], after[name], 0.0) for name in ("logits", "loss"))
    gradients = [name for name in right if name not in ("logits", "loss")]
    largest = max(right[name].abs().max().item() for name in gradients)
    certain = logits.before / max(right["logits"].abs().max().item(), torch.finfo(torch.float64).tiny)
    found = []
    for name in gradients:  # one that is zero but for rounding, as a key's bias, has others' size; one that before
        # happens to hit is no better known than the logits that it is made from
        excused = certain * right[name].abs().max().item()
        found.append(_difference(name, right[name], before[name], after[name], largest, excused))
    worst = max(found, key=lambda difference: difference.ratio)
    return logits, loss, worst._replace(what=f"gradient of {worst.what}")


def _difference(
    what: str, right: Tensor, before: Tensor, after: Tensor, largest: float, excused: float = 0.0
) -> Difference:
    """largest: the size of what else was computed on the way, a part of whose rounding is excused too. excused: a
    distance that is."""
    unit = torch.finfo(before.dtype).eps
    excuse = 2 * unit * right.abs().max().item() + unit * largest / 4
    theirs, ours = ((_computable(side).double() - right).abs().max().item() for side in (before, after))
    ratio = ours / max(theirs, excuse, excused, torch.finfo(torch.float64).tiny)
    return Difference(what, theirs, ours, ratio if ratio == ratio else float("inf"))


def load(source: str) -> nn.Module:
    """The model of a folder, or the one that MODULE:FACTORY makes, looked for in the working folder too.

    A folder of Hugging Face's is read by transformers, where that is installed, and any other as fastgpt's GPT.
    """
    if Path(source).exists():
        folder = Path(source)
        ours = not (folder / CONFIG).is_file() or read_json(folder / CONFIG).get("model_type") != "gpt2"
        if ours or find_spec("transformers") is None:
            return from_pretrained(source)
        from transformers import GPT2LMHeadModel

        return GPT2LMHeadModel.from_pretrained(source)
    module, separator, factory = source.partition(":")
    if not separator or not module or not factory:
        raise ValueError(f"{source!r} is no folder and not of the form MODULE:FACTORY")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        there = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):  # one that theirs imports
            raise
        raise ValueError(f"{source!r} can't be had: {error}") from error
    if not hasattr(there, factory):
        raise ValueError(f"{source!r} can't be had: module {module!r} has no attribute {factory!r}")
    make = getattr(there, factory)
    model = make()
    if not isinstance(model, nn.Module):
        raise ValueError(f"{source!r} makes a {type(model).__name__}, not an nn.Module")
    return model


def limits(model: nn.Module) -> tuple[int, int]:
    """The vocabulary and the context: rows of the first two embeddings."""
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    if len(tables) < 2:
        raise ValueError(f"{type(model).__name__} has no embeddings of tokens and of positions")
    return tables[0].num_embeddings, tables[1].num_embeddings


def random_ids(model: nn.Module, rows: int = 2, tokens: int = 33, seed: int = 0) -> Tensor:
    """Token ids (rows, tokens), or as many as the context holds with one to predict, on the model's device."""
    vocabulary, context = limits(model)
    if not (0 < rows < 2**31 and 1 < tokens < 2**31):
        raise ValueError(f"rows is {rows} and tokens {tokens}, not at least 1 and 2, and below 2**31")
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, min(tokens, context + 1))
    ids = torch.randint(0, vocabulary, shape, generator=generator, dtype=torch.int64, device="cpu")
    return ids.to(next(model.parameters()).device)
