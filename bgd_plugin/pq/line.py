"""Codewords of one weight: on a line, the nearest codeword is found by a binary search, and a good start is known."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["nearest_on_a_line", "running_sums", "settled_on_a_line", "spread_on_a_line"]

_MOST_POINTS = 1 << 22
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


def running_sums(values: Tensor) -> Tensor:
    """The sums of the first values, `[n]` as they are; made on the CPU, since elsewhere floats differ from run to run.

    On a GPU torch refuses them where deterministic algorithms are asked for.

    Args:
        values: `[n]`.
    """
    return values.cpu().cumsum(0).to(values.device)


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
    places = torch.cat([shares.new_zeros(1), running_sums(shares)])
    if not places[-1] > 0:
        return ordered[:count].to(points)
    wanted = (torch.arange(count, dtype=torch.float64, device=points.device) + 0.5) * (places[-1] / count)
    after = torch.searchsorted(places, wanted).clamp(1, len(places) - 1)
    widths = (places[after] - places[after - 1]).clamp(min=1e-300)
    part = (wanted - places[after - 1]) / widths
    return torch.lerp(borders[after - 1], borders[after], part.clamp(0, 1)).to(points)


def settled_on_a_line(points: Tensor, weights: Tensor, start: Tensor, iterations: int) -> Tensor:
    """Centroids each at the weighted mean of the points nearest to it; one that has none stays where it was.

    Lloyd's algorithm on points that are sorted once: the sums over a cluster are differences of running sums, so an
    iteration costs a search for each border, whatever the number of points. Of more than four million points, each row
    gives every so manieth.

    Args:
        points: `[rows, n]`.
        weights: `[rows, n]`, at least 0.
        start: `[k]`, in any order.
        iterations: maximum number; fewer are made if the centroids come to rest.

    Returns:
        `[k]`, ascending, in the dtype of the points.

    **Source**: Lloyd, "Least squares quantization in PCM", IEEE Trans. Inf. Theory 28 (1982).
    """
    step = -(-points.numel() // _MOST_POINTS)
    ordered, order = points[:, ::step].flatten().cpu().sort()  # small steps, and many
    sorted_weights, ordered = weights[:, ::step].flatten().cpu().double()[order], ordered.double()
    zero = ordered.new_zeros(1)
    counts = torch.cat([zero, running_sums(sorted_weights)])
    sums = torch.cat([zero, running_sums(sorted_weights * ordered)])
    centroids = start.cpu().double().sort().values
    ends = torch.tensor([0, len(ordered)], device="cpu")
    for _ in range(iterations):
        borders = torch.searchsorted(ordered, (centroids[1:] + centroids[:-1]) / 2)
        places = torch.cat([ends[:1], borders, ends[1:]])
        members = counts[places].diff()
        means = sums[places].diff() / members.clamp(min=1e-300)
        moved = torch.where(members > 0, means, centroids)
        if torch.equal(moved, centroids):
            break
        centroids = moved
    return centroids.to(points)
