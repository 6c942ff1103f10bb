"""The product-quantized convolutions."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from bgd_plugin.kernels import tiles
from bgd_plugin.kernels.choice import FEWEST_WEIGHTS
from bgd_plugin.kernels.conv_operator import pq_convolution
from bgd_plugin.kernels.convolution import Shape, is_faster, slide
from bgd_plugin.kernels.switch import computable, usable
from bgd_plugin.kernels.tiles import conv_tile, convolve_by_tiles, rows_of_a_tile
from bgd_plugin.nn.base import PQModule
from bgd_plugin.nn.pointwise import at_each_position, is_linear

__all__ = ["PQConv", "PQConv1d", "PQConv2d", "PQConv3d"]

_Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d


class PQConv(PQModule):
    """A convolution with a decoded weight; everything else is inherited from the float convolution."""

    float_type: ClassVar[type[_Conv]]

    def __init__(self, codebook: Tensor, codes: Tensor, like: _Conv) -> None:
        super().__init__(codebook, codes, like.weight.shape)
        self.in_channels = like.in_channels
        self.out_channels = like.out_channels
        self.kernel_size = like.kernel_size
        self.stride = like.stride
        self.padding = like.padding
        self.dilation = like.dilation
        self.groups = like.groups
        self.padding_mode = like.padding_mode
        self._reversed_padding_repeated_twice = list(like._reversed_padding_repeated_twice)
        self.bias = like.bias

    def forward(self, input: Tensor) -> Tensor:
        """Map input `[batch, in_channels, *spatial]` to `[batch, out_channels, *spatial]`, as the float convolution."""
        if not torch.compiler.is_compiling():
            codebook, codes, mask = self.held()
            if usable(input, codebook, codes, self.bias):
                return self._forward_by_kernels(input, codebook, codes, mask)
            if not self.training and computable(input, codebook, codes):  # inference without torch.no_grad()
                return self._forward_with_gradients(input)
        return self._convolved(input, self.weight, self.bias)

    def _convolved(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Run the float convolution's own code with a given weight, or with some output channels of it."""
        convolve: Any = self.float_type._conv_forward
        output: Tensor = convolve(self, input, weight, bias)
        return output

    def _forward_by_kernels(self, input: Tensor, codebook: Tensor, codes: Tensor, mask: Tensor | None) -> Tensor:
        """Inference on a CPU: a 1×1 convolution at few positions is a linear layer; others decode tiles."""
        if self.groups > 1:
            return self._convolved(input, self.weight, self.bias)
        if self._is_lookup(input):
            return self._at_each_position(self.kernels.lookup, input)
        if (shape := self._sliding(input, mask)) is not None:
            return slide(input, codebook, codes, self.bias, shape)
        if self.weight_shape.numel() <= tiles.TILE:
            return self._convolved(input, self.kernels.whole(codebook, codes, mask, self.weight_shape), self.bias)
        parts = self.kernels.tiles(codebook, codes, mask, self._tile(input))
        return convolve_by_tiles(parts, self.bias, self.weight_shape, partial(self._convolved, input))

    def _forward_with_gradients(self, input: Tensor) -> Tensor:
        """The same products as `_forward_by_kernels`, bit for bit, by operators that have gradients."""
        if self.groups > 1:
            return self._convolved(input, self.weight, self.bias)
        if self._is_lookup(input):
            return self._at_each_position(self.kernels.linear_with_gradients, input)
        if (shape := self._sliding(input, self.mask)) is not None:
            output: Tensor = pq_convolution(input, self.codebook, self.codes, self.bias, *map(list, shape))
            return output
        rows = self.weight.flatten(1)
        step = rows_of_a_tile(len(rows), rows.shape[1], self._tile(input))
        parts = ((first, rows[first : first + step]) for first in range(0, len(rows), step))
        return convolve_by_tiles(parts, self.bias, self.weight_shape, partial(self._convolved, input))

    def _sliding(self, input: Tensor, mask: Tensor | None) -> Shape | None:
        """Kernel, stride, padding and dilation if `slide` computes the layer, and is faster; None if not."""
        if self.weight_shape.numel() < FEWEST_WEIGHTS or mask is not None or not self.has_blocks:
            return None
        shape: Any = self.kernel_size, self.stride, self.padding, self.dilation
        if len(self.kernel_size) != 2 or isinstance(self.padding, str) or self.padding_mode != "zeros":
            return None
        return shape if is_faster(input, self.codebook, self.codes, shape) else None

    def _tile(self, input: Tensor) -> int:
        return conv_tile(self.weight_shape.numel(), input.numel() // self.in_channels)

    def _is_lookup(self, input: Tensor) -> bool:
        """Whether it is computed as a linear layer: a 1×1 convolution at few positions, or where that is faster."""
        if self.weight_shape.numel() != self.out_channels * self.in_channels:
            return False
        if any(size != 1 for size in self.stride) or any(self._reversed_padding_repeated_twice):
            return False
        return is_linear(input, self.in_channels, len(self.kernel_size), self.held(), self.has_blocks)

    def _at_each_position(self, linear: Callable[..., Tensor], input: Tensor) -> Tensor:
        return at_each_position(linear, input, len(self.kernel_size), self.held(), self.bias)

    def to_float(self) -> _Conv:
        """The float module of the same geometry, on the meta device."""
        arguments: Any = {
            "stride": self.stride,
            "padding": self.padding,
            "dilation": self.dilation,
            "groups": self.groups,
            "padding_mode": self.padding_mode,
        }
        kernel: Any = self.kernel_size
        bias = self.bias is not None
        return self.float_type(self.in_channels, self.out_channels, kernel, bias=bias, device="meta", **arguments)

    def extra_repr(self) -> str:
        """Geometry, block size and codebook size, for `print`."""
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, dilation={self.dilation}, groups={self.groups}, {self.pq_repr()}"
        )


class PQConv1d(PQConv):
    """`nn.Conv1d` with a decoded weight."""

    float_type = nn.Conv1d


class PQConv2d(PQConv):
    """`nn.Conv2d` with a decoded weight."""

    float_type = nn.Conv2d


class PQConv3d(PQConv):
    """`nn.Conv3d` with a decoded weight."""

    float_type = nn.Conv3d
