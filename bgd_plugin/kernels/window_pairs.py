"""Generated code that decodes trellis windows (`pq.windows`), two rows by one look-up.

The windows of two rows, one below the other, are seven codes together, 14 bits. A table holds the two values of each,
as 8-bit integers: 32 KB, which stay in the innermost cache. Look-ups are single loads into the lanes of a vector, which
no processor does slower than its own gathering of lanes. The windows of a chunk of columns are written to memory before
any of them is looked up: indices that come from memory take two thirds of the time of those that leave a vector.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from bgd_plugin.jit.llvm import Loop
from bgd_plugin.jit.vectors import constant, load, vector
from bgd_plugin.pq.windows import STATES, VALUE_STEP, window_table

__all__ = ["LANES", "ROWS", "over_columns", "pair_table", "ring_bases", "unit_of_row", "valid_rows", "window_scratch"]

LANES = 16
"""Columns in a vector."""
_CHUNK = 128
"""Columns whose windows are in memory at once."""
_TOGETHER = 16
"""Look-ups done one after another, whose entries fill a vector."""
ROWS = 4
"""Rows whose codes are in one byte."""
_PAIR_STATES = 4 * STATES
_PER_WORD = 4
"""Indices of the table in a 64-bit word."""
_PAIRS = 2
"""Pairs of rows in a byte."""

Step = Callable[[int, Any, list[Any], list[Any]], list[Any]]
"""From the pair of rows (0 or 1), the first column, the weights of both rows from there on, two vectors, and the values
carried so far to the next values."""


@cache
def pair_table() -> Tensor:
    """The values of two rows by the codes of both windows, int16 `[16384]`: the upper row's in the low byte."""
    with torch.inference_mode(False):
        steps = (window_table() * VALUE_STEP).to(torch.int16)
        states = torch.arange(_PAIR_STATES)
        return (steps[states >> 2] & 255) | (steps[states & (STATES - 1)] << 8)


def ring_bases(builder: Any, a: dict[str, Any], byte_row: Any) -> list[Any]:
    """Where the codes of a row of bytes begin, and of the two rows before it, which wrap around; the first one first.

    Args:
        builder: at the place where they are needed.
        a: the function's arguments, `bytes` and `columns` among them.
        byte_row: index of the row of bytes.
    """
    whole = byte_row.type
    ahead = builder.add(byte_row, builder.mul(a["bytes"], whole(2)))
    rows = [builder.urem(builder.sub(ahead, whole(back)), a["bytes"]) for back in (2, 1)]
    return [builder.mul(row, a["columns"]) for row in [*rows, byte_row]]


def valid_rows(builder: Any, a: dict[str, Any], byte_row: Any) -> list[Any]:
    """The indices of a byte's four rows; those beyond the last of all are the last.

    So what is stored for them must be stored before the last row's own: in descending order.

    Args:
        builder: at the place where they are needed.
        a: the function's arguments, `rows` among them.
        byte_row: index of the row of bytes.
    """
    whole = byte_row.type
    last = builder.sub(a["rows"], whole(1))
    found = [builder.add(builder.mul(byte_row, whole(ROWS)), whole(i)) for i in range(ROWS)]
    return [builder.select(builder.icmp_signed("<", row, last), row, last) for row in found]


def window_scratch(builder: Any) -> Any:
    """Memory for the windows of a chunk of columns, on the stack.

    Args:
        builder: at the start of the function.
    """
    from llvmlite import ir

    scratch = builder.alloca(ir.ArrayType(ir.IntType(16), _PAIRS * _CHUNK))
    scratch.align = 64
    return builder.inttoptr(builder.ptrtoint(scratch, ir.IntType(64)), ir.PointerType())  # an untyped one


def unit_of_row(builder: Any, a: dict[str, Any], row: Any) -> Any:
    """The scale of a row divided by `VALUE_STEP`, a vector of one lane: what an integer of the table stands for.

    Args:
        builder: at the place where it is needed.
        a: the function's arguments, `scale` among them.
        row: its index.
    """
    from llvmlite import ir

    return builder.fmul(load(builder, a["scale"], row, 1), constant(ir.FloatType(), 1, 1 / VALUE_STEP))


