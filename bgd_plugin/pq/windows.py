"""Trellis windows: codes of two bits, of which the last six stand for a weight together.

Down each column of a weight runs a ring of codes, one for each row. A row's weight is the value that one table, the
same for all layers, has for the window of its own code and the five before it, times the scale of its row:

    state[r] = codes of rows r − 5 … r, 12 bits, the earliest one highest; after the last row comes the first
    weight[r, j] = scale[r] · table[state[r] of column j]

So 4096 values are to be had for two bits, and any weight is decoded from 12 bits of its column. Rows are padded to a
multiple of four, a byte of codes.

The table's values are quantiles of the normal distribution. The four values that may follow a state are a quarter of
all ranks apart, so one of them is near whatever the earlier codes are; where the four begin is scattered.

**Source**: trellis-coded quantization, Marcellin and Fischer, IEEE Trans. Commun. 38 (1990); as a window of bits that
looks up a table, Tseng et al., QTIP, arXiv 2406.11235, section 3.
"""

from __future__ import annotations

from functools import cache
from statistics import NormalDist

import torch
from torch import Tensor

__all__ = [
    "LEAST_ROWS",
    "STATES",
    "VALUE_STEP",
    "code_bytes_per_column",
    "decode_windows",
    "decoded_rows",
    "packed_states",
    "padded_rows",
    "window_table",
]

STATES = 4096
"""Values of the table: windows of six codes."""
LEAST_ROWS = 16
"""Fewer rows are not worth a ring."""
_BRANCHES = 4
_PER_BYTE = 4
_MASK = STATES - 1
VALUE_STEP = 32
"""The table's values are multiples of one part in so many, exact in every floating-point type, bfloat16 too."""
_BASE = (65, 505, 477)
_TURN = (911, 150, 513)


def padded_rows(rows: int) -> int:
    """The number of codes in the ring of a column that has `rows` weights: codes fill whole bytes."""
    return _PER_BYTE * code_bytes_per_column(rows)


def code_bytes_per_column(rows: int) -> int:
    """The bytes of the codes of a column that has `rows` weights."""
    return -(-rows // _PER_BYTE)


def window_table(dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Tensor:
    """The value of each state, `[4096]`, the same tensor at each call; never to be written to.

    Args:
        dtype: floating-point; all of them hold the values exactly.
        device: where it is wanted.
    """
    key = dtype, str(device)
    if key not in _tables:
        with torch.inference_mode(False):  # a graph may keep it
            _tables[key] = torch.tensor(_values_of_states(), dtype=dtype, device=device)
    return _tables[key]


_tables: dict[tuple[torch.dtype, str], Tensor] = {}
"""By type and device; a dict, which torch.compile can look into, where it warns of other caches."""


@cache
def _values_of_states() -> list[float]:
    quantiles = [NormalDist().inv_cdf((rank + 0.5) / STATES) for rank in range(STATES)]
    return [round(quantiles[_rank(state)] * VALUE_STEP) / VALUE_STEP for state in range(STATES)]


def _rank(state: int) -> int:
    """A state's place among all values: ranks of the branches of five codes are a quarter of all apart."""
    before, code = divmod(state, _BRANCHES)
    turn = _scattered(before, *_TURN) >> 3
    quarter = (code * (1 + 2 * (turn >> 2 & 1)) + turn) % _BRANCHES
    return _scattered(before, *_BASE) + STATES // _BRANCHES * quarter


def _scattered(number: int, factor: int, offset: int, second: int) -> int:
    """A permutation of the numbers below 1024."""
    number = (number * factor + offset) & 1023
    number ^= number >> 5
    number = (number * second + 341) & 1023
    return number ^ number >> 4


def packed_states(states: Tensor) -> Tensor:
    """The codes of rings of states, packed: those of one byte in all columns beside each other.

    Args:
        states: integers `[columns, padded rows]`, each of which continues the one before it.

    Returns:
        uint8 `[padded rows / 4, columns]`, the first row in the highest bits.
    """
    codes = (states & (_BRANCHES - 1)).reshape(len(states), -1, _PER_BYTE).to(torch.int32)
    packed = (codes << torch.tensor([6, 4, 2, 0], dtype=torch.int32, device=codes.device)).sum(2).to(torch.uint8)
    return packed.T.contiguous()


def decode_windows(scale: Tensor, codes: Tensor) -> Tensor:
    """The weight `[rows, columns]`, in the scale's dtype; differentiable in the scale.

    Args:
        scale: `[rows]`.
        codes: uint8 `[bytes, columns]`.
    """
    wide = codes.to(torch.int32)
    words = wide.roll(2, 0) << 16 | wide.roll(1, 0) << 8 | wide
    states = torch.stack([words >> 6, words >> 4, words >> 2, words], 1).flatten(0, 1) & _MASK
    return _values(states[: len(scale)], scale) * scale[:, None]


def decoded_rows(scale: Tensor, codes: Tensor, rows: Tensor) -> Tensor:
    """Some rows of the weight, `[*rows.shape, columns]`.

    Args:
        scale: `[rows]`.
        codes: uint8 `[bytes, columns]`.
        rows: indices, any shape.
    """
    flat = rows.flatten()
    last, size = flat // _PER_BYTE, len(codes)
    first, second, third = (codes[(last + size - back) % size].to(torch.int32) for back in (2, 1, 0))
    words = first << 16 | second << 8 | third
    shifts = (2 * (_PER_BYTE - 1 - flat % _PER_BYTE)).to(torch.int32)
    values = _values(words >> shifts[:, None] & _MASK, scale) * scale[flat, None]
    return values.reshape(*rows.shape, codes.shape[1])


def _values(states: Tensor, like: Tensor) -> Tensor:
    """The table's values, of the shape of `states`, int32."""
    return window_table(like.dtype, like.device).index_select(0, states.flatten()).view(states.shape)
