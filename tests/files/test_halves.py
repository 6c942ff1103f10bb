"""Numbers in half precision as high bytes and the rest: nothing is lost, and damage is an error."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bgd_plugin.encoding.significant import round_to_bits
from bgd_plugin.files.halves import Halves, low_bits, shapes_of


def _read_again(halves: Halves) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for group in halves.members:
        tensors |= halves.packed_low(group)
    again = Halves(members=halves.members, high=halves.high)
    for group in halves.members:
        again.take_low_(group, tensors)
    assert not tensors
    return dict(again.tensors())


def test_the_bytes_of_a_number_by_hand() -> None:
    """1.5 is 0 01111 1000000000, -0.25 is 1 01101 0000000000, 1 + 2^-10 is 0 01111 0000000001."""
    halves = Halves.of({"a.bias": torch.tensor([1.5, -0.25]).half(), "b.bias": torch.tensor([1 + 2.0**-10]).half()})
    assert halves.members == {"#half0.bias": [["a.bias", [2]]], "#half8.bias": [["b.bias", [1]]]}
    assert halves.high["#half0.bias"].flatten().tolist() == [0b00111110, 0b10110100]
    assert halves.high["#half8.bias"].flatten().tolist() == [0b00111100]
    assert list(halves.low) == ["#half8.bias"]
    assert halves.low["#half8.bias"].tolist() == [1]


@pytest.mark.parametrize("bits", [1, 3, 4, 7, 11])
def test_tensors_come_back_bit_by_bit(bits: int) -> None:
    values = round_to_bits(torch.randn(3, 50, generator=torch.Generator().manual_seed(bits)), bits).half()
    odd = torch.tensor([0.0, -0.0, float("inf"), float("nan"), 6e-8, -65504.0]).half()
    tensors = {"norm.weight": values, "odd.weight": odd, "norm.bias": values[0], "x.bias": values[:, 0]}
    halves = Halves.of(tensors | {"codes": torch.zeros(4, dtype=torch.uint8), "other": torch.zeros(4), "#steps": odd})
    assert halves.names() == set(tensors)
    assert all(low_bits(group) == max(0, bits - 3) for group in halves.members if group.endswith("bias"))
    again = _read_again(halves)
    for name, value in tensors.items():
        assert again[name].shape == value.shape
        assert torch.equal(again[name].view(torch.int16), value.view(torch.int16)), name


@pytest.mark.parametrize("group", ["#half9.bias", "#grid4", "#half", "half3.bias", "#half33"])
def test_another_name_is_refused(group: str) -> None:
    with pytest.raises(ValueError, match="is no group of numbers in half precision"):
        low_bits(group)


@pytest.mark.parametrize("members", [None, "a", [["a"]], [["a", [0]]], [["a", [2.0]]], [[1, [2]]], [["a", 3]]])
def test_damaged_members_are_refused(members: Any) -> None:
    with pytest.raises(ValueError, match="in a group of numbers in half precision is damaged"):
        shapes_of(members)


def test_missing_or_short_low_bits_are_refused() -> None:
    halves = Halves.of({"a.bias": torch.tensor([1 + 2.0**-10, 3.0]).half()})
    (group,) = halves.members
    with pytest.raises(ValueError, match="is missing from the file"):
        halves.take_low_(group, {})
    with pytest.raises(ValueError, match="2 codes of 8 bits need"):
        halves.take_low_(group, {f"{group}/low": torch.zeros(1, dtype=torch.uint8)})
