"""The knapsack: the least loss for the bytes there are, and for a file that holds more than the layers."""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bgd_plugin.errors import ConfigError
from bgd_plugin.planning.candidates import (
    Option,
)
from bgd_plugin.planning.knapsack import allocate, choose


def _options(pairs: list[tuple[int, float]]) -> list[Option]:
    return [Option(layer=None, size_bytes=size, loss=loss) for size, loss in sorted(pairs)]


_LAYER = st.lists(st.tuples(st.integers(1, 60), st.floats(0, 10)), min_size=1, max_size=4)


@settings(max_examples=60)
@given(layers=st.lists(_LAYER, min_size=1, max_size=5), extra=st.integers(0, 200))
def test_the_knapsack_finds_the_least_loss_there_is(layers: list[list[tuple[int, float]]], extra: int) -> None:
    options = [_options(layer) for layer in layers]
    shared = sum(layer[0].size_bytes for layer in options) + extra
    combinations = itertools.product(*options)
    best = min(sum(o.loss for o in c) for c in combinations if sum(o.size_bytes for o in c) <= shared)
    picked = [layer[i] for layer, i in zip(options, allocate(options, shared), strict=True)]
    assert sum(o.size_bytes for o in picked) <= shared
    assert sum(o.loss for o in picked) == pytest.approx(best)


def test_the_knapsack_never_exceeds_more_bytes_than_it_counts_in_steps() -> None:
    options = [_options([(1000 * i + 7 * layer, 1 / i) for i in range(1, 40)]) for layer in range(60)]
    shared = 1_000_000
    picked = [layer[i] for layer, i in zip(options, allocate(options, shared), strict=True)]
    assert 0.99 * shared < sum(o.size_bytes for o in picked) <= shared


def test_what_a_file_holds_beside_the_layers_is_found_out_and_kept_within() -> None:
    options = [_options([(100 * i, 1 / i) for i in range(1, 30)]) for _ in range(10)]

    def size(picked: Any) -> int:
        return 3210 + sum(o.size_bytes + len(str(o.size_bytes)) for o in picked)

    choice = choose(options, 12_000, size)
    assert choice.file_bytes == size(choice.options)
    assert 12_000 * 0.98 <= choice.file_bytes <= 12_000


@pytest.mark.parametrize("excess", [1, 30, 90])
@pytest.mark.parametrize("count", [1, 40])
def test_a_choice_that_is_too_long_by_less_than_a_step_is_not_given_up(count: int, excess: int) -> None:
    """A few bytes less gave the same choice again, eight times, and then the smallest one was taken."""
    options = [_options([(100_003 * i, 1 / i) for i in range(1, 30)]) for _ in range(count)]
    smallest = sum(layer[0].size_bytes for layer in options)
    room = 4096 * count  # beyond fourteen steps up in each layer, which are taken
    target = smallest + 14 * smallest + room

    def size(picked: Any) -> int:
        used = sum(o.size_bytes for o in picked)
        return used + (room + excess if used > smallest else 0)

    choice = choose(options, target, size)
    assert 0.9 * target < choice.file_bytes <= target


def _given(*pairs: tuple[int, float]) -> list[Option]:
    return [Option(layer=None, size_bytes=size, loss=loss) for size, loss in pairs]


def test_what_cannot_be_reached_says_what_the_budget_cannot_choose() -> None:
    layers = [_given((100, 1.0), (200, 0.5)), _given((50, 1.0))]
    with pytest.raises(ConfigError) as error:
        choose(layers, 640, lambda picked: 500 + sum(o.size_bytes for o in picked))
    found = [int(number.replace(",", "")) for number in re.findall(r"([\d,]+)(?= bytes|\sare)", str(error.value))]
    assert found == [640, 650, 500]


def test_bytes_beside_the_layers_that_depend_on_the_choice_are_measured_again() -> None:
    """A header that grows with the choice, by more than the first guess allows for."""
    layers = [_given(*((100 * i, 1 / i) for i in range(1, 40))) for _ in range(6)]

    def size(picked: Any) -> int:
        total = sum(o.size_bytes for o in picked)
        return 1000 + total + total // 3

    choice = choose(layers, 12_000, size)
    assert 12_000 - 134 * 4 <= choice.file_bytes <= 12_000
    assert choice.file_bytes == size(choice.options)
    assert choice.loss == pytest.approx(sum(o.loss for o in choice.options))


def test_where_only_the_smallest_options_fit_they_are_taken() -> None:
    layers = [_given((100, 1.0), (200, 0.5)) for _ in range(3)]
    choice = choose(layers, 320, lambda picked: 20 + sum(o.size_bytes for o in picked))
    assert [o.size_bytes for o in choice.options] == [100, 100, 100]
    assert (choice.file_bytes, choice.loss) == (320, 3.0)


def _steps(count: int) -> list[Option]:
    """An option for each byte, each losing less than the one before it."""
    return _options([(100 + i, 1.0 / (1 + i)) for i in range(count)])


def test_a_file_that_came_out_a_little_too_long_is_made_shorter_by_a_few_bytes_more() -> None:
    """The header grows by five bytes with the first choice."""
    sizes: list[int] = []

    def size(picked: Any) -> int:
        codes = sum(o.size_bytes for o in picked)
        sizes.append(16_000 + codes + (5 if codes > 900 else 0))
        return sizes[-1]

    choice = choose([_steps(2000)], 17_000, size)
    assert sizes == [16_100, 16_100, 17_005, 16_992]  # the smallest twice, once to see whether the target is in reach
    assert choice.file_bytes == 16_992


def test_room_that_is_left_is_given_to_the_layers_to_the_last_byte() -> None:
    """Here a header becomes shorter with the first choice."""
    choice = choose(
        [_steps(900)], 1_000, lambda picked: sum(o.size_bytes for o in picked) + 300 - 20 * (picked[0].size_bytes > 200)
    )
    assert choice.file_bytes == 1_000
