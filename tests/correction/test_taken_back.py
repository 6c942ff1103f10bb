"""Corrections that do harm on samples kept aside are undone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bgd_plugin.calibration import CollectedInputs
from bgd_plugin.correction.batchnorm import _corrected, _price
from bgd_plugin.correction.depthwise_refit import refitted
from bgd_plugin.correction.gain import kept_aside
from bgd_plugin.pq.blocks import Geometry

LINEAR = Geometry.linear()


def _inputs(student: Sequence[Tensor], reference: Sequence[Tensor], geometry: Geometry = LINEAR) -> CollectedInputs:
    mine, theirs = ([[(x, geometry)] for x in values] for values in (student, reference))
    return CollectedInputs("layer", mine, theirs)


@pytest.mark.parametrize(
    ("count", "tried", "judges"),
    [(1, [0], [0]), (2, [0], [1]), (10, list(range(8)), [8, 9]), (20, list(range(16)), [16, 17, 18, 19])],
)
def test_the_last_fifth_judges(count: int, tried: list[int], judges: list[int]) -> None:
    assert tuple(map(list, kept_aside(count))) == (tried, judges)


@pytest.mark.parametrize(("harm", "mode"), [(5.0, "matched"), (1.0, "matched"), (5.0, "reestimate")])
def test_a_match_that_does_harm_is_undone(harm: float, mode: Any) -> None:
    """A fake error, which depends on the statistics that the norm has."""
    norm = nn.BatchNorm1d(2)
    new = torch.full((2,), 3.0)

    def distance(batches: Sequence[int]) -> float:
        return 0.1 * harm if torch.equal(norm.running_mean, new) else 0.1  # type: ignore[arg-type]

    gain = _corrected(norm, "norm", mode, range(5), lambda batches: (new, new), distance)
    is_undone = mode == "matched" and harm > 1
    assert gain.taken_back == is_undone
    assert torch.equal(norm.running_mean, torch.zeros(2) if is_undone else new)  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", ["matched", "reestimate"])
def test_a_match_is_tried_on_some_batches_judged_on_the_others_and_made_from_all(mode: Any) -> None:
    """From the statistics that the norm came with, each time."""
    norm = nn.BatchNorm1d(2)
    norm.running_mean.fill_(7.0)  # type: ignore[union-attr,operator]
    asked: list[tuple[str, list[int], float]] = []

    def mean() -> float:
        return float(norm.running_mean[0])  # type: ignore[index]

    def statistics(batches: Sequence[int]) -> tuple[Tensor, Tensor]:
        asked.append(("statistics", list(batches), mean()))
        return torch.full((2,), float(len(asked))), torch.ones(2)

    def distance(batches: Sequence[int]) -> float:
        asked.append(("distance", list(batches), mean()))
        return 0.1

    gain = _corrected(norm, "norm", mode, range(10), statistics, distance)
    every, tried, judges = list(range(10)), list(range(8)), [8, 9]
    matched = [
        ("distance", every, 7.0),
        ("distance", judges, 7.0),
        ("statistics", tried, 7.0),
        ("distance", judges, 3.0),
        ("statistics", judges, 7.0),
        ("distance", every, 5.0),
    ]
    reestimated = [("distance", every, 7.0), ("statistics", every, 7.0), ("distance", every, 2.0)]
    assert asked == (matched if mode == "matched" else reestimated)
    assert not gain.taken_back


@pytest.mark.parametrize("where", ["tried", "judges"])
def test_only_harm_to_the_judges_counts(where: str) -> None:
    norm, new = nn.BatchNorm1d(2), torch.full((2,), 3.0)

    def distance(batches: Sequence[int]) -> float:
        is_harmed = list(batches) == ([8, 9] if where == "judges" else list(range(8)))
        return 0.9 if is_harmed and torch.equal(norm.running_mean, new) else 0.1  # type: ignore[arg-type]

    gain = _corrected(norm, "norm", "matched", range(10), lambda batches: (new, new), distance)
    assert gain.taken_back == (where == "judges")
    assert (gain.before, gain.after) == (0.1, 0.1)


def test_keeping_the_variance_has_its_price() -> None:
    """Outputs that are as near as an error allows, and the same outputs with the variance given back."""
    for error in (0.1, 0.3, 0.6):
        x = torch.randn(200_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        noise = torch.randn(200_000, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        nearest = (1 - error) * x + (error * (1 - error)) ** 0.5 * noise  # the best with an error of `error`
        given_back = nearest / nearest.std()
        cost = float((given_back - x).square().mean() / x.var())
        assert cost == pytest.approx(2 * (1 - (1 - error) ** 0.5), rel=0.02)
        assert cost < _price(error) < 1.2 * cost
    assert _price(3.0) == pytest.approx(3.3)  # where the outputs are worse than none, they may stay as bad


@pytest.mark.parametrize(("last", "harms"), [(0.5, False), (2.0, True), (0.9, True)])
def test_a_refit_is_judged_on_other_samples(last: float, harms: bool) -> None:
    """The student's inputs are half as large; in the last piece twice as large, or nearly as they should be.

    In the last case the refit helps in the sum over all pieces, and does harm where it is judged.
    """
    geometry = Geometry.of((3,), 1, 1, 1, 4)
    reference = [torch.randn(8, 4, 16) for _ in range(5)]
    student = [x * (last if i == 4 else 0.5) for i, x in enumerate(reference)]
    weight = torch.randn(4, 1, 3)
    found = refitted(weight, _inputs(student, reference, geometry), torch.Generator().manual_seed(0))
    assert found.gain.taken_back == harms
    assert torch.equal(found.weight, weight) == harms
