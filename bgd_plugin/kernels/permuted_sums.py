"""Sums of table entries, 64 rows at once (see `permuted`)."""

from __future__ import annotations

from functools import cache
from typing import Any

from bgd_plugin.jit.llvm import Loop, compiled, define
from bgd_plugin.jit.vectors import constant, fetch, fma, intrinsic, load, store, vector
from bgd_plugin.kernels.permuted_tables import CHUNK, CODEWORDS, GROUP, PLANES, start_of_chunk

__all__ = ["MOST_ROWS", "ROWS", "SCRATCH", "sums_program"]

_VECTORS = 2
_BYTES = 64
"""Bytes in a vector, and so the rows whose entries are looked up at once."""
ROWS = _VECTORS * _BYTES
"""Rows computed at once."""
MOST_ROWS = 4 * ROWS
"""Rows at most whose codes stay in a cache while all their columns are read: a pass."""
_LANE = 16
"""Bytes within which a vector is interleaved cheaply."""
_TABLE = PLANES * CODEWORDS
_COLUMNS = MOST_ROWS * CHUNK
"""Where the columns of a group lie in the scratch, behind the quarters of a pass."""
SCRATCH = _COLUMNS + ROWS * GROUP
"""Bytes of the scratch."""


@cache
def sums_program() -> Any:
    """`output[r] = bias[r] + Σ_i table_i[codes[r, i]]` for tables of `permuted_tables`.

    A vector of codes of 64 rows at one position picks 64 bytes of the table, in one instruction for each half of it.
    Bytes of even and odd rows are summed in 16 bits, and their sums become floats for each group of positions.

    The rows of a pass share a group's tables, which stay in the innermost cache meanwhile; the codes of the next pass
    are prefetched in the order of their addresses.

    The function takes the addresses of codes (bytes `[rows, blocks]`), tables, scales, offsets, scratch (of `SCRATCH`
    bytes), bias and output `[rows]`, then `first` and `last` (a multiple of `ROWS` apart), `blocks`, and `step`, the
    rows of a pass, a multiple of `ROWS` up to `MOST_ROWS`.
    """
    from llvmlite import ir

    pointers = ("codes", "tables", "scales", "offsets", "scratch", "bias", "output")
    module, builder, a = define("permuted_sums", pointers, ("first", "last", "blocks", "step"))
    whole = ir.IntType(64)
    with Loop(builder, a["first"], a["last"], 16) as rows:
        store(builder, load(builder, a["bias"], rows.index, 16), a["output"], rows.index)
    rows_and_more = builder.add(builder.sub(a["last"], a["first"]), builder.sub(a["step"], whole(1)))
    with Loop(builder, whole(0), builder.sdiv(rows_and_more, a["step"])) as passes:
        top = builder.add(a["first"], builder.mul(passes.index, a["step"]))
        end = builder.add(top, a["step"])
        is_last = builder.icmp_signed(">=", end, a["last"])
        stride = builder.select(is_last, whole(0), whole(ROWS))  # nothing is left to prefetch
        _add_pass(builder, a, top, builder.select(is_last, a["last"], end), stride)
    builder.ret_void()
    return compiled(module)


def _add_pass(builder: Any, a: dict[str, Any], top: Any, end: Any, stride: Any) -> None:
    """Add all entries to the outputs of rows `top` to `end`, and prefetch the next rows, `stride` bytes at a time."""
    from llvmlite import ir

    whole, per_chunk = ir.IntType(64), CHUNK // GROUP
    chunk_count = builder.sdiv(builder.add(a["blocks"], whole(CHUNK - 1)), whole(CHUNK))
    with Loop(builder, whole(0), chunk_count, 1, [builder.mul(end, a["blocks"])]) as chunks:
        start, done = start_of_chunk(builder, chunks.index, a["blocks"])
        with Loop(builder, top, end, _BYTES) as rows:
            _quarters_of_codes(builder, a, rows.index, builder.sub(rows.index, top), start)
        with Loop(builder, builder.sdiv(done, whole(GROUP)), whole(per_chunk), 1, chunks.values) as group:
            place = builder.add(builder.mul(chunks.index, whole(per_chunk)), group.index)
            with Loop(builder, top, end, ROWS, group.values) as rows:
                _columns_of_codes(builder, a, builder.sub(rows.index, top), group.index)
                rows.carry([_add_group(builder, a, rows.index, place, rows.values[0], stride)])
            group.carry(rows.values)
        chunks.carry(group.values)


