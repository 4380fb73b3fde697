"""Triton's CPU interpreter, made right and made strict: `with sanitized(): …` around whatever launches kernels.

TRITON_INTERPRET=1 runs kernels in numpy, one program after another. As it comes it computes some things wrongly and
lets much pass that a GPU would not. Inside `sanitized` these are made right:

  bfloat16  Casts round to nearest even, and tl.dot multiplies values and adds in float32. (Stock: casts truncate, and
            all else is arithmetic on the bits, as if they were integers.)
  tf32      tl.dot of float32 cuts its operands to 10 bits of mantissa where input_precision is "tf32", the default on
            GPUs too. (Stock: all precisions are IEEE, and "tf32x3" is left so, being close. Hardware may round.)
  range     takes tensors as bounds on Triton 3.6 with numpy 2.4 too. (Stock: TypeError.)
  tl        is patched once a launch and put back after it. (Stock: at every call of a device function, and for good.)

and these raise SanitizerError, at the launch that does them:

  bounds    A lane that is not masked off and lies outside the tensor that its pointer came from: outside the *view*
            that was passed, its shape and strides, even where the memory is another argument's. Only a view that
            overlaps itself (as_strided) is held to no more than its extent.
  races     Two programs of a launch that touch one address, unless both only read or both are atomic. What programs
            hand each other under an atomic flag is reported too. Addresses are those where elements begin.
  bfloat16  Arithmetic and comparisons in it: cast to float32 first, as an accurate kernel does anyway.
  int32     Overflow of signed +, - and *. (Philox may wrap: it computes in uint32, and asks Triton not to check.)
  grids     An empty one, which CUDA refuses: the launcher must return before. One past CUDA's limits.

`sanitized(order=seed)` runs the programs in a shuffled order, so that results which depend on it differ. With
`in_turns=True` a little of each runs by turns, drawn anew at every atomic operation, so that a launch whose programs
wait for each other comes to an end; one in which all wait for ever raises.

A pointer that a kernel makes of a number is held to those tensors that `sanitized(behind=tensors)` names.

What a kernel forgets to write needs nothing here: under torch.use_deterministic_algorithms(True), which the tests turn
on, torch.empty and its kin hand out NaN. Everything above holds on Triton 3.6.0, 3.7.1 and 3.9.0, where it was tried
(turns and `behind` on the first two alone); where a newer one lacks a method that is overridden here, `sanitized`
raises. Like Triton's own, not for threads.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import triton
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

from fastgpt.sanitizer import numbers
from fastgpt.sanitizer.launch import Launch, SanitizerError, running
from fastgpt.sanitizer.turns import Turns

_implicit_cvt, _patch_lang = interpreter._implicit_cvt, interpreter._patch_lang


class _Block(NamedTuple):
    order: int | None
    in_turns: bool
    behind: Sequence[Any]


_blocks: list[_Block] = []  # of `sanitized`, that are open


@contextlib.contextmanager
def sanitized(*, order: int | None = None, in_turns: bool = False, behind: Sequence[Any] = ()) -> Iterator[None]:
    """Launches inside run in the sanitizing interpreter and raise SanitizerError for what the module's text lists.

    order: a seed to shuffle each launch's programs by, and what they do in turns. behind: tensors whose addresses
    kernels find in memory. Blocks may be nested: the innermost one's settings count. RuntimeError where kernels are
    compiled (Triton reads TRITON_INTERPRET when they are defined) or Triton is too different.
    """
    if not triton.knobs.runtime.interpret:
        raise RuntimeError("sanitized: kernels are compiled here, not interpreted; set TRITON_INTERPRET=1 before all")
    with contextlib.ExitStack() as undo:
        _install(undo)
        _blocks.append(_Block(order, in_turns, behind))
        undo.callback(_blocks.pop)
        yield


def _install(undo: contextlib.ExitStack) -> None:
    lost = set(vars(_Builder)) - set(dir(interpreter.InterpreterBuilder)) - {"get_bf16"}
    if lost:  # what Triton calls by another name would go unchecked
        raise RuntimeError(f"sanitized: Triton {triton.__version__}'s interpreter has no {', '.join(sorted(lost))}")
    ours: list[tuple[Any, str, Any]] = [
        (interpreter.interpreter_builder, "__class__", _Builder),
        (interpreter, "GridExecutor", _Executor),
        (interpreter, "_implicit_cvt", _convert_argument),
        (interpreter, "_patch_lang", _patch_lang_once),
        (interpreter.ReduceScanOpInterface, "check_tensor", numbers.check_reduced),
        (TritonSemantic, "binary_op_sanitize_overflow_impl", numbers.refuse_int32_overflow),
    ]
    for owner, name, replacement in ours:
        undo.callback(setattr, owner, name, getattr(owner, name))
        setattr(owner, name, replacement)


# What runs a launch


class _Executor(interpreter.GridExecutor):
    def __call__(self, *args, **kwargs):
        named = {**dict(zip(self.arg_names, args, strict=False)), **kwargs}
        block, fn = _blocks[-1], self.fn  # type: ignore[has-type]
        launch = Launch(fn.__name__, named, block.order, block.behind)
        running.append(launch)
        finding = None
        if block.in_turns:
            self.fn = _Together(fn, launch)
        try:
            super().__call__(*args, **kwargs)
        except Exception as error:
            finding = _finding_behind(error)
            if finding is None:
                raise
        finally:
            running.pop()
            self.fn = fn
        if finding is not None:
            raise finding  # without the InterpreterErrors that Triton wrapped around it
        launch.refuse_races()


class _Together:
    """In place of a kernel: called for each program, it waits for the last and then runs all by turns."""

    def __init__(self, fn: Callable, launch: Launch):
        self._fn, self._launch, self._called = fn, launch, 0
        self.__globals__, self.__signature__ = fn.__globals__, inspect.signature(fn)
        self.__name__ = fn.__name__

    def __call__(self, **args) -> None:
        launch = self._launch
        self._called += 1
        if self._called == len(launch.programs):
            launch.turns = Turns(launch.order, len(launch.programs), self._enter, launch.fail)
            launch.turns.run(lambda: self._fn(**args))

    def _enter(self, program: int) -> None:
        self._launch.program = program
        interpreter.InterpreterBuilder.set_grid_idx(interpreter.interpreter_builder, *self._launch.programs[program])


def _finding_behind(error: BaseException | None) -> SanitizerError | None:
    while error is not None and not isinstance(error, SanitizerError):
        error = error.__cause__
    return error


def _convert_argument(argument: Any) -> Any:
    """Triton's conversion of a kernel's argument; a pointer gets the tag of its tensor."""
    converted = _implicit_cvt(argument)
    if hasattr(argument, "data_ptr"):
        converted.handle.data |= running[-1].tag(argument)
    return converted


def _patch_lang_once(fn: Callable) -> Any:
    """Stock, this runs for the kernel and for every call of a device function, and only the kernel's is undone."""
    launch = running[-1]
    if id(fn.__globals__) not in launch.patched:
        launch.patched.add(id(fn.__globals__))
        scope = _patch_lang(fn)
        # numpy 2.4 makes no int of an array of shape (1,), which Triton 3.6 asks of a tensor in range()
        scope.set_attr(tl.tensor, "__index__", lambda tensor: tensor.handle.data.item())
        if launch.patches is None:
            launch.patches = scope
        else:
            launch.patches._changes += scope._changes
    return launch.patches


