"""The Triton launches that a piece of code makes, each as Triton would specialise it, and none of them made.

Triton's own binder and key say what is compiled for a launch: dtypes, which pointers and numbers divide by 16, which
numbers are 1, which arguments are None, constants and the compiler's options. So what is noted here is what a card
would compile.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend
from triton.runtime.jit import JITFunction, compute_cache_key, create_function_from_signature

from bench.gates import feign
from fastgpt.kernels.launch import COMPILED


class Launch(NamedTuple):
    kernel: JITFunction
    key: str  # Triton's: launches of one kernel and key share what is compiled
    capability: int
    signature: dict[str, str]
    constants: dict  # by place
    attributes: dict  # by place
    options: Any  # the backend's

    @property
    def name(self) -> str:
        return self.kernel.__name__.strip("_")

    @property
    def constexprs(self) -> dict[str, Any]:
        """What the kernel's author made a constant, and options that absent pointers switch: by name."""
        named = {self.kernel.params[place[0]].name: value for place, value in self.constants.items()}
        return {
            name: value
            for name, value in named.items()
            if self.kernel.params[self.kernel.arg_names.index(name)].is_constexpr
        }

    @property
    def pointers(self) -> dict[str, str]:
        """The dtypes of the tensors there are, by name: {"q_ptr": "bf16"}."""
        found = {}
        for name, kind in self.signature.items():
            if kind.startswith("*"):
                found[name] = kind.lstrip("*k")
            elif kind.startswith("tensordesc<"):  # tensordesc<bf16[1, 64, 1, 64],its layout>
                found[name] = kind.removeprefix("tensordesc<").partition("[")[0]
        return found

    @property
    def case(self) -> str:
        """In words: the tensors' dtypes in order, the constants; divisibility is left out."""
        runs: list[list] = []
        for kind in self.pointers.values():
            if runs and runs[-1][0] == kind:
                runs[-1][1] += 1
            else:
                runs.append([kind, 1])
        dtypes = " ".join(kind if count == 1 else f"{count}x{kind}" for kind, count in runs)
        absent = [name.removesuffix("_ptr") for name in self.kernel.arg_names if self._is_absent(name)]
        words = [f"{name}={_word(value)}" for name, value in self.constexprs.items() if value not in (False, None, "")]
        without = [f"no {', '.join(absent)}"] if absent else []
        told = ["window"] if self.signature.get("window", "constexpr") != "constexpr" else []
        return "; ".join([dtypes, " ".join(words), *without, *told])

    def _is_absent(self, name: str) -> bool:
        place = (self.kernel.arg_names.index(name),)
        return name.endswith("_ptr") and place in self.constants and self.constants[place] is None

    def compile(self) -> triton.compiler.CompiledKernel:
        source_type = ASTSource
        if self.kernel.is_gluon():
            source_type = import_module("triton.experimental.gluon._runtime").GluonASTSource
        source = source_type(self.kernel, self.signature, self.constants, self.attributes)
        return triton.compile(source, target=GPUTarget("cuda", self.capability, 32), options=self.options.__dict__)


def _word(value: Any) -> str:
    return {"fp32": "f32", "fp64": "f64"}.get(str(value), str(value))


class _Pointer:
    """What Triton looks at in a tensor, of one whose memory begins where the allocator would have put it: at a multiple
    of 512 bytes. A view begins further on."""

    def __init__(self, tensor: torch.Tensor):
        self.dtype, self._tensor = tensor.dtype, tensor

    def data_ptr(self) -> int:
        if feign.is_feigned(self._tensor):
            return self._tensor.storage_offset() * self._tensor.element_size()
        return self._tensor.data_ptr()


@functools.cache
def _backend(capability: int) -> Any:
    return make_backend(GPUTarget("cuda", capability, 32))


@functools.cache
def _binder(kernel: JITFunction, capability: int) -> Callable:
    return create_function_from_signature(kernel.signature, kernel.params, _backend(capability))


def _launch(kernel: JITFunction, capability: int, args: tuple, kwargs: dict) -> Launch:
    """As JITFunction.run makes it."""
    options = dict(kwargs)
    options["debug"] = options.get("debug", kernel.debug) or knobs.runtime.debug
    options["instrumentation_mode"] = knobs.compilation.instrumentation_mode
    args, options = (
        tuple(map(_seen, args)),
        {name: _seen(value) for name, value in options.items()},
    )
    bound, specialization, rest = _binder(kernel, capability)(*args, **options)
    key = compute_cache_key({}, specialization, rest)
    parsed, signature, constants, attributes = kernel._pack_args(
        _backend(capability), options, bound, specialization, rest
    )
    return Launch(kernel, key, capability, signature, constants, attributes, parsed)


def _seen(value: Any) -> Any:
    return _Pointer(value) if isinstance(value, torch.Tensor) else value


@contextmanager
def afresh() -> Iterator[None]:
    """Inside, kernels are launched as if none had been before: what was once compiled is launched again past Triton, on
    a card that is there, whatever tensors it is given."""
    with mock.patch.dict(COMPILED, clear=True):
        yield


@contextmanager
def noted(capability: int, really: bool = False) -> Iterator[list[Launch]]:
    """Inside, each launch is put into the list in place of being made, or with `really` before it is made."""
    found: list[Launch] = []
    seen: set = set()
    run = JITFunction.run

    def note(kernel, *args, grid, warmup, **kwargs):
        launch = _launch(kernel, capability, args, kwargs)
        if (kernel, launch.key) not in seen:
            seen.add((kernel, launch.key))
            found.append(launch)
        return run(kernel, *args, grid=grid, warmup=warmup, **kwargs) if really else None

    with mock.patch.object(JITFunction, "run", note), afresh():
        yield found


def launches(way: Callable[[], object], capability: int) -> list[Launch]:
    """The launches, each once, that `way` makes on a card of this compute capability (90 is 9.0)."""
    with noted(capability) as found, feign.card(capability):
        way()
    return found