def over_columns(
    builder: Any, a: dict[str, Any], bases: list[Any], step: Step, sums: Callable[[int], list[Any]]
) -> list[list[list[Any]]]:
    """Generate a loop over chunks of columns, and one over the columns that are left.

    Args:
        builder: at the place of the loop.
        a: the function's arguments, `codes`, `columns` and `pairs` (the address of `pair_table`) among them, and
            `scratch`, what `window_scratch` gives.
        bases: as `ring_bases` gives them.
        step: is given the table's values times `VALUE_STEP`, as float32, of two rows of the byte at a time; the
            last two come first.
        sums: from a number of lanes to the values with which a loop begins, for two rows.

    Returns:
        for each two rows, the values at the end of each of the two loops.
    """
    whole = a["columns"].type
    many = builder.and_(a["columns"], whole(-LANES))
    own = len(sums(1))
    with Loop(builder, whole(0), many, _CHUNK, sums(LANES) * _PAIRS) as chunks:
        left = builder.sub(many, chunks.index)
        count = builder.select(builder.icmp_signed("<", left, whole(_CHUNK)), left, whole(_CHUNK))
        _look_up_chunk(builder, a, bases, chunks.index, count)
        ends: list[Any] = []
        for pair in reversed(range(_PAIRS)):
            with Loop(builder, whole(0), count, LANES, chunks.values[own * pair : own * (pair + 1)]) as wide:
                place = _place(builder, a, pair, wide.index)
                values = _floats(builder, builder.load(place, typ=_shorts(LANES), align=2 * LANES))
                wide.carry(step(pair, builder.add(chunks.index, wide.index), values, wide.values))
            ends = [*wide.values, *ends]
        chunks.carry(ends)
    with Loop(builder, many, a["columns"], 1, sums(1) * _PAIRS) as single:
        ends = []
        for pair in reversed(range(_PAIRS)):
            window = builder.bitcast(_windows(builder, a, bases, single.index, 1, pair), _shorts(1).element)
            values = _floats(builder, _looked_up(builder, a["pairs"], [window]))
            ends = [*step(pair, single.index, values, single.values[own * pair : own * (pair + 1)]), *ends]
        single.carry(ends)
    return [[loop.values[own * pair : own * (pair + 1)] for loop in (chunks, single)] for pair in range(_PAIRS)]


def _look_up_chunk(builder: Any, a: dict[str, Any], bases: list[Any], first: Any, count: Any) -> None:
    """Write entries of the table to the scratch, for `count` columns from `first` on: all windows, then all entries."""
    from llvmlite import ir

    whole = count.type
    with Loop(builder, whole(0), count, LANES) as wide:
        for pair in range(_PAIRS):
            windows = _windows(builder, a, bases, builder.add(first, wide.index), LANES, pair)
            builder.store(windows, _place(builder, a, pair, wide.index), align=2 * LANES)
    for pair in range(_PAIRS):
        with Loop(builder, whole(0), count, _TOGETHER) as some:
            place = _place(builder, a, pair, some.index)
            words = [
                builder.load(builder.gep(place, [whole(i)], source_etype=whole), typ=whole, align=8)
                for i in range(_TOGETHER // _PER_WORD)
            ]
            parts = [builder.lshr(word, whole(16 * i)) for word in words for i in range(_PER_WORD)]
            found = _looked_up(builder, a["pairs"], [builder.trunc(part, ir.IntType(16)) for part in parts])
            builder.store(found, place, align=2 * _TOGETHER)


def _place(builder: Any, a: dict[str, Any], pair: int, column: Any) -> Any:
    """Where the scratch has a column of the chunk, for a pair of rows."""
    at = builder.add(column, column.type(pair * _CHUNK))
    return builder.gep(a["scratch"], [at], source_etype=_shorts(1).element)


def _shorts(lanes: int) -> Any:
    from llvmlite import ir

    return vector(lanes, ir.IntType(16))


def _windows(builder: Any, a: dict[str, Any], bases: list[Any], column: Any, lanes: int, pair: int) -> Any:
    """The 14 bits of the windows of two rows of a byte in some columns, a vector of 16-bit integers."""
    short = _shorts(lanes)
    shifts = ((12, 4, -4), (None, 8, 0))[pair]  # of which 14 bits count
    windows = constant(short.element, lanes, 0)
    for base, shift in zip(bases, shifts, strict=True):
        if shift is not None:
            codes = builder.zext(_codes(builder, a["codes"], builder.add(base, column), lanes), short)
            places = constant(short.element, lanes, abs(shift))
            windows = builder.or_(windows, builder.shl(codes, places) if shift >= 0 else builder.lshr(codes, places))
    return builder.and_(windows, constant(short.element, lanes, _PAIR_STATES - 1))


def _codes(builder: Any, codes: Any, place: Any, lanes: int) -> Any:
    from llvmlite import ir

    byte = ir.IntType(8)
    return builder.load(builder.gep(codes, [place], source_etype=byte), typ=vector(lanes, byte), align=1)


def _looked_up(builder: Any, table: Any, windows: list[Any]) -> Any:
    """The table's entries of some windows, 16-bit integers, as a vector."""
    from llvmlite import ir

    kind = _shorts(len(windows))
    found = ir.Constant(kind, ir.Undefined)
    for i, window in enumerate(windows):
        place = builder.gep(table, [builder.zext(window, ir.IntType(64))], source_etype=kind.element)
        found = builder.insert_element(found, builder.load(place, typ=kind.element, align=2), ir.IntType(32)(i))
    return found


def _floats(builder: Any, pairs: Any) -> list[Any]:
    """The values of the upper and of the lower rows, as float32, of entries of the table."""
    from llvmlite import ir

    lanes, number = pairs.type.count, ir.IntType(32)
    found = builder.sext(pairs, vector(lanes, number))
    upper = builder.ashr(builder.shl(found, constant(number, lanes, 24)), constant(number, lanes, 24))
    lower = builder.ashr(found, constant(number, lanes, 8))
    return [builder.sitofp(value, vector(lanes)) for value in (upper, lower)]
