"""The interpreter's arithmetic as a GPU has it: bfloat16, TF32, and int32 that may not overflow."""

from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

from fastgpt.sanitizer.launch import running

ROUNDING, _PRECISION = interpreter._ir.ROUNDING_MODE, interpreter._ir.INPUT_PRECISION
_stock_check = interpreter.ReduceScanOpInterface.check_tensor


def cast(stock: Callable, src: Any, dst_type: Any, *rounding: Any) -> Any:
    """Triton's `stock` cast, by way of float32 where bfloat16 is one of the two."""
    if src.dtype.scalar == tl.bfloat16:
        src = _widened(src)
        if dst_type.scalar == tl.float32:
            return src
    if dst_type.scalar != tl.bfloat16:
        return stock(src, dst_type, *rounding)
    single = src if src.dtype.scalar == tl.float32 else stock(src, tl.float32, *rounding)
    toward_zero = ROUNDING.RTZ in rounding
    return interpreter.TensorHandle(_round_to_bfloat16(single.data, toward_zero), tl.bfloat16)


def _round_to_bfloat16(values: np.ndarray, toward_zero: bool) -> np.ndarray:
    """The bits of float32 values as bfloat16, ties to even; NaN is 0x7FFF, as PTX's cvt makes it."""
    values = np.asarray(values, np.float32)
    bits = values.view(np.uint32)
    up = np.uint32(0) if toward_zero else np.uint32(0x7FFF) + (bits >> 16 & 1)
    return np.where(np.isnan(values), 0x7FFF, bits + up >> 16).astype(np.uint16)


def _widened(bfloat16: Any) -> Any:
    return interpreter.TensorHandle((bfloat16.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def as_multiplied(operand: Any, precision: Any) -> Any:
    """A dot's operand as the tensor cores take it."""
    if operand.dtype.scalar == tl.bfloat16:
        return _widened(operand)
    if operand.dtype.scalar == tl.float32 and precision == _PRECISION.TF32:
        bits = operand.data.view(np.uint32) & np.uint32(0xFFFFE000)  # sign, exponent and 10 bits of mantissa
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)
    return operand


def refuse_bfloat16(*operands: Any) -> None:
    if any(operand.dtype.scalar == tl.bfloat16 for operand in operands):
        running[-1].fail("arithmetic in bfloat16; cast to float32 first")


def check_reduced(reduction: Any, tensors: tuple) -> None:
    refuse_bfloat16(*(tensor.handle for tensor in tensors))
    _stock_check(reduction, tensors)


def refuse_int32_overflow(_: Any, lhs: Any, rhs: Any, operation: Callable) -> None:
    """In place of Triton's own check, on which the interpreter spends six operations and ignores the result."""
    if lhs.dtype.scalar == tl.int32:
        compute = {"add": np.add, "sub": np.subtract, "mul": np.multiply}[operation.__name__]
        exact = compute(lhs.handle.data, rhs.handle.data, dtype=np.int64)
        wrapped = exact[exact != exact.astype(np.int32)]
        if wrapped.size:
            running[-1].fail(f"int32 overflow in {operation.__name__}: {wrapped[0]}, in {wrapped.size} lanes")
