"""A quantized linear layer on a CPU: by dot products, by tables, or decoded tile by tile, whichever is fastest."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from bgd_plugin.kernels.choice import fastest
from bgd_plugin.kernels.decoding import decode_rows_into
from bgd_plugin.kernels.dot import dot_program
from bgd_plugin.kernels.table import LANES, TABLE_POSITIONS, table_program
from bgd_plugin.kernels.threads import share_rows

__all__ = ["WAYS", "lookup_linear"]

_MOST_DOTS = 4
_MOST_TABLES = 64
_LARGEST_TABLE_BLOCK = 32
_TILE = 1 << 20
"""Weights decoded at once."""

Way = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def lookup_linear(x: Tensor, codebook: Tensor, codes: Tensor, mask: Tensor | None, bias: Tensor | None) -> Tensor:
    """`x @ weight.T + bias` without the whole weight.

    Args:
        x: `[..., columns]`, float32, bfloat16 or float16 on a CPU.
        codebook: `[codebook_size, block_size]`, of x's type.
        codes: `[rows, columns / block_size]`, contiguous.
        mask: bool of the weight's shape, false where it is zero; None: nowhere.
        bias: `[rows]` or None.

    Returns:
        `[..., rows]`, to rounding what torch gives with the decoded weight.
    """
    rows, columns = codes.shape[0], codes.shape[1] * codebook.shape[1]
    inputs = x.reshape(-1, columns)
    if not inputs.numel() or not rows:
        output = torch.nn.functional.linear(inputs, codebook.new_zeros(rows, columns))
    else:
        arguments = (inputs.contiguous(), codebook.detach().contiguous(), codes, mask)
        output = WAYS[_choice(*arguments)](*arguments)
    if bias is not None:
        output = output.add_(bias)
    return output.reshape(*x.shape[:-1], rows)


def _choice(inputs: Tensor, codebook: Tensor, codes: Tensor, mask: Tensor | None) -> str:
    """The fastest of the ways that can be gone, by batch sizes in powers of two."""
    count = inputs.shape[0]
    names = ["tiles"]
    if count <= _MOST_DOTS:
        names.insert(0, "dot")
    if mask is None and 1 < count <= _MOST_TABLES and codebook.shape[1] <= _LARGEST_TABLE_BLOCK:
        names.insert(0, "table")
    if len(names) == 1:
        return names[0]
    (rows, blocks), (codewords, size) = codes.shape, codebook.shape
    bits, batch = codes.element_size() * 8, 1 << (count - 1).bit_length()
    key = f"{rows}x{blocks}x{size} k{codewords} {bits}bit {str(inputs.dtype)[6:]}{'' if mask is None else ' masked'}"
    key += f", {batch} inputs, {torch.get_num_threads()} threads, {'/'.join(names)}"
    return fastest(key, {name: partial(WAYS[name], inputs, codebook, codes, mask) for name in names})


def _by_dots(inputs: Tensor, codebook: Tensor, codes: Tensor, mask: Tensor | None) -> Tensor:
    """One input after the other; the codes are read once for each."""
    single, table = inputs.float(), codebook.float()
    (rows, blocks), (count, columns) = codes.shape, single.shape
    output = single.new_empty(count, rows)
    program = dot_program(codebook.shape[1], codes.element_size() * 8, mask is not None)
    kept = None if mask is None else mask.contiguous()
    fixed = (table.data_ptr(), codes.data_ptr(), 0 if kept is None else kept.data_ptr())
    places = [(single.data_ptr() + i * columns * 4, output.data_ptr() + i * rows * 4) for i in range(count)]

    def work(first: int, last: int) -> None:
        for source, target in places:
            program(source, *fixed, target, first, last, blocks)

    share_rows(rows, blocks, work)
    return output.to(inputs.dtype)


def _by_tables(inputs: Tensor, codebook: Tensor, codes: Tensor, mask: Tensor | None) -> Tensor:
    """`LANES` inputs at a time; each thread makes its own tables."""
    table = codebook.float()
    (rows, blocks), (codewords, size) = codes.shape, codebook.shape
    groups = -(-inputs.shape[0] // LANES)
    single = table.new_zeros(groups * LANES, inputs.shape[1])
    single[: inputs.shape[0]] = inputs
    single = single.view(groups, LANES, -1).mT.contiguous()
    output = table.new_empty(groups, rows, LANES)
    program = table_program(size, codes.element_size() * 8)
    fixed = (table.data_ptr(), codes.data_ptr())

    def work(first: int, last: int) -> None:
        scratch = table.new_empty(TABLE_POSITIONS, codewords, LANES)
        for source, target in zip(single, output, strict=True):
            pointers = (source.data_ptr(), *fixed, target.data_ptr(), scratch.data_ptr())
            program(*pointers, first, last, blocks, codewords)

    share_rows(rows, blocks, work)
    return output.mT.reshape(groups * LANES, rows)[: inputs.shape[0]].to(inputs.dtype)


def _by_tiles(inputs: Tensor, codebook: Tensor, codes: Tensor, mask: Tensor | None) -> Tensor:
    """Rows decoded `_TILE` weights at a time, each tile multiplied by torch while it is in the cache."""
    rows, columns = codes.shape[0], inputs.shape[1]
    output = inputs.new_empty(inputs.shape[0], rows)
    step = max(1, _TILE // columns)
    tile = inputs.new_empty(min(step, rows), columns)
    for first in range(0, rows, step):
        part = tile[: min(step, rows - first)]
        decode_rows_into(part, codebook, codes, first)
        if mask is not None:
            part.mul_(mask[first : first + step])
        torch.mm(inputs, part.t(), out=output[:, first : first + step])
    return output


WAYS: dict[str, Way] = {"dot": _by_dots, "table": _by_tables, "tiles": _by_tiles}
