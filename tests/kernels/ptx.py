"""The few PTX instructions that kernels/words.py writes, run in Triton's interpreter beside the rest of a kernel.

PTX ISA, sections 9.7: mov (of vectors too), setp (with a boolean operation), ld, st, add, bra, trap, and guards. Each
group of `pack` elements is a thread that comes to its end before the next begins; where it looks at a word again the
turn is over, as it is before a store.
"""

import contextlib
import ctypes
import re
from unittest import mock

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

from fastgpt import sanitizer
from fastgpt.sanitizer.launch import running

_ADDRESS = (1 << 48) - 1
_TYPES = {"b16": (ctypes.c_uint16, tl.int16), "b32": (ctypes.c_uint32, tl.int32), "b64": (ctypes.c_uint64, tl.int64)}


class Trapped(AssertionError):
    """A `trap` was reached."""


class _Thread:
    def __init__(self, operands):
        self.registers = {f"${n}": value for n, value in enumerate(operands)}
        self.widths = {}

    def value(self, text):
        return self.registers[text] if text in self.registers else int(text)

    def place(self, text):
        """[$3 + 16] -> the address, with its tag."""
        base, _, offset = text.strip("[]").partition("+")
        return self.value(base.strip()) + int(offset or 0)

    def run(self, text):
        body = text.strip().removeprefix("{").removesuffix("}")
        lines = [
            line.strip() for line in re.sub(r"(\w+):", r"\1:;", body).replace("\n", " ").split(";") if line.strip()
        ]
        labels = {line[:-1]: number for number, line in enumerate(lines) if line.endswith(":")}
        at = 0
        while at < len(lines):
            line = lines[at]
            at += 1
            if line.endswith(":"):
                continue
            if line.startswith("@"):
                guard, line = line[1:].split(None, 1)
                if bool(self.registers[guard.lstrip("!")]) == guard.startswith("!"):
                    continue
            name, _, rest = line.partition(" ")
            if name == "bra":
                if labels[rest] < at:
                    _over(writes=False)
                at = labels[rest]
            else:
                self.step(name.split("."), re.findall(r"\{[^}]*\}|\[[^]]*\]|[^,\s]+", rest))

    def step(self, name, given):
        kind, width = name[0], name[-1]
        if kind == "trap":
            raise Trapped("a wait came to its end")
        elif kind == "":  # .reg
            return
        elif kind == "mov" and given[0].startswith("{"):
            bits = int(width[1:]) // 2
            for n, part in enumerate(given[0].strip("{}").replace(" ", "").split(",")):
                self.registers[part] = self.value(given[1]) >> bits * n & (1 << bits) - 1
        elif kind == "mov":
            self.registers[given[0]] = self.value(given[1])
        elif kind == "add":
            self.registers[given[0]] = self.value(given[1]) + self.value(given[2])
        elif kind == "setp":
            a, b = (_signed(self.value(text)) for text in given[1:3])
            found = {"ne": a != b, "lt": a < b, "gt": a > b}[name[1]]
            self.registers[given[0]] = found or (name[2] == "or" and self.registers[given[3]])
        elif kind == "ld":
            place = _accessed("atomic", self.place(given[1]), width)
            self.registers[given[0]] = _TYPES[width][0].from_address(place).value
        elif kind == "st":
            _over(writes=True)
            place = _accessed("atomic" if "relaxed" in name else "store", self.place(given[0]), width)
            _TYPES[width][0].from_address(place).value = self.value(given[1])
        else:
            raise NotImplementedError(".".join(name))


def _signed(number):
    number &= 0xFFFFFFFF
    return number - (1 << 32) if number >> 31 else number


def _over(writes):
    if running[-1].turns is not None:
        running[-1].turns.over(writes)


def _accessed(kind, place, width):
    pointer = interpreter.TensorHandle(np.array([place], np.uint64), tl.pointer_type(_TYPES[width][1]))
    return int(running[-1].access(kind, pointer).data[0])


class _Results:
    def __init__(self, results):
        self._results = results

    def get_result(self, number):
        result = self._results[number]
        return interpreter.TensorHandle(result, tl.int64 if result.dtype == np.int64 else tl.int32)


def _inline_asm(builder, text, constraints, values, types, is_pure, pack):
    outs = constraints.count("=") // pack
    columns = [value.data.reshape(-1).astype(np.int64).view(np.uint64) for value in values]
    size, shape = columns[0].size, values[0].data.shape
    wide = "=l" in constraints
    results = [np.zeros(size, np.int64 if wide else np.int32) for _ in range(outs)]
    for first in range(0, size, pack):
        group = range(first, first + pack)
        inputs = [int(column[n]) for column in columns for n in group]
        thread = _Thread([0] * (outs * pack) + inputs)
        assert constraints.count(",") + 1 == outs * pack + len(inputs)
        thread.run(text)
        for out in range(outs):
            for n in group:
                found = thread.registers[f"${out * pack + n - first}"]
                results[out][n] = found if wide else _signed(found)
    return _Results([result.reshape(shape) for result in results])


@contextlib.contextmanager
def interpreted():
    """Inside a `sanitized` block."""
    with mock.patch.object(sanitizer._Builder, "create_inline_asm", _inline_asm, create=True):
        yield
