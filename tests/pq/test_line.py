"""Codewords of one weight: the nearest one, and where to begin."""

from __future__ import annotations

from pathlib import Path

import torch
from hypothesis import given
from hypothesis import strategies as st

from bgd_plugin.pq import line
from bgd_plugin.pq.em import fit_em
from bgd_plugin.pq.feedback import nearest
from bgd_plugin.pq.line import nearest_on_a_line, running_sums, spread_on_a_line


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@given(st.integers(1, 40), st.integers(0, 99))
def test_the_nearest_centroid_is_found_whatever_the_order(count: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    points, centroids = torch.randn(7, 30, generator=generator), torch.randn(count, generator=generator)
    distances = (points[..., None] - centroids).abs()
    found = distances.gather(2, nearest_on_a_line(points, centroids)[..., None]).squeeze(2)
    torch.testing.assert_close(found, distances.amin(2), atol=1e-6, rtol=0)


def test_a_metric_of_one_number_does_not_matter() -> None:
    points, codebook = torch.randn(3, 20, 1, generator=_generator()), torch.randn(8, 1, generator=_generator())
    codes = [nearest(points, scale * torch.ones(3, 1, 1), codebook) for scale in (0.01, 5.0)]
    assert torch.equal(*codes)


def test_a_fit_of_gaussian_weights_comes_near_the_known_distortion() -> None:
    """Panter and Dite: √3 π / 2 / k² of the variance for many codewords."""
    weights = torch.randn(200_000, generator=_generator())
    for size in (64, 1024):
        fit = fit_em(weights.view(200, -1, 1), torch.eye(1), size, 3, generator=_generator())
        error = float((fit.codebook[fit.codes, 0].flatten() - weights).square().mean())
        assert error * size**2 < 1.05 * 2.72


@given(st.lists(st.sampled_from([-2.0, 0.0, 0.5, 3.0]), min_size=8, max_size=60))
def test_weights_of_few_values_are_no_trouble(values: list[float]) -> None:
    points = torch.tensor(values)
    start = spread_on_a_line(points, 8)
    assert start.shape == (8,)
    assert bool(torch.isfinite(start).all())
    fit = fit_em(points.view(1, -1, 1), torch.eye(1), 8, 20, generator=_generator())
    torch.testing.assert_close(fit.codebook[fit.codes, 0].flatten(), points)


def test_running_sums_of_floats_are_made_nowhere_else() -> None:
    """Elsewhere than on a CPU torch has no deterministic ones; those of whole numbers are `.long()`."""
    values = torch.randn(50, dtype=torch.float64, generator=_generator())
    assert torch.equal(running_sums(values), values.cumsum(0))
    files = sorted(Path(line.__file__).parent.glob("*.py"))
    found = [(file.name, text) for file in files for text in file.read_text().splitlines() if ".cumsum(" in text]
    assert [name for name, text in found if ".long()" not in text] == ["line.py"]
