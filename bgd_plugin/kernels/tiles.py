"""Decode a weight one tile at a time, into reused memory: no decoded weight is kept."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from bgd_plugin.kernels.decoding import decode_rows_into

__all__ = ["TILE", "convolve_by_tiles", "decoded_tiles", "rows_of_a_tile"]

TILE = 1 << 20
"""Number of weights decoded at once."""
_ROWS = 64
"""A tile's rows are a multiple of this, for which torch's operators are fastest."""

_scratch = threading.local()


def rows_of_a_tile(rows: int, columns: int) -> int:
    """How many rows of a weight `[rows, columns]` are decoded at once."""
    return rows if rows * columns <= TILE else max(1, TILE // columns // _ROWS * _ROWS or TILE // columns)


def decoded_tiles(codebook: Tensor, codes: Tensor, mask: Tensor | None) -> Iterator[tuple[int, Tensor]]:
    """The weight's rows, some at a time: (index of the first, tile `[count, columns]`).

    A tile is overwritten by the next one, and by the next layer of this thread.

    Args:
        codebook: `[codebook_size, block_size]`, contiguous.
        codes: `[rows, blocks_per_row]`, contiguous.
        mask: bool of the weight's shape, false where it is zero; None: nowhere.
    """
    rows, columns = codes.shape[0], codes.shape[1] * codebook.shape[1]
    step = rows_of_a_tile(rows, columns)
    buffer = _memory(step * columns, codebook.dtype).view(step, columns)
    for first in range(0, rows, step):
        tile = buffer[: min(step, rows - first)]
        decode_rows_into(tile, codebook, codes, first)
        if mask is not None:
            tile.mul_(mask[first : first + step].reshape(tile.shape))
        yield first, tile


def convolve_by_tiles(
    tiles: Iterable[tuple[int, Tensor]],
    bias: Tensor | None,
    shape: torch.Size,
    convolve: Callable[[Tensor, Tensor | None], Tensor],
) -> Tensor:
    """A convolution without groups, some output channels at a time if its weight is large.

    Args:
        tiles: the weight's rows, as `decoded_tiles` gives them: (index of the first, `[count, columns]`).
        bias: `[C_out]` or None.
        shape: the weight's, `[C_out, C_in, *kernel]`.
        convolve: from `(weight, bias)` of some output channels to their output.
    """
    parts = []
    for first, tile in tiles:
        part = None if bias is None else bias[first : first + len(tile)]
        parts.append(convolve(tile.view(-1, *shape[1:]), part))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1 - len(shape))


def _memory(count: int, dtype: torch.dtype) -> Tensor:
    """This thread's memory for a tile; it grows to the largest size requested."""
    size = count * dtype.itemsize
    held: Tensor | None = getattr(_scratch, "held", None)
    if held is None or held.numel() < size:
        with torch.inference_mode(False):
            held = _scratch.held = torch.empty(size, dtype=torch.uint8, device="cpu")
    return held[:size].view(dtype)
