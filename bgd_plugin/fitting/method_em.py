"""The paper's method: EM on the pooled Gram of the inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from bgd_plugin.calibration import PooledGram, pooled_gram
from bgd_plugin.fitting.entropy_coded import fit_stream
from bgd_plugin.fitting.exact import exact_fit
from bgd_plugin.fitting.method import FittedLayer, LayerContext, Method, unused_codewords
from bgd_plugin.fitting.trellis_windows import fit_windows
from bgd_plugin.nn import storable
from bgd_plugin.planning.types import PlannedLayer
from bgd_plugin.pq.blocks import to_blocks
from bgd_plugin.pq.em import fit_em
from bgd_plugin.pq.forms import TRELLIS
from bgd_plugin.pq.masked import fit_em_masked

__all__ = ["EM", "fit_weight"]


def _collect(context: LayerContext, generator: torch.Generator) -> PooledGram:
    return pooled_gram(context.inputs, context.layer.block_size)


def _solve(context: LayerContext, statistics: PooledGram, generator: torch.Generator) -> FittedLayer:
    iterations = context.config.em_iterations
    return fit_weight(context.weight, statistics.gram, context.layer, context.mask, iterations, generator)


def fit_weight(
    weight: Tensor,
    gram: Tensor,
    layer: PlannedLayer,
    mask: Tensor | None,
    iterations: int,
    generator: torch.Generator,
) -> FittedLayer:
    """Fit one weight by EM under a pooled Gram; the codebook is rounded to the storage type of the layer's plan.

    A weight with no more distinct blocks than codewords is represented exactly.

    Args:
        weight: `[rows, ...]`.
        gram: `[block_size, block_size]`; the identity if nothing is known about the inputs.
        layer: the planned block and codebook size; the bytes, of a layer whose codes are entropy coded.
        mask: bool of the weight's shape, false where the decoded weight must be zero; None: nowhere.
        iterations: maximum number.
        generator: draws the initial codewords.
    """
    if layer.codes == "entropy":
        return fit_stream(weight, None, layer)
    if layer.codes == TRELLIS:
        return fit_windows(weight.detach().flatten(1), None, mask=None if mask is None else mask.flatten(1))
    exact = exact_fit(weight, layer)
    if exact is not None:
        return exact
    blocks = to_blocks(weight.detach().float(), layer.block_size)
    if mask is None:
        fit = fit_em(blocks, gram, layer.codebook_size, iterations, generator=generator)
    else:
        kept = to_blocks(mask, layer.block_size)
        fit = fit_em_masked(blocks, gram, kept, layer.codebook_size, iterations, generator=generator)
    codebook = storable(fit.codebook, layer.codebook_storage)
    warnings = unused_codewords(fit.codes, layer.codebook_size)
    return FittedLayer(codebook=codebook.to(weight.dtype), codes=fit.codes, warnings=warnings)


EM = Method(collect=_collect, solve=_solve)
