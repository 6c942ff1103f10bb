"""The product-quantized convolutions."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from bgd_plugin.nn.base import PQModule

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
        """Map `[batch, in_channels, *spatial]` to `[batch, out_channels, *spatial]`, like the float convolution."""
        convolve: Any = self.float_type._conv_forward
        output: Tensor = convolve(self, input, self.weight, self.bias)
        return output

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
