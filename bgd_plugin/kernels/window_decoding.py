"""The decode kernel of trellis windows: rows of the weight, on as many threads as torch may use."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from bgd_plugin.jit.llvm import Loop, compiled, define
from bgd_plugin.jit.threads import share_rows
from bgd_plugin.jit.vectors import splat, store
from bgd_plugin.kernels.window_pairs import (
    LANES,
    ROWS,
    over_columns,
    pair_table,
    ring_bases,
    unit_of_row,
    valid_rows,
    window_scratch,
)

__all__ = ["decode_window_rows", "decode_window_rows_into", "look_ups"]

_PAIRS = 2
"""Pairs of rows in a byte."""


def look_ups(columns: int) -> int:
    """How many look-ups decode a byte of codes in each of `columns` columns."""
    return _PAIRS * columns


@cache
def _program() -> Any:
    """`output[r, j] = scale[r] · table[state of row r in column j]`, in float32.

    It takes the addresses of scale `[rows]`, pairs (`pair_table`), codes `[bytes, columns]` and output, of whose rows
    it writes those that are decoded, then `first`, `last` (rows of bytes), `rows`, `bytes`, `columns`.
    """
    pointers, numbers = ("scale", "pairs", "codes", "output"), ("first", "last", "rows", "bytes", "columns")
    module, builder, a = define("decode_windows", pointers, numbers)
    a["scratch"] = window_scratch(builder)
    with Loop(builder, a["first"], a["last"]) as byte_rows:
        bases, rows = ring_bases(builder, a, byte_rows.index), valid_rows(builder, a, byte_rows.index)
        single = [unit_of_row(builder, a, row) for row in rows]
        scales = {lanes: [splat(builder, scale, lanes) for scale in single] for lanes in (1, LANES)}
        places = [builder.mul(row, a["columns"]) for row in rows]

        def step(pair: int, column: Any, values: list[Any], _: list[Any]) -> list[Any]:
            for i in (1, 0):  # rows beyond the last are written before it
                scale = scales[values[i].type.count][2 * pair + i]
                place = builder.add(places[2 * pair + i], column)
                store(builder, builder.fmul(values[i], scale), a["output"], place)
            return []

        over_columns(builder, a, bases, step, lambda lanes: [])
    builder.ret_void()
    return compiled(module)


def decode_window_rows_into(output: Tensor, scale: Tensor, codes: Tensor, first: int = 0) -> None:
    """Decode rows `first` and following into `output` `[count, columns]`, contiguous and of the scale's type.

    Args:
        output: `[count, columns]`.
        scale: `[rows]`, float32, bfloat16 or float16.
        codes: uint8 `[bytes, columns]`, contiguous.
        first: index of the first row, a multiple of four.
    """
    single = output if output.dtype == torch.float32 else torch.empty_like(output, dtype=torch.float32)
    count, columns = len(output), codes.shape[1]
    scales, program, bytes_before = scale.float().contiguous(), _program(), first // ROWS
    target = single.data_ptr() - first * columns * single.element_size()
    addresses = scales.data_ptr(), pair_table().data_ptr(), codes.data_ptr(), target

    def calls(start: int, stop: int) -> list[tuple[int, ...]]:
        return [(*addresses, bytes_before + start, bytes_before + stop, first + count, len(codes), columns)]

    if columns:
        share_rows(-(-count // ROWS), look_ups(columns), program, calls)
    if single is not output:
        output.copy_(single)


def decode_window_rows(scale: Tensor, codes: Tensor) -> Tensor:
    """All rows of the weight, `[rows, columns]`: to the bit what `pq.windows.decode_windows` gives.

    Args:
        scale: `[rows]`, float32, bfloat16 or float16.
        codes: uint8 `[bytes, columns]`, contiguous.
    """
    output = scale.new_empty(len(scale), codes.shape[1])
    decode_window_rows_into(output, scale, codes)
    return output
