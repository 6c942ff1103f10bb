"""Squares of weights and inputs leave single precision long before these do: compute near 1, and scale back."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["near_one", "power_of_two"]

# The largest exponent of a power of two whose inverse the type holds as well.
_EXPONENTS = {torch.float64: 1022, torch.float32: 126}


def near_one(values: Tensor) -> tuple[Tensor, float]:
    """The values divided by the power of two that makes the largest one about 1, and that power.

    Division by a power of two is exact: what is computed from the result is, digit for digit, what would be computed
    from the values if the range of the numbers had no end.
    """
    scale = power_of_two(values)
    return values / scale, scale


def power_of_two(values: Tensor) -> float:
    """The power of two just above the largest absolute value; 1 where all are zero, or one is not finite.

    Args:
        values: float32 or float64.
    """
    largest = float(torch.stack([values.amin().neg(), values.amax()]).max()) if values.numel() else 0.0
    if not 0 < largest < math.inf:
        return 1.0
    limit = _EXPONENTS[values.dtype]
    return 2.0 ** max(-limit, min(limit, math.frexp(largest)[1]))
