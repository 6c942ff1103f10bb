"""Whether a shift of a layer's bias helps on samples that it was not made from."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bgd_plugin.calibration import LayerInputs, paired_pieces
from bgd_plugin.correction.gain import kept_aside
from bgd_plugin.support.processes import sum_

__all__ = ["shift_helps"]

_ROWS = 16384


@torch.no_grad()
def shift_helps(
    weight: Tensor,
    decoded: Tensor,
    inputs: LayerInputs,
    generator: torch.Generator,
    drift: Callable[[int], Tensor] | None = None,
) -> bool:
    """Whether the mean error of a layer's outputs on some samples, taken off the others, lowers their error.

    Args:
        weight, decoded: W and Ŵ, `[C_out, C_in / groups, *kernel]` or `[C_out, C_in]`.
        inputs: the layer's, in the student and in the float network.
        generator: draws the samples.
        drift: per batch, what the layer's outputs are to compensate for besides, of their shape; None: nothing.
    """
    sums = torch.zeros(2, weight.shape[0], dtype=torch.float64, device=weight.device)
    counts = torch.zeros(2, 1, dtype=torch.float64, device=weight.device)
    for piece in paired_pieces(inputs, _ROWS, generator, drift):
        error = _outputs(piece.reference, weight) - _outputs(piece.student, decoded)
        error = error if piece.drift is None else error + piece.drift
        tried, judges = kept_aside(piece.pieces)
        for place, those in enumerate((tried, judges)):
            if piece.index in those:
                sums[place] += error.sum(0, dtype=torch.float64)
                counts[place] += len(error)
    sum_([sums, counts])
    mean, judged = sums / counts.clamp(min=1)
    return bool((judged - mean).square().sum() <= judged.square().sum())


def _outputs(rows: Tensor, weight: Tensor) -> Tensor:
    """`[positions, C_out]` of inputs `[groups, positions, columns]`."""
    groups, _, columns = rows.shape
    return (rows @ weight.detach().float().reshape(groups, -1, columns).mT).transpose(0, 1).flatten(1)
