"""The difference between the outputs of an exported file and those of the network."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bgd_plugin.errors import BGDError

__all__ = ["largest_difference"]


def largest_difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest difference between two lists of outputs, relative to the range of each expected output's values.

    Values that are infinite or NaN in both are equal; in only one of them, the difference is infinite.

    Args:
        found, expected: outputs of any shapes, the same in both.

    Raises:
        BGDError: the lists differ in their number or shapes.
    """
    shapes = [[list(tensor.shape) for tensor in outputs] for outputs in (found, expected)]
    if shapes[0] != shapes[1]:
        raise BGDError(f"the exported network returns outputs of shapes {shapes[0]}, the network {shapes[1]}")
    return max(_difference(one.double(), other.double()) for one, other in zip(found, expected, strict=True))


def _difference(found: Tensor, expected: Tensor) -> float:
    is_same = (found == expected) | (found.isnan() & expected.isnan())
    if bool(is_same.all()):
        return 0.0
    finite = expected[expected.isfinite()]
    spread = float(finite.max() - finite.min()) if finite.numel() else 0.0
    spread = spread or float(finite.abs().max() if finite.numel() else 0.0) or 1.0
    differences = torch.where(is_same, 0.0, (found - expected).abs())
    return float(differences.nan_to_num(nan=float("inf")).max()) / spread
