"""Rounding to significant bits, by hand."""

from __future__ import annotations

import pytest
import torch

from bgd_plugin.encoding.significant import round_to_bits


@pytest.mark.parametrize(
    ("value", "bits", "rounded"),
    [
        (0.0, 7, 0.0),
        (1.0, 1, 1.0),
        (5.0, 2, 4.0),  # 101 in binary: a tie, to even
        (7.0, 2, 8.0),
        (-5.5, 3, -6.0),  # 101.1: a tie, to even
        (0.3, 3, 0.3125),  # 0.3 = 1.2 · 2^-2, and 1.25 has three bits
        (1000.0, 4, 1024.0),
    ],
)
def test_a_number_keeps_its_leading_bits(value: float, bits: int, rounded: float) -> None:
    assert float(round_to_bits(torch.tensor(value), bits)) == rounded


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_relative_error_is_bounded_and_half_precision_holds_the_result(dtype: torch.dtype) -> None:
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0)).to(dtype)
    rounded = round_to_bits(values, 7)
    assert rounded.dtype == dtype
    assert float(((rounded - values) / values).abs().max()) <= 2.0**-7
    half = rounded.half()
    assert torch.equal(half.to(dtype), rounded)
    assert not bool((half.view(torch.int16) & 0b1111).any())  # ten bits of a fraction, four of them zero
