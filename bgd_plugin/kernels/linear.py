"""A quantized linear layer on a CPU: by dot products, by two kinds of tables, or decoded by tiles (see `choice`)."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count as count_from

import torch
from torch import Tensor

from bgd_plugin.jit.threads import share_rows
from bgd_plugin.kernels.choice import MOST_DOTS, cheapest
from bgd_plugin.kernels.dot import dot_program
from bgd_plugin.kernels.lanes import lanes_program, last_width, panel_floats, row_count, widest
from bgd_plugin.kernels.permuted import can_permute, permuted_outputs, zeros
from bgd_plugin.kernels.table import LANES, TABLE_POSITIONS, table_program
from bgd_plugin.kernels.tiles import decoded_tiles, thread_address

__all__ = ["FEW_INPUTS", "WAYS", "lookup_linear"]

FEW_INPUTS = 64
"""Maximum number of positions at which a 1×1 convolution is computed as a linear layer."""

_GROUPS_PER_THREAD = 4
"""Groups of inputs for each thread from which on threads share them, and not the rows."""
_FASTER = 4
"""How many inputs are multiplied by a block in the time for a code of one."""

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
        `[..., rows]`, equal up to rounding to torch's result with the decoded weight.
    """
    (rows, blocks), (codewords, size) = codes.shape, codebook.shape
    x, codebook = x.contiguous(), codebook.contiguous()
    count = x.numel() // (blocks * size)
    if count and rows:
        has_bytes = count <= MOST_DOTS and can_permute(codes, codebook)
        way = cheapest(count, rows, blocks, codewords, size, mask is not None, has_bytes)
        if way == "dot":
            output = _by_dots(x, codebook, codes, mask)
        elif way in ("lanes", "permuted"):
            compute = _by_lanes if way == "lanes" else _by_permutations
            found = compute(x if x.dim() == 2 else x.view(count, -1), codebook, codes, None, bias)
            return found if x.dim() == 2 else found.view(*x.shape[:-1], rows)
        else:
            output = WAYS[way](x.view(count, -1), codebook, codes, mask).view(*x.shape[:-1], rows)
    else:
        output = torch.nn.functional.linear(x, codebook.new_zeros(rows, blocks * size))
    return output if bias is None else output.add_(bias)


def _by_dots(inputs: Tensor, codebook: Tensor, codes: Tensor, mask: Tensor | None) -> Tensor:
    """One input after the other; each reads all codes. The inputs may have any shape `[..., columns]`."""
    (rows, blocks), columns = codes.shape, inputs.shape[-1]
    is_single = inputs.dtype == torch.float32
    single, table = (inputs, codebook) if is_single else (inputs.float(), codebook.float())
    output = single.new_empty((*inputs.shape[:-1], rows))
    program = dot_program(codebook.shape[1], codes.element_size() * 8, mask is not None)
    kept = None if mask is None else mask.contiguous()
    fixed = (table.data_ptr(), codes.data_ptr(), 0 if kept is None else kept.data_ptr())
    source, target, count = single.data_ptr(), output.data_ptr(), single.numel() // columns

    def calls(first: int, last: int) -> list[tuple[int, ...]]:
        return [(source + i * columns * 4, *fixed, target + i * rows * 4, first, last, blocks) for i in range(count)]

    share_rows(rows, blocks, program, calls)
    return output if is_single else output.to(inputs.dtype)


def _by_permutations(
    inputs: Tensor, codebook: Tensor, codes: Tensor, mask: Tensor | None, bias: Tensor | None = None
) -> Tensor:
    """One input after the other, by tables in bytes; the last few rows by dot products."""
    if inputs.dtype != torch.float32:
        return _by_permutations(inputs.float(), codebook.float(), codes, mask, bias).to(inputs.dtype)
    summand = None if bias is None else bias.float().contiguous()
    count, rows = inputs.shape[0], codes.shape[0]
    output = torch.empty_like(zeros(rows)) if count == 1 else inputs.new_empty((count, rows))  # the first is quicker
    pairs = [(inputs, output)] if count == 1 else zip(inputs, output, strict=True)
    for source, target in pairs:
        done = permuted_outputs(source, codebook, codes, target, summand)
        if done < rows:
            rest = _by_dots(source.view(1, -1), codebook, codes[done:], None)[0]
            target.view(-1)[done:] = rest if summand is None else rest + summand[done:]
    return output


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

    held = []

    def calls(first: int, last: int) -> list[tuple[int, ...]]:
        held.append(table.new_empty(TABLE_POSITIONS, codewords, LANES))
        pointers = zip(single, output, strict=True)
        return [
            (source.data_ptr(), *fixed, target.data_ptr(), held[-1].data_ptr(), first, last, blocks, codewords)
            for source, target in pointers
        ]

    share_rows(rows, blocks, program, calls)
    found = output.mT.reshape(groups * LANES, rows)[: inputs.shape[0]]
    return found.to(inputs.dtype).contiguous()  # torch.compile, and views of the caller's, rely on the order


def _by_tiles(inputs: Tensor, codebook: Tensor, codes: Tensor, mask: Tensor | None) -> Tensor:
    """Tile by tile: torch multiplies each decoded tile while it is in the cache."""
    output = inputs.new_empty(inputs.shape[0], codes.shape[0])
    for first, tile in decoded_tiles(codebook, codes, mask):
        torch.mm(inputs, tile.t(), out=output[:, first : first + len(tile)])
    return output


def _by_lanes(
    inputs: Tensor, codebook: Tensor, codes: Tensor, mask: Tensor | None, bias: Tensor | None = None
) -> Tensor:
    """Many inputs at a time; a thread has inputs of its own if there are many, otherwise rows."""
    single, table = inputs.float(), codebook.float()
    (rows, blocks), size, count = codes.shape, codebook.shape[1], len(inputs)
    output = single.new_empty(count, rows)
    summand = zeros(rows) if bias is None else bias.float().contiguous()
    program = lanes_program(size, codes.element_size() * 8, last_width(count))
    threads, room = torch.get_num_threads(), panel_floats(size)
    panels, step = thread_address(4 * threads * room), row_count()
    fixed = single.data_ptr(), table.data_ptr(), codes.data_ptr(), summand.data_ptr(), output.data_ptr()
    used = count_from(0)

    def some_rows(first: int, last: int) -> list[tuple[int, ...]]:
        end = rows if last == rows // step else last * step
        return [(*fixed, panels + 4 * room * next(used), first * step, end, 0, count, rows, blocks)]

    def some_inputs(first: int, last: int) -> list[tuple[int, ...]]:
        part = first * widest(), min(last * widest(), count)
        return [(*fixed, panels + 4 * room * next(used), 0, rows, *part, rows, blocks)]

    groups = -(-count // widest())
    if groups >= _GROUPS_PER_THREAD * threads:
        share_rows(groups, rows * blocks * widest() // _FASTER, program, some_inputs)
    else:
        share_rows(rows // step, step * blocks * count // _FASTER, program, some_rows)
    return output if inputs.dtype == torch.float32 else output.to(inputs.dtype)


WAYS: dict[str, Way] = {
    "dot": _by_dots,
    "lanes": _by_lanes,
    "permuted": _by_permutations,
    "table": _by_tables,
    "tiles": _by_tiles,
}
