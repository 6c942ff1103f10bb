"""Moments of a batch norm's inputs, channel by channel, summed over the calibration batches."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from bgd_plugin.errors import CalibrationError
from bgd_plugin.support.processes import sum_
from bgd_plugin.support.processes import total as sum_of

__all__ = ["ChannelMoments", "LineFit", "channel_sums", "require_finite_inputs"]

_FEW_POSITIONS = 16
_LEAST_VARIANCE = 1e-2
"""Relative to the mean square. Below it, a difference of float32 sums would lose too many digits."""


class ChannelMoments:
    """Mean and variance over samples and positions of `[samples, channels, ...]` values, accumulated in float64.

    Args:
        name: of the batch norm, for errors.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._count = 0
        self._total, self._squares = (torch.zeros((), dtype=torch.float64) for _ in range(2))

    def add_(self, value: Tensor) -> None:
        """Add the values of some samples, `value` `[N, C, ...]`."""
        total, squares = channel_sums(value)
        self._count += len(value) * math.prod(value.shape[2:])
        self._total, self._squares = self._total + total, self._squares + squares

    def means(self) -> tuple[Tensor, Tensor]:
        """The moments of all values so far, in all processes: mean and variance, float64 `[channels]`.

        Raises:
            CalibrationError: they are not finite; the message names the batch norm.
        """
        total, squares = self._total.clone(), self._squares.clone()
        sum_([total, squares])
        require_finite_inputs([total, squares], self._name)
        count = sum_of(self._count)
        mean = total / count
        return mean, (squares / count - mean.square()).clamp(min=0)


class LineFit:
    """The line s z + o nearest to t (least squares) for each channel, over values added batch by batch.

    Each batch is summed around its own means, where single precision is enough; sums of batches are in double.
    """

    def __init__(self) -> None:
        self._count = 0
        self._sums = torch.zeros((), dtype=torch.float64)

    def add_(self, z: Tensor, t: Tensor) -> None:
        """Add values z and t, both `[channels, positions]`."""
        count = z.shape[1]
        if not count:
            return
        z_mean, t_mean = z.mean(1), t.mean(1)
        z, t = z - z_mean[:, None], t - t_mean[:, None]
        z_sum, t_sum = (z_mean.double() * count + z.sum(1).double(), t_mean.double() * count + t.sum(1).double())
        square = z.square().sum(1).double() + z_sum.square() / count
        product = t.mul_(z).sum(1).double() + z_sum * t_sum / count
        self._count += count
        self._sums = self._sums + torch.stack([z_sum, t_sum, square, product])

    def solved(self) -> tuple[Tensor, Tensor, Tensor]:
        """The slope s, and the means of z and t, over all processes, float64 `[channels]`."""
        sums = self._sums.clone()
        sum_([sums])
        z_mean, t_mean, z_square, product = sums / sum_of(self._count)
        return (product - z_mean * t_mean) / (z_square - z_mean.square()).clamp(min=1e-300), z_mean, t_mean


def require_finite_inputs(moments: Sequence[Tensor], name: str) -> None:
    """Check that moments, each `[channels]`, of the inputs of the batch norm called `name` are finite.

    Raises:
        CalibrationError: they are not; the message names the batch norm.
    """
    if not all(bool(torch.isfinite(moment).all()) for moment in moments):
        raise CalibrationError(
            f"batch norm {name!r}: its inputs on the calibration data contain NaN or infinite values, or overflow; "
            "check the data and the layers before it"
        )


def channel_sums(value: Tensor) -> tuple[Tensor, Tensor]:
    """Sum and sum of squares per channel of a `value` `[samples, channels, ...]`, float64 `[channels]`.

    The values are read where they lie, channel by channel and sample by sample: a copy with all of a channel's values
    side by side costs ten times as much. Where values hardly vary around a large mean, it is made all the same.
    """
    positions = math.prod(value.shape[2:])
    if positions < _FEW_POSITIONS:
        return _careful_sums(value)
    flat = value.float().flatten(2)
    if flat.stride(1) == 1:  # channels lie side by side
        total, square = flat.sum(2).double(), flat.square().sum(2).double()
    else:
        total, square = flat.sum(2).double(), torch.linalg.vector_norm(flat, dim=2).double().square()
    if bool((square - total.square() / positions < _LEAST_VARIANCE * square).any()):
        return _careful_sums(value)
    return total.sum(0), square.sum(0)


def _careful_sums(value: Tensor) -> tuple[Tensor, Tensor]:
    x = value.transpose(0, 1).flatten(1).float()
    center = x.mean(dim=1)
    apart = (x - center[:, None]).square_().sum(dim=1).double()
    return x.shape[1] * center.double(), apart + x.shape[1] * center.double().square()
