"""The Gram of a layer's inputs, pooled over all block positions.

The Gram of whole rows, with the float network's outputs, is summed up from `rows` by `bgd_plugin.pq.gram.MomentSums`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from bgd_plugin.calibration.finite import require_finite
from bgd_plugin.calibration.inputs import LayerInputs
from bgd_plugin.errors import CalibrationError
from bgd_plugin.pq.blocks import Geometry, input_blocks
from bgd_plugin.support.processes import sum_, total

__all__ = ["PooledGram", "pooled_gram"]

_CHUNK_ELEMENTS = 2_000_000


@dataclass(frozen=True, kw_only=True)
class PooledGram:
    """Second moments of a layer's inputs, pooled over all block positions.

    Attributes:
        gram: `[block_size, block_size]`, the mean of x xᵀ over all blocks of all inputs.
        count: number of pooled blocks.
    """

    gram: Tensor
    count: int


@torch.no_grad()
def pooled_gram(inputs: LayerInputs, block_size: int) -> PooledGram:
    """Σ x̃ᵀx̃ / n over every block (of this block size) of every input, computed from chunks of unfolded inputs.

    Raises:
        CalibrationError: the layer's inputs are not finite, or no input reached it.

    **Source**: arXiv 1907.05686, section 3.2, the activations x̃; here only through their Gram matrix.
    """
    gram: Tensor | None = None
    count = 0
    for value, geometry in inputs:
        for piece in _pieces(value, geometry):
            blocks = input_blocks(piece, geometry, block_size).float()
            part = (blocks @ blocks.mT).double()
            gram = part if gram is None else gram + part
            count += blocks.shape[1]
    if gram is None or not count:
        raise CalibrationError(f"layer {inputs.name!r}: no input reached it during calibration")
    sum_([gram])
    count = int(total(count))
    require_finite(gram, inputs.name)
    return PooledGram(gram=gram / count, count=count)


def _pieces(value: Tensor, geometry: Geometry) -> Iterator[Tensor]:
    """Slices of samples whose unfolded inputs fit in a chunk."""
    if not geometry.kernel_size or value.ndim == len(geometry.kernel_size) + 1:
        yield value
        return
    kernel = 1
    for size in geometry.kernel_size:
        kernel *= size
    per_sample = max(1, value[:1].numel() * kernel)
    yield from torch.split(value, max(1, _CHUNK_ELEMENTS // per_sample))
