"""The paper's method: EM on the pooled Gram of the inputs."""

from __future__ import annotations

import torch

from bgd_plugin.calibration import PooledGram, pooled_gram
from bgd_plugin.fitting.base import FittedLayer, LayerContext, Method
from bgd_plugin.nn import storable
from bgd_plugin.pq.blocks import to_blocks
from bgd_plugin.pq.em import fit_em
from bgd_plugin.pq.masked import fit_em_masked

__all__ = ["EM"]


def _collect(context: LayerContext, generator: torch.Generator) -> PooledGram:
    return pooled_gram(context.inputs, context.layer.block_size)


def _solve(context: LayerContext, statistics: PooledGram, generator: torch.Generator) -> FittedLayer:
    layer, weight = context.layer, context.weight
    blocks = to_blocks(weight.detach().float(), layer.block_size)
    iterations = context.config.em_iterations
    if context.mask is None:
        fit = fit_em(blocks, statistics.gram, layer.codebook_size, iterations, generator=generator)
    else:
        mask = to_blocks(context.mask, layer.block_size)
        fit = fit_em_masked(blocks, statistics.gram, mask, layer.codebook_size, iterations, generator=generator)
    codebook = storable(fit.codebook, layer.codebook_storage)
    return FittedLayer(codebook=codebook.to(weight.dtype), codes=fit.codes)


EM = Method(collect=_collect, solve=_solve)
