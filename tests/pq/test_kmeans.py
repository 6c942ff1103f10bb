"""k-means against Lloyd's algorithm written out, and on inputs that leave clusters empty."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bgd_plugin.pq import kmeans as module
from bgd_plugin.pq.kmeans import KMeans, kmeans


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _run(points: Tensor, clusters: int, iterations: int = 50) -> KMeans:
    start = points[torch.randperm(len(points), generator=_generator())[:clusters]]
    return kmeans(points, start, iterations, generator=_generator())


def _check(points: Tensor, found: KMeans, tolerance: float = 1e-6) -> None:
    """What holds for every result: finite, ranges, and means."""
    assert bool(torch.isfinite(found.centroids).all())
    assert found.codes.dtype == torch.int64
    assert found.codes.shape == points.shape[:1]
    assert set(found.codes.tolist()) <= set(range(len(found.centroids)))
    scale = float(points.abs().max()) + 1e-30
    for cluster in sorted(set(found.codes.tolist())):
        mean = points[found.codes == cluster].double().mean(0)
        torch.testing.assert_close(found.centroids[cluster].double(), mean, atol=tolerance * scale, rtol=tolerance)


def _objective(points: Tensor, found: KMeans) -> float:
    return float((points.double() - found.centroids[found.codes].double()).square().sum())


def test_it_is_lloyds_algorithm() -> None:
    points = torch.randn(3000, 5, dtype=torch.float64)
    start, iterations = points[:40], 12
    centroids = start.clone()
    for _ in range(iterations):
        codes = torch.cdist(points, centroids).argmin(1)
        centroids = torch.stack([points[codes == cluster].mean(0) for cluster in range(40)])
    found = kmeans(points, start, iterations, generator=_generator())
    assert torch.equal(found.codes, codes)
    torch.testing.assert_close(found.centroids, centroids)
    _check(points, found)


def test_a_run_that_ends_early_gives_each_point_to_its_nearest_centroid() -> None:
    points = torch.randn(2000, 3)
    found = _run(points, 16, 1000)
    distances = torch.cdist(points.double(), found.centroids.double())
    nearest = distances.gather(1, found.codes.unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(nearest, distances.min(1).values, atol=1e-5, rtol=0)


@given(
    count=st.integers(1, 300),
    size=st.integers(1, 10),
    clusters=st.integers(1, 70),
    distinct=st.integers(1, 300),
    double=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_points_give_a_sound_result(
    count: int, size: int, clusters: int, distinct: int, double: bool, seed: int
) -> None:
    """Fewer distinct points than clusters is part of it."""
    generator = _generator(seed)
    kinds = torch.randn(distinct, size, generator=generator, dtype=torch.float64 if double else torch.float32)
    points = kinds[torch.randint(0, distinct, (count,), generator=generator)]
    few, found = (_run(points, min(clusters, count), iterations) for iterations in (2, 50))
    _check(points, found, 1e-9 if double else 1e-4)
    assert _objective(points, found) <= _objective(points, few) * (1 + 1e-5) + 1e-9


@pytest.mark.parametrize("value", [0.0, 3.7, -1e20])
def test_points_that_are_all_the_same_end_at_once(value: float) -> None:
    points = torch.full((5000, 9), value)
    found = _run(points, 256)
    assert len(set(found.codes.tolist())) == 1
    torch.testing.assert_close(found.centroids[found.codes], points)


def test_as_many_clusters_as_distinct_points_find_them_all() -> None:
    kinds = torch.randn(32, 4)
    points = kinds.repeat(50, 1)
    start = kinds[:1].repeat(32, 1)  # all centroids in one place: 31 clusters start empty
    found = kmeans(points, start, 100, generator=_generator())
    assert len(set(found.codes.tolist())) == 32
    assert _objective(points, found) < 1e-9
    _check(points, found)


def test_an_empty_cluster_takes_a_part_of_the_most_populated_one() -> None:
    left, right = torch.randn(100, 2), torch.randn(900, 2) + torch.tensor([50.0, 0.0])
    points = torch.cat([left, right])
    start = torch.tensor([[0.0, 0.0], [50.0, 0.0], [1e4, 1e4]])
    found = kmeans(points, start, 1, generator=_generator())
    assert set(found.codes[:100].tolist()) == {0}
    assert set(found.codes[100:].tolist()) == {1, 2}
    without = float((left - left.mean(0)).square().sum() + (right - right.mean(0)).square().sum())
    assert _objective(points, found) < without


def test_points_far_from_the_origin_lose_no_digits() -> None:
    near = torch.randn(4000, 4, dtype=torch.float64).mul(256).round() / 256  # exact after the move, in float32 too
    start = near[:32]
    expected = kmeans(near, start, 5, generator=_generator())
    moved = kmeans((near + 4096).float(), (start + 4096).float(), 5, generator=_generator())
    assert _objective(near + 4096, moved) == pytest.approx(_objective(near, expected), rel=1e-4)
    assert (moved.codes == expected.codes).float().mean() > 0.99


def test_the_same_generator_gives_the_same_bits() -> None:
    points = torch.randn(20000, 6).round()
    first, second = _run(points, 200, 10), _run(points, 200, 10)
    assert torch.equal(first.codes, second.codes)
    assert torch.equal(first.centroids, second.centroids)


def test_the_number_of_threads_changes_nothing_and_stays() -> None:
    points, before = torch.randn(20000, 6), torch.get_num_threads()
    results = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(_run(points, 64, 5))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0].codes, results[1].codes)
    assert torch.equal(results[0].centroids, results[1].centroids)


@pytest.mark.parametrize("scratch", [1, 1 << 30])
def test_chunks_change_nothing(scratch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    points = torch.randn(1000, 3, dtype=torch.float64)
    expected = _run(points, 8)
    monkeypatch.setattr(module, "_SCRATCH_CPU", scratch)
    assert torch.equal(_run(points, 8).codes, expected.codes)


def test_sums_by_matrix_product_are_the_sums() -> None:
    points, codes = torch.randn(5000, 7, dtype=torch.float64), torch.randint(0, 300, (5000,))
    expected = module.cluster_sums(points, codes, 301)
    torch.testing.assert_close(module._cluster_sums_by_product(points, codes, torch.zeros_like(expected)), expected)
    torch.testing.assert_close(expected[int(codes[0])], points[codes == codes[0]].sum(0))
    assert not expected[300].any()


def test_a_nan_ends_the_run() -> None:
    points = torch.randn(100, 2)
    points[3, 1] = float("nan")
    assert _run(points, 8, 10**9).codes.shape == (100,)


def test_it_says_what_is_wrong() -> None:
    points = torch.zeros(3, 2)
    with pytest.raises(ValueError, match="3 points are fewer than 4 centroids"):
        kmeans(points, torch.zeros(4, 2), 1, generator=_generator())
    with pytest.raises(ValueError, match="at least one iteration, not 0"):
        kmeans(points, points, 0, generator=_generator())
