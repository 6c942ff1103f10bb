"""What finding layers gives."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor, nn

from bgd_plugin.pq.blocks import AS_IT_IS, Layout, from_transposed_matrix, transposed_matrix

__all__ = ["FoundLayer", "LeftLayer"]


@dataclass(frozen=True, kw_only=True, eq=False)
class FoundLayer:
    """A convolution or linear layer that can be quantized.

    Attributes:
        name: what users call it: the module's path, or the parameter's where a weight stands alone.
        target: path of the module that is, or will be, replaced.
        kind: "conv1d" to "conv3d", "conv_transpose1d" to "conv_transpose3d", "linear" or "embedding".
        family: which setting of `BGDConfig` applies: "conv", "pointwise_conv", "depthwise_conv", "linear"
            or "embedding".
        weight: `[C_out, C_in / groups, *kernel]`, `[C_out, C_in]`, or as the kind of module has it.
        calls: names of the nodes that compute with it, in order; none where the network is not a graph.
        functional: whether code reads the weight as a tensor, rather than call the module that holds it.
        groups: of a convolution.
        hidden: whether its inputs show only while the nodes of `calls`, or the network, run.
        bias: path of the parameter that the layer adds, if it adds one.
        tied: targets of other layers that compute with the same weight.
        layout: how the weight stands for a matrix, where code reads it as a tensor.
        members: matrices that the weight holds, each with inputs of its own.
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
        """The weight as it is cut into blocks, rows first."""
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
    """Something with weights that stays as it is, and why."""

    name: str
    reason: str
