"""Viterbi's search against all walks."""

from __future__ import annotations

import itertools

import numpy
import pytest

from bgd_plugin.pq.viterbi import Floats, cheapest_walk, nearest_ring
from bgd_plugin.pq.windows import window_table

TABLE: Floats = window_table().numpy()


def _values(count: int, seed: int = 0) -> tuple[Floats, Floats]:
    draws = numpy.random.default_rng(seed)
    return draws.standard_normal(count).astype(numpy.float32), draws.random(count).astype(numpy.float32)


def _cost(states: numpy.ndarray, values: Floats, weights: Floats) -> float:
    return float((weights.astype(float) * (values.astype(float) - TABLE[states]) ** 2).sum())


@pytest.mark.parametrize("seam", [0, 1023, 617])
def test_no_walk_is_cheaper(seam: int) -> None:
    """All walks of seven values from a seam and back to it: four to the power of two."""
    values, weights = _values(7, seed=seam)
    found = cheapest_walk(values, weights, TABLE, seam)
    last_five = [seam >> 2 * back & 3 for back in range(4, -1, -1)]
    costs = []
    for first in itertools.product(range(4), repeat=2):
        state, states = seam, []
        for code in (*first, *last_five):
            state = (state * 4 + code) % 4096
            states.append(state)
        costs.append(_cost(numpy.array(states), values, weights))
    assert _cost(found, values, weights) == pytest.approx(min(costs), rel=1e-6)


def test_without_a_seam_any_walk_may_be_taken() -> None:
    values, weights = _values(2, seed=4)
    found = cheapest_walk(values, weights, TABLE, None)
    before = numpy.arange(4096)
    costs = [(b, c, _cost(numpy.array([b, (b * 4 + c) % 4096]), values, weights)) for b in before for c in range(4)]
    assert _cost(found, values, weights) == pytest.approx(min(cost for *_, cost in costs), rel=1e-6)


@pytest.mark.parametrize("count", [16, 20, 52, 100])
def test_a_ring_continues_itself(count: int) -> None:
    states = nearest_ring(cheapest_walk, *_values(count), TABLE)
    assert states.shape == (count,)
    assert ((numpy.roll(states, 1) & 1023) == states >> 2).all()


def test_the_distortion_of_a_gaussian_is_near_the_bound() -> None:
    """0.0625 is the rate-distortion bound at two bits; k-means on blocks of four leaves 0.099."""
    values = numpy.random.default_rng(0).standard_normal(600).astype(numpy.float32)
    states = nearest_ring(cheapest_walk, values, numpy.ones(600, numpy.float32), TABLE)
    assert 0.0625 < float(((values - TABLE[states]) ** 2).mean()) < 0.077


def test_values_of_no_weight_are_free() -> None:
    values, weights = _values(40)
    weights[10:20] = 0
    changed = values.copy()
    changed[10:20] = 100
    one, other = (nearest_ring(cheapest_walk, v, weights, TABLE) for v in (values, changed))
    assert (one == other).all()
