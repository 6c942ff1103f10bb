"""Viterbi's search for a walk through trellis windows whose values are nearest to given ones.

A state is a window of six codes (`pq.windows`). Four states go into each, by the code that leaves the window, so a step
keeps the cheapest of the four, then adds each state's squared distance from the value. `kernels.viterbi` does the same
steps in the same order, with the same rounding.

**Source**: Viterbi, IEEE Trans. Inf. Theory 13 (1967); a ring by two searches as in Tseng et al., QTIP, arXiv
2406.11235, section 3.2.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy
from numpy.typing import NDArray

from bgd_plugin.pq.windows import STATES

__all__ = ["Floats", "Search", "cheapest_walk", "nearest_ring"]

Floats = NDArray[numpy.float32]
Search = Callable[[Floats, Floats, Floats, "int | None"], NDArray[numpy.int16]]
"""Of the form of `cheapest_walk`."""

_BRANCHES = 4
_KEPT = STATES // _BRANCHES
"""States that agree in all but the code that leaves the window."""
_SEAM = 24
"""Values on each side of the seam, from which the codes at the seam are found."""


def nearest_ring(search: Search, values: Floats, weights: Floats, table: Floats) -> NDArray[numpy.int16]:
    """States around a ring, each of which continues the one before, the first one the last.

    First the values around the seam are searched by themselves; the five codes found at the seam are then given to the
    search of the whole.

    Args:
        search: `cheapest_walk`, or one that gives the same.
        values: `[count]`, at least six.
        weights: `[count]`, what the squared distance from each value counts.
        table: `[4096]`.

    Returns:
        `[count]`.
    """
    side = min(_SEAM, len(values) // 2)
    here, counts = (numpy.concatenate((array[-side:], array[:side])) for array in (values, weights))
    around = search(here, counts, table, None)
    return search(values, weights, table, int(around[side - 1]) % _KEPT)


def cheapest_walk(values: Floats, weights: Floats, table: Floats, seam: int | None) -> NDArray[numpy.int16]:
    """States, each of which continues the one before, with the least weighted squared distance from the values.

    Args:
        values, weights: `[count]`.
        table: `[4096]`.
        seam: the five codes before the first value, 10 bits, which are also the last five; None: whatever is best.

    Returns:
        `[count]`.
    """
    costs = first_costs(seam)
    picks = numpy.empty((len(values), _KEPT), numpy.uint8)
    for value, weight, pick in zip(values, weights, picks, strict=True):
        best = costs[:_KEPT].copy()
        pick[:] = 0
        for branch in range(1, _BRANCHES):
            other = costs[branch * _KEPT : (branch + 1) * _KEPT]
            less = other < best
            best[less], pick[less] = other[less], branch
        away = value - table
        costs = away * away * weight + numpy.repeat(best, _BRANCHES)
    state = last_state(costs, seam)
    states = numpy.empty(len(values), numpy.int16)
    for step in range(len(values) - 1, -1, -1):
        states[step] = state
        state = int(picks[step, state // _BRANCHES]) * _KEPT + state // _BRANCHES
    return states


def first_costs(seam: int | None) -> Floats:
    """The costs of states before the first value, `[4096]`: none for those that end in the codes of the seam.

    Args:
        seam: the last five codes as a number of 10 bits; None: any.
    """
    if seam is None:
        return numpy.zeros(STATES, numpy.float32)
    costs: Floats = numpy.full(STATES, numpy.inf, numpy.float32)
    costs[seam::_KEPT] = 0
    return costs


def last_state(costs: Floats, seam: int | None) -> int:
    """The index of the cheapest state at the end, among those that end in the codes of the seam.

    Args:
        costs: of all states, `[4096]`.
        seam: the last five codes as a number of 10 bits; None: any.
    """
    return int(costs.argmin()) if seam is None else seam + _KEPT * int(costs[seam::_KEPT].argmin())
