"""Generated code that decodes trellis windows (`pq.windows`), two rows by one look-up.

The windows of two rows, one below the other, are seven codes together, 14 bits. A table holds the two values of each,
as 8-bit integers: 32 KB, which stay in the innermost cache. Look-ups are single loads into the lanes of a vector, which
no processor does slower than its own gathering of lanes.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from bgd_plugin.jit.llvm import Loop
from bgd_plugin.pq.windows import STATES, VALUE_STEP, window_table

__all__ = ["LANES", "ROWS", "over_columns", "pair_table", "ring_bases", "valid_rows", "window_values"]

LANES = 16
"""Columns decoded at once."""
ROWS = 4
"""Rows whose codes are in one byte."""
_PAIR_STATES = 4 * STATES
_PER_WORD = 4
"""Indices of the table in a 64-bit word."""


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


def over_columns(builder: Any, columns: Any, step: Any, sums: Any) -> list[list[Any]]:
    """Generate a loop over vectors of columns, and one over the columns that are left.

    Args:
        builder: at the place of the loop.
        columns: their number, a 64-bit integer.
        step: from the first column, the number of columns at once, and the values carried so far to the next values.
        sums: from a number of lanes to the values with which a loop begins.

    Returns:
        the values at the end of each of the two loops.
    """
    whole = columns.type
    many = builder.and_(columns, whole(-LANES))
    with Loop(builder, whole(0), many, LANES, sums(LANES)) as wide:
        wide.carry(step(wide.index, LANES, wide.values))
    with Loop(builder, many, columns, 1, sums(1)) as single:
        single.carry(step(single.index, 1, single.values))
    return [wide.values, single.values]


def window_values(builder: Any, a: dict[str, Any], bases: list[Any], column: Any, lanes: int, pair: int) -> list[Any]:
    """The table's values of two rows of a byte in some columns, times `VALUE_STEP`: two vectors of float32.

    Args:
        builder: at the place where they are needed.
        a: the function's arguments, `codes` and `pairs` (the address of `pair_table`) among them.
        bases: as `ring_bases` gives them.
        column: index of the first column.
        lanes: number of columns.
        pair: 0 for the byte's first two rows, 1 for the last two.
    """
    from llvmlite import ir

    short = ir.VectorType(ir.IntType(16), lanes)
    wide, floats = ir.VectorType(ir.IntType(32), lanes), ir.VectorType(ir.FloatType(), lanes)
    shifts = ((12, 4, -4), (None, 8, 0))[pair]  # of which 14 bits count
    windows = ir.Constant(short, [0] * lanes)
    for base, shift in zip(bases, shifts, strict=True):
        if shift is not None:
            codes = builder.zext(_codes(builder, a["codes"], builder.add(base, column), lanes), short)
            places = ir.Constant(short, [abs(shift)] * lanes)
            windows = builder.or_(windows, builder.shl(codes, places) if shift >= 0 else builder.lshr(codes, places))
    found = builder.sext(_looked_up(builder, a["pairs"], windows, lanes), wide)
    upper = builder.ashr(builder.shl(found, ir.Constant(wide, [24] * lanes)), ir.Constant(wide, [24] * lanes))
    lower = builder.ashr(found, ir.Constant(wide, [8] * lanes))
    return [builder.sitofp(value, floats) for value in (upper, lower)]


def _codes(builder: Any, codes: Any, place: Any, lanes: int) -> Any:
    from llvmlite import ir

    byte = ir.IntType(8)
    return builder.load(builder.gep(codes, [place], source_etype=byte), typ=ir.VectorType(byte, lanes), align=1)


def _looked_up(builder: Any, table: Any, windows: Any, lanes: int) -> Any:
    """The table's entries, by the low 14 bits: they leave the vector several in a word, cheaper than one by one."""
    from llvmlite import ir

    short, whole, lane = ir.IntType(16), ir.IntType(64), ir.IntType(32)
    per_word = min(lanes, _PER_WORD)
    words = builder.bitcast(windows, ir.VectorType(ir.IntType(16 * per_word), lanes // per_word))
    found = ir.Constant(windows.type, ir.Undefined)
    for i in range(lanes):
        word = builder.zext(builder.extract_element(words, lane(i // per_word)), whole)
        index = builder.and_(builder.lshr(word, whole(16 * (i % per_word))), whole(_PAIR_STATES - 1))
        value = builder.load(builder.gep(table, [index], source_etype=short), typ=short, align=2)
        found = builder.insert_element(found, value, lane(i))
    return found
