"""The residual part of a target: what a skip connection has drifted, the layer that ends in it makes good."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Skip", "relative_weights", "sum_behind", "with_drift"]

_LEAST_GAIN = 0.01  # of the mean square
_LEAST_LEVEL = 1e-6  # of the mean square, where most positions are empty


@dataclass(frozen=True, kw_only=True)
class Skip:
    """The skip connection added to a layer's normalized output.

    Attributes:
        drift: per batch, the float network's skip values minus the student's, `[batch, rows, ...]`.
        gain: `[rows]`, of the batch norm in between: γ / √(σ² + eps).
        stream: per batch, the float network's skip values, where positions count by the size of the sum that they end
            in (`relative_weights`); None where they count alike.
    """

    drift: Callable[[int], Tensor]
    gain: Tensor
    stream: Callable[[int], Tensor] | None = None


def with_drift(outputs: Tensor, drift: Tensor, gain: Tensor) -> Tensor:
    """The outputs that also make good the drift of the skip that they are added to.

    Args:
        outputs: `[groups, positions, rows_per_group]`, the float network's.
        drift: `[positions, rows]`, the float network's skip minus the compressed one's.
        gain: `[rows]`, of the batch norm in between.

    Returns:
        of the outputs' shape.
    """
    wanted = drift * _inverse(gain.float())
    return outputs + wanted.reshape(len(wanted), len(outputs), -1).transpose(0, 1)


def sum_behind(outputs: Tensor, stream: Tensor) -> Tensor:
    """The sum that a layer's output ends in, `[positions, rows]`.

    Args:
        outputs: `[groups, positions, rows_per_group]`.
        stream: the skip that is added to them, `[positions, rows]`.
    """
    return stream + outputs.transpose(0, 1).flatten(1)


def relative_weights(stream: Tensor) -> Tensor:
    """How much each position counts where a norm reads the sum that a layer's output ends in.

    The norm divides each position by its size, so errors count relative to that. A few positions of language models,
    the first of each text above all, are hundreds of times larger than the others; fitted for those alone, a layer
    ruins the others. The weight is 1 / (e + median e), with e a position's mean square: positions of ordinary size
    count alike, and the error of larger ones counts relative to their size.

    Args:
        stream: the float network's sum, `[positions, features]`.

    Returns:
        `[positions]`, with a mean of 1.
    """
    energy = stream.double().square().mean(1)
    level = torch.maximum(energy.median(), _LEAST_LEVEL * energy.mean()).clamp(min=1e-150)
    weights = (energy + level).reciprocal()
    return (weights / weights.mean()).to(stream.dtype)


def _inverse(gain: Tensor) -> Tensor:
    """The inverse gain of each channel, damped: it goes to 0 for channels with almost no gain."""
    floor = _LEAST_GAIN * gain.square().mean()
    return gain / (gain.square() + floor).clamp(min=torch.finfo(gain.dtype).tiny)
