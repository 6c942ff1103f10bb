"""The 8-bit grid: rounding is near, and what was rounded is recognised and restored to the bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bgd_plugin.encoding.eight_bit import from_eight_bits, round_to_eight_bits, to_eight_bits


@settings(max_examples=60)
@given(
    rows=st.integers(1, 5),
    columns=st.integers(1, 40),
    exponent=st.floats(-30, 30),
    seed=st.integers(0, 2**16),
)
def test_rounded_values_come_back_to_the_bit(rows: int, columns: int, exponent: float, seed: int) -> None:
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 10**exponent
    rounded = round_to_eight_bits(values)
    grid = to_eight_bits(rounded)
    assert grid is not None
    assert torch.equal(from_eight_bits(*grid), rounded)
    assert torch.equal(round_to_eight_bits(rounded), rounded)
    # half a step, and what the scale's 11 bits may add to a step
    bound = values.abs().amax(1, keepdim=True) / 127 * (0.5 + 1e-3) * (1 + 2**-10)
    assert bool(((rounded - values).abs() <= bound).all())


def test_values_off_the_grid_are_not_taken_for_it() -> None:
    values = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    assert to_eight_bits(values) is None
    rounded = round_to_eight_bits(values)
    rounded[1, 2] += 1e-4
    assert to_eight_bits(rounded) is None


@pytest.mark.parametrize("value", [0.0, 1e-42, 3e38])
def test_extreme_rows_lose_nothing_else(value: float) -> None:
    values = torch.stack([torch.full((4,), value), torch.tensor([1.0, -2.0, 3.0, 0.0])])
    rounded = round_to_eight_bits(values)
    assert bool(torch.isfinite(rounded).all())
    assert torch.allclose(rounded[0], values[0], rtol=0.01)
    assert torch.allclose(rounded[1], values[1], atol=3 / 254)
    grid = to_eight_bits(rounded)
    assert grid is None or torch.equal(from_eight_bits(*grid), rounded)


def test_other_types_stay_as_they_are() -> None:
    half = torch.randn(2, 3).half()
    assert round_to_eight_bits(half) is half
    assert to_eight_bits(half) is None
    assert to_eight_bits(torch.tensor([[float("nan"), 1.0]])) is None
