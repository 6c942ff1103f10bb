"""The product-quantized transposed convolutions."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from bgd_plugin.nn.base import PQModule
from bgd_plugin.pq.layout import from_transposed_matrix

__all__ = ["PQConvTranspose", "PQConvTranspose1d", "PQConvTranspose2d", "PQConvTranspose3d"]

_ConvTranspose = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
_GEOMETRY = (
    "in_channels",
    "out_channels",
    "kernel_size",
    "stride",
    "padding",
    "output_padding",
    "dilation",
    "groups",
    "padding_mode",
)


class PQConvTranspose(PQModule):
    """A transposed convolution with a decoded weight; everything else is inherited from the float module.

    Blocks are runs of input channels, as in a 1×1 convolution (`pq.blocks.transposed_matrix`).
    """

    float_type: ClassVar[type[_ConvTranspose]]
    transposed = True
    _output_padding: Any = _ConvTransposeNd._output_padding

    def __init__(self, codebook: Tensor, codes: Tensor, like: _ConvTranspose) -> None:
        super().__init__(codebook, codes, like.weight.shape)
        geometry: Any = like
        for name in _GEOMETRY:
            setattr(self, name, getattr(geometry, name))
        self.groups = like.groups
        columns = like.in_channels // like.groups
        self.matrix_shape = torch.Size((math.prod(like.weight.shape) // columns, columns))
        self.bias = like.bias

    @property
    def weight(self) -> Tensor:
        """The decoded weight `[C_in, C_out / groups, *kernel]`."""
        return from_transposed_matrix(self.matrix, self.weight_shape, self.groups)

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Map input `[batch, in_channels, *spatial]` to `[batch, out_channels, *spatial]`, like the float module.

        Args:
            input: `[batch, in_channels, *spatial]`, in the codebook's dtype.
            output_size: spatial size of the output, where the stride leaves several possible.
        """
        run: Any = self.float_type.forward
        output: Tensor = run(self, input, output_size)
        return output

    def to_float(self) -> _ConvTranspose:
        """The float module of the same geometry, on the meta device."""
        arguments: Any = {name: getattr(self, name) for name in _GEOMETRY}
        return self.float_type(bias=self.bias is not None, device="meta", **arguments)

    def extra_repr(self) -> str:
        """Geometry, block size and codebook size, for `print`."""
        geometry = ", ".join(f"{name}={getattr(self, name)}" for name in _GEOMETRY)
        return f"{geometry}, {self.pq_repr()}"


class PQConvTranspose1d(PQConvTranspose):
    """`nn.ConvTranspose1d` with a decoded weight."""

    float_type = nn.ConvTranspose1d


class PQConvTranspose2d(PQConvTranspose):
    """`nn.ConvTranspose2d` with a decoded weight."""

    float_type = nn.ConvTranspose2d


class PQConvTranspose3d(PQConvTranspose):
    """`nn.ConvTranspose3d` with a decoded weight."""

    float_type = nn.ConvTranspose3d
