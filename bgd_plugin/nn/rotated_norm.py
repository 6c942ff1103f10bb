"""A norm whose output is multiplied by a matrix: what is left of a rotation where the reader cannot absorb it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["RotatedNorm"]


class RotatedNorm(nn.Module):
    """A norm without gain in a rotated basis, followed by the matrix that leads out of it.

    A head that is tied to the embedding has the embedding's rotated weight, and the gain of the norm before it cannot
    go into its columns. So the gain stands in a matrix in between.

    Args:
        norm: the norm, with a gain of 1 and a shift of 0.
        matrix: `[features, features]`.
        shift: `[features]`.

    Attributes:
        matrix, shift: buffers, applied as `y = x matrixᵀ + shift`.
    """

    matrix: Tensor
    shift: Tensor

    def __init__(self, norm: nn.Module, matrix: Tensor, shift: Tensor) -> None:
        super().__init__()
        self.norm = norm
        self.register_buffer("matrix", matrix)
        self.register_buffer("shift", shift)

    @classmethod
    def empty(cls, norm: nn.Module) -> RotatedNorm:
        """One that a state dict is loaded into: zeros of the type, and on the device, of the norm's parameters."""
        like = next(norm.parameters())
        features = like.numel()
        matrix = torch.zeros(features, features, dtype=like.dtype, device=like.device)
        return cls(norm, matrix, torch.zeros_like(like, requires_grad=False)).train(norm.training)

    def forward(self, input: Tensor) -> Tensor:
        """Normalize `input` `[..., features]` and multiply it by the matrix; returns `[..., features]`."""
        return functional.linear(self.norm(input), self.matrix, self.shift)

    @torch.no_grad()
    def round_(self) -> None:
        """Round matrix and shift in place to half precision, in which they are stored."""
        for name in ("matrix", "shift"):
            value = self._buffers[name]
            assert value is not None
            self._buffers[name] = value.half().to(value.dtype) if value.dtype != torch.bfloat16 else value

    def extra_repr(self) -> str:
        """The width, as torch prints it."""
        return f"{len(self.matrix)}"
