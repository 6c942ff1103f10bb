"""Tables of products in bytes, for processors that look up 64 bytes at once (see `permuted`)."""

from __future__ import annotations

from functools import cache
from typing import Any

from bgd_plugin.jit.llvm import Loop, compiled, define
from bgd_plugin.jit.vectors import constant, fetch, fma, intrinsic, load, store, vector

__all__ = ["CHUNK", "CODEWORDS", "GROUP", "PLANES", "scratch_floats", "start_of_chunk", "tables_program"]

CHUNK = 64
"""Number of block positions that are worked on together: a cache line of codes."""
GROUP = 16
"""Number of block positions that share a scale."""
CODEWORDS = 256
"""Number of entries of a table; codebooks are filled up with zeros."""
PLANES = 3
"""Number of bytes of an entry."""

_LANES = 16
_LINE = 64
_LARGEST = float(2 ** (8 * PLANES) - 256)
"""The largest entry, with some room for rounding."""
_SMALLEST_RANGE = 1e-30
_BOOK = GROUP * (CODEWORDS + 1)
"""Where the transposed codebook lies in the scratch, behind a group's products and their smallest."""


def scratch_floats(block_size: int) -> int:
    """Number of float32 in the scratch of `tables_program`, for a `block_size`, the number of weights in a block."""
    return _BOOK + block_size * CODEWORDS


def start_of_chunk(builder: Any, chunk: Any, blocks: Any) -> tuple[Any, Any]:
    """A chunk's first block position, and how many of its positions an earlier chunk has: the last one overlaps.

    Args:
        builder: at the place where they are needed.
        chunk: its index, a 64-bit integer.
        blocks: number of block positions.
    """
    from llvmlite import ir

    whole = ir.IntType(64)
    own = builder.mul(chunk, whole(CHUNK))
    last = builder.sub(blocks, whole(CHUNK))
    start = builder.select(builder.icmp_signed("<", own, last), own, last)
    return start, builder.sub(own, start)


@cache
def tables_program(block_size: int) -> Any:
    """The products of every codeword with every block of one input, in fixed point of 24 bits.

    `table_i[c] ≈ (⟨input block i, codeword c⟩ − smallest_i) / scale`, as an integer. The `GROUP` positions of a group
    share the scale, so that their integers can be added; `offset` of a group is the sum of its smallest products.
    Positions that belong to an earlier chunk have products 0.

    Args:
        block_size: d, the number of weights in a block.

    The function takes the addresses of input `[blocks · block_size]`, codebook `[codewords, block_size]`, scratch (of
    `scratch_floats`), tables (bytes `[chunks · CHUNK, PLANES, CODEWORDS]`, the low bytes first), and of scales, offsets
    and ranges (float32 `[chunks · CHUNK / GROUP]`; the ranges of a group's positions are added, and not finite if a
    product is not), then `first` and `last` (chunks), `blocks`, at least `CHUNK`, `codewords`, and what to prefetch for
    the sums meanwhile: from the address `ahead` on so many `lines` for each position.
    """
    from llvmlite import ir

    pointers = ("input", "codebook", "scratch", "tables", "scales", "offsets", "ranges")
    module, builder, a = define("permuted_tables", pointers, ("first", "last", "blocks", "codewords", "ahead", "lines"))
    whole, single = ir.IntType(64), ir.FloatType()
    groups = CHUNK // GROUP
    _transpose(builder, a, block_size)
    with Loop(builder, a["first"], a["last"], 1, [a["ahead"]]) as chunks:
        start, done = start_of_chunk(builder, chunks.index, a["blocks"])
        with Loop(builder, whole(0), whole(groups), 1, chunks.values) as group:
            in_chunk = builder.mul(group.index, whole(GROUP))
            spread, offset, ranges, ahead = _products(builder, a, block_size, start, in_chunk, done, group.values[0])
            group.carry([ahead])
            place = builder.add(builder.mul(chunks.index, whole(groups)), group.index)
            scale = builder.fdiv(spread, single(_LARGEST))
            for name, number in (("scales", scale), ("offsets", offset), ("ranges", ranges)):
                builder.store(number, builder.gep(a[name], [place], source_etype=single), align=4)
            _integers(builder, a, builder.fdiv(single(_LARGEST), spread), builder.mul(place, whole(GROUP)))
        chunks.carry(group.values)
    builder.ret_void()
    return compiled(module)


def _transpose(builder: Any, a: dict[str, Any], block_size: int) -> None:
    """Write the codebook to the end of the scratch, `[block_size, CODEWORDS]`, filled up with zeros."""
    from llvmlite import ir

    whole, single = ir.IntType(64), ir.FloatType()

    def place(word: Any, i: int) -> Any:
        return builder.gep(a["scratch"], [builder.add(word, whole(_BOOK + CODEWORDS * i))], source_etype=single)

    with Loop(builder, whole(0), a["codewords"]) as words:
        own = builder.mul(words.index, whole(block_size))
        for i in range(block_size):
            source = builder.gep(a["codebook"], [builder.add(own, whole(i))], source_etype=single)
            builder.store(builder.load(source, typ=single, align=4), place(words.index, i), align=4)
    with Loop(builder, a["codewords"], whole(CODEWORDS)) as rest:
        for i in range(block_size):
            builder.store(single(0.0), place(rest.index, i), align=4)


