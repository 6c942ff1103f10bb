"""Values as small integers times one step for a whole tensor, exact in half precision: files find the grid again.

A power of two times an integer of few bits is a number that half precision holds exactly.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["fold_to_integers", "row_factors"]

_LEAST_STEP = 2.0**-24
"""The least number in half precision."""


@torch.no_grad()
def fold_to_integers(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scale each row so that its largest weight is the largest integer, round, and say what to undo behind the layer.

    Args:
        weight: `[rows, ...]`, finite.
        bits: 2 … 8.

    Returns:
        integers times one power of two, of the shape and dtype of `weight`, and the factor on each row, `[rows]`,
            positive; a row of zeros has 1.
    """
    step, factor = row_factors(weight, bits)
    scaled = weight.double() * factor.reshape(-1, *(1 for _ in weight.shape[1:]))
    return ((scaled / step).round() * step + 0.0).to(weight.dtype), factor.to(torch.float32)


@torch.no_grad()
def row_factors(weight: Tensor, bits: int) -> tuple[float, Tensor]:
    """A power of two as the step of all weights, and the factor on each row that makes its largest weight the largest
    integer.

    Args:
        weight: `[rows, ...]`, finite.
        bits: 2 … 8.

    Returns:
        the step, and float64 `[rows]`, positive; 1 for a row of zeros.
    """
    most = 2 ** (bits - 1) - 1
    largest = weight.double().flatten(1).abs().amax(1)
    alive = largest > 0
    usual = float(largest[alive].log2().mean()) if bool(alive.any()) else 0.0
    step = 2.0 ** round(usual - math.log2(most))
    step = min(max(step, _LEAST_STEP), 2.0**8)
    return step, torch.where(alive, most * step / largest.clamp(min=torch.finfo(torch.float64).tiny), 1.0)
