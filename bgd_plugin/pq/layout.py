"""How a weight stands for the matrix whose rows are cut into blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

__all__ = ["AS_IT_IS", "Layout", "from_transposed_matrix", "transposed_matrix"]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a weight that code reads as a tensor stands for a matrix `[rows, columns]` whose rows are cut into blocks.

    Attributes:
        transposed: its last two dimensions are `[columns, rows]`, as in transformers' `Conv1D`.
        columns: of a matrix into which its dimensions are folded: several matrices one below the other, such as the
            experts' of a mixture; 0 where the weight is the matrix.
        groups: of a transposed convolution, whose weight is `[C_in, C_out / groups, *kernel]`; 0 for any other layer.
    """

    transposed: bool = False
    columns: int = 0
    groups: int = 0

    def matrix(self, weight: Tensor) -> Tensor:
        """The matrix `[rows, columns]` of a weight of the layer's own shape; a view where that is possible."""
        if self.groups:
            return transposed_matrix(weight, self.groups)
        turned = weight.mT if self.transposed else weight
        return turned.reshape(-1, self.columns) if self.columns else turned

    def weight(self, matrix: Tensor, shape: Sequence[int]) -> Tensor:
        """Undo `matrix`: a weight of the given shape from its matrix `[rows, columns]`."""
        if self.groups:
            return from_transposed_matrix(matrix, shape, self.groups)
        turned = [*shape[:-2], shape[-1], shape[-2]] if self.transposed else [*shape]
        return matrix.reshape(turned).mT if self.transposed else matrix.reshape(turned)


AS_IT_IS = Layout()
"""The weight is the matrix."""


def transposed_matrix(weight: Tensor, groups: int) -> Tensor:
    """The weight of a transposed convolution, `[C_in, C_out / groups, *kernel]`, as the matrix `[rows, C_in / groups]`.

    A transposed convolution multiplies each input position by this matrix and sums the results that land on the same
    output position. A row is one output channel at one kernel offset; the rows of each group are contiguous.
    """
    return weight.reshape(groups, weight.shape[0] // groups, -1).mT.flatten(0, 1)


def from_transposed_matrix(matrix: Tensor, shape: Sequence[int], groups: int) -> Tensor:
    """Inverse of `transposed_matrix`: from the matrix `[rows, C_in / groups]` to the weight of shape `shape`."""
    return matrix.reshape(groups, -1, matrix.shape[1]).mT.reshape(tuple(shape))
