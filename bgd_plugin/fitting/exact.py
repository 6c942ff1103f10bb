"""Layers with no more distinct blocks than codewords: each block gets a codeword of its own, and nothing is lost."""

from __future__ import annotations

import torch
from torch import Tensor

from bgd_plugin.fitting.method import FittedLayer, unused_codewords
from bgd_plugin.nn import storable
from bgd_plugin.planning.types import PlannedLayer
from bgd_plugin.pq.blocks import to_blocks
from bgd_plugin.pq.forms import BLOCKS

__all__ = ["exact_fit"]


@torch.no_grad()
def exact_fit(weight: Tensor, layer: PlannedLayer) -> FittedLayer | None:
    """A codebook of all distinct blocks of a weight; None if it has more of them than codewords.

    What remains is the rounding of the codebook to its storage type.

    Args:
        weight: `[rows, ...]`.
        layer: the planned block and codebook size.
    """
    blocks = to_blocks(weight.detach(), layer.block_size)
    flat = blocks.flatten(0, 1)
    if layer.codes != BLOCKS or _has_more(flat, layer.codebook_size):
        return None
    words, codes = torch.unique(flat, dim=0, return_inverse=True)
    if len(words) > layer.codebook_size:
        return None
    codebook = words.new_zeros(layer.codebook_size, layer.block_size)
    codebook[: len(words)] = words
    return FittedLayer(
        codebook=storable(codebook, layer.codebook_storage),
        codes=codes.reshape(blocks.shape[:2]),
        warnings=unused_codewords(codes, layer.codebook_size),
    )


def _has_more(blocks: Tensor, count: int) -> bool:
    """Whether a look at the blocks' first weights already shows more distinct blocks than `count`."""
    return len(blocks) > count and len(torch.unique(blocks[:, 0])) > count
