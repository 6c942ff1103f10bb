"""Sums of table entries, 64 rows at once (see `permuted`)."""

from __future__ import annotations

import functools
from functools import cache
from typing import Any

from bgd_plugin.jit.llvm import Loop, compiled, define
from bgd_plugin.jit.vectors import constant, fetch, fma, intrinsic, load, store, vector
from bgd_plugin.kernels.permuted_tables import CHUNK, CODEWORDS, GROUP, PLANES, start_of_chunk

__all__ = ["ROWS", "sums_program"]

_VECTORS = 2
_BYTES = 64
"""Bytes in a vector, and so the rows whose entries are looked up at once."""
ROWS = _VECTORS * _BYTES
"""Rows computed at once."""
_ROWS_OF_A_PASS = 2 * ROWS
"""Rows whose codes stay in a cache while all their columns are read."""
_LANE = 16
"""Bytes within which a vector is interleaved cheaply."""
_TABLE = PLANES * CODEWORDS


@cache
def sums_program() -> Any:
    """`output[r] = bias[r] + Σ_i table_i[codes[r, i]]` for tables of `permuted_tables`.

    A vector of codes of 64 rows at one position picks 64 bytes of the table, in one instruction for each half of it.
    Bytes of even and odd rows are summed in 16 bits, and their sums become floats for each group of positions.

    The function takes the addresses of codes (bytes `[rows, blocks]`), tables, scales, offsets, scratch (bytes `[ROWS /
    64, CHUNK, 64]`, and as many again), bias and output `[rows]`, then `first` and `last` (a multiple of `ROWS`
    apart) and `blocks`.
    """
    from llvmlite import ir

    pointers = ("codes", "tables", "scales", "offsets", "scratch", "bias", "output")
    module, builder, a = define("permuted_sums", pointers, ("first", "last", "blocks"))
    whole = ir.IntType(64)
    chunk_count = builder.sdiv(builder.add(a["blocks"], whole(CHUNK - 1)), whole(CHUNK))
    with Loop(builder, a["first"], a["last"], 16) as rows:
        store(builder, load(builder, a["bias"], rows.index, 16), a["output"], rows.index)
    with Loop(builder, a["first"], a["last"], _ROWS_OF_A_PASS) as passes:
        stop = builder.add(passes.index, whole(_ROWS_OF_A_PASS))
        stop = builder.select(builder.icmp_signed("<", stop, a["last"]), stop, a["last"])
        next_pass = builder.mul(stop, a["blocks"])
        with Loop(builder, whole(0), chunk_count, 1, [next_pass]) as chunks:
            start, done = start_of_chunk(builder, chunks.index, a["blocks"])
            first_group = builder.sdiv(done, whole(GROUP))
            with Loop(builder, passes.index, stop, ROWS, chunks.values) as rows:
                _columns_of_codes(builder, a, rows.index, start)
                with Loop(builder, first_group, whole(CHUNK // GROUP), 1, rows.values) as group:
                    place = builder.add(builder.mul(chunks.index, whole(CHUNK // GROUP)), group.index)
                    _add_group(builder, a, rows.index, group.index, place, group.values[0])
                    group.carry([builder.add(group.values[0], whole(GROUP * ROWS))])
                rows.carry(group.values)
            chunks.carry(rows.values)
    builder.ret_void()
    return compiled(module)


def _columns_of_codes(builder: Any, a: dict[str, Any], row: Any, start: Any) -> None:
    """Write the codes of `ROWS` rows to the scratch, column by column: `[ROWS / 64, CHUNK, 64]`.

    Each row's codes are read once, a cache line; rows are often 4096 bytes apart, so that few lines fit in a cache.
    """
    from llvmlite import ir

    byte, whole = ir.IntType(8), ir.IntType(64)
    kind, quarters, parts = vector(_BYTES, byte), CHUNK // _LANE, whole(_VECTORS * CHUNK)

    def address(*places: Any) -> Any:
        place = functools.reduce(builder.add, places)
        return builder.gep(a["scratch"], [builder.mul(place, whole(_BYTES))], source_etype=byte)

    with Loop(builder, whole(0), whole(_VECTORS)) as half:
        top = builder.add(row, builder.mul(half.index, whole(_BYTES)))
        with Loop(builder, whole(0), whole(_LANE)) as rows:
            found = []
            for lane in range(_BYTES // _LANE):
                own = builder.add(builder.add(top, rows.index), whole(_LANE * lane))
                place = builder.add(builder.mul(own, a["blocks"]), start)
                found.append(builder.load(builder.gep(a["codes"], [place], source_etype=byte), typ=kind, align=1))
            for i, value in enumerate(_quarters(builder, found)):
                builder.store(value, address(parts, whole(i * _LANE), rows.index), align=1)
        with Loop(builder, whole(0), whole(quarters)) as quarter:
            first = builder.mul(quarter.index, whole(_LANE))
            found = [builder.load(address(parts, first, whole(i)), typ=kind, align=1) for i in range(_LANE)]
            base = builder.add(first, builder.mul(half.index, whole(CHUNK)))
            for i, value in enumerate(_transposed(builder, found)):
                builder.store(value, address(base, whole(i)), align=1)


def _quarters(builder: Any, rows: list[Any]) -> list[Any]:
    """From four vectors `[4 lanes]`, the four whose lanes are lane i of each."""
    from llvmlite import ir

    def pick(x: Any, y: Any, lanes: list[int]) -> Any:
        order = [lane * _LANE + i for lane in lanes for i in range(_LANE)]
        return builder.shuffle_vector(x, y, ir.Constant(vector(_BYTES, ir.IntType(32)), order))

    low = [pick(rows[0], rows[1], lanes) for lanes in ([0, 1, 4, 5], [2, 3, 6, 7])]
    high = [pick(rows[2], rows[3], lanes) for lanes in ([0, 1, 4, 5], [2, 3, 6, 7])]
    pairs = zip(low, high, strict=True)
    return [pick(x, y, lanes) for x, y in pairs for lanes in ([0, 2, 4, 6], [1, 3, 5, 7])]


def _transposed(builder: Any, rows: list[Any]) -> list[Any]:
    """Sixteen vectors, whose lanes hold 16 columns of 16 rows, column by column.

    Interleaving vectors i and i + 8 rotates the address of a byte, [row, column], by a bit; four times exchange both.
    """
    from llvmlite import ir

    def interleaved(x: Any, y: Any, first: int) -> Any:
        order = [
            source + lane * _LANE + first + i
            for lane in range(_BYTES // _LANE)
            for i in range(_LANE // 2)
            for source in (0, _BYTES)
        ]
        return builder.shuffle_vector(x, y, ir.Constant(vector(_BYTES, ir.IntType(32)), order))

    half = _LANE // 2
    for _ in range(4):
        rows = [interleaved(rows[i], rows[i + half], first) for i in range(half) for first in (0, half)]
    return rows


def _add_group(builder: Any, a: dict[str, Any], row: Any, group: Any, place: Any, ahead: Any) -> None:
    """Add the entries of a group's positions to the outputs of `ROWS` rows."""
    from llvmlite import ir

    whole, words = ir.IntType(64), vector(_BYTES // 2, ir.IntType(16))
    column = builder.mul(group, whole(GROUP))
    table = builder.mul(place, whole(GROUP * _TABLE))
    zeros = [ir.Constant(words, None)] * (2 * PLANES * _VECTORS)
    with Loop(builder, whole(0), whole(GROUP), 1, zeros) as positions:
        own = builder.add(table, builder.mul(positions.index, whole(_TABLE)))
        sums = _add_entries(builder, a, own, builder.add(column, positions.index), positions.values)
        positions.carry(sums)
        _fetch(builder, a, builder.add(ahead, builder.mul(positions.index, whole(ROWS))))
    scale, offset = (
        builder.load(builder.gep(a[name], [place], source_etype=ir.FloatType()), typ=vector(1), align=4)
        for name in ("scales", "offsets")
    )
    for half in range(_VECTORS):
        own = positions.values[2 * PLANES * half : 2 * PLANES * (half + 1)]
        _add_floats(builder, a, own, builder.add(row, whole(half * _BYTES)), scale, offset)


def _fetch(builder: Any, a: dict[str, Any], place: Any) -> None:
    """Prefetch two lines of the next pass's codes, in the order of their addresses."""
    from llvmlite import ir

    for offset in range(0, ROWS, _BYTES):
        own = builder.add(place, ir.IntType(64)(offset))
        fetch(builder, builder.gep(a["codes"], [own], source_etype=ir.IntType(8)))


def _add_entries(builder: Any, a: dict[str, Any], table: Any, column: Any, sums: list[Any]) -> list[Any]:
    """The sums after one more position: for each plane, of all bytes as 16-bit numbers, and of their high bytes."""
    from llvmlite import ir

    byte, whole = ir.IntType(8), ir.IntType(64)
    kind, words = vector(_BYTES, byte), vector(_BYTES // 2, ir.IntType(16))

    def read(name: str, place: Any) -> Any:
        return builder.load(builder.gep(a[name], [place], source_etype=byte), typ=kind, align=1)

    quarters = [read("tables", builder.add(table, whole(_BYTES * i))) for i in range(_TABLE // _BYTES)]
    result = list(sums)
    for half in range(_VECTORS):
        place = builder.mul(builder.add(column, whole(half * CHUNK)), whole(_BYTES))
        codes = read("scratch", place)
        upper = builder.icmp_signed("<", codes, ir.Constant(kind, None))
        for plane in range(PLANES):
            own = quarters[4 * plane : 4 * plane + 4]
            low, high = (
                intrinsic(builder, "llvm.x86.avx512.vpermi2var.qi.512", kind, [own[i], codes, own[i + 1]])
                for i in (0, 2)
            )
            found = builder.bitcast(builder.select(upper, high, low), words)
            at = 2 * (PLANES * half + plane)
            result[at] = builder.add(sums[at], found)
            odd = builder.lshr(found, constant(ir.IntType(16), _BYTES // 2, 8))
            result[at + 1] = builder.add(sums[at + 1], odd)
    return result


def _add_floats(builder: Any, a: dict[str, Any], sums: list[Any], row: Any, scale: Any, offset: Any) -> None:
    """Add 64 rows' sums, as floats, to the outputs from index `row` on."""
    from llvmlite import ir

    number, short = ir.IntType(32), ir.IntType(16)
    count, lanes = _BYTES // 2, 16
    parts = []
    for is_odd in (False, True):
        result = ir.Constant(vector(count, number), None)
        for plane in range(PLANES):
            both, odd = sums[2 * plane : 2 * plane + 2]
            own = odd if is_odd else builder.sub(both, builder.shl(odd, constant(short, count, 8)))
            wide = builder.shl(builder.zext(own, vector(count, number)), constant(number, count, 8 * plane))
            result = builder.add(result, wide)
        parts.append(builder.sitofp(result, vector(count)))
    same = constant(number, lanes, 0)
    factor, shift = (builder.shuffle_vector(x, ir.Constant(x.type, ir.Undefined), same) for x in (scale, offset))
    for i in range(_BYTES // lanes):
        order = [source + i * lanes // 2 + j for j in range(lanes // 2) for source in (0, count)]
        mixed = builder.shuffle_vector(*parts, ir.Constant(vector(lanes, number), order))
        at = builder.add(row, ir.IntType(64)(i * lanes))
        value = builder.fadd(fma(builder, mixed, factor, shift), load(builder, a["output"], at, lanes))
        store(builder, value, a["output"], at)
