"""Plain k-means, made fast on a CPU with the kernels of torch and numpy.

Time of one iteration with one thread, for 262,144 points of 9 dimensions and 256 centroids: 8 ms for the matrix product
that gives the distances; 17 ms for numpy's argmin (torch: `min` 43, `argmin` 100; a hierarchy of minima 40); 3 ms for
the cluster sums by `index_add_` (one-hot product 33, sorting 14); 2 ms for the objective. The products are small, and
half of the time is spent in numpy, which has one thread. A second torch thread saves a tenth of the wall time on an
idle machine, but doubles the CPU time, and is ten times slower when another process wants the core, because each
product ends in a barrier. So k-means on a CPU uses one thread, and its result does not depend on torch's thread count.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from bgd_plugin.jit.nearest import can_search, search
from bgd_plugin.pq.line import nearest_on_a_line, running_sums

__all__ = ["KMeans", "cluster_sums", "kmeans"]

_SCRATCH_CPU = 1 << 18
"""Distances held at a time: 1 MiB of float32, which fits a core's L2 cache."""
_SCRATCH_DEVICE = 1 << 24
"""The same on other devices, where kernel launches dominate."""


@dataclass(frozen=True, kw_only=True)
class KMeans:
    """Result of `kmeans`.

    `centroids` are the means of the clusters given by `codes`. The last step updates the means, so without an early
    stop a point may be nearer to another centroid.
    """

    centroids: Tensor
    """`[codebook_size, block_size]`."""
    codes: Tensor
    """int64 `[points]`."""


@torch.no_grad()
def kmeans(
    points: Tensor, start: Tensor, iterations: int, *, generator: torch.Generator, compiled: bool = False
) -> KMeans:
    """Lloyd's algorithm from given centroids; stops early when the objective no longer falls (no code changes).

    An iteration assigns each point to its nearest centroid by exhaustive search, refills empty clusters by splitting
    the most populated one, and moves each centroid to its cluster's mean. No step raises the objective. Memory beyond
    the input: a copy of the points, their codes, and 1 MiB (CPU) of distances.

    Args:
        points: `[n, d]`, float32 or float64, any device.
        start: `[k, d]`, k ≤ n, the initial centroids.
        iterations: maximum number, at least 1.
        generator: draws the point from which an empty cluster is refilled.
        compiled: whether the search may run as compiled code where it can: several times as fast, and other last bits.

    Raises:
        ValueError: no iterations, or fewer points than centroids.

    **Source**: Lloyd, "Least squares quantization in PCM", IEEE Trans. Inf. Theory 28 (1982).
    """
    if iterations < 1:
        raise ValueError(f"k-means needs at least one iteration, not {iterations}")
    if points.shape[0] < start.shape[0]:
        raise ValueError(f"{points.shape[0]} points are fewer than {start.shape[0]} centroids")
    with _one_thread(points.device):
        return _lloyd(points, start, iterations, generator, compiled)


def _lloyd(points: Tensor, start: Tensor, iterations: int, generator: torch.Generator, compiled: bool) -> KMeans:
    """`kmeans` on checked arguments."""
    # Subtract the points' mean first: float32 loses accuracy in differences of large numbers.
    centre = points.mean(0)
    homogeneous = points.new_ones(points.shape[0], points.shape[1] + 1)
    torch.sub(points, centre, out=homogeneous[:, :-1])
    centroids = start.to(points) - centre
    codes: Tensor | None = None
    objective = math.inf
    for _ in range(iterations):
        new_codes = _assign(homogeneous, centroids, compiled)
        _fill_empty(homogeneous, new_codes, centroids.shape[0], generator)
        new_centroids = _means(homogeneous, new_codes, centroids)
        new_objective = _objective(homogeneous, new_centroids, new_codes)
        if codes is not None and not new_objective < objective:  # `not <` also ends a run that meets a NaN
            break
        centroids, codes, objective = new_centroids, new_codes, new_objective
    assert codes is not None
    return KMeans(centroids=centroids + centre, codes=codes)


@contextmanager
def _one_thread(device: torch.device) -> Iterator[None]:
    """Limit torch to one thread if the work is on the CPU; restores the setting."""
    threads = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def cluster_sums(points: Tensor, codes: Tensor, clusters: int) -> Tensor:
    """Sum of the points `[n, d]` of each cluster, `[clusters, d]`; bitwise reproducible.

    On a CPU `index_add_` is fast and adds in order. On other devices its order varies, so a one-hot matrix product is
    used instead.

    Args:
        points: `[n, d]`.
        codes: int64 `[n]`, the index of each point's cluster.
        clusters: number of clusters.
    """
    sums = points.new_zeros(clusters, points.shape[1])
    if points.device.type == "cpu":
        return sums.index_add_(0, codes, points)
    return _cluster_sums_by_product(points, codes, sums)


