"""Calibration samples kept aside: no step of the fit uses them; the compressed network is judged by them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from bgd_plugin.calibration.batches import Batch, Batches

__all__ = ["first_samples", "take_aside_"]

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
        the samples taken, possibly none. If some batch has tensors whose first dimension is not the samples, every n-th
        batch is taken whole, n = 1 / share.
    """
    count = sum(batch.size for batch in batches)
    wanted = min(_MOST, math.floor(share * count)) if count >= _FEWEST else 0
    if not wanted:
        return []
    if all(_can_be_cut(batch) for batch in batches):
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
            aside.append(_samples(batch, taken))
            emptied += [] if left else [index]
        if taken and left:
            batches.replace(index, _samples(batch, left))
    batches.remove(emptied)
    return aside


def first_samples(batches: Sequence[Batch], count: int) -> list[Batch]:
    """The first `count` samples of the batches; a batch that cannot be split is taken whole."""
    taken: list[Batch] = []
    for batch in batches:
        rest = count - sum(b.size for b in taken)
        if rest <= 0:
            break
        can_be_cut = batch.size > rest and _can_be_cut(batch)
        taken.append(_samples(batch, list(range(rest))) if can_be_cut else batch)
    return taken


def _can_be_cut(batch: Batch) -> bool:
    leaves = [t for t in pytree.tree_leaves((batch.args, batch.kwargs)) if isinstance(t, Tensor)]
    return bool(leaves) and all(t.ndim and t.shape[0] == batch.size for t in leaves)


def _samples(batch: Batch, places: list[int]) -> Batch:
    """The samples of a batch at some indices; the batch itself if these are all."""
    if len(places) == batch.size:
        return batch
    args, kwargs = pytree.tree_map_only(
        Tensor, lambda t: t[torch.tensor(places, device=t.device)], (batch.args, batch.kwargs)
    )
    return Batch(args, kwargs)
