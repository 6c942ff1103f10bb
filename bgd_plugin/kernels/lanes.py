"""The kernel for several inputs: each weight, read from the codebook, is multiplied by many inputs at once.

Inputs lie side by side in the lanes of vectors, and the sums of a few rows for all of them stay in registers. No weight
is decoded to memory, where another thread would have to fetch it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from bgd_plugin.jit.llvm import Loop, compiled, define, pieces, read_codes, vector_lanes, vector_registers
from bgd_plugin.jit.vectors import fma, load, splat, store, transposed, vector, zero

__all__ = [
    "FEWEST_ROWS",
    "Kind",
    "cuts",
    "lane_count",
    "lanes_program",
    "last_width",
    "panel_floats",
    "row_count",
    "sum_rows",
    "widest",
]

FEWEST_ROWS = 8
"""Rows of a weight that the kernel needs on any processor."""
_UNIT = 8
"""Inputs of a group are a multiple of this."""
_REGISTER_FLOATS = 512
_COLUMNS = 512
"""Columns of the input that are in lanes at a time: they stay in a cache near the core."""


@cache
def row_count() -> int:
    """Rows computed at once."""
    return 8 if vector_registers() * vector_lanes() >= _REGISTER_FLOATS else 4


@cache
def widest() -> int:
    """Inputs computed at once, at most: their sums for `row_count()` rows take up three quarters of the registers."""
    return vector_registers() * vector_lanes() * 3 // (4 * row_count()) // _UNIT * _UNIT


def _blocks_of_a_panel(block_size: int) -> int:
    return max(1, _COLUMNS // block_size)


def lane_count(inputs: int) -> int:
    """Lanes in which this number of inputs is computed: groups of `widest()`, and of what remains."""
    return inputs // widest() * widest() + last_width(inputs) * (inputs % widest() > 0)


def last_width(inputs: int) -> int:
    """Lanes of the inputs that remain after groups of `widest()`; `widest()` if none do."""
    return -(-(inputs % widest()) // _UNIT) * _UNIT or widest()


def cuts(width: int) -> list[tuple[int, int]]:
    """The vectors of a group: (offset, lanes). Three of 8 lanes are faster than one of 16 and one of 8.

    Args:
        width: number of inputs in the group, a multiple of 8.
    """
    return [(at, _UNIT) for at in range(0, width, _UNIT)] if width == 3 * _UNIT else pieces(width)


def panel_floats(block_size: int) -> int:
    """Number of floats in the panel of `lanes_program`, for a `block_size`, the number of weights in a block."""
    return _sums(block_size) + 2 * widest() * row_count()


def _sums(block_size: int) -> int:
    """Where sums lie on their way to the outputs: behind the inputs."""
    return _blocks_of_a_panel(block_size) * block_size * widest()


@dataclass(frozen=True, kw_only=True)
class Kind:
    """The function being generated, and the kind of layer that it is for.

    Attributes:
        builder: at the place where code is generated.
        a: the function's arguments by name; "codes", "codebook", "panel" and "blocks" among them.
        block_size: weights in a block.
        code_bits: bits of a code in memory.
    """

    builder: Any
    a: dict[str, Any]
    block_size: int
    code_bits: int


@cache
def lanes_program(block_size: int, code_bits: int, tail: int) -> Any:
    """`output[n, r] = bias[r] + Σ_c input[n, c] · weight[r, c]` for some inputs and rows, in float32.

    Args:
        block_size: d, the number of weights in a block.
        code_bits: bits of a code in memory.
        tail: lanes of the inputs that remain after groups of `widest()`, see `last_width`.

    The function takes the addresses of input `[inputs, columns]`, codebook `[codebook_size, block_size]`, codes, bias
    `[rows]`, output `[inputs, rows]` and panel (of `panel_floats`), then the first row and the last one (at least
    `row_count()` apart), the first input and the last one, `rows` and `blocks`.
    """
    from llvmlite import ir

    pointers = ("input", "codebook", "codes", "bias", "output", "panel")
    numbers = ("first", "last", "start", "stop", "rows", "blocks")
    module, builder, a = define("lanes", pointers, numbers)
    kind = Kind(builder=builder, a=a, block_size=block_size, code_bits=code_bits)
    whole, most = ir.IntType(64), widest()
    middle = a["start"]
    if tail < most:
        groups = builder.sdiv(builder.sub(a["stop"], a["start"]), whole(most))
        middle = builder.add(a["start"], builder.mul(groups, whole(most)))
        with Loop(builder, a["start"], middle, most) as group:
            _group(kind, group.index, most)
    with Loop(builder, middle, a["stop"], tail) as group:
        _group(kind, group.index, tail)
    builder.ret_void()
    return compiled(module)


def _group(kind: Kind, start: Any, width: int) -> None:
    """The outputs of up to `width` inputs from index `start` on."""
    from llvmlite import ir

    builder, a, whole = kind.builder, kind.a, ir.IntType(64)
    step = _blocks_of_a_panel(kind.block_size)
    most = whole(step)
    with Loop(builder, whole(0), a["blocks"], step) as panel:
        left = builder.sub(a["blocks"], panel.index)
        count = builder.select(builder.icmp_signed("<", left, most), left, most)
        _fill_panel(kind, start, width, panel.index, count)
        with Loop(builder, a["first"], a["last"], row_count()) as rows:
            final = builder.sub(a["last"], whole(row_count()))
            row = builder.select(builder.icmp_signed("<", rows.index, final), rows.index, final)
            found = sum_rows(kind, row, width, (panel.index, count), lambda column: builder.mul(column, whole(width)))
            _write(kind, found, width, start, row, builder.sub(rows.index, row), panel.index)


def _fill_panel(kind: Kind, start: Any, width: int, block: Any, count: Any) -> None:
    """Write columns of the inputs to the panel `[columns, width]`; what lies behind the last input repeats it."""
    from llvmlite import ir

    builder, a, whole, side = kind.builder, kind.a, ir.IntType(64), row_count()
    size = whole(kind.block_size)
    columns, first, wide = builder.mul(count, size), builder.mul(block, size), builder.mul(a["blocks"], size)
    final = builder.sub(a["stop"], whole(1))
    many = builder.and_(columns, whole(-side))
    with Loop(builder, whole(0), whole(width), side) as part:
        bases = []
        for i in range(side):
            number = builder.add(builder.add(start, part.index), whole(i))
            number = builder.select(builder.icmp_signed("<", number, final), number, final)
            bases.append(builder.add(builder.mul(number, wide), first))

        def place(column: Any, part: Any = part) -> Any:
            return builder.add(builder.mul(column, whole(width)), part.index)

        with Loop(builder, whole(0), many, side) as column:
            found = [load(builder, a["input"], builder.add(base, column.index), side) for base in bases]
            for i, values in enumerate(transposed(builder, found)):
                store(builder, values, a["panel"], place(builder.add(column.index, whole(i))))
        with Loop(builder, many, columns) as rest:
            for i, base in enumerate(bases):
                value = load(builder, a["input"], builder.add(base, rest.index), 1)
                store(builder, value, a["panel"], builder.add(place(rest.index), whole(i)))


def sum_rows(kind: Kind, row: Any, width: int, blocks: tuple[Any, Any], place: Callable[[Any], Any]) -> list[list[Any]]:
    """The sums of `row_count()` rows over some blocks of columns, for `width` inputs.

    Args:
        kind: of the layer; the inputs are in the memory named "panel".
        row: index of the first row.
        width: number of inputs, see `last_width`.
        blocks: index of the first one in a row, and their number.
        place: from a column, counted from the first block, to the index of its first input in the panel.

    Returns:
        for each row vectors, which are `cuts(width)`.
    """
    from llvmlite import ir

    block, count = blocks
    builder, a, whole, rows = kind.builder, kind.a, ir.IntType(64), row_count()
    parts, size = cuts(width), whole(kind.block_size)
    bases = [builder.add(builder.mul(builder.add(row, whole(k)), a["blocks"]), block) for k in range(rows)]
    zeros = [zero(lanes) for _ in range(rows) for _, lanes in parts]
    with Loop(builder, whole(0), count, 1, zeros) as loop:
        codes = [read_codes(builder, a["codes"], builder.add(base, loop.index), 1, kind.code_bits)[0] for base in bases]
        words = [builder.mul(code, size) for code in codes]
        column = builder.mul(loop.index, size)
        # A loop, though the size is known: in longer code without jumps, sums would leave the registers.
        with Loop(builder, whole(0), size, 1, loop.values) as weights:
            first = place(builder.add(column, weights.index))
            inputs = [load(builder, a["panel"], builder.add(first, whole(at)), lanes) for at, lanes in parts]
            result = []
            for k, word in enumerate(words):
                weight = load(builder, a["codebook"], builder.add(word, weights.index), 1)
                for p, (_, lanes) in enumerate(parts):
                    own = weights.values[k * len(parts) + p]
                    result.append(fma(builder, splat(builder, weight, lanes), inputs[p], own))
            weights.carry(result)
        loop.carry(weights.values)
    return [loop.values[k * len(parts) : (k + 1) * len(parts)] for k in range(rows)]


def _write(kind: Kind, found: list[list[Any]], width: int, start: Any, row: Any, done: Any, block: Any) -> None:
    """Add the sums to the outputs, and the bias once; the first `done` of the rows have been written before."""
    from llvmlite import ir

    builder, a, whole, side = kind.builder, kind.a, ir.IntType(64), row_count()
    rough = _sums(kind.block_size)
    sums = rough + widest() * side
    for k, values in enumerate(found):
        for (at, _), value in zip(cuts(width), values, strict=True):
            store(builder, value, a["panel"], whole(rough + k * width + at))
    with Loop(builder, whole(0), whole(width), side) as part:
        own = [load(builder, a["panel"], builder.add(part.index, whole(rough + k * width)), side) for k in range(side)]
        for i, value in enumerate(transposed(builder, own)):
            at = builder.mul(builder.add(part.index, whole(i)), whole(side))
            store(builder, value, a["panel"], builder.add(at, whole(sums)))
    numbers = ir.Constant(vector(side, whole), list(range(side)))
    spread = builder.insert_element(ir.Constant(vector(side, whole), ir.Undefined), done, ir.IntType(32)(0))
    spread = builder.shuffle_vector(spread, spread, ir.Constant(vector(side, ir.IntType(32)), [0] * side))
    is_done = builder.icmp_signed("<", numbers, spread)
    is_first = builder.icmp_signed("==", block, whole(0))
    bias, left = load(builder, a["bias"], row, side), builder.sub(a["stop"], start)
    valid = builder.select(builder.icmp_signed("<", left, whole(width)), left, whole(width))
    with Loop(builder, whole(0), valid) as lane:
        place = builder.add(builder.mul(builder.add(start, lane.index), a["rows"]), row)
        before = load(builder, a["output"], place, side)
        own = load(builder, a["panel"], builder.add(builder.mul(lane.index, whole(side)), whole(sums)), side)
        after = builder.fadd(builder.select(is_first, bias, before), own)
        store(builder, builder.select(is_done, before, after), a["output"], place)