def _cluster_sums_by_product(points: Tensor, codes: Tensor, sums: Tensor) -> Tensor:
    """`one_hot(codes).T @ points` added to `sums` `[clusters, d]`, in chunks."""
    rows = _chunk_rows(points, sums.shape[0])
    for part, part_codes in zip(torch.split(points, rows), torch.split(codes, rows), strict=True):
        one_hot = part.new_zeros(part.shape[0], sums.shape[0]).scatter_(1, part_codes.unsqueeze(1), 1.0)
        sums.addmm_(one_hot.T, part)
    return sums


def _chunk_rows(points: Tensor, clusters: int) -> int:
    """Rows of distances held at a time."""
    return max(256, (_SCRATCH_CPU if points.device.type == "cpu" else _SCRATCH_DEVICE) // clusters)


def _assign(homogeneous: Tensor, centroids: Tensor, compiled: bool = False) -> Tensor:
    """The nearest centroid of each point, int64 `[n]`.

    ‖v − c‖² = ‖v‖² − 2 v·c + ‖c‖², and ‖v‖² does not affect the choice. With a column of ones appended to the points,
    the rest is one matrix product: [v, 1] · [−2c, ‖c‖²].
    """
    if centroids.shape[1] == 1:
        return nearest_on_a_line(homogeneous[:, 0], centroids[:, 0])
    if compiled and can_search(homogeneous):
        return search(homogeneous[None, :, :-1], centroids[None])[0]
    weights = torch.cat([-2 * centroids, centroids.square().sum(1, keepdim=True)], dim=1).T.contiguous()
    codes = torch.empty(homogeneous.shape[0], dtype=torch.int64, device=homogeneous.device)
    rows = min(_chunk_rows(homogeneous, centroids.shape[0]), homogeneous.shape[0])
    scratch = homogeneous.new_empty(rows, centroids.shape[0])
    for part, part_codes in zip(torch.split(homogeneous, rows), torch.split(codes, rows), strict=True):
        distances = torch.mm(part, weights, out=scratch[: part.shape[0]])
        if distances.device.type == "cpu":
            distances.numpy().argmin(1, out=part_codes.numpy())
        else:
            torch.argmin(distances, 1, out=part_codes)
    return codes


def _means(homogeneous: Tensor, codes: Tensor, centroids: Tensor) -> Tensor:
    """The mean of each cluster, `[k, d]`; the centroid of an empty cluster does not move."""
    sums = cluster_sums(homogeneous[:, :-1], codes, centroids.shape[0])
    counts = torch.bincount(codes, minlength=centroids.shape[0]).unsqueeze(1)
    return torch.where(counts > 0, sums / counts.clamp(min=1), centroids)


def _objective(homogeneous: Tensor, centroids: Tensor, codes: Tensor) -> float:
    """Σ ‖v − c‖², from the differences themselves, which is more accurate than the expanded form."""
    rows, total = 8192, 0.0
    for part, part_codes in zip(torch.split(homogeneous, rows), torch.split(codes, rows), strict=True):
        difference = (part[:, :-1] - functional.embedding(part_codes, centroids)).flatten()
        total += float(torch.dot(difference, difference))
    return total


def _fill_empty(homogeneous: Tensor, codes: Tensor, clusters: int, generator: torch.Generator) -> None:
    """Refill each empty cluster with part of the most populated one, in `codes`.

    Each attempt refills a cluster or rules out a source that cannot be split because its points are all equal. So the
    loop ends, also with fewer distinct points than clusters: the rest stay empty.

    **Source**: Stock et al., arXiv 1907.05686, section 3, for splitting the most populated cluster.
    """
    counts = torch.bincount(codes, minlength=clusters).tolist()
    empty = [cluster for cluster, count in enumerate(counts) if count == 0]
    filled = 0
    while filled < len(empty):
        largest = max(range(clusters), key=counts.__getitem__)
        if counts[largest] < 2:
            break
        moved = _split(homogeneous, codes, largest, empty[filled], generator)
        if moved == 0:
            counts[largest] = 0
            continue
        counts[largest] -= moved
        counts[empty[filled]] = moved
        filled += 1


def _split(homogeneous: Tensor, codes: Tensor, source: int, target: int, generator: torch.Generator) -> int:
    """Split `source` around one of its points: points nearer to it than to the mean move to `target`; returns how many.

    The point is drawn with probability proportional to its squared distance from the mean, as in k-means++: the
    farthest point would often be an outlier that ends up alone. Each moved point gets nearer, so the objective does not
    rise. Returns 0 and moves nothing if all points are equal.
    """
    members = (codes == source).nonzero().squeeze(1)
    points = homogeneous[members, :-1].double()
    mean = points.mean(0)
    distances = (points - mean).square().sum(1)
    cumulated = running_sums(distances)
    draw = torch.rand((), generator=generator, dtype=torch.float64, device=generator.device).item()
    chosen = int(torch.searchsorted(cumulated, cumulated[-1:] * draw, right=True).clamp(max=len(members) - 1))
    nearer = (points - points[chosen]).square().sum(1) < distances
    moved = int(nearer.sum())
    if moved == len(members):  # the points differ from their mean only by rounding
        return 0
    codes[members[nearer]] = target
    return moved
