"""Decode a weight one tile at a time, into reused memory: no decoded weight is kept."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from bgd_plugin.kernels.decoding import decode_rows_into

__all__ = [
    "TILE",
    "Decoding",
    "conv_tile",
    "convolve_by_tiles",
    "decoded_tiles",
    "decoded_whole",
    "rows_of_a_tile",
    "thread_address",
    "thread_memory",
    "tiles_by",
    "whole_by",
]

Decoding = Callable[[Tensor, Tensor, Tensor, int], None]
"""Decodes rows into `[count, ...]`, from codebook, codes and the index of the first row."""

TILE = 1 << 20
"""Number of weights decoded at once."""
_ROWS = 64
"""A tile's rows are a multiple of this, for which torch's operators are fastest."""
_FEWEST_ROWS = 4
"""Where rows are long, a tile's rows are a multiple of this: trellis windows have four rows in a byte."""

_FEW_POSITIONS = 256

_scratch = threading.local()


def conv_tile(weights: int, positions: int) -> int:
    """Number of a convolution's weights decoded at once.

    Torch reads a weight more than once, from a cache if it is small; it also reads the input once for each tile. So a
    weight is split if that leaves tiles of some size, and sooner where there is little input.

    Args:
        weights: number of them in the convolution.
        positions: in its input, of all samples.
    """
    return TILE // 2 if weights > TILE and positions <= _FEW_POSITIONS else TILE


def rows_of_a_tile(rows: int, columns: int, tile: int = TILE) -> int:
    """How many rows of a weight `[rows, columns]` are decoded at once: about `tile` weights."""
    return rows if rows * columns <= tile else _whole_rows(tile // columns)


def _whole_rows(rows: int) -> int:
    return rows // _ROWS * _ROWS or max(1, rows // _FEWEST_ROWS) * _FEWEST_ROWS


def decoded_whole(codebook: Tensor, codes: Tensor, mask: Tensor | None, shape: torch.Size) -> Tensor:
    """A weight of at most `TILE` weights, in the memory of a tile: the next layer of this thread overwrites it.

    Args:
        codebook: `[codebook_size, block_size]`, contiguous.
        codes: `[rows, blocks_per_row]`, contiguous.
        mask: bool of the weight's shape, false where it is zero; None: nowhere.
        shape: the weight's, `[C_out, ...]`.
    """
    return whole_by(decode_rows_into, codebook, codes, mask, shape)


def whole_by(into: Decoding, codebook: Tensor, codes: Tensor, mask: Tensor | None, shape: torch.Size) -> Tensor:
    """As `decoded_whole`, of any form of codes.

    Args:
        into: decodes the rows.
        codebook, codes: of the form's shapes.
        mask: bool of the weight's shape, false where it is zero; None: nowhere.
        shape: the weight's, `[C_out, ...]`.
    """
    weight = _thread_memory_of(shape, codebook.dtype)
    into(weight, codebook, codes, 0)
    return weight if mask is None else weight.mul_(mask)


def decoded_tiles(
    codebook: Tensor, codes: Tensor, mask: Tensor | None, tile: int = TILE
) -> Iterator[tuple[int, Tensor]]:
    """The weight's rows, some at a time: (index of the first, tile `[count, columns]`).

    A tile is overwritten by the next one, and by the next layer of this thread.

    Args:
        codebook: `[codebook_size, block_size]`, contiguous.
        codes: `[rows, blocks_per_row]`, contiguous.
        mask: bool of the weight's shape, false where it is zero; None: nowhere.
        tile: number of weights decoded at once.
    """
    shape = codes.shape[0], codes.shape[1] * codebook.shape[1]
    return tiles_by(decode_rows_into, codebook, codes, mask, shape, tile)


def tiles_by(
    into: Decoding, codebook: Tensor, codes: Tensor, mask: Tensor | None, shape: tuple[int, int], tile: int
) -> Iterator[tuple[int, Tensor]]:
    """As `decoded_tiles`, of any form of codes.

    Args:
        into: decodes the rows.
        codebook, codes: of the form's shapes.
        mask: bool of the weight's shape, false where it is zero; None: nowhere.
        shape: of the weight, `(rows, columns)`.
        tile: number of weights decoded at once.
    """
    rows, columns = shape
    step = rows_of_a_tile(rows, columns, tile)
    buffer = _thread_memory_of((step, columns), codebook.dtype)
    for first in range(0, rows, step):
        part = buffer[: min(step, rows - first)]
        into(part, codebook, codes, first)
        if mask is not None:
            part.mul_(mask[first : first + step].reshape(part.shape))
        yield first, part


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


def thread_memory(count: int, dtype: torch.dtype) -> Tensor:
    """This thread's memory for a tile; it grows to the largest size requested.

    Args:
        count: number of values.
        dtype: of each.

    Returns:
        `[count]`, with the values that the last tile has left.
    """
    size = count * dtype.itemsize
    thread_address(size)
    held: Tensor = _scratch.held
    return held[:size].view(dtype)


def thread_address(size: int) -> int:
    """The address of this thread's memory for a tile, of at least this size.

    Args:
        size: number of bytes.
    """
    if getattr(_scratch, "size", -1) < size:
        with torch.inference_mode(False):
            _scratch.held = torch.empty(size, dtype=torch.uint8, device="cpu")
        _scratch.size, _scratch.address, _scratch.views = size, _scratch.held.data_ptr(), {}
    return _scratch.address  # type: ignore[no-any-return]


def _thread_memory_of(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """`thread_memory` in a shape; a view that was made before is used again."""
    key = shape, dtype
    views: dict[Any, Tensor] | None = getattr(_scratch, "views", None)
    found = None if views is None else views.get(key)
    if found is None:
        with torch.inference_mode(False):
            found = thread_memory(math.prod(shape), dtype).view(shape)
        _scratch.views[key] = found
    return found