def _products(
    builder: Any, a: dict[str, Any], block_size: int, start: Any, in_chunk: Any, done: Any, ahead: Any
) -> tuple[Any, ...]:
    """Write a group's products, and each position's smallest, to the scratch.

    Returns:
        the largest range, the sum of the smallest, the sum of the ranges, and the address that is prefetched next.
    """
    from llvmlite import ir

    whole, single = ir.IntType(64), ir.FloatType()
    first = [single(_SMALLEST_RANGE), single(0.0), single(0.0), ahead]
    with Loop(builder, whole(0), whole(GROUP), 1, first) as positions:
        ahead = _fetch_lines(builder, positions.values[3], a["lines"])
        number = builder.add(in_chunk, positions.index)
        fresh = builder.icmp_signed(">=", number, done)
        column = builder.mul(builder.add(start, number), whole(block_size))
        inputs = []
        for i in range(block_size):
            place = builder.gep(a["input"], [builder.add(column, whole(i))], source_etype=single)
            x = builder.select(fresh, builder.load(place, typ=single, align=4), single(0.0))
            inputs.append(_spread(builder, x))
        own = builder.mul(positions.index, whole(CODEWORDS))
        extremes = [constant(ir.FloatType(), _LANES, limit) for limit in (float("inf"), float("-inf"))]
        with Loop(builder, whole(0), whole(CODEWORDS), _LANES, extremes) as words:
            product = constant(single, _LANES, 0.0)
            for i, x in enumerate(inputs):
                word = load(builder, a["scratch"], builder.add(words.index, whole(_BOOK + CODEWORDS * i)), _LANES)
                product = fma(builder, x, word, product)
            store(builder, product, a["scratch"], builder.add(own, words.index))
            words.carry(
                [
                    builder.select(builder.fcmp_ordered(order, product, extreme), product, extreme)
                    for order, extreme in zip("<>", words.values, strict=True)
                ]
            )
        smallest, largest = (
            intrinsic(builder, f"llvm.vector.reduce.f{kind}.v{_LANES}f32", single, [value])
            for kind, value in zip(("min", "max"), words.values, strict=True)
        )
        place = builder.add(whole(GROUP * CODEWORDS), positions.index)
        builder.store(smallest, builder.gep(a["scratch"], [place], source_etype=single), align=4)
        spread = builder.fsub(largest, smallest)
        widest, offset, ranges, _ = positions.values
        wider = builder.select(builder.fcmp_ordered(">", spread, widest), spread, widest)
        positions.carry([wider, builder.fadd(offset, smallest), builder.fadd(ranges, spread), ahead])
    return tuple(positions.values)


def _fetch_lines(builder: Any, address: Any, count: Any) -> Any:
    """Prefetch so many lines from an address on; returns that of the next one."""
    from llvmlite import ir

    whole = ir.IntType(64)
    with Loop(builder, whole(0), count, 1, [address]) as lines:
        fetch(builder, builder.inttoptr(lines.values[0], ir.PointerType()))
        lines.carry([builder.add(lines.values[0], whole(_LINE))])
    return lines.values[0]


def _integers(builder: Any, a: dict[str, Any], per_unit: Any, table: Any) -> None:
    """Write a group's products as integers, byte by byte, to the tables from index `table` on."""
    from llvmlite import ir

    whole, byte, single = ir.IntType(64), ir.IntType(8), ir.FloatType()
    integers = vector(_LANES, ir.IntType(32))
    factor = _spread(builder, per_unit)
    half = constant(single, _LANES, 0.5)
    with Loop(builder, whole(0), whole(GROUP)) as positions:
        place = builder.add(whole(GROUP * CODEWORDS), positions.index)
        smallest = builder.load(builder.gep(a["scratch"], [place], source_etype=single), typ=single, align=4)
        lowest = _spread(builder, smallest)
        own = builder.mul(positions.index, whole(CODEWORDS))
        base = builder.mul(builder.add(table, positions.index), whole(PLANES * CODEWORDS))
        with Loop(builder, whole(0), whole(CODEWORDS), _LANES) as words:
            product = load(builder, a["scratch"], builder.add(own, words.index), _LANES)
            units = fma(builder, builder.fsub(product, lowest), factor, half)
            number = builder.fptosi(units, integers)
            for plane in range(PLANES):
                shift = constant(ir.IntType(32), _LANES, 8 * plane)
                part = builder.trunc(builder.lshr(number, shift), vector(_LANES, byte))
                at = builder.add(builder.add(base, whole(plane * CODEWORDS)), words.index)
                builder.store(part, builder.gep(a["tables"], [at], source_etype=byte), align=1)


def _spread(builder: Any, number: Any) -> Any:
    """A vector whose lanes are all equal to a number."""
    from llvmlite import ir

    kind = vector(_LANES)
    first = builder.insert_element(ir.Constant(kind, ir.Undefined), number, ir.IntType(32)(0))
    lanes = constant(ir.IntType(32), _LANES, 0)
    return builder.shuffle_vector(first, ir.Constant(kind, ir.Undefined), lanes)
