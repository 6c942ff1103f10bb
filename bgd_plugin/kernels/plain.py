"""Linear layers by torch's operators alone, some rows of the weight at a time: for forms that are large to decode."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from bgd_plugin.kernels.tiles import rows_of_a_tile
from bgd_plugin.pq.forms import Form
from bgd_plugin.pq.masked import masked

__all__ = ["linear_by_tiles"]

_TILE = 1 << 18
"""Weights decoded at once: torch decodes in several steps, each of which has memory of its own."""


def linear_by_tiles(
    form: Form, x: Tensor, codebook: Tensor, codes: Tensor, mask: Tensor | None, bias: Tensor | None
) -> Tensor:
    """`x @ weight.T + bias`, of which no more than a tile of the weight is decoded at a time.

    Args:
        form: of the codes.
        x: `[..., columns]`.
        codebook, codes: of the form's shapes (`pq.forms`).
        mask: bool, of the weight's shape or one that begins with its rows, false where it is zero; None: nowhere.
        bias: `[rows]` or None.

    Returns:
        `[..., rows]`.
    """
    rows, columns = len(codebook) if codebook.dim() == 1 else len(codes), x.shape[-1]
    step = rows_of_a_tile(rows, columns, _TILE)
    output = x.new_empty(*x.shape[:-1], rows)
    for first in range(0, rows, step):
        own = torch.arange(first, min(first + step, rows), device=codes.device)
        tile = masked(form.rows(codebook, codes, own), None if mask is None else mask[first : first + step])
        part = None if bias is None else bias[first : first + step]
        output[..., first : first + step] = functional.linear(x, tile, part)
    return output
