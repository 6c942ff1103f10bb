"""The expected error of a layer with trellis codes: the search for them, run on a few of its columns."""

from __future__ import annotations

import torch
from torch import Tensor

from bgd_plugin.kernels.viterbi import walk_search
from bgd_plugin.pq.viterbi import nearest_ring
from bgd_plugin.pq.windows import LEAST_ROWS, padded_rows, window_table

__all__ = ["window_error"]

_WEIGHTS = 1 << 12
"""Searched in all, without compiled code a quarter of a second."""
_FEWEST_COLUMNS = 4
_MOST_ROWS = 1 << 11
_TINY = 1e-30


@torch.no_grad()
def window_error(weight: Tensor, metrics: Tensor) -> float | None:
    """Mean error per weight with trellis codes, in the unit of `pq.rate.rate_curve`; None where there are too few rows.

    A few columns show which part of a weight's mean square is lost, and that part is taken of all columns.

    Args:
        weight: `[groups, rows_per_group, columns]`.
        metrics: what an error counts in each column, `[groups, columns]`.
    """
    groups, per_group, columns = weight.shape
    if groups * per_group < LEAST_ROWS:
        return None
    scale = weight.float().square().mean(2).sqrt()
    powers = metrics.float()[:, None] * scale[..., None].square()  # of an error of the row's size
    whole = float(powers.mean(dtype=torch.float64))
    rows = torch.arange(0, per_group, -(-groups * per_group // _MOST_ROWS), device=weight.device)
    count = max(_FEWEST_COLUMNS, _WEIGHTS // (groups * len(rows)))
    chosen = torch.arange(0, columns, max(1, columns // count), device=weight.device)
    values = (weight[:, rows][..., chosen] / scale[:, rows, None].clamp(min=_TINY)).flatten(0, 1).cpu()
    powers = powers[:, rows][..., chosen].flatten(0, 1).cpu()
    lost = sum(_lost(*pair) for pair in zip(values.unbind(1), powers.unbind(1), strict=True))
    return whole * lost / max(float(powers.sum(dtype=torch.float64)), _TINY)


def _lost(values: Tensor, powers: Tensor) -> float:
    """The error of a column, in the unit of `powers`; both are `[rows]`."""
    missing = padded_rows(len(values)) - len(values)
    mean = float(powers.mean()) or 1.0
    padded, weights = (torch.nn.functional.pad(x, (0, missing)).numpy() for x in (values, powers / mean))
    states = nearest_ring(walk_search(), padded, weights, window_table().numpy())
    found = window_table()[torch.from_numpy(states[: len(values)]).long()]
    return float(((values - found).square() * powers).sum(dtype=torch.float64))
