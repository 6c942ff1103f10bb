"""A linear layer of trellis windows on a CPU: few inputs times codes, or decoded tile by tile and multiplied."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from bgd_plugin.jit.threads import share_rows
from bgd_plugin.kernels.tiles import TILE, tiles_by, whole_by
from bgd_plugin.kernels.window_decoding import decode_window_rows_into, look_ups
from bgd_plugin.kernels.window_dot import MOST_INPUTS, window_dot_program
from bgd_plugin.kernels.window_pairs import pair_table

__all__ = ["WAYS", "decoded_window_tiles", "decoded_windows_whole", "lookup_windows"]

Way = Callable[[Tensor, Tensor, Tensor, "Tensor | None"], Tensor]


def lookup_windows(x: Tensor, scale: Tensor, codes: Tensor, mask: Tensor | None, bias: Tensor | None) -> Tensor:
    """`x @ weight.T + bias` without the whole weight.

    Which way is taken depends on the number of inputs alone, so outputs are the same in every process.

    Args:
        x: `[..., columns]`, float32, bfloat16 or float16 on a CPU.
        scale: `[rows]`, of x's type.
        codes: uint8 `[bytes, columns]`, contiguous.
        mask: bool of the weight's shape, false where it is zero; None: nowhere.
        bias: `[rows]` or None.

    Returns:
        `[..., rows]`, equal up to rounding to torch's result with the decoded weight.
    """
    rows, columns = len(scale), codes.shape[1]
    inputs = x.reshape(-1, columns).contiguous()
    if inputs.numel():
        way = "dot" if len(inputs) <= MOST_INPUTS else "tiles"
        output = WAYS[way](inputs, scale, codes, mask)
    else:
        output = torch.nn.functional.linear(inputs, scale.new_zeros(rows, columns))
    if bias is not None:
        output = output.add_(bias)
    return output.view(*x.shape[:-1], rows)


def _by_dots(inputs: Tensor, scale: Tensor, codes: Tensor, mask: Tensor | None) -> Tensor:
    """All inputs at once; each code is read once."""
    single, scales = inputs.float(), scale.float().contiguous()
    (count, columns), rows = single.shape, len(scale)
    output = single.new_empty((count, rows))
    program = window_dot_program(count, mask is not None)
    kept = None if mask is None else mask.contiguous()
    masks = 0 if kept is None else kept.data_ptr()
    fixed = scales.data_ptr(), pair_table().data_ptr(), codes.data_ptr(), masks
    addresses = single.data_ptr(), *fixed, output.data_ptr()

    def calls(first: int, last: int) -> list[tuple[int, ...]]:
        return [(*addresses, first, last, rows, len(codes), columns)]

    share_rows(len(codes), look_ups(columns), program, calls)
    return output if inputs.dtype == torch.float32 else output.to(inputs.dtype)


def _by_tiles(inputs: Tensor, scale: Tensor, codes: Tensor, mask: Tensor | None) -> Tensor:
    """Tile by tile: torch multiplies each decoded tile while it is in the cache."""
    output = inputs.new_empty(inputs.shape[0], len(scale))
    for first, tile in decoded_window_tiles(scale, codes, mask):
        torch.mm(inputs, tile.t(), out=output[:, first : first + len(tile)])
    return output


WAYS: dict[str, Way] = {"dot": _by_dots, "tiles": _by_tiles}


def decoded_windows_whole(scale: Tensor, codes: Tensor, mask: Tensor | None, shape: torch.Size) -> Tensor:
    """`tiles.decoded_whole` of trellis windows.

    Args:
        scale: `[rows]`.
        codes: uint8 `[bytes, columns]`, contiguous.
        mask: bool of the weight's shape, false where it is zero; None: nowhere.
        shape: the weight's, `[rows, ...]`.
    """
    return whole_by(decode_window_rows_into, scale, codes, mask, shape)


def decoded_window_tiles(
    scale: Tensor, codes: Tensor, mask: Tensor | None, tile: int = TILE
) -> Iterator[tuple[int, Tensor]]:
    """`tiles.decoded_tiles` of trellis windows.

    Args:
        scale: `[rows]`.
        codes: uint8 `[bytes, columns]`, contiguous.
        mask: bool of the weight's shape, false where it is zero; None: nowhere.
        tile: number of weights decoded at once.
    """
    return tiles_by(decode_window_rows_into, scale, codes, mask, (len(scale), codes.shape[1]), tile)
