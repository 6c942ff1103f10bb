"""Vectors of float32 in generated code: loads, stores, arithmetic and sums of lanes.

In each function, `builder` emits the code, and addresses and values belong to the generated code.
"""

from __future__ import annotations

from typing import Any

__all__ = [
    "constant",
    "fetch",
    "fma",
    "intrinsic",
    "load",
    "masked",
    "splat",
    "spread",
    "store",
    "total",
    "transposed",
    "tree",
    "vector",
    "zero",
]


def zero(lanes: int) -> Any:
    """A vector of zeros with this number of lanes."""
    from llvmlite import ir

    return ir.Constant(vector(lanes), None)


def vector(lanes: int, kind: Any = None) -> Any:
    """The type of a vector with this number of lanes, of float32 if `kind`, the type of a lane, is None."""
    from llvmlite import ir

    return ir.VectorType(kind or ir.FloatType(), lanes)


def constant(kind: Any, lanes: int, value: float) -> Any:
    """A vector of this number of lanes, all equal to `value`, of the type `kind`."""
    from llvmlite import ir

    return ir.Constant(vector(lanes, kind), [value] * lanes)


def intrinsic(builder: Any, name: str, kind: Any, arguments: list[Any]) -> Any:
    """Call one of LLVM's own functions; it is declared where it is not yet.

    Args:
        builder: at the place of the call.
        name: of the function.
        kind: the type that it returns.
        arguments: of the call, values.
    """
    from llvmlite import ir

    declared = builder.module.globals.get(name)
    if declared is None:
        own = ir.FunctionType(kind, [argument.type for argument in arguments])
        declared = ir.Function(builder.module, own, name)
    return builder.call(declared, arguments)


def load(builder: Any, pointer: Any, place: Any, lanes: int) -> Any:
    """The `lanes` floats from index `place` on, behind a pointer; they need not be aligned."""
    from llvmlite import ir

    return builder.load(builder.gep(pointer, [place], source_etype=ir.FloatType()), typ=vector(lanes), align=4)


def store(builder: Any, value: Any, pointer: Any, place: Any) -> None:
    """Write a vector, `value`, to the floats from index `place` on, behind a pointer."""
    from llvmlite import ir

    builder.store(value, builder.gep(pointer, [place], source_etype=ir.FloatType()), align=4)


def fetch(builder: Any, address: Any) -> None:
    """Prefetch the memory at an address into the caches."""
    from llvmlite import ir

    number = ir.IntType(32)
    arguments = [address, number(0), number(3), number(1)]  # to read, to be kept, data
    intrinsic(builder, "llvm.prefetch.p0", ir.VoidType(), arguments)


def fma(builder: Any, x: Any, y: Any, z: Any) -> Any:
    """The vector x · y + z, in one rounding."""
    return intrinsic(builder, f"llvm.fma.v{x.type.count}f32", x.type, [x, y, z])


def masked(builder: Any, mask: Any, place: Any, x: Any, lanes: int) -> Any:
    """The vector x, of this number of lanes, where the mask's bytes from index `place` on are not zero; otherwise 0."""
    from llvmlite import ir

    kind = ir.VectorType(ir.IntType(8), lanes)
    kept = builder.load(builder.gep(mask, [place], source_etype=ir.IntType(8)), typ=kind, align=1)
    return builder.select(builder.icmp_unsigned("!=", kept, ir.Constant(kind, None)), x, ir.Constant(x.type, None))


def splat(builder: Any, number: Any, lanes: int) -> Any:
    """A vector of this number of lanes, all equal to `number`, a vector of one lane."""
    return spread(builder, number, 0, lanes)


def spread(builder: Any, vector: Any, place: int, lanes: int) -> Any:
    """A vector of this number of lanes, all equal to the one at a place of `vector`, counted from 0."""
    from llvmlite import ir

    places = ir.Constant(ir.VectorType(ir.IntType(32), lanes), [place] * lanes)
    return builder.shuffle_vector(vector, ir.Constant(vector.type, ir.Undefined), places)


def total(builder: Any, vector: Any, lanes: int) -> Any:
    """The sum of a vector's lanes; `lanes` is their number, a power of two."""
    from llvmlite import ir

    nothing = ir.Undefined
    while lanes > 1:
        lanes //= 2
        kind = ir.VectorType(ir.IntType(32), lanes)
        halves = [
            builder.shuffle_vector(
                vector, ir.Constant(vector.type, nothing), ir.Constant(kind, list(range(start, start + lanes)))
            )
            for start in (0, lanes)
        ]
        vector = builder.fadd(*halves)
    return builder.extract_element(vector, ir.IntType(32)(0))


def transposed(builder: Any, rows: list[Any]) -> list[Any]:
    """The vectors `rows`, as many as each has lanes, a power of two, column by column.

    Interleaving each vector with that half of them behind it rotates the address of a value, [row, column], by a bit.
    """
    from llvmlite import ir

    half, rounds = len(rows) // 2, len(rows).bit_length() - 1
    kind = vector(len(rows), ir.IntType(32))
    orders = [[first + i + source for i in range(half) for source in (0, len(rows))] for first in (0, half)]
    for _ in range(rounds):
        rows = [
            builder.shuffle_vector(rows[i], rows[i + half], ir.Constant(kind, order))
            for i in range(half)
            for order in orders
        ]
    return rows


def tree(builder: Any, values: list[Any]) -> Any:
    """The sum of several vectors, `values`, in pairs."""
    while len(values) > 1:
        values = [
            builder.fadd(*values[i : i + 2]) if i + 1 < len(values) else values[i] for i in range(0, len(values), 2)
        ]
    return values[0]
