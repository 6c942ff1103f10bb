"""The kernels of each form of codes (`pq.forms`): what a layer calls, whatever its form is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Size, Tensor

from bgd_plugin.kernels.linear import lookup_linear
from bgd_plugin.kernels.operators import pq_linear, run_decode, run_linear
from bgd_plugin.kernels.tiles import decoded_tiles, decoded_whole
from bgd_plugin.kernels.window_linear import decoded_window_tiles, decoded_windows_whole, lookup_windows
from bgd_plugin.kernels.window_operators import run_window_decode, run_window_linear, window_linear
from bgd_plugin.pq.forms import BLOCKS, TRELLIS

__all__ = ["KERNELS", "Kernels"]

Linear = Callable[[Tensor, Tensor, Tensor, "Tensor | None", "Tensor | None"], Tensor]
"""From input `[..., columns]`, codebook, codes, mask and bias to the output `[..., rows]`."""


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """The kernels of a form of codes.

    Attributes:
        decode: from codebook and codes to the weight `[rows, columns]`, without gradients.
        linear: a linear layer without gradients, for torch.compile, too.
        lookup: the same for callers whom no compiler watches.
        linear_with_gradients: the same as an operator that has gradients.
        whole: from codebook, codes, mask and shape to a weight of at most a tile, in memory that is used again.
        tiles: from codebook, codes, mask and number of weights to the rows of the weight, some at a time, in memory
            that is used again: (index of the first, `[count, columns]`).
    """

    decode: Callable[[Tensor, Tensor], Tensor]
    linear: Linear
    lookup: Linear
    linear_with_gradients: Linear
    whole: Callable[[Tensor, Tensor, Tensor | None, Size], Tensor]
    tiles: Callable[[Tensor, Tensor, Tensor | None, int], Iterator[tuple[int, Tensor]]]


KERNELS = {
    BLOCKS: Kernels(
        decode=run_decode,
        linear=run_linear,
        lookup=lookup_linear,
        linear_with_gradients=pq_linear,
        whole=decoded_whole,
        tiles=decoded_tiles,
    ),
    TRELLIS: Kernels(
        decode=run_window_decode,
        linear=run_window_linear,
        lookup=lookup_windows,
        linear_with_gradients=window_linear,
        whole=decoded_windows_whole,
        tiles=decoded_window_tiles,
    ),
}
"""By the form's name."""
