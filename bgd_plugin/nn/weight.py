"""Modules that return a weight, for weights that a graph uses as plain tensors.

A graph that calls `F.conv2d(x, self.weight, ...)` reads the weight by a `get_attr` node. Replacing that node by a
module that *returns* the weight leaves the call and all its arguments unchanged.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bgd_plugin.kernels.decoding import decode_rows_into
from bgd_plugin.kernels.switch import usable
from bgd_plugin.nn.base import PQModule
from bgd_plugin.nn.pending import pending
from bgd_plugin.pq.layout import AS_IT_IS, Layout

__all__ = ["FloatWeight", "PQWeight"]


class FloatWeight(nn.Module):
    """Returns a float weight; placeholder for a later `PQWeight`."""

    def __init__(self, weight: nn.Parameter, layout: Layout = AS_IT_IS) -> None:
        super().__init__()
        self.weight = weight
        self.layout = layout

    def forward(self) -> Tensor:
        """The weight, of its own shape."""
        return self.weight


class PQWeight(PQModule):
    """Returns the decoded weight."""

    def __init__(self, codebook: Tensor, codes: Tensor, like: FloatWeight) -> None:
        super().__init__(codebook, codes, like.weight.shape)
        self.layout = like.layout
        matrix = self.layout.matrix(torch.empty(self.weight_shape, device="meta"))
        self.matrix_shape = matrix.shape

    def pending(self) -> Tensor:
        """The weight `[*weight_shape]`, decoded only if it is used for more than to convolve with it (`nn.pending`)."""
        found = pending(self) if self.layout is AS_IT_IS else None
        return self() if found is None else found

    @property
    def weight(self) -> Tensor:
        """The decoded weight `[*weight_shape]`."""
        return self.layout.weight(self.matrix, self.weight_shape)

    def forward(self) -> Tensor:
        """The decoded weight `[*weight_shape]`."""
        codebook, codes, mask = self.held()
        is_matrix = mask is None and self.has_blocks and self.layout is AS_IT_IS
        if not is_matrix or torch.compiler.is_compiling() or not usable(codebook, codebook, codes):
            return self.weight
        weight = codebook.new_empty(self.weight_shape)  # decoded into its shape at once: fewer calls for each layer
        decode_rows_into(weight, codebook, codes)
        return weight

    def extra_repr(self) -> str:
        """Shape, block size and codebook size, for `print`."""
        return f"{tuple(self.weight_shape)}, {self.pq_repr()}"
