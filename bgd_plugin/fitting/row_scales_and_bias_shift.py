"""Row scales, which make every row's error count the same, and bias shifts, which match the means of the outputs.

What a layer's neighbours make of them is in `correction.absorb`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bgd_plugin.fitting.method import LayerContext
from bgd_plugin.pq.powers import near_one

__all__ = ["equal_rows", "matching_bias"]


@torch.no_grad()
def equal_rows(target: Tensor, covariance: Tensor, context: LayerContext) -> Tensor:
    """The inverse standard deviation of each row's output, `[rows]`, so that every row's error counts the same.

    Limited to what the batch norm can undo and the weight's dtype can hold.

    Args:
        target: the weight to quantize, `[rows, columns]`, the rows of each group contiguous.
        covariance: of the inputs, `[groups, columns, columns]`.
        context: of the layer.
    """
    covariance, power = near_one(covariance)
    (rows, unit), groups = near_one(target.to(covariance)), len(covariance)
    rows = rows.reshape(groups, -1, covariance.shape[1])
    deviation = ((rows @ covariance) * rows).sum(2).double().clamp(min=0).sqrt().flatten() * (unit * power**0.5)
    alive = deviation > 1e-3 * deviation.mean()
    scale = torch.where(alive, deviation, deviation.mean().clamp(min=1e-150)).reciprocal()
    if context.scale_bounds is not None:
        least, largest = context.scale_bounds
        scale = torch.minimum(torch.maximum(scale, least.to(scale)), largest.to(scale))
    room = torch.finfo(context.weight.dtype).max / 4 / target.double().abs().amax(1).clamp(min=1e-150)
    return torch.minimum(scale, room).clamp(max=1e30).float()


@torch.no_grad()
def matching_bias(weight: Tensor, mean: Tensor, output_mean: Tensor) -> Tensor:
    """The bias `[rows]` that gives this (quantized) weight the wanted mean outputs: E y − W E x.

    Args:
        weight: `[rows, columns]`.
        mean, output_mean: as in `Moments`, `[groups, columns]` and `[groups, rows_per_group]`.
    """
    grouped_weight = weight.double().reshape(mean.shape[0], -1, weight.shape[1])
    produced = (grouped_weight @ mean.double().unsqueeze(2)).squeeze(2)
    return (output_mean.double() - produced).flatten().to(weight.dtype)
