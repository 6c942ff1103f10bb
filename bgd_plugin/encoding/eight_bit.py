"""Values on an 8-bit grid: integers from -127 to 127, times one scale per row."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["LEVELS", "from_eight_bits", "round_to_eight_bits", "to_eight_bits"]

LEVELS = 127
_MANTISSA_BITS = 11  # of a scale: its product with a 7-bit integer is exact in float32


@torch.no_grad()
def round_to_eight_bits(values: Tensor) -> Tensor:
    """Round each row to its own grid; rows whose grid float32 cannot represent are returned unchanged.

    The grid spans the row's largest absolute value. Only float32 is rounded: half precision cannot hold the products
    exactly, and is already small.

    Args:
        values: `[rows, columns]`, finite.
    """
    if values.dtype != torch.float32:
        return values
    scales = _scales(values)
    rounded = (values / scales).round().clamp(-LEVELS, LEVELS) * scales + 0.0  # no negative zeros
    return torch.where(_is_normal(scales) & torch.isfinite(rounded).all(1, keepdim=True), rounded, values)


@torch.no_grad()
def to_eight_bits(values: Tensor) -> tuple[Tensor, Tensor] | None:
    """Integers and scales whose product is exactly `values`; None if there are none.

    The scale is derived from the row's largest absolute value, so values rounded by `round_to_eight_bits` are
    recognized without any additional information.

    Args:
        values: `[rows, columns]`.

    Returns:
        int8 `[rows, columns]` and float32 `[rows]`.
    """
    if values.dtype != torch.float32 or not values.numel() or not bool(torch.isfinite(values).all()):
        return None
    scales = _scales(values)
    numbers = (values / scales).round().clamp(-LEVELS, LEVELS)
    is_exact = torch.equal(numbers * scales, values) and bool(_is_normal(scales).all())
    return (numbers.to(torch.int8), scales.squeeze(1)) if is_exact else None


def from_eight_bits(numbers: Tensor, scales: Tensor) -> Tensor:
    """Inverse of `to_eight_bits`: numbers int8 `[rows, columns]` and scales float32 `[rows]` to float32, same shape."""
    return numbers.float() * scales.unsqueeze(1)


def _scales(values: Tensor) -> Tensor:
    """The largest absolute value over 127, rounded up to 11 bits of mantissa: `[rows, 1]`; 1 for a row of zeros."""
    largest = values.abs().amax(1, keepdim=True) / LEVELS
    mantissa, exponent = torch.frexp(largest)
    steps = 2.0**_MANTISSA_BITS
    # The margin compensates for rounding in the division: an exact scale must be recovered, not the next larger one.
    rounded = torch.ldexp((mantissa * steps - 1e-2).ceil() / steps, exponent)
    return torch.where(largest > 0, rounded, torch.ones_like(rounded))


def _is_normal(scales: Tensor) -> Tensor:
    return (scales > torch.finfo(torch.float32).tiny) & torch.isfinite(scales)
