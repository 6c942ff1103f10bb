"""Unpack codes and masks by nodes of the graph, which a runtime computes once, when it loads the file.

The nodes use integer arithmetic only: OpenVINO folds no bitwise operator, onnxruntime's shifts support few types, and
a matrix product may be computed in half precision.
"""

from __future__ import annotations

import math
from typing import Any

import numpy
from numpy.typing import NDArray

from bgd_plugin.encoding.masks import mask_groups
from bgd_plugin.exporting.onnx.nodes import Nodes

__all__ = ["unpacked_codes", "unpacked_mask"]


def unpacked_codes(nodes: Nodes, name: str, packed: NDArray[Any], bits: int, shape: tuple[int, ...], dtype: Any) -> Any:
    """Codes that `encoding.codes.pack` packed, as a value of the graph.

    `period` codes take `width` whole bytes. A code lies within at most three bytes, which form one number below 2^24;
    it is that number divided by 2^(bits before it), modulo 2^bits. Codes of 1, 2 or 4 bits lie within one byte.

    Args:
        nodes: receives the nodes.
        name: of the initializer that holds the bytes.
        packed: uint8 `[n]`.
        bits: 1 … 16, of each code.
        shape: of the result.
        dtype: of the result, numpy's.
    """
    if bits == 8:
        value = nodes.tensor(name, packed.reshape(shape))
        return value if dtype == numpy.uint8 else nodes.cast(value, dtype)
    count, period = math.prod(shape), 8 // math.gcd(8, bits)
    width = bits * period // 8
    groups = -(-count // period)
    padded = numpy.zeros(groups * width, numpy.uint8)
    padded[: packed.size] = packed
    numbers = nodes.cast(nodes.tensor(name, padded.reshape(groups, width)), numpy.int32)
    first, before = numpy.divmod(numpy.arange(period) * bits, 8)
    span = -(-int((before + bits).max()) // 8)
    if span > 1:
        windows = numpy.minimum(first[:, None] + numpy.arange(span), width - 1)
        numbers = nodes.add("Gather", numbers, nodes.constant(windows, numpy.int64), axis=1)
        numbers = nodes.add("Mul", numbers, nodes.constant(256 ** numpy.arange(span), numpy.int32))
        numbers = nodes.add("ReduceSum", numbers, nodes.constant([2], numpy.int64), keepdims=0)
    numbers = nodes.add("Div", numbers, nodes.constant(2**before, numpy.int32))
    numbers = nodes.add("Mod", numbers, nodes.constant(2**bits, numpy.int32))
    if groups * period != count:
        numbers = nodes.reshape(numbers, (-1,))
        ends = [nodes.constant([end], numpy.int64) for end in (0, count)]
        numbers = nodes.add("Slice", numbers, *ends)
    numbers = nodes.reshape(numbers, shape)
    return numbers if dtype == numpy.int32 else nodes.cast(numbers, dtype)


def unpacked_mask(nodes: Nodes, name: str, packed: NDArray[Any], form: str, shape: tuple[int, ...]) -> Any:
    """A mask that `encoding.masks.pack_mask` packed, as a bool value of the graph, true where a weight is kept.

    Args:
        nodes: receives the nodes.
        name: of the initializer that holds the bytes.
        packed: uint8 `[n]`.
        form: as in the header of a file.
        shape: of the weight.
    """
    if form == "bits":
        return nodes.cast(unpacked_codes(nodes, name, packed, 1, shape, numpy.int32), bool)
    if form == "positions":
        return _from_positions(nodes, name, packed, shape)
    if form == "lines":
        rows, columns = shape[0], math.prod(shape[1:])
        lines = unpacked_codes(nodes, name, packed, 1, (rows + columns,), numpy.int32)
        edges = [nodes.constant([edge], numpy.int64) for edge in (0, rows, rows + columns)]
        row = nodes.reshape(nodes.add("Slice", lines, edges[0], edges[1]), (rows, 1))
        column = nodes.reshape(nodes.add("Slice", lines, edges[1], edges[2]), (1, columns))
        return nodes.cast(nodes.reshape(nodes.add("Mul", row, column), shape), bool)
    return _from_groups(nodes, name, packed, form, shape)


def _from_positions(nodes: Nodes, name: str, packed: NDArray[Any], shape: tuple[int, ...]) -> Any:
    """A mask from `[n]` positions of zeros, 32 bits each."""
    positions = nodes.tensor(name, packed.copy().view(numpy.int32))
    ones = nodes.add("Expand", nodes.constant([1], numpy.int32), nodes.constant([math.prod(shape)], numpy.int64))
    zeros = nodes.add("Expand", nodes.constant([0], numpy.int32), nodes.constant([packed.size // 4], numpy.int64))
    return nodes.cast(nodes.reshape(nodes.add("ScatterElements", ones, positions, zeros, axis=0), shape), bool)


def _from_groups(nodes: Nodes, name: str, packed: NDArray[Any], form: str, shape: tuple[int, ...]) -> Any:
    """A mask that keeps N of each M weights: an index for each group, into a table of patterns."""
    groups = mask_groups(form, shape)
    count = math.prod(shape) // groups.size
    codes = unpacked_codes(nodes, name, packed, groups.bits, (count,), numpy.int32)
    kept = nodes.add("Gather", nodes.constant(groups.patterns.numpy(), bool), codes, axis=0)
    kept = nodes.reshape(kept, groups.shape)
    if groups.along_channels:
        last = len(shape) - 1
        kept = nodes.add("Transpose", kept, perm=[0, last, *range(1, last)])
    return nodes.reshape(kept, shape)
