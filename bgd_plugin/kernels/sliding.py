"""The kernel for convolutions of small images: each weight is multiplied by the positions where it meets the input.

The positions of an output lie side by side in the lanes of vectors, as inputs do in `lanes`: in a padded input, what a
weight meets at the next position is the next number. Nothing is decoded to memory, nor brought into another order.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from bgd_plugin.jit.llvm import Loop, compiled, define
from bgd_plugin.jit.vectors import store, zero
from bgd_plugin.kernels.lanes import Kind, cuts, row_count, sum_rows, widest

__all__ = ["pad_program", "sliding_program"]

_LANES = 16


@cache
def sliding_program(block_size: int, code_bits: int, tail: int) -> Any:
    """`output[r, target[p]] = bias[r] + Σ_c weight[r, c] · panel[offset[c] + p]` for all positions p, in float32.

    Rows are computed in order of their positions, so of several with one target the last one stays.

    Args:
        block_size: d, the number of weights in a block.
        code_bits: bits of a code in memory.
        tail: lanes of the positions that remain after groups of `widest()`, see `lanes.last_width`. Where they are more
            than all positions, numbers behind the panel are read.

    The function takes the addresses of panel, codebook `[codebook_size, block_size]`, codes, bias `[rows]`, output
    `[rows, area]`, offsets and targets (64-bit integers `[columns]` and `[positions]`) and scratch (`widest()` times
    `row_count()` floats), then the first row and the last one (at least `row_count()` apart), `positions`, `area` and
    `blocks`.
    """
    from llvmlite import ir

    pointers = ("panel", "codebook", "codes", "bias", "output", "offsets", "targets", "scratch")
    numbers = ("first", "last", "positions", "area", "blocks")
    module, builder, a = define("sliding", pointers, numbers)
    kind = Kind(builder=builder, a=a, block_size=block_size, code_bits=code_bits)
    whole, most = ir.IntType(64), widest()
    many = whole(0)
    if tail < most:
        many = builder.mul(builder.sdiv(a["positions"], whole(most)), whole(most))
        with Loop(builder, whole(0), many, most) as group:
            _group(kind, group.index, most)
    final = builder.sub(a["positions"], whole(tail))
    final = builder.select(builder.icmp_signed("<", final, whole(0)), whole(0), final)
    with Loop(builder, many, a["positions"], tail) as group:
        _group(kind, builder.select(builder.icmp_signed("<", group.index, final), group.index, final), tail)
    builder.ret_void()
    return compiled(module)


def _group(kind: Kind, start: Any, width: int) -> None:
    """The outputs of all rows at up to `width` positions from index `start` on."""
    from llvmlite import ir

    builder, a, whole = kind.builder, kind.a, ir.IntType(64)

    def place(column: Any) -> Any:
        return builder.add(_number(builder, a["offsets"], column), start)

    with Loop(builder, a["first"], a["last"], row_count()) as rows:
        final = builder.sub(a["last"], whole(row_count()))
        row = builder.select(builder.icmp_signed("<", rows.index, final), rows.index, final)
        _write(kind, sum_rows(kind, row, width, (whole(0), a["blocks"]), place), width, start, row)


def _write(kind: Kind, found: list[list[Any]], width: int, start: Any, row: Any) -> None:
    """Write the sums and the bias to the outputs."""
    from llvmlite import ir

    builder, a, whole, single = kind.builder, kind.a, ir.IntType(64), ir.FloatType()
    for k, values in enumerate(found):
        for (at, _), value in zip(cuts(width), values, strict=True):
            store(builder, value, a["scratch"], whole(k * width + at))
    left = builder.sub(a["positions"], start)
    valid = builder.select(builder.icmp_signed("<", left, whole(width)), left, whole(width))
    with Loop(builder, whole(0), whole(row_count())) as own:
        number = builder.add(row, own.index)
        bias, base = _float(builder, a["bias"], number), builder.mul(number, a["area"])
        with Loop(builder, whole(0), valid) as lane:
            value = _float(builder, a["scratch"], builder.add(builder.mul(own.index, whole(width)), lane.index))
            target = _number(builder, a["targets"], builder.add(start, lane.index))
            place = builder.gep(a["output"], [builder.add(base, target)], source_etype=single)
            builder.store(builder.fadd(value, bias), place, align=4)


@cache
def pad_program() -> Any:
    """Write images with zeros around them, each as `stride²` images of every `stride`-th row and column.

    The function takes the addresses of input `[images, height, width]` and panel `[images, stride², tall, wide]`, then
    `size` (floats in the panel and behind it, a multiple of 16), `images`, `height`, `width`, `top` and `left` (the
    number of zeros there), `stride`, `tall` and `wide`.
    """
    from llvmlite import ir

    numbers = ("size", "images", "height", "width", "top", "left", "stride", "tall", "wide")
    module, builder, a = define("pad", ("input", "panel"), numbers)
    whole = ir.IntType(64)
    with Loop(builder, whole(0), a["size"], _LANES) as part:
        store(builder, zero(_LANES), a["panel"], part.index)
    planes = builder.mul(a["stride"], a["stride"])
    area = builder.mul(a["tall"], a["wide"])
    with Loop(builder, whole(0), a["images"]) as image, Loop(builder, whole(0), a["height"]) as row:
        source = builder.mul(builder.add(builder.mul(image.index, a["height"]), row.index), a["width"])
        down = builder.add(row.index, a["top"])
        plane = builder.mul(builder.srem(down, a["stride"]), a["stride"])
        plane = builder.add(builder.mul(image.index, planes), plane)
        line = builder.mul(builder.sdiv(down, a["stride"]), a["wide"])
        with Loop(builder, whole(0), a["width"]) as column:
            along = builder.add(column.index, a["left"])
            own = builder.mul(builder.add(plane, builder.srem(along, a["stride"])), area)
            place = builder.add(builder.add(own, line), builder.sdiv(along, a["stride"]))
            value = _float(builder, a["input"], builder.add(source, column.index))
            builder.store(value, builder.gep(a["panel"], [place], source_etype=ir.FloatType()), align=4)
    builder.ret_void()
    return compiled(module)


def _number(builder: Any, numbers: Any, place: Any) -> Any:
    from llvmlite import ir

    whole = ir.IntType(64)
    return builder.load(builder.gep(numbers, [place], source_etype=whole), typ=whole, align=8)


def _float(builder: Any, numbers: Any, place: Any) -> Any:
    from llvmlite import ir

    single = ir.FloatType()
    return builder.load(builder.gep(numbers, [place], source_etype=single), typ=single, align=4)
