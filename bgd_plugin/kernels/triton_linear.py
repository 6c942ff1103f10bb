"""The look-up linear layer as a Triton kernel, for CUDA devices.

It is tested under Triton's interpreter on a CPU, and has not been timed on a device, so quantized layers do not use it.
The operator `bgd_plugin::pq_linear` runs it on tensors of a CUDA device.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["triton_linear"]

_INPUTS, _ROWS, _COLUMNS = 16, 64, 64
"""The part of one program: inputs and rows of its output, and columns that it sums at once."""


@triton.jit  # type: ignore[untyped-decorator]
def _kernel(
    x: Any,
    codebook: Any,
    codes: Any,
    mask: Any,
    bias: Any,
    output: Any,
    inputs: Any,
    rows: Any,
    columns: Any,
    block_size: tl.constexpr,
    has_mask: tl.constexpr,
    has_bias: tl.constexpr,
    INPUTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """`output[n, r] = Σ_j x[n, j] · codebook[codes[r, j // d], j mod d] + bias[r]`, one tile of n and r a program."""
    n = tl.program_id(0) * INPUTS + tl.arange(0, INPUTS)
    r = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    total = tl.zeros((INPUTS, ROWS), dtype=tl.float32)
    blocks = columns // block_size
    for start in range(0, columns, COLUMNS):
        j = start + tl.arange(0, COLUMNS)
        there = (j[:, None] < columns) & (r[None, :] < rows)
        code = tl.load(codes + r[None, :] * blocks + (j // block_size)[:, None], mask=there, other=0).to(tl.int64)
        if has_mask:
            there = there & (tl.load(mask + r[None, :] * columns + j[:, None], mask=there, other=0) != 0)
        weight = tl.load(codebook + code * block_size + (j % block_size)[:, None], mask=there, other=0.0)
        own = tl.load(
            x + n[:, None] * columns + j[None, :], mask=(n[:, None] < inputs) & (j[None, :] < columns), other=0.0
        )
        total += tl.dot(own.to(tl.float32), weight.to(tl.float32), input_precision="ieee")
    if has_bias:
        total += tl.load(bias + r, mask=r < rows, other=0.0).to(tl.float32)[None, :]
    place = output + n[:, None] * rows + r[None, :]
    tl.store(place, total.to(output.dtype.element_ty), mask=(n[:, None] < inputs) & (r[None, :] < rows))


def triton_linear(x: Tensor, codebook: Tensor, codes: Tensor, mask: Tensor | None, bias: Tensor | None) -> Tensor:
    """`x @ weight.T + bias`, summed in float32.

    Args:
        x, codebook, codes, mask, bias: of the shapes in `lookup_linear`, on a CUDA device.

    Returns:
        `[..., rows]`.
    """
    rows, block_size = codes.shape[0], codebook.shape[1]
    columns = codes.shape[1] * block_size
    flat = x.reshape(-1, columns).contiguous()
    output = flat.new_empty(len(flat), rows)
    if not output.numel():
        return output.reshape(*x.shape[:-1], rows)
    codebook, codes = codebook.contiguous(), codes.contiguous()
    kept = codes if mask is None else mask.contiguous().view(torch.uint8)
    grid = (triton.cdiv(len(flat), _INPUTS), triton.cdiv(rows, _ROWS))
    sizes = (len(flat), rows, columns, block_size, mask is not None, bias is not None)
    _kernel[grid](
        flat, codebook, codes, kept, output if bias is None else bias, output, *sizes, _INPUTS, _ROWS, _COLUMNS
    )
    return output.reshape(*x.shape[:-1], rows)
