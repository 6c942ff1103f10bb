"""Float weights as they are in a file, for memory: half precision, or 8-bit integers with a scale for each row.

Both are exact: what is widened again is, bit for bit, the weight that was narrowed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bgd_plugin.encoding.eight_bit import to_eight_bits

__all__ = ["from_narrow", "to_narrow"]

_AT_ONCE = 1 << 20
"""Number of weights looked at at once."""


@torch.no_grad()
def to_narrow(weight: Tensor) -> tuple[Tensor, Tensor] | None:
    """Numbers and scales that stand for a weight exactly; None if it is in neither form.

    Args:
        weight: `[rows, columns]`; only float32 is narrowed.

    Returns:
        numbers `[rows, columns]`, int16 (the bits of half precision) or int8; and float32 scales, `[1]` with the value
            1, or `[rows]`.
    """
    if weight.dtype != torch.float32 or weight.ndim != 2 or not weight.numel():
        return None
    for form, dtype in ((_as_half, torch.int16), (to_eight_bits, torch.int8)):
        numbers, scales = torch.empty(weight.shape, dtype=dtype, device=weight.device), []
        step = max(1, _AT_ONCE // weight.shape[1])
        for first in range(0, len(weight), step):
            part = form(weight.detach()[first : first + step])
            if part is None:
                break
            numbers[first : first + step] = part[0]
            scales.append(part[1])
        else:
            return numbers, torch.cat(scales) if dtype == torch.int8 else scales[0]
    return None


def from_narrow(numbers: Tensor, scales: Tensor) -> Tensor:
    """Inverse of `to_narrow`, in the dtype of the scales.

    Args:
        numbers: int16 or int8 `[rows, columns]`.
        scales: floats `[1]` for int16, which are not looked at, or `[rows]`.
    """
    if numbers.dtype == torch.int16:
        return numbers.view(torch.float16).to(scales.dtype)
    return numbers.to(scales.dtype).mul_(scales[:, None])


def _as_half(rows: Tensor) -> tuple[Tensor, Tensor] | None:
    half = rows.half()
    is_exact = torch.equal(half.to(rows.dtype), rows)
    return (half.view(torch.int16), rows.new_ones(1)) if is_exact else None
