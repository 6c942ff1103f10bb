"""Which kernel computes a layer: the one whose estimated time is shortest.

The estimate depends on sizes, and on what the processor can do. So a network gives the same outputs in every process on
a machine: a choice by stopwatch would differ from one process to the next, and with it the last bits of the outputs.
"""

from __future__ import annotations

from functools import lru_cache

from bgd_plugin.kernels.lanes import FEWEST_ROWS, lane_count
from bgd_plugin.kernels.permuted_tables import CODEWORDS
from bgd_plugin.kernels.table import LANES

__all__ = ["FEWEST_WEIGHTS", "MOST_DOTS", "beats_convolution", "cheapest", "slides"]

MOST_DOTS = 4
"""Number of inputs up to which each of them may read all codes for itself."""
FEWEST_WEIGHTS = 1 << 18
"""Number of a convolution's weights below which bringing them into order costs too little to be saved."""
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
_LANE_WEIGHT = 0.0193
_LANE_CALL = 12_000.0
_NARROWEST = 12  # lanes: fewer take as long
_LANE_INPUT = 0.1  # for each number of an input
_LANE_OUTPUT = 0.27
_TILE_CALL = 20_000.0
_DECODED_WEIGHT = 0.30
_MULTIPLIED_WEIGHT = 0.0235
_CONVOLUTION_CALL = 20_000.0
_CONVOLVED_WEIGHT = 0.0215
_CONVOLVED_NUMBER = 0.1  # of its input and its output
_ORDERED_WEIGHT = 0.3  # what torch does to a weight before it convolves
_SLIDING_CALL = 30_000.0
_SLIDING_WEIGHT = 0.0205
_SLIDING_INPUT = 2.0
_SLIDING_OUTPUT = 0.5


@lru_cache(maxsize=4096)
def cheapest(
    inputs: int, rows: int, blocks: int, codewords: int, block_size: int, has_mask: bool, can_permute: bool
) -> str:
    """The cheapest way to multiply some inputs by a quantized weight (see `linear.WAYS`).

    * `dot` reads every code once for each input, and multiplies its codeword.
    * `permuted` computes the products of all codewords with an input in bytes, and looks up those of 64 rows at once.
    * `table` computes the products of all codewords with a few inputs, then reads every code once for these inputs.
    * `lanes` multiplies a weight by many inputs at once, in the registers; it needs a few rows, and takes no mask.
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
    costs = _costs(inputs, rows, blocks, codewords, block_size, has_mask, can_permute)
    return min(costs, key=costs.__getitem__)


@lru_cache(maxsize=4096)
def beats_convolution(positions: int, rows: int, blocks: int, codewords: int, block_size: int) -> bool:
    """Whether a 1×1 convolution of channels that lie side by side is faster as a linear layer than decoded by torch.

    Args:
        positions: number of them in all samples.
        rows: number of output channels.
        blocks: number of blocks in a row of the weight.
        codewords: number of codewords in the codebook.
        block_size: weights in a block.
    """
    costs = _costs(positions, rows, blocks, codewords, block_size, False, False)
    weights, numbers = rows * blocks * block_size, positions * (rows + blocks * block_size)
    convolution = _CONVOLUTION_CALL + weights * (_DECODED_WEIGHT + _CONVOLVED_WEIGHT * positions)
    return min(costs[way] for way in costs if way != "tiles") < convolution + numbers * _CONVOLVED_NUMBER


@lru_cache(maxsize=4096)
def slides(weights: int, rows: int, block_size: int, inputs: int, positions: int, outputs: int, batch: int) -> bool:
    """Whether a convolution is faster by `convolution.slide` than decoded and convolved by torch.

    Args:
        weights: number of them.
        rows: output channels.
        block_size: weights in a block.
        inputs, outputs: numbers of a sample's input, and positions of its output.
        positions: of the output, in the width of the padded input.
        batch: number of samples.
    """
    if weights < FEWEST_WEIGHTS or rows < FEWEST_ROWS or block_size > _LARGEST_TABLE_BLOCK:
        return False
    own = weights * lane_count(positions) * _SLIDING_WEIGHT + inputs * _SLIDING_INPUT + rows * outputs * _SLIDING_OUTPUT
    torchs = weights * (_DECODED_WEIGHT + _ORDERED_WEIGHT + batch * outputs * _CONVOLVED_WEIGHT)
    return _SLIDING_CALL + batch * own < _CONVOLUTION_CALL + torchs


def _costs(
    inputs: int, rows: int, blocks: int, codewords: int, block_size: int, has_mask: bool, can_permute: bool
) -> dict[str, float]:
    """The estimated time of each way that can compute the layer; arguments as in `cheapest`."""
    codes = rows * blocks
    tiles = codes * block_size * (_DECODED_WEIGHT + _MULTIPLIED_WEIGHT * inputs)
    costs = {"tiles": _TILE_CALL + tiles + inputs * (blocks * block_size + rows) * _CONVOLVED_NUMBER}
    if inputs <= MOST_DOTS:
        costs["dot"] = inputs * codes * _DOT_BLOCK
        if can_permute and not has_mask:
            tables = blocks * CODEWORDS * (_PERMUTED_ENTRY + _PERMUTED_PRODUCT * block_size)
            costs["permuted"] = inputs * (_PERMUTED_CALL + tables + codes * _PERMUTED_BLOCK)
    if not has_mask and rows >= FEWEST_ROWS and block_size <= _LARGEST_TABLE_BLOCK:
        numbers = inputs * (blocks * block_size * _LANE_INPUT + rows * _LANE_OUTPUT)
        costs["lanes"] = _LANE_CALL + codes * block_size * max(lane_count(inputs), _NARROWEST) * _LANE_WEIGHT + numbers
    if not has_mask and inputs > 1 and block_size <= _LARGEST_TABLE_BLOCK:
        groups = -(-inputs // LANES)
        products = blocks * codewords * block_size
        costs["table"] = _TABLE_CALL + groups * (codes * _TABLE_BLOCK + products * _TABLE_PRODUCT)
    return costs
