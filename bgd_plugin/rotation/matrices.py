"""Random orthogonal matrices."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["orthogonal"]


def orthogonal(size: int, generator: torch.Generator, *, fixes_mean: bool = False) -> Tensor:
    """A random orthogonal matrix, float64 `[size, size]`.

    Args:
        size: of the matrix.
        generator: draws it.
        fixes_mean: leave the vector of ones as it is, so that a layer norm, which subtracts the mean, gives the rotated
            output for a rotated input.
    """
    if not fixes_mean or size < 2:
        return _of_gaussian(size, generator)
    inner = torch.eye(size, dtype=torch.float64)
    inner[1:, 1:] = _of_gaussian(size - 1, generator)
    # the reflection that exchanges the first unit vector and the vector of ones
    normal = torch.full((size, 1), -(size**-0.5), dtype=torch.float64)
    normal[0] += 1
    normal /= torch.linalg.vector_norm(normal)
    reflection = torch.eye(size, dtype=torch.float64) - 2 * normal @ normal.T
    return reflection @ inner @ reflection


def _of_gaussian(size: int, generator: torch.Generator) -> Tensor:
    basis, triangle = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64, device="cpu"))
    matrix: Tensor = basis * triangle.diagonal().sign()
    return matrix
