"""Layers that stay float can make good what their inputs have lost: a new weight, by least squares."""

from __future__ import annotations

import torch
from torch import Tensor

from bgd_plugin.calibration import LayerInputs, paired_pieces, require_finite
from bgd_plugin.correction.gain import Gain, output_distance
from bgd_plugin.pq.target import MomentSums, asymmetric_target

__all__ = ["refitted"]

_DAMPING = 0.01
_MAX_ROWS = 32768
_MAX_ELEMENTS = 30_000_000  # of sampled inputs
_JUDGED_PIECES = 4


@torch.no_grad()
def refitted(weight: Tensor, inputs: LayerInputs, generator: torch.Generator) -> tuple[Tensor, Gain]:
    """The weight with which the student's inputs give most nearly the float network's outputs.

    Ridge regression centred on the weight; a depthwise convolution has so few weights for each channel that the whole
    step is safe (a quantized layer goes half the way). Means are left to the batch norm or bias that follows.

    Args:
        weight: `[C_out, C_in / groups, *kernel]`.
        inputs: the layer's, student and float network.

    Returns:
        a weight of the same shape and type, and what it gained on some of the inputs, whatever the means.
    """
    columns = weight[0].numel()
    groups = weight.shape[0] if weight.shape[1] == 1 else 1
    count = max(16 * columns, min(_MAX_ROWS, _MAX_ELEMENTS // max(1, groups * columns)))
    judged: list[tuple[Tensor, Tensor]] = []
    sums = MomentSums()
    for piece in paired_pieces(inputs, count, generator):
        outputs = _outputs(piece.reference, weight)
        sums.add_(piece.student, outputs)
        if len(judged) < _JUDGED_PIECES:
            judged.append((piece.student, outputs))
    sums.share_()
    for moment in sums.sums:
        require_finite(moment, inputs.name)
    target = asymmetric_target(weight.flatten(1), sums.means_(), step=1.0, damping=_DAMPING).reshape(weight.shape)
    before, after = (
        output_distance((_centred(_outputs(x, w)), _centred(y)) for x, y in judged) for w in (weight, target)
    )
    return target, Gain(before=before, after=after)


def _outputs(rows: Tensor, weight: Tensor) -> Tensor:
    """`[groups, positions, rows_per_group]` of inputs `[groups, positions, columns]`."""
    return rows @ weight.detach().float().reshape(len(rows), -1, rows.shape[2]).mT


def _centred(outputs: Tensor) -> Tensor:
    """As `[positions, channels]`, each channel around its mean."""
    channels = outputs.transpose(0, 1).flatten(1)
    return channels - channels.mean(0)
