"""Frequencies of codes for the entropy coder, and the trellis in which the past decides on a code's quantizer.

Trellis-coded quantization has a grid of levels twice as fine as its rate allows: even levels belong to one quantizer,
odd ones to the other, and a state of eight, moved by the code before, says which of the two is in force. A code's place
in the grid, modulo 4, is all that the trellis looks at.

**Source**: Marcellin and Fischer, "Trellis coded quantization of memoryless and Gauss-Markov sources", IEEE Trans.
Commun. 38 (1990); entropy coded with one table for each quantizer as in Fischer and Wang, IEEE Trans. Inf. Theory 38
(1992).
"""

from __future__ import annotations

from typing import Any

import numpy
from numpy.typing import NDArray

__all__ = ["NEXT_STATE", "PROBABILITY_BITS", "STATES", "TOTAL", "contexts", "frequencies", "trellis_offset"]

PROBABILITY_BITS = 12
TOTAL = 1 << PROBABILITY_BITS
"""What the frequencies of a table sum to."""
STATES = 8
NEXT_STATE = numpy.array([[0, 1], [2, 3], [5, 4], [7, 6], [1, 0], [3, 2], [4, 5], [6, 7]], dtype=numpy.int64)
"""The state after a code, by the state before it and bit 1 of the code's place; a state's quantizer is its bit 0."""

Array = NDArray[Any]


def frequencies(counts: Array) -> Array:
    """Counts, scaled to integers that sum to `TOTAL`: at least 1 where a code occurs, and two of them at least.

    Args:
        counts: `[size]`, 2 to 256 integers of at least 0.

    Returns:
        int64 `[size]`, each below `TOTAL`.
    """
    counts = numpy.asarray(counts, dtype=numpy.int64)
    total = int(counts.sum())
    if not total:
        counts, total = numpy.ones_like(counts), len(counts)
    scaled = numpy.where(counts > 0, numpy.maximum(1, (2 * TOTAL * counts + total) // (2 * total)), 0)
    if numpy.count_nonzero(scaled) == 1:
        scaled[(int(scaled.argmax()) + 1) % len(scaled)] = 1
    while missing := TOTAL - int(scaled.sum()):
        largest = int(scaled.argmax())
        scaled[largest] += max(missing, -(int(scaled[largest]) // 2))
    return scaled


def contexts(size: int, offset: int | None) -> Array:
    """The table to which each code belongs: its quantizer, or 0 without a trellis.

    Args:
        size: number of codes.
        offset: of the first code's place in the trellis' grid, 0 to 3; None: no trellis.

    Returns:
        int64 `[size]`.
    """
    return numpy.zeros(size, dtype=numpy.int64) if offset is None else (numpy.arange(size) + offset) & 1


def trellis_offset(codes: Array, size: int) -> int | None:
    """The offset at which every row of codes is a walk through the trellis from state 0; None if there is none.

    Args:
        codes: integers `[rows, columns]`.
        size: number of codes.
    """
    if size < 4 or codes.size == 0:
        return None
    return next((offset for offset in range(4) if _is_walk(codes, offset)), None)


def _is_walk(codes: Array, offset: int) -> bool:
    state = numpy.zeros(len(codes), dtype=numpy.int64)
    for column in codes.T:
        place = column.astype(numpy.int64) + offset
        if ((place ^ state) & 1).any():
            return False
        state = NEXT_STATE[state, place >> 1 & 1]
    return True
