"""What a layer should aim at, once the layers before it are quantized: the float network's outputs, not its weights.

Everything here needs streamed moments only: sums over positions that add up over batches and workers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bgd_plugin.distributed import sum_, total
from bgd_plugin.pq.feedback import damped

__all__ = ["MomentSums", "Moments", "asymmetric_target", "matching_bias"]


@dataclass(frozen=True, kw_only=True)
class Moments:
    """Means over the same positions of a layer's inputs x (in the student) and of the outputs y it should have had.

    A group's outputs are its rows of the weight. Float64 is meant: `centred` takes differences.
    """

    gram: Tensor
    """`[groups, columns, columns]`, mean of x xᵀ."""
    mean: Tensor
    """`[groups, columns]`, mean of x."""
    cross: Tensor
    """`[groups, columns, rows_per_group]`, mean of x yᵀ."""
    output_mean: Tensor
    """`[groups, rows_per_group]`, mean of y."""

    @classmethod
    def of(cls, inputs: Tensor, outputs: Tensor) -> Moments:
        """From inputs `[groups, positions, columns]` and outputs `[groups, positions, rows_per_group]` held whole."""
        count = inputs.shape[1]
        return cls(
            gram=(inputs.mT @ inputs).double() / count,
            mean=inputs.double().mean(1),
            cross=(inputs.mT @ outputs).double() / count,
            output_mean=outputs.double().mean(1),
        )

    @classmethod
    def pooled(cls, first: Moments, second: Moments, share: float) -> Moments:
        """The moments of two sets of positions together, `share` of them in the first."""

        def mean(a: Tensor, b: Tensor) -> Tensor:
            return torch.lerp(b, a, share)  # a sum would hold two more Grams for a moment

        return cls(
            gram=mean(first.gram, second.gram),
            mean=mean(first.mean, second.mean),
            cross=mean(first.cross, second.cross),
            output_mean=mean(first.output_mean, second.output_mean),
        )

    def centred(self) -> tuple[Tensor, Tensor]:
        """The covariances of x with itself and with y: what is left to the weight once a bias takes the means."""
        mean, output_mean = self.mean.double().unsqueeze(2), self.output_mean.double().unsqueeze(1)
        gram = torch.baddbmm(self.gram.double(), mean, mean.mT, alpha=-1)
        cross = torch.baddbmm(self.cross.double(), mean, output_mean, alpha=-1)
        return gram, cross


class MomentSums:
    """Moments as they add up, piece by piece; the pieces themselves are not kept.

    Attributes:
        count: positions so far.
        sums: over them, of what `Moments` are the means, in that order; empty before the first piece.
    """

    def __init__(self) -> None:
        self.count = 0
        self.sums: list[Tensor] = []

    def add_(self, inputs: Tensor, outputs: Tensor) -> None:
        """Inputs `[groups, positions, columns]` and outputs `[groups, positions, rows_per_group]`."""
        parts = (inputs.mT @ inputs, inputs.double().sum(1), inputs.mT @ outputs, outputs.double().sum(1))
        self.count += inputs.shape[1]
        self.sums = self.sums or [torch.zeros_like(part, dtype=torch.float64) for part in parts]
        for so_far, part in zip(self.sums, parts, strict=True):
            so_far += part

    def share_(self) -> None:
        """Add what other processes have, in all of them."""
        sum_(self.sums)
        self.count = int(total(self.count))

    def means_(self) -> Moments:
        """The moments; the sums are used up."""
        gram, mean, cross, output_mean = (sums.div_(max(1, self.count)) for sums in self.sums)
        return Moments(gram=gram, mean=mean, cross=cross, output_mean=output_mean)


@torch.no_grad()
def asymmetric_target(weight: Tensor, moments: Moments, *, step: float = 0.5, damping: float = 0.01) -> Tensor:
    """The weight to quantize instead of W, so that the layer also makes good what its inputs have lost.

    W* = W + step · (H + damping · mean(diag H) · I)⁻¹ Xcᵀ (Yc − Xc W), all centred, solved in float64. The damping
    pulls towards W, so that directions without inputs keep the float weight. Half a step serves a quantized layer
    better than the whole: the rest of the correction is noise of the calibration set. A layer that stays float, a
    depthwise convolution for one (each channel its group), takes the whole step.

    Args:
        weight: `[rows, columns]`, groups' rows one after another.
        moments: of the student's inputs and the float network's outputs.
        step: 0 gives W itself, 1 the (ridge) least squares solution.
        damping: in units of the mean of the centred Gram's diagonal.

    Returns:
        `[rows, columns]`, in the weight's dtype.

    Raises:
        ValueError: no damping, where H may be singular.

    **Source**: ridge regression centred on W; the aim at the float network's outputs is that of Nagel et al.,
    AdaRound, arXiv 2004.10568, section 3.4 ("asymmetric reconstruction").
    """
    if not damping > 0:
        raise ValueError(f"the asymmetric target needs a damping above 0, not {damping}")
    gram, cross = moments.centred()
    current = weight.double().reshape(gram.shape[0], -1, gram.shape[1])
    missing = cross - gram @ current.mT
    change = torch.cholesky_solve(missing, torch.linalg.cholesky(damped(gram, damping)))
    return (current + step * change.mT).reshape(weight.shape).to(weight.dtype)


@torch.no_grad()
def matching_bias(weight: Tensor, moments: Moments) -> Tensor:
    """The bias `[rows]` with which this (quantized) weight has the mean outputs it should have: E y − W E x.

    Args:
        weight: `[rows, columns]`.
    """
    grouped_weight = weight.double().reshape(moments.mean.shape[0], -1, weight.shape[1])
    produced = (grouped_weight @ moments.mean.double().unsqueeze(2)).squeeze(2)
    return (moments.output_mean.double() - produced).flatten().to(weight.dtype)
