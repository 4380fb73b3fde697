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
  races     Two programs of a launch that touch one address, unless both only read or both are atomic. Programs that
            wait for each other through atomics are reported too. Addresses are those where elements begin.
  bfloat16  Arithmetic and comparisons in it: cast to float32 first, as an accurate kernel does anyway.
  int32     Overflow of signed +, - and *. (Philox may wrap: it computes in uint32, and asks Triton not to check.)
  grids     An empty one, which CUDA refuses: the launcher must return before. One past CUDA's limits.

`sanitized(order=seed)` runs the programs in a shuffled order, so that results which depend on it differ.

What a kernel forgets to write needs nothing here: under torch.use_deterministic_algorithms(True), which the tests turn
on, torch.empty and its kin hand out NaN. Everything above holds on Triton 3.6.0, 3.7.1 and 3.9.0, where it was tried;
where a newer one lacks a method that is overridden here, `sanitized` raises. Like Triton's own, not for threads.
"""

import contextlib
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import triton
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

_implicit_cvt, _patch_lang = interpreter._implicit_cvt, interpreter._patch_lang
_check_tensor = interpreter.ReduceScanOpInterface.check_tensor
_ROUNDING, _PRECISION = interpreter._ir.ROUNDING_MODE, interpreter._ir.INPUT_PRECISION

_TAG_SHIFT = 48  # user addresses have 47 bits; the number of the argument that a pointer came from rides above them
_ADDRESS_BITS = np.uint64((1 << _TAG_SHIFT) - 1)
_GRID_LIMITS = (2**31 - 1, 65535, 65535)
_RACES = (("store", "store"), ("load", "store"), ("atomic", "store"), ("atomic", "load"))
_FOLD_LANES = 1 << 22  # so many accesses are noted before they are folded: some 100 MB

_orders: list[int | None] = []  # of the `sanitized` blocks that are open
_launches: list["_Launch"] = []  # that are running; the builder is called for the last

_Touched = tuple[np.ndarray, np.ndarray, np.ndarray]  # sorted addresses, the lowest and the highest program at each


class SanitizerError(AssertionError):
    """What a kernel did that is wrong on a GPU; the message begins with the kernel's name."""


@contextlib.contextmanager
def sanitized(*, order: int | None = None) -> Iterator[None]:
    """Launches inside run in the sanitizing interpreter and raise SanitizerError for what the module's text lists.

    order: a seed to shuffle each launch's programs by. Blocks may be nested: the innermost order counts. RuntimeError
    where kernels are compiled (Triton reads TRITON_INTERPRET when they are defined) or Triton is too different.
    """
    if not triton.knobs.runtime.interpret:
        raise RuntimeError("sanitized: kernels are compiled here, not interpreted; set TRITON_INTERPRET=1 before all")
    with contextlib.ExitStack() as undo:
        _install(undo)
        _orders.append(order)
        undo.callback(_orders.pop)
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
        (interpreter.ReduceScanOpInterface, "check_tensor", _check_reduced),
        (TritonSemantic, "binary_op_sanitize_overflow_impl", _refuse_int32_overflow),
    ]
    for owner, name, replacement in ours:
        undo.callback(setattr, owner, name, getattr(owner, name))
        setattr(owner, name, replacement)


# What runs a launch


class _Executor(interpreter.GridExecutor):
    def __call__(self, *args, **kwargs):
        named = {**dict(zip(self.arg_names, args, strict=False)), **kwargs}
        launch = _Launch(self.fn.__name__, named, _orders[-1])
        _launches.append(launch)
        finding = None
        try:
            super().__call__(*args, **kwargs)
        except Exception as error:
            finding = _finding_behind(error)
            if finding is None:
                raise
        finally:
            _launches.pop()
        if finding is not None:
            raise finding  # without the InterpreterErrors that Triton wrapped around it
        launch.refuse_races()


def _finding_behind(error: BaseException | None) -> SanitizerError | None:
    while error is not None and not isinstance(error, SanitizerError):
        error = error.__cause__
    return error


