"""Which kernel computes a layer: the one whose estimated time is shortest.

The estimate depends on sizes, and on what the processor can do. So a network gives the same outputs in every process on
a machine: a choice by stopwatch would differ from one process to the next, and with it the last bits of the outputs.
"""

from __future__ import annotations

from functools import lru_cache

from bgd_plugin.kernels.permuted_tables import CODEWORDS
from bgd_plugin.kernels.table import LANES

__all__ = ["MOST_DOTS", "cheapest"]

MOST_DOTS = 4
"""Number of inputs up to which each of them may read all codes for itself."""
_LARGEST_TABLE_BLOCK = 32

# Nanoseconds on one thread of a processor with AVX-512, of which only the ratios count.
_DOT_BLOCK = 0.25
_PERMUTED_BLOCK = 0.105
_PERMUTED_ENTRY = 0.2
_PERMUTED_PRODUCT = 0.0225
_PERMUTED_CALL = 60_000.0  # a fourth of it is work; the rest is for what tables drive out of the caches
_TABLE_BLOCK = 0.40
_TABLE_PRODUCT = 0.32
_TABLE_CALL = 20_000.0
_DECODED_WEIGHT = 0.30
_MULTIPLIED_WEIGHT = 0.0235


@lru_cache(maxsize=4096)
def cheapest(
    inputs: int, rows: int, blocks: int, codewords: int, block_size: int, has_mask: bool, can_permute: bool
) -> str:
    """The cheapest way to multiply some inputs by a quantized weight (see `linear.WAYS`).

    * `dot` reads every code once for each input, and multiplies its codeword.
    * `permuted` computes the products of all codewords with an input in bytes, and looks up those of 64 rows at once.
    * `table` computes the products of all codewords with a few inputs, then reads every code once for these inputs.
    * `tiles` decodes the weight once and multiplies it with torch.

    Args:
        inputs: number of rows of the input.
        rows: number of outputs.
        blocks: number of blocks in a row of the weight.
        codewords: number of codewords in the codebook.
        block_size: weights in a block.
        has_mask: whether single weights are zero regardless of their codeword; tables do not support that.
        can_permute: whether the processor and the sizes allow `permuted`.
    """
    codes = rows * blocks
    costs = {"tiles": codes * block_size * (_DECODED_WEIGHT + _MULTIPLIED_WEIGHT * inputs)}
    if inputs <= MOST_DOTS:
        costs["dot"] = inputs * codes * _DOT_BLOCK
        if can_permute and not has_mask:
            tables = blocks * CODEWORDS * (_PERMUTED_ENTRY + _PERMUTED_PRODUCT * block_size)
            costs["permuted"] = inputs * (_PERMUTED_CALL + tables + codes * _PERMUTED_BLOCK)
    if not has_mask and inputs > 1 and block_size <= _LARGEST_TABLE_BLOCK:
        groups = -(-inputs // LANES)
        products = blocks * codewords * block_size
        costs["table"] = _TABLE_CALL + groups * (codes * _TABLE_BLOCK + products * _TABLE_PRODUCT)
    return min(costs, key=costs.__getitem__)
