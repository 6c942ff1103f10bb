"""One input times a quantized weight, by looking up 64 bytes of products at once.

A block's contribution to an output is one of up to 256 products. They are computed once for all rows, in fixed point of
three bytes. A processor with AVX-512 VBMI finds 64 bytes of a table in two instructions: the registers that hold the
table are indexed by a register of codes. André, Kermarrec and Le Scouarnec, "Cache locality is not enough" (VLDB 2015),
scan products in the same way, with 16 entries of 8 bits; 24 bits keep the outputs as exact as float32.
"""

from __future__ import annotations

import ctypes
from array import array
from functools import cache, lru_cache
from itertools import count

import torch
from torch import Tensor

from bgd_plugin.jit.threads import share_rows
from bgd_plugin.kernels.permuted_sums import ROWS, sums_program
from bgd_plugin.kernels.permuted_tables import CHUNK, CODEWORDS, GROUP, PLANES, scratch_floats, tables_program
from bgd_plugin.kernels.tiles import thread_address

__all__ = ["can_permute", "permuted_outputs", "zeros"]

_LARGEST_BLOCK = 16
_MOST_POSITIONS = 1 << 12
"""Number of block positions up to which tables take no more memory than a tile."""
_WORK = 3
"""Time for an entry of a table, in times that for a code."""
_LINE = 64
_SMALLEST, _LARGEST = 1e-20, 1e30
"""Bounds on the sum of the ranges of products, within which fixed point is as exact as floats."""


@cache
def _has_instructions() -> bool:
    from llvmlite import binding

    return bool(binding.get_host_cpu_features().get("avx512vbmi"))


def can_permute(codes: Tensor, codebook: Tensor) -> bool:
    """Whether the processor has the instructions, and the layer's sizes suit them.

    Args:
        codes: `[rows, blocks]`.
        codebook: `[codebook_size, block_size]`.
    """
    rows, blocks = codes.shape
    fits = rows >= ROWS and CHUNK <= blocks <= _MOST_POSITIONS and codebook.shape[1] <= _LARGEST_BLOCK
    return codes.dtype == torch.uint8 and fits and _has_instructions()


def permuted_outputs(
    source: Tensor, codebook: Tensor, codes: Tensor, output: Tensor, bias: Tensor | None = None
) -> int:
    """Write the outputs of the first rows for one input; returns how many rows, a multiple of `ROWS`.

    It is 0 if products are too small or large for fixed point, or not finite.

    Args:
        source: the input, float32 `[columns]`, contiguous.
        codebook: float32 `[codebook_size, block_size]`.
        codes: uint8 `[rows, blocks]`, contiguous; see `can_permute`.
        output: float32 `[rows]`, contiguous.
        bias: float32 `[rows]`, contiguous; None: zeros.
    """
    (rows, blocks), (codewords, size) = codes.shape, codebook.shape
    chunks, groups = -(-blocks // CHUNK), rows // ROWS
    table, scales = chunks * CHUNK * PLANES * CODEWORDS, chunks * CHUNK // GROUP
    room = _whole_lines(max(4 * scratch_floats(size), 2 * ROWS * CHUNK))
    behind = table + _whole_lines(3 * 4 * scales)
    tables = thread_address(behind + torch.get_num_threads() * room)
    numbers = [tables + table + 4 * scales * i for i in range(3)]
    summand = (zeros(rows) if bias is None else bias).data_ptr()
    fill, add = tables_program(size), sums_program()
    addresses = source.data_ptr(), codebook.data_ptr(), codes.data_ptr(), output.data_ptr()

    used, others = count(0), count(0)

    def make(first: int, last: int) -> list[tuple[int, ...]]:
        own = tables + behind + room * next(used)
        return [(*addresses[:2], own, tables, *numbers, first, last, blocks, codewords)]

    def sum_rows(first: int, last: int) -> list[tuple[int, ...]]:
        own = tables + behind + room * next(others)
        return [(addresses[2], tables, *numbers[:2], own, summand, addresses[3], first * ROWS, last * ROWS, blocks)]

    share_rows(chunks, _WORK * CHUNK * CODEWORDS, fill, make)
    if not _SMALLEST < sum(array("f", ctypes.string_at(numbers[2], 4 * scales))) < _LARGEST:
        return 0
    share_rows(groups, ROWS * blocks, add, sum_rows)
    return groups * ROWS


@lru_cache(maxsize=64)
def zeros(count: int) -> Tensor:
    """The bias of a layer without one, `[count]`; not to be changed."""
    with torch.inference_mode(False):
        return torch.zeros(count, dtype=torch.float32, device="cpu")


def _whole_lines(size: int) -> int:
    return -(-size // _LINE) * _LINE
