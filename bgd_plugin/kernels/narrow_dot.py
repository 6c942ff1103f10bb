"""The kernel of narrow weights: one input times rows of half-precision numbers or 8-bit integers."""

from __future__ import annotations

from functools import cache
from typing import Any

from bgd_plugin.jit.llvm import AVAILABLE, Loop, compiled, converts_halves, define, rows_together
from bgd_plugin.jit.vectors import fetch, fma, load, total, tree, vector, zero

__all__ = ["narrow_dot_program"]

_ROWS = 4
"""Rows computed at once."""
_LANES = 16
_AHEAD = 8192
"""Bytes of numbers between what is read and what is asked for."""
_VECTORS = 2
"""Vectors of a row that are computed at once."""


@cache
def narrow_dot_program(number_bits: int) -> Any:
    """`output[r] = Σ_i input[i] · numbers[r, i]` for one input, in float32; None where the processor lacks it.

    The weight is read once, in its narrow form; a few rows at a time share the input's vectors.

    Args:
        number_bits: 16 for half precision, 8 for integers.

    The function takes the addresses of input `[columns]`, numbers `[rows, columns]` and output `[rows]`, then `first`,
    `last` and `columns`.
    """
    if not AVAILABLE or (number_bits == 16 and not converts_halves()):
        return None

    module, builder, a = define("narrow_dot", ("input", "numbers", "output"), ("first", "last", "columns"))
    for rows in rows_together(builder, a["first"], a["last"], _ROWS):
        _sum_rows(builder, a, rows, number_bits)
    builder.ret_void()
    return compiled(module)


def _sum_rows(builder: Any, a: dict[str, Any], rows: list[Any], number_bits: int) -> None:
    """The outputs of some rows, which share the loads of the input."""
    from llvmlite import ir

    whole, step = ir.IntType(64), _LANES * _VECTORS
    bases = [builder.mul(row, a["columns"]) for row in rows]
    many = builder.and_(a["columns"], whole(-step))

    def products(start: Any, lanes: int, vectors: int, sums: list[Any]) -> list[Any]:
        result = list(sums)
        for i in range(vectors):
            at = builder.add(start, whole(i * lanes))
            x = load(builder, a["input"], at, lanes)
            for k, base in enumerate(bases):
                number = _number(builder, a["numbers"], builder.add(base, at), lanes, number_bits)
                result[k * vectors + i] = fma(builder, x, number, result[k * vectors + i])
        return result

    with Loop(builder, whole(0), many, step, [zero(_LANES)] * (len(rows) * _VECTORS)) as wide:
        _fetch(builder, a, [builder.add(base, wide.index) for base in bases], number_bits)
        wide.carry(products(wide.index, _LANES, _VECTORS, wide.values))
    with Loop(builder, many, a["columns"], 1, [zero(1)] * len(rows)) as single:
        single.carry(products(single.index, 1, 1, single.values))
    for k, row in enumerate(rows):
        result = total(builder, tree(builder, wide.values[k * _VECTORS : (k + 1) * _VECTORS]), _LANES)
        result = builder.fadd(result, total(builder, single.values[k], 1))
        builder.store(result, builder.gep(a["output"], [row], source_etype=ir.FloatType()), align=4)


def _fetch(builder: Any, a: dict[str, Any], places: list[Any], bits: int) -> None:
    """Prefetch the numbers that are read some kilobytes later: rows in turn are more than processors predict."""
    from llvmlite import ir

    whole = ir.IntType(64)
    for place in places:
        ahead = builder.add(builder.mul(place, whole(bits // 8)), whole(_AHEAD))
        fetch(builder, builder.gep(a["numbers"], [ahead], source_etype=ir.IntType(8)))


def _number(builder: Any, numbers: Any, place: Any, lanes: int, bits: int) -> Any:
    """`lanes` numbers from index `place` on, as float32."""
    from llvmlite import ir

    kind = ir.HalfType() if bits == 16 else ir.IntType(8)
    narrow = builder.load(
        builder.gep(numbers, [place], source_etype=kind), typ=ir.VectorType(kind, lanes), align=bits // 8
    )
    if bits == 16:
        return builder.fpext(narrow, vector(lanes))
    return builder.sitofp(builder.sext(narrow, ir.VectorType(ir.IntType(32), lanes)), vector(lanes))
