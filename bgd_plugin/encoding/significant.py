"""Numbers rounded to a few significant bits: in half precision their last bits are zero, and a file leaves them out."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["round_to_bits"]


@torch.no_grad()
def round_to_bits(values: Tensor, bits: int) -> Tensor:
    """The nearest numbers with so many significant bits, the leading one included; ties to even.

    Args:
        values: floating point, any shape, finite.
        bits: 1 … 11; half precision has 11.

    Returns:
        the shape and dtype of `values`.
    """
    fraction, exponent = torch.frexp(values.double())
    steps = 2.0**bits
    return torch.ldexp((fraction * steps).round() / steps, exponent).to(values.dtype)
