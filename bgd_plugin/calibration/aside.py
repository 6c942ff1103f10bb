"""Calibration samples kept aside: no step of the fit uses them; the compressed network is judged by them."""

from __future__ import annotations

import math
from itertools import accumulate

from bgd_plugin.calibration.batches import Batch, Batches
from bgd_plugin.calibration.cutting import can_be_cut, some_samples_of

__all__ = ["take_aside_"]

_FEWEST = 16
"""Minimum number of calibration samples for some to be kept aside: with fewer, the fit needs them all."""
_MOST = 64
"""Maximum number of samples kept aside."""


def take_aside_(batches: Batches, share: float) -> list[Batch]:
    """Take evenly spread samples out of the calibration data, in place.

    Args:
        batches: all calibration data; afterwards the data for the fit, at least one batch.
        share: of the samples, from 0 to below 1; at most 64 samples are taken, and none from fewer than 16.

    Returns:
        the samples taken, possibly none. Where batches may not be cut, or have tensors whose first dimension is not the
        samples, every n-th batch is taken whole, n = 1 / share.
    """
    count = sum(batch.size for batch in batches)
    wanted = min(_MOST, math.floor(share * count)) if count >= _FEWEST else 0
    if not wanted:
        return []
    if all(can_be_cut(batch) for batch in batches) and batches.may_be_cut():
        # the middle of each of `wanted` equal stretches: no sample twice
        chosen = {int((place + 0.5) * count / wanted) for place in range(wanted)}
    else:
        every = max(2, round(1 / share))
        ends = list(accumulate(batch.size for batch in batches))
        chosen = {i for k in range(every - 1, len(ends), every) for i in range(ends[k - 1], ends[k])}
    aside: list[Batch] = []
    emptied: list[int] = []
    start = 0
    for index, batch in enumerate(batches):
        taken = [i for i in range(batch.size) if start + i in chosen]
        left = [i for i in range(batch.size) if start + i not in chosen]
        start += batch.size
        if taken:
            aside.append(some_samples_of(batch, taken))
            emptied += [] if left else [index]
        if taken and left:
            batches.replace(index, some_samples_of(batch, left))
    batches.remove(emptied)
    return aside
