"""Layers of trellis windows, and their weight decoded code by code."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bgd_plugin.nn import PQModule, quantized
from bgd_plugin.pq.windows import code_bytes_per_column, window_table


def scale_and_codes(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Scales, one of them negative, and codes, all of which a layer of this size can have."""
    generator = torch.Generator().manual_seed(rows * 1009 + columns)
    scale = torch.rand(rows, generator=generator) + 0.5
    scale[rows // 2] *= -1
    codes = torch.randint(0, 256, (code_bytes_per_column(rows), columns), dtype=torch.uint8, generator=generator)
    return scale.to(dtype), codes


def literal_weight(scale: Tensor, codes: Tensor) -> Tensor:
    """Weight by weight: two bits a row, six of them in a window that runs around the column."""
    rows, columns, table = len(scale), codes.shape[1], window_table().tolist()
    weight = torch.empty(rows, columns, dtype=scale.dtype)
    for column in range(columns):
        two_bits = [byte >> shift & 3 for byte in codes[:, column].tolist() for shift in (6, 4, 2, 0)]
        for row in range(rows):
            state = 0
            for back in range(5, -1, -1):
                state = state * 4 + two_bits[(row - back) % len(two_bits)]
            weight[row, column] = scale[row] * table[state]
    return weight


def window_layer(module: nn.Module, has_mask: bool = False) -> PQModule:
    """The layer with trellis windows in place of a float one, whose weight has rows first."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    scale, codes = scale_and_codes(len(weight), weight[0].numel(), weight.dtype)
    mask = torch.rand(weight.shape) > 0.5 if has_mask else None
    return quantized(module, scale, codes, mask, "trellis").eval()
