"""What a step without gradients gained: the error of outputs before it and after it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bgd_plugin.support.processes import total

__all__ = ["Gain", "output_distance"]

_ROUNDING = 1e-6
"""A variance this small, in units of the mean square, is what rounding has left."""


@dataclass(frozen=True, kw_only=True)
class Gain:
    """Errors of a layer's outputs in units of their variance, before and after a step; see `output_distance`.

    NaN where there is no float network beside the compressed one.
    """

    before: float
    after: float

    @staticmethod
    def said(gains: Sequence[Gain]) -> str:
        """The median of several, in words."""
        if any(math.isnan(gain.before) for gain in gains):
            return "not compared, as no float network is run beside it"
        before, after = (statistics.median(getattr(gain, name) for gain in gains) for name in ("before", "after"))
        return f"error of their outputs {before:.2%} → {after:.2%} of the variance (median)"


@torch.no_grad()
def output_distance(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    """‖a − b‖² / ‖b − mean b‖², the mean that of each channel; 0 where b does not vary.

    Args:
        pairs: a of the compressed and b of the float network, both `[samples, channels, ...]`.
    """
    distance, square, count, sums = 0.0, 0.0, 0, torch.zeros(())
    for mine, theirs in pairs:
        a, b = (values.transpose(0, 1).flatten(1).float() for values in (mine, theirs))
        distance += float((a - b).square().sum(dtype=torch.float64))
        square += float(b.square().sum(dtype=torch.float64))
        sums = sums + b.sum(1, dtype=torch.float64).cpu()
        count += b.shape[1]
    distance, square = total(distance), total(square)
    variance = square - total(float(sums.square().sum()) / max(1, count))
    return distance / variance if variance > _ROUNDING * square else 0.0
