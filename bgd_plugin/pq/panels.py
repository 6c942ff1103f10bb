"""Updates of the columns on the right of a matrix, block by block, gathered into large products."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Panels"]

_COLUMNS = 128
"""Columns in a panel."""


class Panels:
    """Values whose blocks are visited from left to right, each of which changes all blocks on its right.

    A change x_J ← x_J − a_I M_IJ is made at once within a panel of some blocks, and for all columns beyond it when the
    panel's last block has been visited: one product with many columns is several times as fast as one for each block.

    Args:
        values: `[groups, rows, columns]`; overwritten.
        matrix: M, `[groups, columns, columns]`, of which the part above the diagonal blocks is read.
        block_size: columns in a block.

    **Source**: the lazy updates of Frantar et al., GPTQ, arXiv 2210.17323, section 3.
    """

    def __init__(self, values: Tensor, matrix: Tensor, block_size: int) -> None:
        self._values, self._matrix, self._size = values, matrix, block_size
        self._blocks = values.shape[2] // block_size
        self._per_panel = max(1, _COLUMNS // block_size)
        self._waiting: list[Tensor] = []

    def __getitem__(self, block: int) -> Tensor:
        """A block's values `[groups, rows, block_size]` after all changes by blocks on its left: a view."""
        return self._values[:, :, block * self._size : (block + 1) * self._size]

    def change_(self, block: int, factor: Tensor) -> None:
        """Make the change of a block, the next one on the right of the last.

        Args:
            factor: a, `[groups, rows, block_size]`.
        """
        first = block // self._per_panel * self._per_panel
        last = min(first + self._per_panel, self._blocks)
        start, here, after, end = (number * self._size for number in (first, block, block + 1, last))
        self._waiting.append(factor)
        if block + 1 < last:
            self._values[:, :, after:end] -= factor @ self._matrix[:, here:after, after:end]
            return
        self._values[:, :, end:] -= torch.cat(self._waiting, 2) @ self._matrix[:, start:end, end:]
        self._waiting = []
