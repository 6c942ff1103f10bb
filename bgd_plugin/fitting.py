"""Fit one layer: from its weight and its inputs to a codebook and codes. One function for each method."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bgd_plugin.calibration import InputSample, LayerInputs, PooledGram, pooled_gram
from bgd_plugin.config import BGDConfig
from bgd_plugin.nn import storable
from bgd_plugin.plan import PlannedLayer
from bgd_plugin.pq.blocks import to_blocks
from bgd_plugin.pq.em import fit_em

__all__ = ["METHODS", "FittedLayer", "Method", "output_error"]


@dataclass(frozen=True, kw_only=True)
class FittedLayer:
    """What a fit returns: `codebook [codebook_size, block_size]` and `codes [rows, blocks_per_row]`."""

    codebook: Tensor
    codes: Tensor


@dataclass(frozen=True, kw_only=True)
class Method:
    """A way to fit layers, in two steps: collect statistics of the inputs, then solve for codebook and codes."""

    collect: Callable[[LayerInputs, PlannedLayer, BGDConfig], Any]
    solve: Callable[[Tensor, Any, PlannedLayer, BGDConfig, torch.Generator], FittedLayer]


def _collect_em(inputs: LayerInputs, layer: PlannedLayer, config: BGDConfig) -> PooledGram:
    return pooled_gram(inputs, layer.block_size)


def _solve_em(
    weight: Tensor, statistics: PooledGram, layer: PlannedLayer, config: BGDConfig, generator: torch.Generator
) -> FittedLayer:
    """The paper's EM on the pooled Gram of the inputs (arXiv 1907.05686, section 3.2)."""
    blocks = to_blocks(weight.detach().float(), layer.block_size)
    fit = fit_em(blocks, statistics.gram, layer.codebook_size, config.em_iterations, generator=generator)
    return FittedLayer(codebook=storable(fit.codebook).to(weight.dtype), codes=fit.codes)


METHODS: dict[str, Method] = {"em": Method(collect=_collect_em, solve=_solve_em)}


@torch.no_grad()
def output_error(weight: Tensor, decoded: Tensor, sample: InputSample) -> float:
    """‖X(W − Ŵ)ᵀ‖² / ‖XWᵀ‖² on a sample of the layer's inputs; 0 where the layer's output is all zero.

    Args:
        weight, decoded: W and Ŵ, `[C_out, C_in / groups, *kernel]` or `[C_out, C_in]`.
        sample: rows `[groups, positions, columns]`.
    """
    groups, _, columns = sample.rows.shape
    exact = weight.float().reshape(groups, -1, columns)
    difference = exact - decoded.float().reshape(groups, -1, columns)
    kept = float((sample.rows @ exact.mT).square().sum())
    lost = float((sample.rows @ difference.mT).square().sum())
    return lost / kept if kept > 0 and math.isfinite(kept) else 0.0
