"""Scale values to about 1 before computing, and scale back: their squares may overflow or underflow float32."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["near_one", "power_of_two"]

# The largest exponent such that both 2^e and 2^−e are normal numbers of the type.
_EXPONENTS = {torch.float64: 1022, torch.float32: 126}


def near_one(values: Tensor) -> tuple[Tensor, float]:
    """Divide values of any shape by the power of two that scales the largest to about 1; returns both.

    The values themselves are returned where that is 1.

    Division by a power of two is exact: results computed from the scaled values have the same digits as results
    computed from the values themselves in a type with unlimited range.
    """
    scale = power_of_two(values)
    return (values if scale == 1.0 else values / scale), scale


def power_of_two(values: Tensor) -> float:
    """The power of two just above the largest absolute value; 1 if all are zero or any is not finite.

    Args:
        values: float32 or float64, any shape.
    """
    largest = float(torch.stack([values.amin().neg(), values.amax()]).max()) if values.numel() else 0.0
    if not 0 < largest < math.inf:
        return 1.0
    limit = _EXPONENTS[values.dtype]
    return 2.0 ** max(-limit, min(limit, math.frexp(largest)[1]))
