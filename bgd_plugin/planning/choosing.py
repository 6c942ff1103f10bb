"""Choose sizes by measurements: by the layers' own effects first, corrected by the effect of all errors together."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from bgd_plugin.planning.budget import Budget
from bgd_plugin.planning.measure import Measurements
from bgd_plugin.planning.survey import Survey

__all__ = ["choose_sizes", "energy_at", "energy_left", "realized_energy"]

_TRIALS = 4
_MADE_GOOD = 1 / 3
"""Share of the errors' energy that is left where each layer's fit aims at the float outputs, and so makes good what the
layers before it have lost: the median of eleven trained networks, of which it was between 0.04 and 0.8."""
_NEAR = 1.1
"""A trial that differs from what was expected by no more than this factor ends a search."""
_PATIENCE = 2
"""Passes that may come out above what was asked for before the next ones expect worse than they have shown."""
_TINY = 1e-30
_FARTHEST = 32.0
"""Factor, at most, by which one pass corrects the energy."""


def energy_left(budget: Budget) -> float:
    """The share of the errors' energy that is expected to be left before a pass has shown it."""
    return _MADE_GOOD if budget.survey.config.makes_good else 1.0


def choose_sizes(budget: Budget, measurements: Measurements, energy: float) -> Survey:
    """The survey with sizes chosen, and the divergence that is expected of them.

    What layers' errors cost adds up only roughly. So the errors that a choice is expected to have are tried together,
    and where the divergence is another one than the sum, the choice is made again under that correction.

    Args:
        budget: of a network.
        measurements: of the same one.
        energy: share of the errors' energy that is left after the fit.

    Raises:
        ConfigError: as `Budget.spend`.
    """
    sensitivities = measurements.sensitivities
    beside = tuple(layer for layer in budget.survey.beside if layer.name in sensitivities)
    budget = dataclasses.replace(budget, scale=measurements.scale, beside=beside)
    factor = energy
    survey = budget.spend(sensitivities, factor)
    for trial in range(_TRIALS):
        if not survey.expected_divergence:
            return survey
        tried = measurements.joint(survey, energy)
        if not 0 < tried < math.inf:
            break
        step = tried / survey.expected_divergence
        factor *= step
        survey = dataclasses.replace(survey, expected_divergence=tried)
        if budget.target_bytes is not None or 1 / _NEAR < step < _NEAR or trial == _TRIALS - 1:
            break
        survey = budget.spend(sensitivities, factor)
    return dataclasses.replace(survey, curve=budget.curve(sensitivities, factor))


def energy_at(shown: Sequence[tuple[float, float]], divergence: float) -> float:
    """The share of the errors' energy that is expected to be left where a choice comes to a divergence.

    Fine codes may leave a far smaller share than coarse ones. Two passes show how it changes: their logarithms are
    interpolated, and beyond both passes the nearer one's counts. Where three passes or more have all come out above
    the divergence, the share counts more by the factor by which the nearest did, and again by it for each further pass.

    Args:
        shown: pairs (measured divergence, energy realized), one for each pass so far, at least one.
        divergence: to which the next choice is to come.
    """
    below = max((pair for pair in shown if pair[0] <= divergence), default=None)
    above = min((pair for pair in shown if pair[0] >= divergence), default=None)
    if below is None or above is None or not below[0] < above[0] or not below[0] > 0:
        nearest, energy = min(shown, key=lambda pair: abs(math.log(max(pair[0], _TINY) / divergence)))
        misses = max(0, len(shown) - _PATIENCE) if below is None else 0
        return energy * min(nearest / divergence, _FARTHEST) ** misses
    share = math.log(divergence / below[0]) / math.log(above[0] / below[0])
    return float(below[1] ** (1 - share) * above[1] ** share)


def realized_energy(measurements: Measurements, survey: Survey, energy: float, divergence: float) -> float:
    """The share of the errors' energy with which the errors of a choice, tried together, cost what was measured.

    A divergence is not proportional to the energy of errors: of a network that is sure of its answers it falls much
    faster. So the energy is what a pass corrects, not the divergence.

    Args:
        measurements: of the network.
        survey: with the sizes chosen.
        energy: the share under which they were chosen; its `expected_divergence` is what was expected then.
        divergence: measured after the fit.
    """
    expected = survey.expected_divergence
    if not expected or not 0 < divergence < math.inf:
        return energy
    points = [(math.log(energy), math.log(expected))]
    wanted, slope = math.log(divergence), 1.0
    low, high = math.log(energy / _FARTHEST), math.log(energy * _FARTHEST)
    for _ in range(_TRIALS):
        place, found = points[-1]
        if abs(found - wanted) < math.log(_NEAR):
            break
        place = min(max(place + (wanted - found) / slope, low), high)
        if place == points[-1][0]:
            break
        tried = measurements.joint(survey, math.exp(place))
        if not 0 < tried < math.inf:
            break
        points.append((place, math.log(tried)))
        (x0, y0), (x1, y1) = points[-2:]
        slope = min(max((y1 - y0) / (x1 - x0), 0.3), 10.0)
    return math.exp(min(points, key=lambda point: abs(point[1] - wanted))[0])
