"""Numbers on a grid are found by their values, whatever the step, and come back exactly."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bgd_plugin.files.grids import Grids, group_size, members_of


@given(
    numbers=st.lists(st.integers(-127, 127), min_size=1, max_size=30),
    mantissa=st.integers(1, 15),
    exponent=st.integers(-20, 3),
)
def test_halves_on_a_grid_come_back(numbers: list[int], mantissa: int, exponent: int) -> None:
    value = (torch.tensor(numbers, dtype=torch.float64) * mantissa * 2.0**exponent).half()
    grids = Grids.of({"x": value})
    found = dict(grids.tensors())
    assert torch.equal(found["x"], value)
    (group,) = grids.members
    assert max(map(abs, numbers)) >= (group_size(group) - 1) // 4  # no more bits than needed


def test_tensors_are_grouped_by_bits_and_kind() -> None:
    grids = Grids.of(
        {
            "norm": torch.tensor([0.5, -1.5]).half(),
            "other": torch.tensor([3.0, 2.0]).half(),
            "weight": torch.tensor([[3.0, 2.0]]).half(),
            "eight": torch.tensor([[127, -90]], dtype=torch.int8),
        }
    )
    assert grids.members == {
        "#grid2": [["weight", [1, 2], True]],
        "#grid2v": [["norm", [2], True], ["other", [2], True]],
        "#grid7": [["eight", [1, 2], False]],
    }
    assert grids.numbers["#grid2v"].flatten().tolist() == [4, 0, 6, 5]
    assert grids.steps == [1.0, 0.5, 1.0]


@pytest.mark.parametrize(
    "value",
    [
        torch.tensor([0.1, 0.2234]).half(),
        torch.tensor([1.0, 3.0]),  # single precision
        torch.tensor([128.0, 1.0]).half(),
        torch.tensor([float("inf"), 1.0]).half(),
        torch.tensor([-0.0, 1.0]).half(),
        torch.tensor([-128, 1], dtype=torch.int8),
        torch.empty(0).half(),
        torch.cat([torch.ones(5000), torch.tensor([1.5, 1 / 512])]).half(),
    ],
)
def test_other_numbers_are_on_no_grid(value: torch.Tensor) -> None:
    assert Grids.of({"x": value}).members == {}


def test_zeros_are_on_a_grid() -> None:
    (found,) = dict(Grids.of({"x": torch.zeros(3).half()}).tensors()).values()
    assert torch.equal(found, torch.zeros(3).half())


@pytest.mark.parametrize("group", ["#grid0", "#grid8", "#grid", "grid3", "#grid3w", "#grid77"])
def test_no_other_group_has_a_size(group: str) -> None:
    with pytest.raises(ValueError, match="no group"):
        group_size(group)


@pytest.mark.parametrize("entry", [{}, [1], [["x", [2]]], [["x", [0], True]], [["x", [2.0], True]], [[1, [2], True]]])
def test_damaged_members_are_refused(entry: object) -> None:
    with pytest.raises(ValueError, match="damaged"):
        members_of(entry)
