"""Codewords of one weight: on a line, the nearest codeword is found by a binary search, and a good start is known."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["nearest_on_a_line", "spread_on_a_line"]

_BINS = 8
"""Intervals for each codeword in the estimate of the density."""


def nearest_on_a_line(points: Tensor, centroids: Tensor) -> Tensor:
    """The nearest centroid of each point.

    Args:
        points: any shape.
        centroids: `[k]`, in any order.

    Returns:
        int64 of the shape of `points`.
    """
    ordered, order = centroids.sort()
    borders = (ordered[:-1] + ordered[1:]) / 2
    return order[torch.bucketize(points.contiguous(), borders)]


def spread_on_a_line(points: Tensor, count: int) -> Tensor:
    """Initial centroids with a density proportional to the cube root of the points' density.

    This is the optimal density for many centroids. Centroids drawn from the points themselves are too few where points
    are rare, and Lloyd's iterations move them only a little way in each round.

    Args:
        points: `[n]`, n ≥ `count`.
        count: k.

    Returns:
        `[k]`, ascending.

    **Source**: Panter and Dite, "Quantization distortion in pulse-count modulation with nonuniform spacing of levels",
    Proc. IRE 39 (1951).
    """
    step = max(1, len(points) // (_BINS * count))
    ordered = points.sort().values.double()
    borders = torch.cat([ordered[:-1:step], ordered[-1:]])
    # With as many points in each interval, the density is proportional to 1 / width.
    shares = borders.diff().pow(2 / 3)
    places = torch.cat([shares.new_zeros(1), shares.cumsum(0)])
    if not places[-1] > 0:
        return ordered[:count].to(points)
    wanted = (torch.arange(count, dtype=torch.float64, device=points.device) + 0.5) * (places[-1] / count)
    after = torch.searchsorted(places, wanted).clamp(1, len(places) - 1)
    widths = (places[after] - places[after - 1]).clamp(min=1e-300)
    part = (wanted - places[after - 1]) / widths
    return torch.lerp(borders[after - 1], borders[after], part.clamp(0, 1)).to(points)
