"""Codes that are walks through the trellis, drawn at random, one code at a time."""

from __future__ import annotations

import random

import numpy

from bgd_plugin.encoding.tables import NEXT_STATE


def random_walk(*, rows: int, columns: int, size: int, offset: int, seed: int = 0) -> numpy.ndarray:
    """int64 `[rows, columns]`, codes near the middle more often than others."""
    rng, codes = random.Random(seed), numpy.zeros((rows, columns), dtype=numpy.int64)
    for row in range(rows):
        state = 0
        for column in range(columns):
            allowed = [code for code in range(size) if (code + offset) % 2 == state % 2]
            code = rng.choices(allowed, [2.0 ** -abs(code - size / 2) for code in allowed])[0]
            codes[row, column] = code
            state = int(NEXT_STATE[state][(code + offset) // 2 % 2])
    return codes
