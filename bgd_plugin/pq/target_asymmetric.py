"""The fit's target once earlier layers are quantized: the float network's outputs, not the layer's own weight."""

from __future__ import annotations

import torch
from torch import Tensor

from bgd_plugin.pq.feedback import damped

__all__ = ["asymmetric_target"]


@torch.no_grad()
def asymmetric_target(
    weight: Tensor, gram: Tensor, cross: Tensor, *, step: float = 0.5, damping: float = 0.01
) -> Tensor:
    """The weight to quantize instead of W, so that the layer also compensates for errors in its inputs.

    W* = W + step · (H + damping · mean(diag H) · I)⁻¹ Xᵀ(Y − X W), solved in float64. The damping pulls towards W, so
    directions without inputs keep the float weight. For a quantized layer half a step is better than a whole one: the
    rest of the correction fits noise of the calibration set. A layer that stays float, such as a depthwise convolution
    (one group per channel), takes the whole step. A skip connection's drift is part of Y (`fitting.target_residual`).

    Args:
        weight: `[rows, columns]`, the rows of each group contiguous.
        gram: H, `[groups, columns, columns]`, float64, of the compressed network's inputs, centred where a bias takes
            the means (`Moments.centred`).
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
    if not damping > 0:
        raise ValueError(f"the asymmetric target needs a damping above 0, not {damping}")
    current = weight.double().reshape(gram.shape[0], -1, gram.shape[1])
    missing = torch.baddbmm(cross, gram, current.mT, alpha=-1)
    change = torch.cholesky_solve(missing, torch.linalg.cholesky(damped(gram, damping)))
    return (current + step * change.mT).reshape(weight.shape).to(weight.dtype)
