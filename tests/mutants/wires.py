"""Defects in the wiring, which cosmic-ray has not: a step left out, a bound not applied, a term that is missing."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass

__all__ = ["Edit", "edits", "executed"]


@dataclass(frozen=True, kw_only=True)
class Edit:
    """One defect: what stands between two offsets of the source is replaced."""

    operator: str
    line: int
    start: int
    end: int
    text: str

    def applied(self, source: bytes) -> bytes:
        """The source with the defect."""
        return source[: self.start] + self.text.encode() + source[self.end :]


class _Offsets:
    def __init__(self, source: bytes) -> None:
        self.source = source
        self._starts = [0]
        for line in source.splitlines(keepends=True):
            self._starts.append(self._starts[-1] + len(line))

    def start(self, node: ast.expr | ast.stmt) -> int:
        return self._starts[node.lineno - 1] + node.col_offset

    def end(self, node: ast.expr | ast.stmt) -> int:
        assert node.end_lineno is not None and node.end_col_offset is not None
        return self._starts[node.end_lineno - 1] + node.end_col_offset

    def text(self, node: ast.expr | ast.stmt) -> str:
        return self.source[self.start(node) : self.end(node)].decode()


def edits(source: bytes) -> Iterator[Edit]:
    """Every defect of these kinds in a module's source."""
    offsets = _Offsets(source)
    for node in executed(ast.parse(source)):
        for place, operator, text in _edits_of(node, offsets):
            yield Edit(
                operator=f"wires/{operator}",
                line=place.lineno,
                start=offsets.start(place),
                end=offsets.end(place),
                text=text,
            )


def _edits_of(node: ast.AST, offsets: _Offsets) -> Iterator[tuple[ast.expr | ast.stmt, str, str]]:
    """For each defect of a node: what is replaced, the defect's name, and by what."""
    conditions = [node.test] if isinstance(node, ast.If) else node.ifs if isinstance(node, ast.comprehension) else []
    for condition in conditions:
        yield condition, "Always", "True"
        yield condition, "Never", "False"
    if isinstance(node, (ast.expr, ast.stmt)):
        for operator, text in _replacements(node, offsets):
            yield node, operator, text


def executed(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes but annotations, assertions, `strict` of a zip, decorators and what only makes a message."""
    if isinstance(node, (ast.Assert, ast.Raise, ast.JoinedStr, ast.Import, ast.ImportFrom)):
        return
    if isinstance(node, ast.keyword) and node.arg == "strict":
        return
    yield node
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from executed(child)


def _replacements(node: ast.expr | ast.stmt, offsets: _Offsets) -> Iterator[tuple[str, str]]:
    text = offsets.text
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        yield "LeaveOutCall", "pass"
    elif isinstance(node, ast.AugAssign) or (
        isinstance(node, ast.Assign) and isinstance(node.targets[0], (ast.Attribute, ast.Subscript))
    ):
        yield "LeaveOutAssignment", "pass"
    elif isinstance(node, ast.IfExp):
        yield "TakeFirstBranch", f"({text(node.body)})"
        yield "TakeSecondBranch", f"({text(node.orelse)})"
    elif isinstance(node, ast.BinOp):
        yield "LeaveOutRight", f"({text(node.left)})"
        yield "LeaveOutLeft", f"({text(node.right)})"
    elif isinstance(node, ast.BoolOp):
        for index, value in enumerate(node.values):
            rest = [f"({text(v)})" for v in node.values if v is not value]
            joined = (" and " if isinstance(node.op, ast.And) else " or ").join(rest)
            yield f"LeaveOutCondition{index}", f"({joined})"
    elif isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Slice):
        yield "LeaveOutSlice", f"({text(node.value)})"
    elif isinstance(node, ast.Call):
        yield from _calls(node, offsets)
    elif isinstance(node, ast.Constant) and isinstance(node.value, float) and node.value:
        yield "HundredTimes", repr(node.value * 100)


def _calls(node: ast.Call, offsets: _Offsets) -> Iterator[tuple[str, str]]:
    """The call's subject, as if the function did nothing; the call without an argument that has a default."""
    text = offsets.text
    subject = node.func.value if isinstance(node.func, ast.Attribute) else None
    if subject is not None and (not isinstance(subject, ast.Name) or node.func.attr in _BOUNDS):
        yield "LeaveOutMethod", f"({text(subject)})"
    elif isinstance(node.func, ast.Name) and node.args and not isinstance(node.args[0], ast.Starred):
        yield "TakeFirstArgument", f"({text(node.args[0])})"
        if len(node.args) > 1:
            yield "TakeLastArgument", f"({text(node.args[-1])})"
    if len(node.args) > 1 and not any(isinstance(argument, ast.Starred) for argument in node.args):
        swapped = [text(node.args[1]), text(node.args[0]), *map(text, node.args[2:])]
        swapped += [f"{k.arg}={text(k.value)}" if k.arg else f"**{text(k.value)}" for k in node.keywords]
        yield "SwapArguments", f"{text(node.func)}({', '.join(swapped)})"
    for index, keyword in enumerate(node.keywords):
        if keyword.arg is not None and _may_be_left_out(node):
            arguments = [text(a) for a in node.args]
            arguments += [
                f"{k.arg}={text(k.value)}" if k.arg else f"**{text(k.value)}" for k in node.keywords if k is not keyword
            ]
            yield f"LeaveOutKeyword{index}", f"{text(node.func)}({', '.join(arguments)})"


_BOUNDS = ("clamp", "sqrt", "square", "abs", "mean", "half", "flip", "double", "rsqrt", "reciprocal")


def _may_be_left_out(node: ast.Call) -> bool:
    """Not where a value is made, all of whose fields are needed: that fails wherever it runs."""
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    return not name[:1].isupper() and not name.lstrip("_")[:1].isupper()
