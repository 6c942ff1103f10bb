"""Error curves: the law for Gaussian weights, the points between, and what is sampled."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bgd_plugin.pq.rate import (
    EntropyCurve,
    RateCurve,
    entropy_curve,
    largest_codebook,
    quick_fit,
    rate_curve,
    sampled_positions,
)


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_a_curve_goes_through_its_points_and_is_straight_in_log_log_between() -> None:
    curve = RateCurve(block_size=4, points=((16, 0.4), (256, 0.1)))
    assert (curve.error(16), curve.error(256)) == (0.4, 0.1)
    assert curve.error(64) == pytest.approx(0.2)


def test_beyond_its_points_a_curve_follows_the_law_of_fine_quantization() -> None:
    curve = RateCurve(block_size=4, points=((16, 0.4), (256, 0.1)))
    assert curve.error(4096) == pytest.approx(0.1 * 16 ** (-2 / 4))
    assert curve.error(4) == pytest.approx(0.4 * 4 ** (2 / 4))
    assert RateCurve(block_size=2, points=((1, 1.0),)).error(16) == pytest.approx(1 / 16)


def test_an_error_of_zero_stays_zero() -> None:
    curve = RateCurve(block_size=2, points=((16, 0.5), (64, 0.0)))
    assert curve.error(64) == curve.error(256) == 0.0
    assert curve.error(32) == 0.5


@given(st.integers(1, 10_000))
def test_the_largest_codebook_is_the_largest_power_of_two_below_a_quarter(blocks: int) -> None:
    assert largest_codebook(blocks) == max([2**b for b in range(12) if 4 * 2**b < blocks], default=0)


def test_a_quick_fit_of_gaussian_blocks_comes_near_the_known_distortion() -> None:
    # The optimal scalar quantizer of 16 levels has 0.01154 (Max, 1960); pairs gain a few percent on it.
    blocks = torch.randn(40, 400, 2, generator=_generator())
    metrics = torch.eye(2).expand(40, -1, -1)
    error = quick_fit(blocks, metrics, 256, generator=_generator()).error
    assert 0.008 < error < 0.0125


def test_a_quick_fit_counts_errors_in_the_positions_metric() -> None:
    blocks = torch.randn(30, 60, 3, generator=_generator())
    factors = torch.randn(30, 3, 3, generator=_generator(1))
    metrics = factors @ factors.mT + 0.1 * torch.eye(3)
    fit = quick_fit(blocks, metrics, 16, generator=_generator())
    difference = blocks[:, :, None] - fit.codebook
    distances = torch.einsum("prki,pij,prkj->prk", difference, metrics, difference)
    assert fit.error == pytest.approx(float(distances.min(2).values.mean()) / 3, rel=1e-4)


def test_curves_of_several_block_sizes_compare_by_weight() -> None:
    weight = torch.randn(240, 240, generator=_generator())
    errors = []
    for d, k in ((1, 4), (2, 16), (4, 256)):  # two bits a weight: larger blocks fill space better
        blocks = weight.reshape(240, -1, d).transpose(0, 1)
        metrics = torch.eye(d).expand(blocks.shape[0], -1, -1)
        errors.append(quick_fit(blocks, metrics, k, generator=_generator()).error)
    assert 0.11 < errors[0] < 0.13  # Max, 1960: 0.1175
    assert errors == sorted(errors, reverse=True)


def test_a_curve_never_rises() -> None:
    blocks = torch.randn(30, 60, 3, generator=_generator())
    curve = rate_curve(blocks, torch.eye(3).expand(30, -1, -1), [16, 64, 256], generator=_generator())
    errors = [error for _, error in curve.points]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0] / 2


def test_what_is_sampled_keeps_blocks_and_metrics_together() -> None:
    blocks = torch.arange(50.0)[:, None, None].expand(50, 20, 2)
    metrics = torch.arange(50.0)[:, None, None].expand(50, 2, 2)
    some, theirs = sampled_positions(blocks, metrics, 200, _generator())
    assert some.shape == (10, 20, 2)
    assert torch.equal(some[:, 0, 0], theirs[:, 0, 0])
    assert len(some[:, 0, 0].unique()) == 10
    assert sampled_positions(blocks, metrics, 1000, _generator())[0] is blocks
    assert sampled_positions(blocks, metrics, 8, _generator())[0].shape == (1, 8, 2)


def _entropy_points(scale: float = 1.0) -> EntropyCurve:
    blocks = scale * torch.randn(40, 400, 1, generator=_generator(3))
    return entropy_curve(blocks, torch.ones(40, 1, 1))


def test_the_error_of_entropy_coded_codes_is_near_the_bound() -> None:
    """A Gaussian's error at b bits is 4^-b at least; scalar codes need a quarter of a bit more, the trellis less."""
    curve = _entropy_points()
    assert curve.error(0.0) == pytest.approx(1.0, rel=0.03)
    for bits in (1.0, 2.0, 3.0, 4.0):
        assert 1.05 * 4.0**-bits < curve.error(bits) < 1.35 * 4.0**-bits, bits
    assert all(b0 < b1 and e0 > e1 for (b0, e0), (b1, e1) in itertools.pairwise(curve.points))


def test_an_entropy_curve_is_interpolated_and_goes_on() -> None:
    curve = EntropyCurve(points=((0.0, 1.0), (2.0, 0.1)))
    assert curve.error(1.0) == pytest.approx(0.1**0.5)
    assert curve.error(2.0) == pytest.approx(0.1)
    assert curve.error(3.0) == pytest.approx(0.025)
    assert EntropyCurve(points=((0.0, 0.0),)).error(1.5) == 0.0


def test_an_entropy_curve_scales_with_the_weights() -> None:
    one, other = _entropy_points(), _entropy_points(2.0**10)
    for (b0, e0), (b1, e1) in zip(one.points, other.points, strict=True):
        assert b0 == pytest.approx(b1)
        assert e1 == pytest.approx(2.0**20 * e0)


def test_columns_that_hardly_count_get_few_bits() -> None:
    blocks = torch.randn(20, 500, 1, generator=_generator(4))
    metrics = torch.ones(20, 1, 1)
    metrics[10:] = 1e-4
    curve = entropy_curve(blocks, metrics)
    assert curve.error(1.5) < 0.5 * 4.0**-1.5  # as if the rest had nearly all of them
