"""Layers that stay float can make good what their inputs have lost: a new weight, by least squares."""

from __future__ import annotations

import torch
from torch import Tensor

from bgd_plugin.calibration import LayerInputs, paired_pieces, require_finite
from bgd_plugin.pq.target import MomentSums, asymmetric_target

__all__ = ["refitted"]

_DAMPING = 0.01
_MAX_ROWS = 32768
_MAX_ELEMENTS = 30_000_000  # of sampled inputs


@torch.no_grad()
def refitted(weight: Tensor, inputs: LayerInputs, generator: torch.Generator) -> Tensor:
    """The weight with which the student's inputs give most nearly the float network's outputs.

    Ridge regression centred on the weight; a depthwise convolution has so few weights for each channel that the whole
    step is safe (a quantized layer goes half the way). Means are left to the batch norm or bias that follows.

    Args:
        weight: `[C_out, C_in / groups, *kernel]`.
        inputs: the layer's, student and float network.

    Returns:
        a weight of the same shape and type.
    """
    columns = weight[0].numel()
    groups = weight.shape[0] if weight.shape[1] == 1 else 1
    count = max(16 * columns, min(_MAX_ROWS, _MAX_ELEMENTS // max(1, groups * columns)))
    sums, rows = MomentSums(), weight.detach().float()
    for piece in paired_pieces(inputs, count, generator):
        outputs = piece.reference @ rows.reshape(len(piece.reference), -1, columns).mT
        sums.add_(piece.student, outputs)
    sums.share_()
    for moment in sums.sums:
        require_finite(moment, inputs.name)
    target = asymmetric_target(weight.flatten(1), sums.means_(), step=1.0, damping=_DAMPING)
    return target.reshape(weight.shape)
