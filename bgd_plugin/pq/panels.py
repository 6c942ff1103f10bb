"""Updates of the columns on the right of a matrix, block by block, gathered into large products."""

from __future__ import annotations

from collections.abc import Iterator

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
        blocks = self._panel(block)
        here, after, end = (number * self._size for number in (block, block + 1, blocks.stop))
        self._waiting.append(factor)
        if block + 1 < blocks.stop:
            self._values[:, :, after:end] -= factor @ self._matrix[:, here:after, after:end]
            return
        self.change_beyond_(blocks, torch.cat(self._waiting, 2))
        self._waiting = []

    def spans(self) -> Iterator[slice]:
        """The blocks of each panel, from left to right: for those who make the changes within a panel themselves."""
        for block in range(0, self._blocks, self._per_panel):
            yield self._panel(block)

    def part(self, blocks: slice) -> tuple[Tensor, Tensor]:
        """The values of some blocks, `[groups, rows, columns]`, and the square of the matrix that is theirs: views."""
        columns = self._columns(blocks)
        return self._values[:, :, columns], self._matrix[:, columns, columns]

    def change_beyond_(self, blocks: slice, factors: Tensor) -> None:
        """Make the changes of a panel's blocks for all columns beyond it.

        Args:
            blocks: of the panel.
            factors: a of all of them, `[groups, rows, columns]`.
        """
        columns = self._columns(blocks)
        self._values[:, :, columns.stop :] -= factors @ self._matrix[:, columns, columns.stop :]

    def _panel(self, block: int) -> slice:
        """The blocks of the panel that a block is in."""
        first = block // self._per_panel * self._per_panel
        return slice(first, min(first + self._per_panel, self._blocks))

    def _columns(self, blocks: slice) -> slice:
        return slice(blocks.start * self._size, blocks.stop * self._size)