def _at(builder: Any, a: dict[str, Any], line: Any, offset: int = 0) -> Any:
    """The address of a cache line of the scratch, behind an offset in bytes."""
    from llvmlite import ir

    whole = ir.IntType(64)
    place = builder.add(builder.mul(line, whole(_BYTES)), whole(offset))
    return builder.gep(a["scratch"], [place], source_etype=ir.IntType(8))


def _quarters_of_codes(builder: Any, a: dict[str, Any], row: Any, in_pass: Any, start: Any) -> None:
    """Write a chunk's codes of 64 rows to the scratch by quarters of its columns, `[4, 16, 64]`, four rows in a line.

    Each row's codes are read once, a cache line; rows are often 4096 bytes apart, so that few lines fit in a cache.
    """
    from llvmlite import ir

    byte, whole = ir.IntType(8), ir.IntType(64)
    with Loop(builder, whole(0), whole(_LANE)) as rows:
        found = []
        for lane in range(_BYTES // _LANE):
            own = builder.add(builder.add(row, rows.index), whole(_LANE * lane))
            place = builder.add(builder.mul(own, a["blocks"]), start)
            address = builder.gep(a["codes"], [place], source_etype=byte)
            found.append(builder.load(address, typ=vector(_BYTES, byte), align=1))
        for i, value in enumerate(_quarters(builder, found)):
            line = builder.add(builder.add(in_pass, rows.index), whole(i * _LANE))
            builder.store(value, _at(builder, a, line), align=1)


def _columns_of_codes(builder: Any, a: dict[str, Any], in_pass: Any, quarter: Any) -> None:
    """Write a quarter's codes of `ROWS` rows to the end of the scratch, column by column: `[ROWS / 64, 16, 64]`."""
    from llvmlite import ir

    whole, kind = ir.IntType(64), vector(_BYTES, ir.IntType(8))
    with Loop(builder, whole(0), whole(_VECTORS)) as half:
        base = builder.add(in_pass, builder.mul(half.index, whole(_BYTES)))
        base = builder.add(base, builder.mul(quarter, whole(_LANE)))
        found = [builder.load(_at(builder, a, builder.add(base, whole(i))), typ=kind, align=1) for i in range(_LANE)]
        own = builder.mul(half.index, whole(GROUP))
        for i, value in enumerate(_transposed(builder, found)):
            builder.store(value, _at(builder, a, builder.add(own, whole(i)), _COLUMNS), align=1)


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


def _add_group(builder: Any, a: dict[str, Any], row: Any, place: Any, ahead: Any, stride: Any) -> Any:
    """Add the entries of a group's positions to the outputs of `ROWS` rows; returns what is to be prefetched next."""
    from llvmlite import ir

    whole, words = ir.IntType(64), vector(_BYTES // 2, ir.IntType(16))
    table = builder.mul(place, whole(GROUP * _TABLE))
    zeros = [ir.Constant(words, None)] * (2 * PLANES * _VECTORS)
    with Loop(builder, whole(0), whole(GROUP), 1, [*zeros, ahead]) as positions:
        own = builder.add(table, builder.mul(positions.index, whole(_TABLE)))
        *sums, ahead = positions.values
        _fetch(builder, a, ahead)
        sums = _add_entries(builder, a, own, positions.index, sums)
        positions.carry([*sums, builder.add(ahead, stride)])
    scale, offset = (
        builder.load(builder.gep(a[name], [place], source_etype=ir.FloatType()), typ=vector(1), align=4)
        for name in ("scales", "offsets")
    )
    for half in range(_VECTORS):
        own = positions.values[2 * PLANES * half : 2 * PLANES * (half + 1)]
        _add_floats(builder, a, own, builder.add(row, whole(half * _BYTES)), scale, offset)
    return positions.values[-1]


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

    places = [builder.add(table, whole(_BYTES * i)) for i in range(_TABLE // _BYTES)]
    pointers = [builder.gep(a["tables"], [place], source_etype=byte) for place in places]
    quarters = [builder.load(pointer, typ=kind, align=1) for pointer in pointers]
    result = list(sums)
    for half in range(_VECTORS):
        line = builder.add(column, whole(half * GROUP))
        codes = builder.load(_at(builder, a, line, _COLUMNS), typ=kind, align=1)
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
