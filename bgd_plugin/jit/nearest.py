"""The search for the nearest codeword as compiled code: distances and their minimum in registers."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from bgd_plugin.jit.llvm import Loop, compiled, define
from bgd_plugin.jit.switch import enabled
from bgd_plugin.jit.threads import share_rows
from bgd_plugin.jit.vectors import fma, load, splat

__all__ = ["LARGEST_BLOCK", "can_search", "search"]

LARGEST_BLOCK = 32
"""Weights in a block above which torch's matrix product is as fast."""
_LANES = 16
_POINTS = 4
"""Points compared at once, which share the loads of the codewords."""


def can_search(points: Tensor) -> bool:
    """Whether `search` takes points of this kind: single precision, on a CPU, with the extra `fast`.

    Args:
        points: `[..., block_size]`.
    """
    return points.is_cpu and points.dtype == torch.float32 and 1 < points.shape[-1] <= LARGEST_BLOCK and enabled()


def search(points: Tensor, codebooks: Tensor) -> Tensor:
    """The index of the codeword nearest to each point; of several that are as near, the first.

    Args:
        points: `[groups, n, block_size]`, float32.
        codebooks: `[groups, codebook_size, block_size]`, float32, one for each group.

    Returns:
        int64 `[groups, n]`.
    """
    points = points.contiguous()
    groups, count, width = points.shape
    codes = torch.empty(groups, count, dtype=torch.int64)
    chunks = -(-codebooks.shape[1] // _LANES)
    spare = chunks * _LANES - codebooks.shape[1]
    words = functional.pad(-2 * codebooks.mT, (0, spare)).contiguous()
    norms = functional.pad(codebooks.square().sum(2), (0, spare), value=torch.inf)
    program, operands = _program(width), (points, words, norms, codes)
    for group in range(groups):
        addresses = [x.data_ptr() + group * x.stride(0) * x.element_size() for x in operands]
        share_rows(count, chunks, program, partial(_call, addresses, chunks))
    return codes


def _call(addresses: list[int], chunks: int, first: int, last: int) -> list[tuple[int, ...]]:
    return [(*addresses, first, last, chunks)]


@cache
def _program(block_size: int) -> Any:
    """`codes[i] = argmin_c (norms[c] + Σ_j points[i, j] · words[j, c])` for points `first` to `last`."""
    from llvmlite import ir

    module, builder, a = define("nearest", ("points", "words", "norms", "codes"), ("first", "last", "chunks"))
    whole = ir.IntType(64)
    count = builder.and_(builder.sub(a["last"], a["first"]), whole(-_POINTS))
    many = builder.add(a["first"], count)
    with Loop(builder, a["first"], many, _POINTS) as points:
        _search(builder, a, [builder.add(points.index, whole(i)) for i in range(_POINTS)], block_size)
    with Loop(builder, many, a["last"]) as rest:
        _search(builder, a, [rest.index], block_size)
    builder.ret_void()
    return compiled(module)


def _search(builder: Any, a: dict[str, Any], points: list[Any], block_size: int) -> None:
    """The nearest codewords of some points: sixteen codewords at a time, then the least of sixteen lanes."""
    from llvmlite import ir

    whole, numbers = ir.IntType(64), ir.VectorType(ir.IntType(32), _LANES)
    inputs = [
        [
            splat(builder, load(builder, a["points"], _place(builder, point, block_size, j), 1), _LANES)
            for j in range(block_size)
        ]
        for point in points
    ]
    far = ir.Constant(ir.VectorType(ir.FloatType(), _LANES), [float("inf")] * _LANES)
    lanes = ir.Constant(numbers, list(range(_LANES)))
    none = ir.Constant(numbers, [0] * _LANES)
    with Loop(builder, whole(0), a["chunks"], 1, [lanes, *[far] * len(points), *[none] * len(points)]) as chunk:
        own, values = chunk.values[0], chunk.values[1:]
        least, places = values[: len(points)], values[len(points) :]
        first = builder.mul(chunk.index, whole(_LANES))
        width = builder.mul(a["chunks"], whole(_LANES))
        norms = load(builder, a["norms"], first, _LANES)
        words = [
            load(builder, a["words"], builder.add(builder.mul(width, whole(j)), first), _LANES)
            for j in range(block_size)
        ]
        distances = [norms] * len(points)
        for j, word in enumerate(words):
            distances = [fma(builder, x[j], word, d) for x, d in zip(inputs, distances, strict=True)]
        nearer = [builder.fcmp_ordered("<", d, best) for d, best in zip(distances, least, strict=True)]
        moved = [builder.select(*three) for three in zip(nearer, distances, least, strict=True)]
        placed = [builder.select(is_nearer, own, place) for is_nearer, place in zip(nearer, places, strict=True)]
        chunk.carry([builder.add(own, ir.Constant(numbers, [_LANES] * _LANES)), *moved, *placed])
    for i, point in enumerate(points):
        code = _least(builder, chunk.values[1 + i], chunk.values[1 + len(points) + i])
        builder.store(builder.zext(code, whole), builder.gep(a["codes"], [point], source_etype=whole), align=8)


def _place(builder: Any, point: Any, block_size: int, column: int) -> Any:
    return builder.add(builder.mul(point, point.type(block_size)), point.type(column))


def _least(builder: Any, distances: Any, codes: Any) -> Any:
    """The code of the least distance; of equal ones the lowest."""
    from llvmlite import ir

    lanes = _LANES
    while lanes > 1:
        lanes //= 2
        kind = ir.VectorType(ir.IntType(32), lanes)
        low, high = (ir.Constant(kind, list(range(start, start + lanes))) for start in (0, lanes))
        left, right = (_lanes(builder, distances, part) for part in (low, high))
        left_code, right_code = (_lanes(builder, codes, part) for part in (low, high))
        is_equal = builder.fcmp_ordered("==", right, left)
        is_right = builder.or_(
            builder.fcmp_ordered("<", right, left),
            builder.and_(is_equal, builder.icmp_unsigned("<", right_code, left_code)),
        )
        distances, codes = builder.select(is_right, right, left), builder.select(is_right, right_code, left_code)
    return builder.extract_element(codes, ir.IntType(32)(0))


def _lanes(builder: Any, vector: Any, places: Any) -> Any:
    from llvmlite import ir

    return builder.shuffle_vector(vector, ir.Constant(vector.type, ir.Undefined), places)
