"""A check that statistics of calibration data are numbers."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bgd_plugin.errors import CalibrationError

__all__ = ["require_finite"]


def require_finite(statistic: Tensor, name: str) -> None:
    """Check that a statistic of a layer's inputs is finite.

    Args:
        statistic: any shape.
        name: the layer's, for the message.

    Raises:
        CalibrationError: it is not finite; the message names the layer.
    """
    # a sum is finite only if all its terms are, and is computed several times faster; a large one may overflow
    if not (math.isfinite(float(statistic.sum())) or bool(torch.isfinite(statistic).all())):
        raise CalibrationError(
            f"layer {name!r}: its inputs on the calibration data contain NaN or infinite values, or overflow; "
            "check the data and the layers before it"
        )
