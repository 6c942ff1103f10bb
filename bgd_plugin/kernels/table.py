"""The table kernel: a few inputs at once, with tables of products computed once for all rows."""

from __future__ import annotations

from functools import cache
from typing import Any

from bgd_plugin.jit.llvm import Loop, compiled, define, read_codes
from bgd_plugin.jit.vectors import fma, load, splat, store, tree, zero

__all__ = ["LANES", "TABLE_POSITIONS", "table_program"]

LANES = 8
"""Number of inputs that the table kernel computes at once."""
TABLE_POSITIONS = 8
"""Number of block positions whose tables are in memory at once."""


@cache
def table_program(block_size: int, code_bits: int) -> Any:
    """`output[r, :] = Σ_i table_i[codes[r, i], :]` for `LANES` inputs at once, in float32.

    `table_i[c, :]` holds the products of all inputs' block i with codeword c. Tables of `TABLE_POSITIONS` positions are
    computed and used before the next ones, so that they stay in the caches.

    Args:
        block_size: d, the number of weights in a block.
        code_bits: bits of a code in memory.

    The function takes the addresses of input `[columns, LANES]`, codebook `[codebook_size, block_size]`, codes, output
    `[rows, LANES]` and table `[TABLE_POSITIONS, codebook_size, LANES]`, then `first`, `last`, `blocks`, `codewords`.
    """
    from llvmlite import ir

    pointers, numbers = ("input", "codebook", "codes", "output", "table"), ("first", "last", "blocks", "codewords")
    module, builder, a = define("table", pointers, numbers)
    whole = ir.IntType(64)

    def row_of_output(row: Any) -> Any:
        return builder.mul(row, whole(LANES))

    def use(start: Any, count: int) -> None:
        """Make `count` tables and add their entries to the outputs of all rows."""
        for i in range(count):
            _fill_table(builder, a, builder.add(start, whole(i)), i, block_size)
        with Loop(builder, a["first"], a["last"]) as rows:
            base = builder.add(builder.mul(rows.index, a["blocks"]), start)
            found = []
            for i, code in enumerate(read_codes(builder, a["codes"], base, count, code_bits)):
                entry = builder.add(builder.mul(a["codewords"], whole(i)), code)
                found.append(load(builder, a["table"], builder.mul(entry, whole(LANES)), LANES))
            at = row_of_output(rows.index)
            total = builder.fadd(load(builder, a["output"], at, LANES), tree(builder, found))
            store(builder, total, a["output"], at)

    with Loop(builder, a["first"], a["last"]) as rows:
        store(builder, zero(LANES), a["output"], row_of_output(rows.index))
    many = builder.and_(a["blocks"], whole(-TABLE_POSITIONS))
    with Loop(builder, whole(0), many, TABLE_POSITIONS) as blocks:
        use(blocks.index, TABLE_POSITIONS)
    with Loop(builder, many, a["blocks"]) as rest:
        use(rest.index, 1)
    builder.ret_void()
    return compiled(module)


def _fill_table(builder: Any, a: dict[str, Any], position: Any, slot: int, block_size: int) -> None:
    """`table[slot, c, :] = Σ_j codebook[c, j] · input[position · block_size + j, :]` for all codewords c."""
    from llvmlite import ir

    whole = ir.IntType(64)
    column = builder.mul(position, whole(block_size * LANES))
    inputs = [load(builder, a["input"], builder.add(column, whole(j * LANES)), LANES) for j in range(block_size)]
    with Loop(builder, whole(0), a["codewords"]) as codewords:
        total = zero(LANES)
        word = builder.mul(codewords.index, whole(block_size))
        for j, x in enumerate(inputs):
            number = load(builder, a["codebook"], builder.add(word, whole(j)), 1)
            total = fma(builder, splat(builder, number, LANES), x, total)
        entry = builder.add(builder.mul(a["codewords"], whole(slot)), codewords.index)
        store(builder, total, a["table"], builder.mul(entry, whole(LANES)))
