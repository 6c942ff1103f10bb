"""One input times a quantized weight, by looking up 64 bytes of products at once.

A block's contribution to an output is one of up to 256 products. They are computed once for all rows, in fixed point of
three bytes. A processor with AVX-512 VBMI finds 64 bytes of a table in two instructions: the registers that hold the
table are indexed by a register of codes. André, Kermarrec and Le Scouarnec, "Cache locality is not enough" (VLDB 2015),
scan products in the same way, with 16 entries of 8 bits; 24 bits keep the outputs as exact as float32.
"""

from __future__ import annotations

from array import array
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from bgd_plugin.jit.threads import pays, run_parts
from bgd_plugin.kernels.permuted_layer import layer_program
from bgd_plugin.kernels.permuted_sums import MOST_ROWS, ROWS, SCRATCH
from bgd_plugin.kernels.permuted_tables import CHUNK, CODEWORDS, GROUP, PLANES, scratch_floats
from bgd_plugin.kernels.tiles import thread_address

__all__ = ["can_permute", "permuted_outputs", "zeros"]

_LARGEST_BLOCK = 16
_MOST_POSITIONS = 1 << 12
"""Number of block positions up to which tables take no more memory than a tile."""
_LINE = 64
_PASS = 1 << 19
"""Bytes of codes that stay in a cache until they are used."""


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
    program, threads, room, numbers = _layout(rows, blocks, codewords, size, torch.get_num_threads())
    summand = zeros(rows) if bias is None else bias
    addresses = source.data_ptr(), codebook.data_ptr(), codes.data_ptr(), summand.data_ptr(), output.data_ptr()
    data = array("q", (*addresses, thread_address(room), *numbers, 0))
    run_parts(program, data.buffer_info()[0], threads)
    return rows // ROWS * ROWS if data[-1] else 0


@lru_cache(maxsize=1024)
def _layout(rows: int, blocks: int, codewords: int, size: int, threads: int) -> tuple[Any, int, int, tuple[int, ...]]:
    """What does not depend on the tensors: program, number of threads, bytes of memory, and `permuted_layer.NUMBERS`.

    It is computed once: with cold caches, each line of Python costs a microsecond or more.

    Args:
        rows, blocks, codewords, size: of codes and codebook.
        threads: that torch may use.
    """
    threads = threads if pays(rows, blocks) else 1
    chunks, groups = -(-blocks // CHUNK), rows // ROWS
    scales, figures = chunks * CHUNK // GROUP, chunks * CHUNK * PLANES * CODEWORDS
    scratch = figures + _whole_lines(3 * 4 * scales)
    room = _whole_lines(max(4 * scratch_floats(size), SCRATCH))
    step = min(MOST_ROWS, max(_PASS // (blocks * ROWS), 1) * ROWS)
    lines = min(step, -(-groups // threads) * ROWS) * blocks // _LINE  # of a thread's first pass
    positions = max(chunks // threads, 1) * CHUNK
    numbers = blocks, codewords, chunks, groups, scales, figures, scratch, room, step, -(-lines // positions)
    return layer_program(size), threads, scratch + threads * room, numbers


@lru_cache(maxsize=64)
def zeros(count: int) -> Tensor:
    """The bias of a layer without one, `[1, count]`; not to be changed."""
    with torch.inference_mode(False):
        return torch.zeros(1, count, dtype=torch.float32, device="cpu")


def _whole_lines(size: int) -> int:
    return -(-size // _LINE) * _LINE