def _convert_argument(argument: Any) -> Any:
    """Triton's conversion of a kernel's argument; a pointer gets the tag of its tensor."""
    converted = _implicit_cvt(argument)
    if hasattr(argument, "data_ptr"):
        converted.handle.data |= _launches[-1].tag(argument)
    return converted


def _patch_lang_once(fn: Callable) -> Any:
    """Stock, this runs for the kernel and for every call of a device function, and only the kernel's is undone."""
    launch = _launches[-1]
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
        _launches[-1].begin(grid)
        super().set_grid_dim(*grid)

    def set_grid_idx(self, *index):
        super().set_grid_idx(*_launches[-1].next_program())

    def create_masked_load(self, ptrs, mask, *args, **kwargs):
        return super().create_masked_load(_launches[-1].access("load", ptrs, mask), mask, *args, **kwargs)

    def create_masked_store(self, ptrs, value, mask, *args, **kwargs):
        return super().create_masked_store(_launches[-1].access("store", ptrs, mask), value, mask, *args, **kwargs)

    def create_atomic_rmw(self, op, ptr, value, mask, *args, **kwargs):
        return super().create_atomic_rmw(op, _launches[-1].access("atomic", ptr, mask), value, mask, *args, **kwargs)

    def create_atomic_cas(self, ptr, *args, **kwargs):
        return super().create_atomic_cas(_launches[-1].access("atomic", ptr), *args, **kwargs)

    def cast_impl(self, src, dst_type):
        return _cast(super().cast_impl, src, dst_type)

    def create_fp_to_fp(self, src, dst_type, rounding):
        if {src.dtype.scalar, dst_type.scalar} == {tl.bfloat16, tl.float16} and rounding == _ROUNDING.RTNE:
            return self.cast_impl(src, dst_type)  # Triton 3.9 comes here, where to float16 is wrong
        return _cast(super().create_fp_to_fp, src, dst_type, rounding)

    def get_bf16(self, value):  # a constant; only Triton 3.9 has this itself
        return self.create_fp_trunc(self.get_fp32(value), tl.bfloat16)

    def create_dot(self, a, b, accumulator, precision, *args, **kwargs):
        a, b = _as_multiplied(a, precision), _as_multiplied(b, precision)
        return super().create_dot(a, b, accumulator, precision, *args, **kwargs)

    def binary_op(self, lhs, rhs, op):
        _refuse_bfloat16(lhs, rhs)
        return super().binary_op(lhs, rhs, op)

    def unary_op(self, arg, op):  # Triton 3.9's negation; tl checks the dtype for all others
        _refuse_bfloat16(arg)
        return super().unary_op(arg, op)

    def create_fma(self, x, y, z):
        _refuse_bfloat16(x, y, z)
        return super().create_fma(x, y, z)


# Arithmetic


def _cast(cast: Callable, src: Any, dst_type: Any, *rounding: Any) -> Any:
    """Triton's `cast`, by way of float32 where bfloat16 is one of the two."""
    if src.dtype.scalar == tl.bfloat16:
        src = _widened(src)
        if dst_type.scalar == tl.float32:
            return src
    if dst_type.scalar != tl.bfloat16:
        return cast(src, dst_type, *rounding)
    single = src if src.dtype.scalar == tl.float32 else cast(src, tl.float32, *rounding)
    toward_zero = _ROUNDING.RTZ in rounding
    return interpreter.TensorHandle(_round_to_bfloat16(single.data, toward_zero), tl.bfloat16)


def _round_to_bfloat16(values: np.ndarray, toward_zero: bool) -> np.ndarray:
    """The bits of float32 values as bfloat16, ties to even; NaN is 0x7FFF, as PTX's cvt makes it."""
    values = np.asarray(values, np.float32)
    bits = values.view(np.uint32)
    up = np.uint32(0) if toward_zero else np.uint32(0x7FFF) + (bits >> 16 & 1)
    return np.where(np.isnan(values), 0x7FFF, bits + up >> 16).astype(np.uint16)


