"""The fit's target once earlier layers are quantized: the float network's outputs, not the layer's own weight."""

from __future__ import annotations

import torch
from torch import Tensor

from bgd_plugin.pq.feedback import cholesky, damping_of

__all__ = ["asymmetric_target", "best_step", "ridge_change"]


@torch.no_grad()
def asymmetric_target(
    weight: Tensor, gram: Tensor, cross: Tensor, *, step: float = 0.5, damping: float = 0.01
) -> Tensor:
    """The weight to quantize instead of W, so that the layer also compensates for errors in its inputs.

    W* = W + step · (H + damping · mean(diag H) · I)⁻¹ Xᵀ(Y − X W), computed in H's dtype, with all columns scaled to a
    diagonal of 1: the equations are the same in any units, and single precision does. The damping pulls towards W, so
    directions without inputs keep the float weight. For a quantized layer half a step is better than a whole one: the
    rest of the correction fits noise of the calibration set. With few inputs it is no longer than suits held-out ones
    (`best_step`): a classifier with 250 inputs of 1280 columns had best keep its weight. A layer that stays float, such
    as a depthwise convolution (one group per channel), takes the whole step. A skip connection's drift is part of Y
    (`fitting.target_residual`).

    Args:
        weight: `[rows, columns]`, the rows of each group contiguous.
        gram: H, `[groups, columns, columns]`, of the compressed network's inputs: their covariance where a bias takes
            the means (`Moments`).
        cross: XᵀY, `[groups, columns, rows_per_group]`, of these inputs and the float network's outputs, likewise.
        step: 0 gives W itself, 1 the (ridge) least squares solution.
        damping: as a factor of the mean diagonal of the Gram.

    Returns:
        `[rows, columns]`, in the weight's dtype.

    Raises:
        ValueError: no damping; H may be singular.

    **Source**: ridge regression centred on W; matching the float network's outputs follows Nagel et al., AdaRound,
    arXiv 2004.10568, section 3.4 ("asymmetric reconstruction").
    """
    current = weight.double().reshape(gram.shape[0], -1, gram.shape[1])
    change = ridge_change(weight, gram, cross, damping=damping)
    return (current + step * change.mT).reshape(weight.shape).to(weight.dtype)


@torch.no_grad()
def ridge_change(weight: Tensor, gram: Tensor, cross: Tensor, *, damping: float) -> Tensor:
    """The whole step of `asymmetric_target`.

    Args:
        weight: `[rows, columns]`, as there.
        gram: `[groups, columns, columns]`.
        cross: `[groups, columns, rows_per_group]`.
        damping: as there.

    Returns:
        `[groups, columns, rows_per_group]`, in the Gram's dtype.

    Raises:
        ValueError: no damping; H may be singular.
    """
    if not damping > 0:
        raise ValueError(f"the asymmetric target needs a damping above 0, not {damping}")
    power = gram.diagonal(dim1=1, dim2=2).double()
    added = damping_of(power, damping)
    scale = (power + added).rsqrt().unsqueeze(2)
    unit = (gram * scale.to(gram)).mul_(scale.mT.to(gram))
    current = weight.to(gram).reshape(len(gram), -1, gram.shape[1]).mT
    missing = torch.baddbmm(cross * scale.to(cross), unit, current / scale.to(current), alpha=-1)
    unit.diagonal(dim1=1, dim2=2).add_((added.unsqueeze(2) * scale.square()).squeeze(2).to(unit))
    root = cholesky(unit)
    return torch.cholesky_solve(missing.to(root), root) * scale.to(root)


@torch.no_grad()
def best_step(weight: Tensor, change: Tensor, gram: Tensor, cross: Tensor) -> float:
    """The step along a change that leaves the least error on other inputs than those it was solved for.

    The error is a parabola of the step: it falls by 2 · step · tr(Dᵀ(XᵀY − H Wᵀ)) − step² · tr(Dᵀ H D).

    Args:
        weight: `[rows, columns]`.
        change: D, `[groups, columns, rows_per_group]`, of `ridge_change`.
        gram: `[groups, columns, columns]`, as for `asymmetric_target`, of the inputs that judge.
        cross: `[groups, columns, rows_per_group]`, likewise.

    Returns:
        from 0 to 1; 1 where the change does nothing.
    """
    gram, change = gram.double(), change.double()
    current = weight.double().reshape(len(gram), -1, gram.shape[1])
    missing = torch.baddbmm(cross.double(), gram, current.mT, alpha=-1)  # Xᵀ(Y − X W)
    gain = float((change * missing).sum())
    cost = float((change * (gram @ change)).sum())
    return min(1.0, max(0.0, gain / cost)) if cost > 0 else 1.0
