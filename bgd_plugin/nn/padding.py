"""Padding as TensorFlow's "SAME", which depends on the size of the input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

__all__ = ["SamePadding"]


@dataclass(frozen=True)
class SamePadding:
    """A forward pre-hook of a convolution: its input is padded so that an output has ⌈size / stride⌉ positions.

    Attributes:
        kernel, stride, dilation: the convolution's, one number for each spatial dimension.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]

    def __call__(self, module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The arguments of a call, the first of them padded."""
        return (self.padded(args[0]), *args[1:])

    def padded(self, x: Tensor) -> Tensor:
        """Pad x `[..., *spatial]` with zeros, one more after than before it if their number is odd."""
        pads: list[int] = []
        dimensions = zip(x.shape[-len(self.kernel) :], self.kernel, self.stride, self.dilation, strict=True)
        for size, kernel, stride, dilation in dimensions:
            total = max(0, (-(-size // stride) - 1) * stride + (kernel - 1) * dilation + 1 - size)
            pads = [total // 2, total - total // 2, *pads]  # torch begins with the last dimension
        return F.pad(x, pads) if any(pads) else x
