"""The dot kernel of trellis windows: up to eight inputs times a quantized weight, which exists in registers only."""

from __future__ import annotations

from functools import cache
from typing import Any

from bgd_plugin.jit.llvm import Loop, compiled, define
from bgd_plugin.jit.vectors import fma, load, masked, total, zero
from bgd_plugin.kernels.window_pairs import over_columns, ring_bases, unit_of_row, valid_rows, window_scratch

__all__ = ["MOST_INPUTS", "window_dot_program"]

MOST_INPUTS = 8
"""Inputs for which each weight is decoded once."""


@cache
def window_dot_program(inputs: int, has_mask: bool) -> Any:
    """`output[i, r] = scale[r] · Σ_j input[i, j] · table[state of row r in column j]`, in float32.

    Args:
        inputs: their number, at most `MOST_INPUTS`.
        has_mask: whether the layer has a mask.

    The function takes the addresses of input `[inputs, columns]`, scale `[rows]`, pairs (`window_pairs.pair_table`),
    codes `[bytes, columns]`, mask (bytes `[rows, columns]`, if it has one) and output `[inputs, rows]`, then `first`,
    `last` (rows of bytes), `rows`, `bytes`, `columns`.
    """
    pointers = ("input", "scale", "pairs", "codes", "mask", "output")
    module, builder, a = define("window_dot", pointers, ("first", "last", "rows", "bytes", "columns"))
    a["scratch"] = window_scratch(builder)
    with Loop(builder, a["first"], a["last"]) as byte_rows:
        bases, rows = ring_bases(builder, a, byte_rows.index), valid_rows(builder, a, byte_rows.index)
        _sum_rows(builder, a, bases, rows, inputs, has_mask)
    builder.ret_void()
    return compiled(module)


def _sum_rows(builder: Any, a: dict[str, Any], bases: list[Any], rows: list[Any], inputs: int, has_mask: bool) -> None:
    """The outputs of the rows of a byte; the last one is written first."""
    from llvmlite import ir

    whole = ir.IntType(64)
    starts = [builder.mul(row, a["columns"]) for row in rows]

    def step(pair: int, column: Any, values: list[Any], sums: list[Any]) -> list[Any]:
        lanes = values[0].type.count
        if has_mask:
            places = [builder.add(start, column) for start in starts[2 * pair : 2 * pair + 2]]
            values = [
                masked(builder, a["mask"], place, value, lanes) for place, value in zip(places, values, strict=True)
            ]
        result = []
        for i in range(inputs):
            at = builder.add(builder.mul(a["columns"], whole(i)), column)
            x = load(builder, a["input"], at, lanes)
            result += [fma(builder, x, value, sums[2 * i + j]) for j, value in enumerate(values)]
        return result

    ends = over_columns(builder, a, bases, step, lambda lanes: [zero(lanes)] * (2 * inputs))
    for j in reversed(range(len(rows))):
        unit = builder.extract_element(unit_of_row(builder, a, rows[j]), ir.IntType(32)(0))
        for i in range(inputs):
            sums = [end[2 * i + j % 2] for end in ends[j // 2]]
            result = builder.fmul(builder.fadd(*[total(builder, value, value.type.count) for value in sums]), unit)
            place = builder.add(builder.mul(a["rows"], whole(i)), rows[j])
            builder.store(result, builder.gep(a["output"], [place], source_etype=ir.FloatType()), align=4)
