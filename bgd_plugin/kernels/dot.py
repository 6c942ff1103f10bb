"""The dot kernel: one input times a quantized weight, codeword by codeword."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from bgd_plugin.jit.llvm import Loop, compiled, define, pieces, read_codes, rows_together, vector_registers
from bgd_plugin.jit.vectors import fetch, fma, load, masked, total, tree, zero

__all__ = ["dot_program"]

_ROWS = 4
"""Rows computed at once."""
_CACHE_LINE = 64
_AHEAD = 8192
"""Bytes of codes between what is read and what is asked for; processors do not predict several rows at once."""


@cache
def dot_program(block_size: int, code_bits: int, has_mask: bool) -> Any:
    """`output[r] = Σ_i ⟨input block i, codeword of codes[r, i]⟩` for one input, in float32.

    A codeword is one or two vectors of the codebook, which stays in the innermost cache; the weight exists only in
    registers. Several independent sums keep the processor's pipelines full. A few rows at a time share the input's
    vectors, because loads take most of the time.

    Args:
        block_size: d, the number of weights in a block.
        code_bits: bits of a code in memory.
        has_mask: whether the layer has a mask.

    The function takes the addresses of input `[columns]`, codebook `[codebook_size, block_size]`, codes, mask (bytes
    `[rows, columns]`, if it has one) and output `[rows]`, then `first`, `last` and `blocks`.
    """
    pointers = ("input", "codebook", "codes", "mask", "output")
    module, builder, a = define("dot", pointers, ("first", "last", "blocks"))
    kind = _Kind(builder=builder, a=a, block_size=block_size, code_bits=code_bits, has_mask=has_mask)
    for rows in rows_together(builder, a["first"], a["last"], _ROWS):
        _sum_rows(kind, rows)
    builder.ret_void()
    return compiled(module)


@dataclass(frozen=True, kw_only=True)
class _Kind:
    """The function being generated, and the kind of layer that it is for."""

    builder: Any
    a: dict[str, Any]
    block_size: int
    code_bits: int
    has_mask: bool


def _fetch(kind: _Kind, bases: list[Any], start: Any) -> None:
    """Prefetch the codes that are read some kilobytes later, a line for each row."""
    from llvmlite import ir

    builder, a, whole = kind.builder, kind.a, ir.IntType(64)
    size = whole(kind.code_bits // 8)
    own = builder.mul(builder.mul(a["blocks"], size), whole(len(bases)))
    ahead = builder.select(builder.icmp_signed(">", own, whole(_AHEAD)), own, whole(_AHEAD))
    for base in bases:
        place = builder.add(builder.mul(builder.add(base, start), size), ahead)
        fetch(builder, builder.gep(a["codes"], [place], source_etype=ir.IntType(8)))


def _sum_rows(kind: _Kind, rows: list[Any]) -> None:
    """The outputs of some rows, which share the loads of the input."""
    from llvmlite import ir

    builder, a, whole = kind.builder, kind.a, ir.IntType(64)
    cuts = pieces(kind.block_size)
    together = _unrolled(kind.block_size, len(rows))
    bases = [builder.mul(row, a["blocks"]) for row in rows]
    many = builder.and_(a["blocks"], whole(-together))
    zeros = [zero(lanes) for _ in rows for _, lanes in cuts] * together
    line = max(together, _CACHE_LINE * 8 // kind.code_bits)
    lines = builder.and_(a["blocks"], whole(-line))
    with Loop(builder, whole(0), lines, line, zeros) as far:
        _fetch(kind, bases, far.index)
        with Loop(builder, far.index, builder.add(far.index, whole(line)), together, far.values) as near:
            near.carry(_products(kind, bases, near.index, together, near.values))
        far.carry(near.values)
    with Loop(builder, lines, many, together, far.values) as blocks:
        blocks.carry(_products(kind, bases, blocks.index, together, blocks.values))
    with Loop(builder, many, a["blocks"], 1, blocks.values) as rest:
        rest.carry(_products(kind, bases, rest.index, 1, rest.values))
    per_block = len(rows) * len(cuts)
    for i, row in enumerate(rows):
        result = ir.FloatType()(0.0)
        for j, (_, lanes) in enumerate(cuts):
            sums = rest.values[i * len(cuts) + j :: per_block]
            result = builder.fadd(result, total(builder, tree(builder, sums), lanes))
        builder.store(result, builder.gep(a["output"], [row], source_etype=ir.FloatType()), align=4)


def _products(kind: _Kind, bases: list[Any], start: Any, count: int, sums: list[Any]) -> list[Any]:
    """The sums after `count` more blocks; there is one sum for each block, row and vector."""
    from llvmlite import ir

    builder, a, whole = kind.builder, kind.a, ir.IntType(64)
    cuts = pieces(kind.block_size)
    result = list(sums)
    codes = [read_codes(builder, a["codes"], builder.add(base, start), count, kind.code_bits) for base in bases]
    for i in range(count):
        column = builder.mul(builder.add(start, whole(i)), whole(kind.block_size))
        for j, (offset, lanes) in enumerate(cuts):
            at = builder.add(column, whole(offset))
            x = load(builder, a["input"], at, lanes)
            for k, base in enumerate(bases):
                own = x
                if kind.has_mask:
                    own = masked(
                        builder, a["mask"], builder.add(builder.mul(base, whole(kind.block_size)), at), x, lanes
                    )
                word = builder.add(builder.mul(codes[k][i], whole(kind.block_size)), whole(offset))
                place = (i * len(bases) + k) * len(cuts) + j
                result[place] = fma(builder, own, load(builder, a["codebook"], word, lanes), result[place])
    return result


def _unrolled(block_size: int, rows: int) -> int:
    """Number of blocks computed at once, so that their sums fit in the registers."""
    vectors = rows * len(pieces(block_size))
    return next((count for count in (8, 4, 2) if count * vectors <= vector_registers() // 2), 1)
