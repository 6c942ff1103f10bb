"""One input times a quantized weight by tables in bytes, or a thread's part of it, in one call (see `permuted`)."""

from __future__ import annotations

from functools import cache
from typing import Any

from bgd_plugin.jit.llvm import Loop, compiled, define
from bgd_plugin.jit.openmp import BARRIER, runtime
from bgd_plugin.jit.threads import BOTH, FIRST, SECOND
from bgd_plugin.kernels.permuted_sums import ROWS, sums_program
from bgd_plugin.kernels.permuted_tables import tables_program

__all__ = ["ADDRESSES", "NUMBERS", "layer_program"]

ADDRESSES = "input", "codebook", "codes", "bias", "output", "memory"
NUMBERS = "blocks", "codewords", "chunks", "groups", "scales", "figures", "scratch", "room", "step", "lines"
"""What a layer's function reads, in this order: addresses of tensors and of memory; the number of blocks in a row, of
codewords, of chunks, of groups of `ROWS` rows, and of scales; where in the memory, behind the tables, scales, offsets
and ranges are, and where each part's scratch of `room` bytes; rows of a pass; lines of codes prefetched for a table."""

_SMALLEST, _LARGEST = 1e-20, 1e30
"""Bounds on the sum of the ranges of products, within which fixed point is as exact as floats."""


@cache
def layer_program(block_size: int) -> Any:
    """First the tables of a part of the chunks, then, when all parts have theirs, the sums of a part of the rows.

    Args:
        block_size: weights in a block.

    The function takes the address of 64-bit integers, those of `ADDRESSES`, of `NUMBERS`, and one that becomes 1 if
    fixed point is exact enough, without which there are no sums; then what `threads.run_parts` says.
    """
    from llvmlite import ir

    module, builder, a = define("permuted_layer", ("data",), ("part", "parts", "steps"))
    whole, names = ir.IntType(64), (*ADDRESSES, *NUMBERS)
    places = [builder.gep(a["data"], [whole(i)], source_etype=whole) for i in range(len(names) + 1)]
    for name, place in zip(names, places, strict=False):
        a[name] = builder.load(place, typ=whole, align=8)
    start = builder.add(a["memory"], a["figures"])
    figures = [builder.add(start, builder.mul(a["scales"], whole(4 * i))) for i in range(3)]
    own = builder.add(builder.add(a["memory"], a["scratch"]), builder.mul(a["room"], a["part"]))
    chunks, groups = (_share(builder, a, a[name]) for name in ("chunks", "groups"))
    rows = [builder.mul(bound, whole(ROWS)) for bound in groups]
    with builder.if_then(_has_step(builder, a, FIRST)):
        ahead = builder.add(a["codes"], builder.mul(rows[0], a["blocks"]))
        sizes = a["blocks"], a["codewords"], ahead, a["lines"]
        _call(builder, "tables", a["input"], a["codebook"], own, a["memory"], *figures, *chunks, *sizes)
    _wait(builder, a)
    is_next = _has_step(builder, a, SECOND)
    with builder.if_then(is_next), builder.if_then(_is_exact(builder, figures[2], a["scales"])):
        memory = a["codes"], a["memory"], *figures[:2], own, a["bias"], a["output"]
        _call(builder, "sums", *memory, *rows, a["blocks"], a["step"])
        with builder.if_then(builder.icmp_signed("==", a["part"], whole(0))):
            builder.store(whole(1), places[-1], align=8)
    builder.ret_void()
    return compiled(module, _callees(block_size))


def _wait(builder: Any, a: dict[str, Any]) -> None:
    """Wait for the tables of all parts, if there are more than one, and they do both steps."""
    from llvmlite import ir

    if runtime() is not None:
        whole = ir.IntType(64)
        is_one = builder.icmp_signed("==", a["parts"], whole(1))
        is_apart = builder.icmp_signed("!=", a["steps"], whole(BOTH))
        with builder.if_then(builder.not_(builder.or_(is_one, is_apart))):
            _call(builder, BARRIER)


def _callees(block_size: int) -> dict[str, int]:
    """The addresses of the functions that a layer's calls, by name."""
    own, callees = runtime(), {"tables": tables_program(block_size).address, "sums": sums_program().address}
    return callees if own is None else {**callees, BARRIER: own.functions[BARRIER]}


def _call(builder: Any, name: str, *arguments: Any) -> None:
    from llvmlite import ir

    kind = ir.FunctionType(ir.VoidType(), [ir.IntType(64)] * len(arguments))
    builder.call(ir.Function(builder.module, kind, name), arguments)


def _has_step(builder: Any, a: dict[str, Any], step: int) -> Any:
    from llvmlite import ir

    whole = ir.IntType(64)
    return builder.icmp_signed("!=", builder.and_(a["steps"], whole(step)), whole(0))


def _share(builder: Any, a: dict[str, Any], count: Any) -> list[Any]:
    """A part's share of `count` things: the first, and that after the last."""
    from llvmlite import ir

    parts = a["part"], builder.add(a["part"], ir.IntType(64)(1))
    return [builder.sdiv(builder.mul(count, part), a["parts"]) for part in parts]


def _is_exact(builder: Any, ranges: Any, count: Any) -> Any:
    """Whether fixed point is as exact as floats: by the sum of `count` ranges, which may be no number."""
    from llvmlite import ir

    whole, single = ir.IntType(64), ir.FloatType()
    start = builder.inttoptr(ranges, ir.PointerType())
    with Loop(builder, whole(0), count, 1, [single(0.0)]) as each:
        place = builder.gep(start, [each.index], source_etype=single)
        each.carry([builder.fadd(each.values[0], builder.load(place, typ=single, align=4))])
    bounds = (">", _SMALLEST), ("<", _LARGEST)
    return builder.and_(*(builder.fcmp_ordered(order, each.values[0], single(bound)) for order, bound in bounds))
