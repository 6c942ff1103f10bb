"""The search of the trellis, against one that is written out, and against all walks there are."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from bgd_plugin.encoding.tables import NEXT_STATE, trellis_offset
from bgd_plugin.pq import trellis
from bgd_plugin.pq.feedback import damped, factors
from bgd_plugin.pq.trellis import encode_trellis


def _grid(size: int, offset: int, step: float = 0.4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(offset)
    levels = step * (torch.arange(size, dtype=torch.float64) - size // 2)
    levels += 0.1 * step * torch.randn(size, generator=generator, dtype=torch.float64)
    return levels, 0.02 * torch.rand(size, generator=generator, dtype=torch.float64)


def _written_out(
    row: list[float], levels: list[float], offset: int, costs: list[float], v: list[float], u: list[list[float]] | None
) -> list[int]:
    """The codes of one row; the best survivor alone goes on after every so many columns."""
    survivors = {0: (0.0, list(row), [])}
    for column in range(len(row)):
        if column and column % trellis._COLUMNS == 0:
            state = min(survivors, key=lambda s: survivors[s][0])
            survivors = {state: (0.0, *survivors[state][1:])}
        found: dict[int, tuple[float, list[float], list[int]]] = {}
        for state, (cost, rest, codes) in survivors.items():
            for code, level in enumerate(levels):
                place = (code + offset) % 4
                if place % 2 != state % 2:
                    continue
                error = rest[column] - level
                total = cost + (v[column] * error) ** 2 + costs[code]
                after = int(NEXT_STATE[state][place // 2])
                if after in found and found[after][0] <= total:
                    continue
                tail = [u[column][j] * v[column] * error if u and j > column else 0.0 for j in range(len(row))]
                found[after] = total, [a - b for a, b in zip(rest, tail, strict=True)], [*codes, code]
        survivors = found
    codes: list[int] = min(survivors.values(), key=lambda survivor: survivor[0])[2]
    return codes


@pytest.mark.parametrize("offset", range(4))
@pytest.mark.parametrize("has_feedback", [False, True])
def test_the_codes_are_those_of_the_search_written_out(
    offset: int, has_feedback: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trellis, "_COLUMNS", 8)
    monkeypatch.setattr(trellis, "_PART", 3)
    monkeypatch.setattr(trellis, "_ROWS", 2)
    generator = torch.Generator().manual_seed(1)
    levels, costs = _grid(13, offset)
    weight = torch.randn(2, 3, 19, generator=generator, dtype=torch.float64)
    x = torch.randn(2, 40, 19, generator=generator, dtype=torch.float64)
    metrics, inverse = factors(damped(x.mT @ x / 40, 0.1), 1)
    metrics = metrics.flatten(1)
    codes = encode_trellis(weight, levels, offset, costs, metrics, inverse if has_feedback else None)
    for group in range(2):
        u = inverse[group].tolist() if has_feedback else None
        for row in range(3):
            wanted = _written_out(
                weight[group, row].tolist(), levels.tolist(), offset, costs.tolist(), metrics[group].tolist(), u
            )
            assert codes[group, row].tolist() == wanted, (group, row)


def test_no_walk_is_cheaper() -> None:
    levels, costs = _grid(8, 1)
    weight = torch.randn(1, 4, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    metrics = torch.tensor([[1.0, 0.5, 2.0, 1.0, 0.7]], dtype=torch.float64)
    codes = encode_trellis(weight, levels, 1, costs, metrics, None)

    def cost(row: Tensor, walk: tuple[int, ...]) -> float:
        state = 0
        for code in walk:
            if (code + 1 - state) % 2:
                return math.inf
            state = int(NEXT_STATE[state][(code + 1) // 2 % 2])
        chosen = list(walk)
        return float(((metrics[0] * (row - levels[chosen])).square() + costs[chosen]).sum())

    for row, found in zip(weight[0], codes[0].tolist(), strict=True):
        least = min(cost(row, walk) for walk in itertools.product(range(8), repeat=5))
        assert cost(row, tuple(found)) == pytest.approx(least)


def test_the_codes_are_a_walk_that_the_file_knows() -> None:
    levels, costs = _grid(30, 2)
    weight = torch.randn(1, 20, 150, generator=torch.Generator().manual_seed(5))
    codes = encode_trellis(weight, levels.float(), 2, costs.float(), torch.ones(1, 150), None)
    assert trellis_offset(codes[0].numpy(), 30) == 2


def test_feedback_lowers_the_error_of_the_outputs() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(1, 30, 40, generator=generator)
    x = torch.randn(200, 8, generator=generator) @ torch.randn(8, 40, generator=generator)
    x += 0.3 * torch.randn(200, 40, generator=generator)
    gram = damped((x.mT @ x / 200)[None], 0.01)
    metrics, inverse = (part.float() for part in factors(gram, 1))
    levels, costs = _grid(24, 0)
    errors = []
    for feedback in (inverse, None):
        codes = encode_trellis(weight, levels.float(), 0, costs.float(), metrics.flatten(1), feedback)
        errors.append(float(((weight - levels.float()[codes]) @ x.mT).square().sum()))
    assert errors[0] < 0.5 * errors[1]
