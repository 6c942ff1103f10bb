"""The dot kernel of trellis windows: up to eight inputs times a quantized weight, which exists in registers only."""

from __future__ import annotations

from functools import cache
from typing import Any

from bgd_plugin.jit.llvm import Loop, compiled, define, vector_registers
from bgd_plugin.jit.vectors import fma, load, masked, total, zero
from bgd_plugin.kernels.window_pairs import over_columns, ring_bases, valid_rows, window_values

__all__ = ["MOST_INPUTS", "window_dot_program"]

MOST_INPUTS = 8
"""Inputs for which each weight is decoded once."""


@cache
def window_dot_program(inputs: int, has_mask: bool) -> Any:
    """`output[i, r] = Σ_j input[i, j] · table[state of row r in column j]` times `VALUE_STEP`, in float32.

    Args:
        inputs: their number, at most `MOST_INPUTS`.
        has_mask: whether the layer has a mask.

    The function takes the addresses of input `[inputs, columns]`, pairs (`window_pairs.pair_table`), codes
    `[bytes, columns]`, mask (bytes `[rows, columns]`, if it has one) and output `[inputs, rows]`, then `first`, `last`
    (rows of bytes), `rows`, `bytes`, `columns`.
    """
    pointers = ("input", "pairs", "codes", "mask", "output")
    module, builder, a = define("window_dot", pointers, ("first", "last", "rows", "bytes", "columns"))
    # Sums of four rows, or of two and then of the other two, as the registers hold.
    passes = [(0, 1)] if 4 * inputs <= vector_registers() // 2 else [(1,), (0,)]
    with Loop(builder, a["first"], a["last"]) as byte_rows:
        bases, rows = ring_bases(builder, a, byte_rows.index), valid_rows(builder, a, byte_rows.index)
        for pairs in passes:
            own = [rows[2 * pair + i] for pair in pairs for i in range(2)]
            _sum_rows(builder, a, bases, own, pairs, inputs, has_mask)
    builder.ret_void()
    return compiled(module)


def _sum_rows(
    builder: Any,
    a: dict[str, Any],
    bases: list[Any],
    rows: list[Any],
    pairs: tuple[int, ...],
    inputs: int,
    has_mask: bool,
) -> None:
    """The outputs of some rows of a byte, the last one first."""
    from llvmlite import ir

    whole = ir.IntType(64)
    starts = [builder.mul(row, a["columns"]) for row in rows]

    def step(column: Any, lanes: int, sums: list[Any]) -> list[Any]:
        values = [value for pair in pairs for value in window_values(builder, a, bases, column, lanes, pair)]
        if has_mask:
            places = [builder.add(start, column) for start in starts]
            values = [
                masked(builder, a["mask"], place, value, lanes) for place, value in zip(places, values, strict=True)
            ]
        result = []
        for i in range(inputs):
            at = builder.add(builder.mul(a["columns"], whole(i)), column)
            x = load(builder, a["input"], at, lanes)
            result += [fma(builder, x, value, sums[i * len(rows) + j]) for j, value in enumerate(values)]
        return result

    ends = over_columns(builder, a["columns"], step, lambda lanes: [zero(lanes)] * (inputs * len(rows)))
    for j in reversed(range(len(rows))):
        for i in range(inputs):
            parts = [total(builder, end[i * len(rows) + j], end[i * len(rows) + j].type.count) for end in ends]
            place = builder.add(builder.mul(a["rows"], whole(i)), rows[j])
            result = builder.fadd(*parts)
            builder.store(result, builder.gep(a["output"], [place], source_etype=ir.FloatType()), align=4)
