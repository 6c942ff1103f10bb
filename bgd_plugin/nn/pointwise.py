"""1×1 convolutions on a CPU as linear layers: when, and where their outputs lie in memory."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bgd_plugin.kernels.choice import beats_convolution
from bgd_plugin.kernels.linear import FEW_INPUTS

__all__ = ["at_each_position", "is_linear"]

Held = tuple[Tensor, Tensor, "Tensor | None"]
"""Codebook, codes and mask of a layer."""


def is_linear(input: Tensor, channels: int, dimensions: int, held: Held, has_blocks: bool) -> bool:
    """Whether a 1×1 convolution of stride 1 is computed as a linear layer: at few positions, or where that is faster.

    Args:
        input: `[batch, channels, *spatial]` or `[channels, *spatial]`.
        channels: of the input.
        dimensions: number of spatial ones.
        held: codebook, codes and mask of the layer.
        has_blocks: whether codes are indices of codewords.
    """
    positions = input.numel() // channels
    if positions <= FEW_INPUTS:
        return True
    codebook, codes, mask = held
    if mask is not None or not has_blocks or input.dtype != torch.float32:
        return False
    if not _keeps_channels_last(input, dimensions):
        return False
    return beats_convolution(positions, *codes.shape, *codebook.shape)


def _keeps_channels_last(input: Tensor, dimensions: int) -> bool:
    """Whether torch's convolution gives an output whose channels lie side by side, as the input's do."""
    return dimensions == 2 and input.dim() == 4 and input.is_contiguous(memory_format=torch.channels_last)


def at_each_position(
    linear: Callable[..., Tensor], input: Tensor, dimensions: int, held: Held, bias: Tensor | None
) -> Tensor:
    """The output of a function for linear layers, at each position; in memory as torch's convolution has it.

    Args:
        linear: takes inputs `[..., channels]`, codebook, codes, mask and bias.
        input: `[batch, channels, *spatial]` or `[channels, *spatial]`.
        dimensions: number of spatial ones.
        held: codebook, codes and mask of the layer.
        bias: `[rows]` or None.

    Returns:
        `[batch, rows, *spatial]`, or without the batch.
    """
    channels = -1 - dimensions
    found = linear(input.movedim(channels, -1), *held, bias).movedim(-1, channels)
    return found if _keeps_channels_last(input, dimensions) else found.contiguous()
