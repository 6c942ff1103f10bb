"""A layer that can be quantized, and a weight that is left alone, as found in a network."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor, nn

from bgd_plugin.pq.layout import AS_IT_IS, Layout, from_transposed_matrix, transposed_matrix

__all__ = ["FoundLayer", "LeftLayer"]


@dataclass(frozen=True, kw_only=True, eq=False)
class FoundLayer:
    """A convolution or linear layer that can be quantized.

    Attributes:
        name: the user's name: the module's path, or the parameter's if a weight is read by name.
        target: path of the module that is, or will be, replaced.
        kind: "conv1d" to "conv3d", "conv_transpose1d" to "conv_transpose3d", "linear" or "embedding".
        family: which setting of `BGDConfig` applies: "conv", "pointwise_conv", "depthwise_conv", "linear"
            or "embedding".
        weight: `[C_out, C_in / groups, *kernel]`, `[C_out, C_in]`, or as the kind of module has it.
        calls: names of the nodes that compute with it, in order; none if the network is not a graph.
        functional: whether code reads the weight as a tensor instead of calling the module that holds it.
        groups: of a convolution.
        hidden: whether its inputs are visible only while the nodes of `calls`, or the network, run.
        bias: path of the parameter that the layer, and nothing else, adds; None if there is none.
        tied: targets of other layers that compute with the same weight.
        layout: from the weight to its matrix, if code reads the weight as a tensor.
        members: number of matrices in the weight, each with its own inputs.
    """

    name: str
    target: str
    kind: str
    family: str
    weight: nn.Parameter
    calls: tuple[str, ...]
    functional: bool
    groups: int = 1
    hidden: bool = False
    bias: str | None = None
    tied: tuple[str, ...] = ()
    layout: Layout = AS_IT_IS
    members: int = 1

    @property
    def matrix(self) -> Tensor:
        """The weight as it is cut into blocks: `[rows, ...]`."""
        if self.kind.startswith("conv_transpose"):
            return transposed_matrix(self.weight.detach(), self.groups)
        return self.weight if self.layout == AS_IT_IS else self.layout.matrix(self.weight.detach())

    def weight_of(self, matrix: Tensor) -> Tensor:
        """The weight that a matrix of the shape of `matrix`, or its rows folded in any way, stands for."""
        shape = self.weight.shape
        if self.kind.startswith("conv_transpose"):
            return from_transposed_matrix(matrix.reshape(self.matrix.shape), shape, self.groups)
        return self.layout.weight(matrix, shape)

    @property
    def rows(self) -> int:
        """Rows of the weight matrix."""
        return self.matrix.shape[0]

    @property
    def columns(self) -> int:
        """Weights in a row."""
        return math.prod(self.matrix.shape[1:])


@dataclass(frozen=True, kw_only=True)
class LeftLayer:
    """A module or parameter that is left alone: its name and the reason."""

    name: str
    reason: str
