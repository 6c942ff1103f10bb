"""Weights as small integers times one step, rounded with error feedback under the Gram of each group's inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from bgd_plugin.encoding.small_integers import row_factors
from bgd_plugin.pq.feedback import encode_with_feedback

__all__ = ["integers_with_feedback"]

_DAMPING = 0.01


@torch.no_grad()
def integers_with_feedback(weight: Tensor, bits: int, gram: Tensor) -> tuple[Tensor, Tensor]:
    """`encoding.small_integers.fold_to_integers`, but later weights of a row make good the rounding of earlier ones.

    Args:
        weight: `[rows, ...]`, finite; the rows of each group contiguous.
        bits: 2 … 8.
        gram: `[groups, columns, columns]`, second moments of the inputs.

    Returns:
        integers times one power of two, of the shape and dtype of `weight`, and the factor on each row, float32
            `[rows]`.
    """
    step, factor = row_factors(weight, bits)
    most = 2 ** (bits - 1) - 1
    grid = torch.arange(-most, most + 1, dtype=torch.float64, device=weight.device) * step
    rows = weight.double().flatten(1) * factor[:, None]
    codes = encode_with_feedback(rows, grid[:, None], gram, damping=_DAMPING)
    return grid[codes].reshape(weight.shape).to(weight.dtype), factor.float()