class _Builder(interpreter.InterpreterBuilder):
    """Each method gives way to Triton's own, whose last arguments differ between versions."""

    def set_grid_dim(self, *grid):
        running[-1].begin(grid)
        super().set_grid_dim(*grid)

    def set_grid_idx(self, *index):
        super().set_grid_idx(*running[-1].next_program())

    def create_masked_load(self, ptrs, mask, *args, **kwargs):
        return super().create_masked_load(running[-1].access("load", ptrs, mask), mask, *args, **kwargs)

    def create_masked_store(self, ptrs, value, mask, *args, **kwargs):
        return super().create_masked_store(running[-1].access("store", ptrs, mask), value, mask, *args, **kwargs)

    def create_int_to_ptr(self, value, dst_type):
        made = super().create_int_to_ptr(value, dst_type)
        return interpreter.TensorHandle(running[-1].tagged(made.data), made.dtype)

    def create_atomic_rmw(self, op, ptr, value, mask, *args, **kwargs):
        if (turns := running[-1].turns) is not None:
            turns.over(writes=op == interpreter._ir.ATOMIC_OP.XCHG or bool(value.data.any()))
        return super().create_atomic_rmw(op, running[-1].access("atomic", ptr, mask), value, mask, *args, **kwargs)

    def create_atomic_cas(self, ptr, *args, **kwargs):
        if (turns := running[-1].turns) is not None:
            turns.over(writes=False)
        return super().create_atomic_cas(running[-1].access("atomic", ptr), *args, **kwargs)

    def cast_impl(self, src, dst_type):
        return numbers.cast(super().cast_impl, src, dst_type)

    def create_fp_to_fp(self, src, dst_type, rounding):
        if {src.dtype.scalar, dst_type.scalar} == {tl.bfloat16, tl.float16} and rounding == numbers.ROUNDING.RTNE:
            return self.cast_impl(src, dst_type)  # Triton 3.9 comes here, where to float16 is wrong
        return numbers.cast(super().create_fp_to_fp, src, dst_type, rounding)

    def get_bf16(self, value):  # a constant; only Triton 3.9 has this itself
        return self.create_fp_trunc(self.get_fp32(value), tl.bfloat16)

    def create_dot(self, a, b, accumulator, precision, *args, **kwargs):
        a, b = numbers.as_multiplied(a, precision), numbers.as_multiplied(b, precision)
        return super().create_dot(a, b, accumulator, precision, *args, **kwargs)

    def binary_op(self, lhs, rhs, op):
        numbers.refuse_bfloat16(lhs, rhs)
        return super().binary_op(lhs, rhs, op)

    def unary_op(self, arg, op):  # Triton 3.9's negation; tl checks the dtype for all others
        numbers.refuse_bfloat16(arg)
        return super().unary_op(arg, op)

    def create_fma(self, x, y, z):
        numbers.refuse_bfloat16(x, y, z)
        return super().create_fma(x, y, z)
