"""The fewest bytes within a bound, against trying everything."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bgd_plugin.planning import bound
from bgd_plugin.planning.bound import fewest_bytes, loss_by_bytes
from bgd_plugin.planning.candidates import Option
from bgd_plugin.planning.losses import LEVEL


def _layer(sizes: list[int], losses: list[float]) -> list[Option]:
    pairs = zip(sorted(set(sizes)), sorted(losses, reverse=True), strict=False)
    options = [Option(layer=None, size_bytes=size, loss=loss) for size, loss in pairs]
    return [*options, Option(layer=None, size_bytes=options[-1].size_bytes + 7, loss=0.0)]


LAYER = st.builds(
    _layer,
    st.lists(st.integers(1, 200), min_size=1, max_size=4),
    st.lists(st.floats(0.01, 1.0), min_size=4, max_size=4, unique=True),
)


def _totals(layers: list[list[Option]], picks: tuple[int, ...]) -> tuple[int, float]:
    chosen = [options[i] for options, i in zip(layers, picks, strict=True)]
    return sum(o.size_bytes for o in chosen), sum(o.loss for o in chosen)


@given(st.lists(LAYER, min_size=1, max_size=4), st.floats(0.0, 3.0))
def test_nothing_smaller_keeps_the_bound(layers: list[list[Option]], bound: float) -> None:
    picks = tuple(fewest_bytes(layers, bound))
    size, loss = _totals(layers, picks)
    assert loss <= bound
    every = [_totals(layers, p) for p in itertools.product(*(range(len(options)) for options in layers))]
    assert size == min(s for s, found in every if found <= bound)


def test_an_option_whose_loss_is_no_number_is_not_chosen() -> None:
    lost = [Option(layer=None, size_bytes=size, loss=loss) for size, loss in ((1, math.inf), (2, math.nan), (9, 0.0))]
    assert fewest_bytes([lost, _layer([3], [0.5, 0.4, 0.3, 0.2])], 0.6) == [2, 0]


@given(st.lists(LAYER, min_size=1, max_size=4))
def test_the_curve_falls_from_the_smallest_file_to_no_loss(layers: list[list[Option]]) -> None:
    curve = loss_by_bytes(lambda level: layers, lambda picked: sum(o.loss for o in picked), 6)
    sizes, losses = zip(*curve, strict=True)
    assert list(sizes) == sorted(set(sizes))
    assert list(losses) == sorted(losses, reverse=True)
    assert sizes[0] == sum(options[0].size_bytes for options in layers)
    assert losses[-1] == 0.0


def test_the_search_takes_few_steps_also_where_the_answer_is_near_the_smallest_file(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Bytes are halved by factors, not by differences, while they span several powers of ten."""
    calls, real = [], bound.allocate

    def counted(layers: Any, shared: int) -> Any:
        calls.append(shared)
        return real(layers, shared)

    monkeypatch.setattr(bound, "allocate", counted)
    options = [Option(layer=None, size_bytes=round(1000 * 1.05**i), loss=1 / (1 + i)) for i in range(188)]
    layers = [[*options, Option(layer=None, size_bytes=10**7, loss=0.0)]]
    (pick,) = fewest_bytes(layers, 1 / 11)
    assert pick == 10
    assert len(calls) <= 18


def test_a_choice_that_loses_just_the_bound_is_within_it() -> None:
    options = [Option(layer=None, size_bytes=size, loss=loss) for size, loss in ((10, 0.5), (20, 0.25), (40, 0.0))]
    assert fewest_bytes([options], 0.5) == [0]
    assert fewest_bytes([options], 0.25) == [1]
    assert fewest_bytes([options, options], 0.5) == [1, 1]
    assert fewest_bytes([options], 0.0) == [2]


def test_each_point_of_the_curve_is_rated_at_the_loss_of_the_point_before_it() -> None:
    options = [Option(layer=None, size_bytes=size, loss=loss) for size, loss in ((10, 0.5), (20, 0.25), (40, 0.0))]
    levels: list[float] = []

    def rated(level: float) -> list[list[Option]]:
        levels.append(level)
        return [options]

    curve = loss_by_bytes(rated, lambda picked: 3 * sum(option.loss for option in picked), 3)
    assert curve == [(10, 1.5), (20, 0.75), (40, 0.0)]
    assert levels == [LEVEL, 1.5, 1.5, 0.75]


def test_a_curve_never_rises_with_the_bytes() -> None:
    """What a joint loss makes of options that lose less each may be more."""
    options = [Option(layer=None, size_bytes=size, loss=loss) for size, loss in ((10, 0.5), (20, 0.25), (40, 0.0))]
    losses = iter([0.3, 0.3, 0.9, 0.1])
    assert [found for _, found in loss_by_bytes(lambda level: [options], lambda picked: next(losses), 3)] == [
        0.3,
        0.3,
        0.1,
    ]