def _widened(bfloat16: Any) -> Any:
    return interpreter.TensorHandle((bfloat16.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _as_multiplied(operand: Any, precision: Any) -> Any:
    """A dot's operand as the tensor cores take it."""
    if operand.dtype.scalar == tl.bfloat16:
        return _widened(operand)
    if operand.dtype.scalar == tl.float32 and precision == _PRECISION.TF32:
        bits = operand.data.view(np.uint32) & np.uint32(0xFFFFE000)  # sign, exponent and 10 bits of mantissa
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)
    return operand


def _refuse_bfloat16(*operands: Any) -> None:
    if any(operand.dtype.scalar == tl.bfloat16 for operand in operands):
        _launches[-1].fail("arithmetic in bfloat16; cast to float32 first")


def _check_reduced(reduction: Any, tensors: tuple) -> None:
    _refuse_bfloat16(*(tensor.handle for tensor in tensors))
    _check_tensor(reduction, tensors)


def _refuse_int32_overflow(_: Any, lhs: Any, rhs: Any, operation: Callable) -> None:
    """In place of Triton's own check, on which the interpreter spends six operations and ignores the result."""
    if lhs.dtype.scalar == tl.int32:
        compute = {"add": np.add, "sub": np.subtract, "mul": np.multiply}[operation.__name__]
        exact = compute(lhs.handle.data, rhs.handle.data, dtype=np.int64)
        wrapped = exact[exact != exact.astype(np.int32)]
        if wrapped.size:
            _launches[-1].fail(f"int32 overflow in {operation.__name__}: {wrapped[0]}, in {wrapped.size} lanes")


# What is known of a launch


class _Launch:
    """A running launch: where its arguments lie, which program runs, who touched what."""

    def __init__(self, kernel: str, arguments: dict[str, Any], order: int | None):
        self.kernel, self.arguments, self.order = kernel, arguments, order
        self.views: list[_View] = []
        self.footprints = {kind: _Footprint() for kind in ("load", "store", "atomic")}
        self.patched: set[int] = set()  # modules in which tl is the interpreter's
        self.patches: Any = None
        self.program = -1  # its place in `programs`

    def fail(self, finding: str) -> None:
        where = "" if self.program < 0 else f" (program {self.programs[self.program]})"
        raise SanitizerError(f"{self.kernel}: {finding}{where}")

    def begin(self, grid: tuple[int, ...]) -> None:
        if min(grid) <= 0:
            self.fail(f"the grid {grid} is empty, which CUDA refuses; the launcher must return before")
        if any(size > limit for size, limit in zip(grid, _GRID_LIMITS, strict=True)):
            self.fail(f"the grid {grid} is past CUDA's limits of {_GRID_LIMITS}")
        self.programs = list(np.ndindex(*grid))
        if self.order is not None:
            random.Random(self.order).shuffle(self.programs)

    def next_program(self) -> tuple[int, ...]:
        self.program += 1
        return self.programs[self.program]

    def tag(self, tensor: Any) -> np.uint64:
        """Numbers begin with 1: 0 is left to pointers that no argument gave."""
        self.views.append(_View(tensor))
        return np.uint64(len(self.views) << _TAG_SHIFT)

    def access(self, kind: str, pointers: Any, mask: Any = None) -> Any:
        """Note and check an access; the pointers come back without tags, fit to be followed."""
        active = True if mask is None else np.asarray(mask.data, bool)  # of integers, where a scalar took part in it
        lanes = pointers.data[np.broadcast_to(active, pointers.data.shape)]
        if lanes.size:
            addresses = (lanes & _ADDRESS_BITS).astype(np.int64)
            width = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
            self.refuse_out_of_bounds(kind, lanes >> np.uint64(_TAG_SHIFT), addresses, width)
            self.footprints[kind].add(addresses, self.program)
        return interpreter.TensorHandle(pointers.data & _ADDRESS_BITS, pointers.dtype)

    def refuse_out_of_bounds(self, kind: str, tags: np.ndarray, addresses: np.ndarray, width: int) -> None:
        for tag in tags[:1] if (tags == tags[0]).all() else np.unique(tags):
            mine = addresses[tags == tag]
            view = self.views[tag - 1] if 1 <= tag <= len(self.views) else None
            outside = mine.size if view is None else mine.size - np.count_nonzero(view.holds(mine, width))
            if outside:
                self.fail(f"{kind} out of bounds of {self.describe(view)}: {outside} of {mine.size} lanes")

    def refuse_races(self) -> None:
        self.program = -1
        touched = {kind: footprint.folded() for kind, footprint in self.footprints.items()}
        for one, other in _RACES:
            (these, first, last), (those, others_first, others_last) = touched[one], touched[other]
            shared, i, j = np.intersect1d(these, those, assume_unique=True, return_indices=True)
            first, last = np.minimum(first[i], others_first[j]), np.maximum(last[i], others_last[j])
            racing = np.flatnonzero(first != last)
            if racing.size:
                at = racing[:1]
                view = next(view for view in self.views if view.holds(shared[at], 1))
                programs = f"programs {self.programs[first[at].item()]} and {self.programs[last[at].item()]}"
                self.fail(f"{one}/{other} race on {racing.size} elements of {self.describe(view)}: {programs}")

    def describe(self, view: "_View | None") -> str:
        if view is None:
            return "all arguments"
        tensors = {name: value for name, value in self.arguments.items() if hasattr(value, "data_ptr")}
        names = [name for name, tensor in tensors.items() if vars(_View(tensor)) == vars(view)]
        return f"{' or '.join(names) or 'a tensor'} {view.shape} strided {view.strides}"


class _View:
    """Where a tensor's elements lie in memory."""

    def __init__(self, tensor: Any):
        self.base, self.shape, self.strides = tensor.data_ptr(), tuple(tensor.shape), tuple(tensor.stride())
        self.dims = _dims_in_bytes(self.shape, self.strides, tensor.element_size())

    def holds(self, addresses: np.ndarray, width: int) -> np.ndarray:
        """Whether `width` bytes from each address on are the tensor's."""
        rest = addresses - self.base
        inside = rest >= 0
        for size, stride in self.dims[:-1]:
            index, rest = np.divmod(rest, stride)
            inside &= index < size
        return inside & (rest + width <= self.dims[-1][0])


def _dims_in_bytes(shape: tuple, strides: tuple, width: int) -> list[tuple[int, int]]:
    """(size, stride), each stride as long as all that follow it reach, the last a run of bytes.

    Dimensions that continue one another are joined, those that only repeat elements dropped.
    """
    if 0 in shape:
        return [(0, 1)]
    dims = [(width, 1)]
    reach = width
    nested = True
    for stride, size in sorted((stride * width, size) for size, stride in zip(shape, strides, strict=True)):
        if size == 1 or stride == 0:
            continue
        nested &= stride >= reach
        reach += (size - 1) * stride
        if stride == dims[-1][0] * dims[-1][1]:
            dims[-1] = (dims[-1][0] * size, dims[-1][1])
        else:
            dims.append((size, stride))
    return dims[::-1] if nested else [(reach, 1)]


class _Footprint:
    """The addresses that a launch touched in one way, and which programs did."""

    def __init__(self) -> None:
        self.noted: list[_Touched] = [(np.empty(0, np.int64),) * 3]
        self.lanes = 0

    def add(self, addresses: np.ndarray, program: int) -> None:
        programs = np.broadcast_to(np.int64(program), addresses.shape)
        self.noted.append((addresses, programs, programs))
        self.lanes += addresses.size
        if self.lanes > _FOLD_LANES:
            self.folded()

    def folded(self) -> _Touched:
        addresses, first, last = (np.concatenate(column) for column in zip(*self.noted, strict=True))
        if addresses.size:
            order = np.argsort(addresses)
            addresses, first, last = addresses[order], first[order], last[order]
            starts = np.flatnonzero(np.diff(addresses, prepend=-1))
            addresses = addresses[starts]
            first, last = np.minimum.reduceat(first, starts), np.maximum.reduceat(last, starts)
        self.noted, self.lanes = [(addresses, first, last)], 0
        return self.noted[0]
