"""Mutants by rule: `places(text)` finds, by syntax tree, what of a file a small mistake would change.

The rules are comparisons, arithmetic, numbers off by one, axes, swapped arguments, defaults, strides, dtypes,
statements and arguments left out, negated conditions. Docstrings, annotations, decorators, imports and the words of
messages are left alone: no test should hold them to the letter.
"""

import ast
import re
from collections.abc import Iterator
from typing import NamedTuple


class Place(NamedTuple):
    """One mutant of a file: bytes [start, end) of its text become `new`."""

    rule: str
    function: str  # that it stands in, by its qualified name; "" for none
    first: int  # the lines of its statement: who enters none of them can't see the mutant
    last: int
    start: int
    end: int
    new: str


_COMPARISONS = {"<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "==", "is not": "is", "is": "is not"}
_COMPARISONS |= {"not in": "in", "in": "not in"}
_SIGNS = {
    ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">=", ast.Eq: "==", ast.NotEq: "!=",
    ast.Is: "is", ast.IsNot: "is not", ast.In: "in", ast.NotIn: "not in",
    ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/", ast.FloorDiv: "//", ast.Mod: "%",
    ast.BitAnd: "&", ast.BitOr: "|", ast.And: "and", ast.Or: "or",
}  # fmt: skip
_ARITHMETIC = {"+": "-", "-": "+", "*": "+", "/": "*", "//": "/", "%": "//", "&": "|", "|": "&"}
_DTYPES = {
    "float32": "float16", "float16": "float32", "bfloat16": "float16", "float64": "float32",
    "int64": "int32", "int32": "int64", "uint64": "uint32", "uint16": "uint32",
}  # fmt: skip
_AXES = ("axis", "dim", "dims", "keepdim")
_BY_AXES = ("transpose", "flatten", "unflatten", "unsqueeze", "squeeze", "size", "permute", "unbind", "select", "sum")
_HEADS = (ast.If, ast.While, ast.For, ast.With, ast.FunctionDef, ast.ClassDef, ast.Try)


def places(text: str) -> list[Place]:
    """Every mutant of a Python file; a few are no longer Python, or say the same (`is_another` tells)."""
    return list(dict.fromkeys(_File(text).found))


def is_another(text: str, place: Place) -> bool:
    """Whether it is a program still, and not the same one."""
    try:
        return ast.dump(ast.parse(mutated(text, place))) != ast.dump(ast.parse(text))
    except SyntaxError:  # such as two swapped arguments of which one is starred
        return False


def mutated(text: str, place: Place) -> str:
    """The file's text with the mutant in it."""
    raw = text.encode()
    return (raw[: place.start] + place.new.encode() + raw[place.end :]).decode()


class _File:
    def __init__(self, text: str):
        self.raw = text.encode()
        self.begins = [0]
        for line in self.raw.splitlines(keepends=True):
            self.begins.append(self.begins[-1] + len(line))
        self.found: list[Place] = []
        self._body(ast.parse(text), "")

    def _body(self, parent: ast.AST, function: str) -> None:
        """The statements below `parent`, each with its expressions."""
        for node in ast.iter_child_nodes(parent):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                name = f"{function}.{node.name}".lstrip(".")
                if isinstance(node, ast.FunctionDef):
                    self._defaults(node, name)
                self._body(node, name)
            elif isinstance(node, (ast.Import, ast.ImportFrom, ast.Raise)):
                if isinstance(node, ast.Raise):
                    self._add("statement left out", node, node, function, "pass")
            elif isinstance(node, ast.stmt):
                self._statement(node, function)
                self._body(node, function)
            elif isinstance(node, (ast.ExceptHandler, ast.match_case)):
                self._body(node, function)

    def _statement(self, node: ast.stmt, function: str) -> None:
        calls = isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
        if calls or isinstance(node, (ast.AugAssign, ast.Continue, ast.Break)):
            self._add("statement left out", node, node, function, "pass")
        if isinstance(node, (ast.If, ast.While)):
            self._add("condition negated", node, node.test, function, f"not ({self._of(node.test)})")
        for expression in _expressions(node):
            for child in _walk(expression):
                for rule, where, new in self._changes(child):
                    self._add(rule, node, where, function, new)

    def _defaults(self, node: ast.FunctionDef, name: str) -> None:
        for default in [*node.args.defaults, *node.args.kw_defaults]:
            if isinstance(default, ast.Constant) and isinstance(default.value, (bool, int, float)):
                value = default.value
                new = not value if isinstance(value, bool) else value + 1 if isinstance(value, int) else value * 2 + 0.1
                self._add("default", node.body[-1], default, name, repr(new), node.body[0].lineno)

    def _changes(self, node: ast.AST) -> Iterator[tuple[str, ast.AST, str]]:
        """(rule, what of the text, what it becomes) for one expression."""
        if isinstance(node, ast.Compare) and len(node.ops) == 1:
            sign = _COMPARISONS[_SIGNS[type(node.ops[0])]]
            yield "comparison", node, f"{self._of(node.left)} {sign} {self._of(node.comparators[0])}"
        elif isinstance(node, ast.BinOp) and (sign := _ARITHMETIC.get(_SIGNS.get(type(node.op), ""), "")):
            words = (isinstance(side, ast.Constant) and isinstance(side.value, str) for side in (node.left, node.right))
            if not any(words):
                yield "arithmetic", node, f"({self._of(node.left)} {sign} {self._of(node.right)})"
        elif isinstance(node, ast.BoolOp):
            sign = "or" if isinstance(node.op, ast.And) else "and"
            yield "condition negated", node, "(" + f" {sign} ".join(f"({self._of(v)})" for v in node.values) + ")"
            kept = node.values[:-1]
            yield "condition left out", node, f" {_SIGNS[type(node.op)]} ".join(f"({self._of(v)})" for v in kept)
        elif isinstance(node, ast.IfExp):
            yield "condition negated", node.test, f"(not ({self._of(node.test)}))"
        elif isinstance(node, ast.comprehension):
            yield from (("condition negated", test, f"(not ({self._of(test)}))") for test in node.ifs)
        elif isinstance(node, ast.Constant) and type(node.value) is int:
            yield "off by one", node, str(node.value + 1)
            if node.value > 0:
                yield "off by one", node, str(node.value - 1)
        elif isinstance(node, ast.Attribute) and node.attr in _DTYPES:
            yield "dtype", node, f"{self._of(node.value)}.{_DTYPES[node.attr]}"
        elif isinstance(node, ast.Name) and node.id.startswith("stride_") and isinstance(node.ctx, ast.Load):
            yield from (("stride", node, other) for other in self._other_strides(node.id))
        elif isinstance(node, ast.Call):
            yield from self._call(node)

    def _call(self, node: ast.Call) -> Iterator[tuple[str, ast.AST, str]]:
        for one, other in zip(node.args, node.args[1:], strict=False):
            if _kind(one) and _kind(one) == _kind(other) and self._of(one) != self._of(other):
                start, end = self._span(one)[0], self._span(other)[1]
                between = self.raw[self._span(one)[1] : self._span(other)[0]].decode()
                yield "arguments swapped", _Between(start, end), f"{self._of(other)}{between}{self._of(one)}"
        name = node.func.attr if isinstance(node.func, ast.Attribute) else ""
        for number in node.args if name in _BY_AXES else ():
            if isinstance(number, ast.Constant) and type(number.value) is int:
                yield "axis", number, str(number.value - 1 if number.value else 1)
        if name in ("to", "contiguous", "clone", "detach") and isinstance(node.func, ast.Attribute):
            yield "conversion left out", node, self._of(node.func.value)
        for keyword in node.keywords:
            if keyword.arg is None:
                continue
            if isinstance(keyword.value, ast.Constant) and isinstance(keyword.value.value, bool):
                yield "boolean", keyword.value, repr(not keyword.value.value)
            elif keyword.arg in _AXES and isinstance(keyword.value, ast.Constant):
                yield "axis", keyword.value, str(keyword.value.value - 1 if keyword.value.value else 1)
            elif len(node.keywords) > 1 and keyword is not node.keywords[-1]:
                after = node.keywords[node.keywords.index(keyword) + 1]
                yield "argument left out", _Between(self._span(keyword)[0], self._span(after)[0]), ""

    def _other_strides(self, name: str) -> list[str]:
        """The strides that such a one is taken for: of another axis of the same tensor, of the same axis of another."""
        text = self.raw.decode()
        everyone = sorted(set(re.findall(r"\bstride_\w+", text)) - {name})
        return [other for other in everyone if other[:-1] == name[:-1] or other[-1] == name[-1]][:3]

    def _span(self, node: ast.AST) -> tuple[int, int]:
        if isinstance(node, _Between):
            return node.start, node.end
        return (
            self.begins[node.lineno - 1] + node.col_offset,  # type: ignore[attr-defined]
            self.begins[node.end_lineno - 1] + node.end_col_offset,  # type: ignore[attr-defined]
        )

    def _of(self, node: ast.AST) -> str:
        start, end = self._span(node)
        return self.raw[start:end].decode()

    def _add(self, rule: str, statement: ast.stmt, where: ast.AST, function: str, new: str, first: int = 0) -> None:
        last = statement.end_lineno or 0
        if isinstance(statement, _HEADS) and not first:
            last = max(statement.lineno, statement.body[0].lineno - 1)  # type: ignore[attr-defined]
        start, end = self._span(where)
        self.found.append(Place(rule, function, first or statement.lineno, last, start, end, new))


class _Between(ast.AST):
    """A part of the text that is no node."""

    def __init__(self, start: int, end: int):
        super().__init__()
        self.start, self.end = start, end


def _expressions(node: ast.stmt) -> Iterator[ast.AST]:
    """A statement's own expressions, without the statements below it and without a docstring."""
    for name, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, (ast.expr, ast.withitem)) and name not in ("annotation", "decorator_list"):
                yield child


def _walk(node: ast.AST) -> Iterator[ast.AST]:
    """As ast.walk, but not into text that is put together, whose places Python 3.11 does not tell."""
    if not isinstance(node, ast.JoinedStr):
        yield node
        for child in ast.iter_child_nodes(node):
            yield from _walk(child)


def _kind(node: ast.expr) -> str:
    """What an argument may be taken for: another pointer, another stride, another variable; "" for nothing."""
    if isinstance(node, ast.Starred):
        return "several " + _kind(node.value)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ("stride", "size"):
        return node.func.attr
    name = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
    if not name or name.isupper():
        return "constant" if name else ""
    return "stride" if name.startswith("stride_") else "pointer" if name.endswith("_ptr") else "variable"
