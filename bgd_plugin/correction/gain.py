"""Gain of a correction: the error of outputs before and after it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bgd_plugin.correction.channels import channel_sums
from bgd_plugin.support.processes import total

__all__ = ["Gain", "judged_pairs", "kept_aside", "output_distance", "some_samples"]

_VALUES = 1 << 18
"""Values of a batch that are compared: comparing all took a fifth of a run."""
_ALL_VALUES = 1 << 20
"""Values that are compared."""

_ROUNDING = 1e-6
"""Relative to the mean square, a variance below this is rounding error."""


@dataclass(frozen=True, kw_only=True)
class Gain:
    """Errors of a layer's outputs relative to their variance, before and after a correction; see `output_distance`.

    NaN if there is no float network to compare with. `taken_back` if the correction raised the error on samples kept
    aside, and was undone.
    """

    before: float
    after: float
    taken_back: bool = False

    @staticmethod
    def said(gains: Sequence[Gain]) -> str:
        """The median of several gains, as text for the report."""
        if any(math.isnan(gain.before) for gain in gains):
            return "not measured, because no float network runs alongside"
        before, after = (statistics.median(getattr(gain, name) for gain in gains) for name in ("before", "after"))
        return f"median output error {before:.2%} → {after:.2%} of the variance"


def kept_aside(count: int) -> tuple[range, range]:
    """Of `count` batches or pieces, those that a correction is tried on, and those that judge it: the last fifth.

    The last ones hold other samples than the first ones. A single one has to do for both.
    """
    start = count - max(1, count // 5)
    return (range(start) if start else range(count)), range(start, count)


def some_samples(value: Tensor) -> Tensor:
    """The first samples of a value `[samples, ...]`, as many as make up 262,144 numbers; at least one."""
    return value[: max(1, _VALUES // max(1, value[:1].numel()))]


def judged_pairs(pairs: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    """The first pairs of outputs, each pair of one shape, until they have as many values as are compared."""
    count = 0
    for mine, theirs in pairs:
        yield mine, theirs
        count += mine.numel()
        if count >= _ALL_VALUES:
            return


@torch.no_grad()
def output_distance(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    """‖a − b‖² / ‖b − mean b‖², with the mean taken per channel; 0 if b is constant.

    Args:
        pairs: outputs a of the compressed and b of the float network, both `[samples, channels, ...]`.
    """
    distance, square, count, sums = 0.0, 0.0, 0, torch.zeros((), dtype=torch.float64)
    for mine, theirs in pairs:
        summed, squares = channel_sums(theirs)
        distance += float(channel_sums(mine.float() - theirs.float())[1].sum())
        square += float(squares.sum())
        sums = sums + summed.cpu()
        count += math.prod(theirs.shape) // theirs.shape[1]
    distance, square = total(distance), total(square)
    variance = square - total(float(sums.square().sum()) / max(1, count))
    return distance / variance if variance > _ROUNDING * square else 0.0
