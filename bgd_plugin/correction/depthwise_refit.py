"""Refit layers that stay float by least squares, to compensate for errors in their inputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bgd_plugin.calibration import LayerInputs, paired_pieces, require_finite
from bgd_plugin.correction.gain import Gain, kept_aside, output_distance
from bgd_plugin.pq.gram import MomentSums
from bgd_plugin.pq.target_asymmetric import asymmetric_target

__all__ = ["Refit", "refitted"]

_DAMPING = 0.01
_MAX_ROWS = 8192
_PLENTY = 256
"""Rows for each column of a channel: what few rows cost is one part in so many of the error that is left."""
_MAX_ELEMENTS = 30_000_000  # of sampled inputs
_JUDGED_SHARE = 4  # one row in so many shows what the refit gained, and another one judges it


@dataclass(frozen=True, kw_only=True)
class Refit:
    """What `refitted` found.

    Attributes:
        weight: `[C_out, C_in / groups, *kernel]`.
        gain: on a sample of the inputs, ignoring means.
        gram: `[groups, columns, columns]`, the covariance of the student's inputs.
    """

    weight: Tensor
    gain: Gain
    gram: Tensor


@torch.no_grad()
def refitted(weight: Tensor, inputs: LayerInputs, generator: torch.Generator) -> Refit:
    """The weight that, on the student's inputs, best reproduces the float network's outputs.

    Ridge regression centred on the weight. A depthwise convolution has so few weights per channel that the full step is
    safe (a quantized layer takes half a step). Means are left to the batch norm or bias that follows.

    Args:
        weight: `[C_out, C_in / groups, *kernel]`.
        inputs: the layer's inputs in the student and in the float network.

    Returns:
        a weight of the same shape and dtype; the weight itself if the error rose on inputs kept aside.
    """
    columns = weight[0].numel()
    groups = weight.shape[0] if weight.shape[1] == 1 else 1
    count = max(16 * columns, min(_MAX_ROWS, _PLENTY * columns, _MAX_ELEMENTS // max(1, groups * columns)))
    shown: list[tuple[Tensor, Tensor]] = []
    judged: list[tuple[Tensor, Tensor]] = []
    first, last = MomentSums(), MomentSums()
    for piece in paired_pieces(inputs, count, generator):
        outputs = _outputs(piece.reference, weight)
        tried, judges = kept_aside(piece.pieces)
        for sums, is_due in ((first, piece.index in tried), (last, piece.index not in tried)):
            rows = piece.student.shape[1] if is_due else 0  # sums of nothing: all processes share the same ones
            sums.add_(piece.student[:, :rows], outputs[:, :rows])
        for kept, is_due in ((shown, True), (judged, piece.index in judges)):
            if is_due and _JUDGED_SHARE * sum(x.shape[1] for x, _ in kept) < count:
                kept.append((piece.student, outputs))
    before = _distance(weight, shown)
    for sums in (first, last):
        sums.share_()
    every = first.joined(last)
    is_harmful = _distance(_solved(weight, first, inputs.name)[0], judged) > _distance(weight, judged)
    target, gram = _solved(weight, every, inputs.name)
    if is_harmful:
        return Refit(weight=weight, gain=Gain(before=before, after=before, taken_back=True), gram=gram)
    return Refit(weight=target, gain=Gain(before=before, after=_distance(target, shown)), gram=gram)


def _distance(weight: Tensor, pairs: list[tuple[Tensor, Tensor]]) -> float:
    """Error of a weight's outputs on the student's inputs, ignoring means."""
    return output_distance((_centred(_outputs(x, weight)), _centred(y)) for x, y in pairs)


def _solved(weight: Tensor, sums: MomentSums, name: str) -> tuple[Tensor, Tensor]:
    """The refitted weight by some sums over all processes, and the inputs' covariance."""
    for moment in sums.squares:
        require_finite(moment, name)
    gram, cross = sums.means_().around_mean()
    target = asymmetric_target(weight.flatten(1), gram, cross, step=1.0, damping=_DAMPING)
    return target.reshape(weight.shape), gram


def _outputs(rows: Tensor, weight: Tensor) -> Tensor:
    """`[groups, positions, rows_per_group]` of inputs `[groups, positions, columns]`."""
    return rows @ weight.detach().float().reshape(len(rows), -1, rows.shape[2]).mT


def _centred(outputs: Tensor) -> Tensor:
    """The values as `[positions, groups, rows_per_group]`, each channel centred."""
    return (outputs - outputs.mean(1, keepdim=True)).transpose(0, 1)
