"""The search for the nearest codeword as compiled code: distances and their minimum in registers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from bgd_plugin.jit.llvm import Loop, compiled, define, rows_together
from bgd_plugin.jit.switch import enabled
from bgd_plugin.jit.threads import share_rows
from bgd_plugin.jit.vectors import fma, load, splat

__all__ = ["LANES", "LARGEST_BLOCK", "POINTS", "addresses_in", "can_search", "nearest_codes", "search", "searched"]

LARGEST_BLOCK = 32
"""Weights in a block above which torch's matrix product is as fast."""
LANES = 16
"""Codewords that are compared at once."""
POINTS = 4
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
    codes = torch.empty(groups, count, dtype=torch.int64, device=points.device)
    words, norms = searched(codebooks)
    chunks = norms.shape[-1] // LANES
    program, operands = _program(width), (points, words, norms, codes)
    for group in range(groups):
        share_rows(count, chunks, program, partial(_call, addresses_in(group, operands), chunks))
    return codes


def searched(codebooks: Tensor) -> tuple[Tensor, Tensor]:
    """What a search reads of codewords: them times -2, column by column, and their squared norms.

    Args:
        codebooks: `[..., codebook_size, block_size]`, float32.

    Returns:
        `[..., block_size, n]` and `[..., n]`, n being a multiple of `LANES`; norms of what is no codeword are infinite.
    """
    spare = -codebooks.shape[-2] % LANES
    words = functional.pad(-2 * codebooks.mT, (0, spare)).contiguous()
    return words, functional.pad(codebooks.square().sum(-1), (0, spare), value=torch.inf)


def addresses_in(group: int, operands: Sequence[Tensor]) -> list[int]:
    """Where in memory a group's part of each operand is.

    Args:
        group: index of the group.
        operands: each `[groups, ...]`; those that all groups share are expanded.
    """
    return [x.data_ptr() + group * x.stride(0) * x.element_size() for x in operands]


def _call(addresses: list[int], chunks: int, first: int, last: int) -> list[tuple[int, ...]]:
    return [(*addresses, first, last, chunks)]


@cache
def _program(block_size: int) -> Any:
    """`codes[i] = argmin_c (norms[c] + Σ_j points[i, j] · words[j, c])` for points `first` to `last`."""
    module, builder, a = define("nearest", ("points", "words", "norms", "codes"), ("first", "last", "chunks"))
    for points in rows_together(builder, a["first"], a["last"], POINTS):
        _search(builder, a, points, block_size)
    builder.ret_void()
    return compiled(module)


def _search(builder: Any, a: dict[str, Any], points: list[Any], block_size: int) -> None:
    """Store the codes of some points."""
    from llvmlite import ir

    whole = ir.IntType(64)
    inputs = [
        [
            splat(builder, load(builder, a["points"], _place(builder, point, block_size, j), 1), LANES)
            for j in range(block_size)
        ]
        for point in points
    ]
    codes = nearest_codes(builder, inputs, a["words"], a["norms"], a["chunks"])
    for point, code in zip(points, codes, strict=True):
        builder.store(code, builder.gep(a["codes"], [point], source_etype=whole), align=8)


def nearest_codes(builder: Any, inputs: Sequence[Sequence[Any]], words: Any, norms: Any, chunks: Any) -> list[Any]:
    """Code for the nearest codewords of some points: `LANES` of them at a time, then the least of as many lanes.

    Args:
        builder: where the code is emitted.
        inputs: each point's numbers, each of them in all of `LANES` lanes.
        words: address of the codewords times -2, `[block_size, chunks * LANES]`.
        norms: address of their squared norms, infinite for codewords that only fill the last chunk.
        chunks: how many times `LANES` codewords there are.

    Returns:
        the codes, 64-bit integers.
    """
    from llvmlite import ir

    whole, numbers = ir.IntType(64), ir.VectorType(ir.IntType(32), LANES)
    far = ir.Constant(ir.VectorType(ir.FloatType(), LANES), [float("inf")] * LANES)
    lanes = ir.Constant(numbers, list(range(LANES)))
    none = ir.Constant(numbers, [0] * LANES)
    width = builder.mul(chunks, whole(LANES))
    with Loop(builder, whole(0), chunks, 1, [lanes, *[far] * len(inputs), *[none] * len(inputs)]) as chunk:
        own, values = chunk.values[0], chunk.values[1:]
        least, places = values[: len(inputs)], values[len(inputs) :]
        first = builder.mul(chunk.index, whole(LANES))
        distances = [load(builder, norms, first, LANES)] * len(inputs)
        for j in range(len(inputs[0])):
            word = load(builder, words, builder.add(builder.mul(width, whole(j)), first), LANES)
            distances = [fma(builder, x[j], word, d) for x, d in zip(inputs, distances, strict=True)]
        nearer = [builder.fcmp_ordered("<", d, best) for d, best in zip(distances, least, strict=True)]
        moved = [builder.select(*three) for three in zip(nearer, distances, least, strict=True)]
        placed = [builder.select(is_nearer, own, place) for is_nearer, place in zip(nearer, places, strict=True)]
        chunk.carry([builder.add(own, ir.Constant(numbers, [LANES] * LANES)), *moved, *placed])
    pairs = zip(chunk.values[1 : 1 + len(inputs)], chunk.values[1 + len(inputs) :], strict=True)
    return [builder.zext(_least(builder, *pair), whole) for pair in pairs]


def _place(builder: Any, point: Any, block_size: int, column: int) -> Any:
    return builder.add(builder.mul(point, point.type(block_size)), point.type(column))


def _least(builder: Any, distances: Any, codes: Any) -> Any:
    """The code of the least distance; of equal ones the lowest."""
    from llvmlite import ir

    lanes = LANES
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
