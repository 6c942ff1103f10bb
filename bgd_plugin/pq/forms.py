"""The forms of codes: how a layer's two tensors, codebook and codes, stand for its weight.

| form | codebook | codes |
|---|---|---|
| blocks | `[codebook_size, block_size]`, the layer's own codewords | integers `[rows, blocks_per_row]` |
| trellis | `[rows]`, the scale of each row | uint8 `[rows / 4, columns]`, four codes of two bits each |

Values of trellis windows are in one table for all layers (`pq.windows`). A third form, entropy-coded streams, exists in
files only: in memory such a layer is one of blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bgd_plugin.encoding.codes import code_dtype
from bgd_plugin.pq.blocks import decode
from bgd_plugin.pq.masked import codeword_uses
from bgd_plugin.pq.windows import STATES, code_bytes_per_column, decode_windows, decoded_rows, window_table

__all__ = ["BLOCKS", "FORMS", "TRELLIS", "Form", "Sizes"]

BLOCKS, TRELLIS = "blocks", "trellis"


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What the shapes of a layer's tensors follow from.

    Attributes:
        rows, columns: of its matrix.
        block_size: weights in a block.
        codebook_size: number of codewords.
    """

    rows: int
    columns: int
    block_size: int
    codebook_size: int


@dataclass(frozen=True, kw_only=True)
class Form:
    """One form of codes.

    Attributes:
        name: as in settings and files.
        decode: from codebook, codes and a shape `[rows, ...]` to the weight of that shape; differentiable in the
            codebook. Shapes of codebook and codes are in the table above.
        rows: from codebook, codes and indices of any shape to these rows, `[*indices.shape, columns]`.
        uses: from the same, mask and codebook to the number of weights for which each number in the codebook stands.
        codebook_shape, codes_shape: by the layer's sizes.
        codes_dtype: by the number of codewords.
        sizes: block size and codebook size, by the codebook's shape.
        code_bits: bits in a file of each item of `codes`, by the codebook size.
        is_wide: whether decoding by torch's operators takes several times the memory of what is decoded.
        prepare: makes what decoding needs besides, by the codebook: before a compiler or an exporter looks at it.
    """

    name: str
    decode: Callable[[Tensor, Tensor, Sequence[int]], Tensor]
    rows: Callable[[Tensor, Tensor, Tensor], Tensor]
    uses: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    codebook_shape: Callable[[Sizes], tuple[int, ...]]
    codes_shape: Callable[[Sizes], tuple[int, int]]
    codes_dtype: Callable[[int], torch.dtype]
    sizes: Callable[[Sequence[int]], tuple[int, int]]
    code_bits: Callable[[int], int]
    is_wide: bool
    prepare: Callable[[Tensor], object]

    def empty(self, sizes: Sizes, **options: Any) -> tuple[Tensor, Tensor]:
        """A codebook and codes, all zero, of the shapes and types of a layer.

        Args:
            sizes: of the layer.
            **options: `dtype`, of the codebook alone, and `device`.
        """
        codes_options = {**options, "dtype": self.codes_dtype(sizes.codebook_size)}
        codebook = torch.zeros(self.codebook_shape(sizes), **options)
        return codebook, torch.zeros(self.codes_shape(sizes), **codes_options)


def _block_rows(codebook: Tensor, codes: Tensor, rows: Tensor) -> Tensor:
    return decode(codebook, codes[rows], (*rows.shape, codes.shape[1] * codebook.shape[1]))


def _block_uses(codebook: Tensor, codes: Tensor, mask: Tensor | None) -> Tensor:
    size, width = codebook.shape
    return codeword_uses(codes, mask, size, width)


def _decode_windows(scale: Tensor, codes: Tensor, shape: Sequence[int]) -> Tensor:
    return decode_windows(scale, codes).reshape(tuple(shape))


def _window_uses(scale: Tensor, codes: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return torch.full_like(scale, codes.shape[1])
    return mask.flatten(1).sum(1).to(scale)


def _block_bits(codebook_size: int) -> int:
    return max(1, math.ceil(math.log2(codebook_size)))


FORMS = {
    BLOCKS: Form(
        name=BLOCKS,
        decode=decode,
        rows=_block_rows,
        uses=_block_uses,
        codebook_shape=lambda sizes: (sizes.codebook_size, sizes.block_size),
        codes_shape=lambda sizes: (sizes.rows, sizes.columns // sizes.block_size),
        codes_dtype=code_dtype,
        sizes=lambda shape: (shape[1], shape[0]),
        code_bits=_block_bits,
        is_wide=False,
        prepare=lambda _: None,
    ),
    TRELLIS: Form(
        name=TRELLIS,
        decode=_decode_windows,
        rows=decoded_rows,
        uses=_window_uses,
        codebook_shape=lambda sizes: (sizes.rows,),
        codes_shape=lambda sizes: (code_bytes_per_column(sizes.rows), sizes.columns),
        codes_dtype=lambda _: torch.uint8,
        sizes=lambda _: (1, STATES),
        code_bits=lambda _: 8,
        is_wide=True,
        prepare=lambda scale: window_table(scale.dtype, scale.device),
    ),
}
"""By name."""
