"""Fit one layer: from its weight and its inputs to a codebook and codes. One function for each method."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bgd_plugin.calibration import InputSample
from bgd_plugin.calibration.statistics import Inputs, pooled_gram
from bgd_plugin.config import BGDConfig
from bgd_plugin.plan import PlannedLayer
from bgd_plugin.pq.blocks import decode, to_blocks
from bgd_plugin.pq.em import fit_em

__all__ = ["FITTERS", "FittedLayer", "output_error", "storable"]


@dataclass(frozen=True, kw_only=True)
class FittedLayer:
    """What a fit returns: `codebook [codebook_size, block_size]` and `codes [rows, blocks_per_row]`."""

    codebook: Tensor
    codes: Tensor


Fitter = Callable[[Tensor, Inputs, PlannedLayer, BGDConfig, torch.Generator], FittedLayer]


def _em(
    weight: Tensor, inputs: Inputs, layer: PlannedLayer, config: BGDConfig, generator: torch.Generator
) -> FittedLayer:
    """The paper's EM on the pooled Gram of the inputs (arXiv 1907.05686, section 3.2)."""
    statistics = pooled_gram(inputs, layer.block_size, layer.name)
    blocks = to_blocks(weight.detach().float(), layer.block_size)
    fit = fit_em(blocks, statistics.gram, layer.codebook_size, config.em_iterations, generator=generator)
    return FittedLayer(codebook=storable(fit.codebook, weight.dtype), codes=fit.codes)


FITTERS: dict[str, Fitter] = {"em": _em}


def storable(codebook: Tensor, dtype: torch.dtype) -> Tensor:
    """The codebook rounded to half precision, in which it is stored; as it is where its values do not fit."""
    half = codebook.half()
    fits = bool(torch.isfinite(half).all()) and float(half.abs().max()) >= float(codebook.abs().max()) / 2
    return (half if fits else codebook).to(dtype)


@torch.no_grad()
def output_error(weight: Tensor, fit: FittedLayer, sample: InputSample) -> float:
    """‖X(W − Ŵ)ᵀ‖² / ‖XWᵀ‖² on a sample of the layer's inputs; 0 where the layer's output is all zero.

    Args:
        weight: `[C_out, C_in / groups, *kernel]` or `[C_out, C_in]`.
        sample: rows `[groups, positions, columns]`.
    """
    decoded = decode(fit.codebook, fit.codes, weight.shape)
    groups, _, columns = sample.rows.shape
    exact = weight.float().reshape(groups, -1, columns)
    difference = exact - decoded.float().reshape(groups, -1, columns)
    kept = float((sample.rows @ exact.mT).square().sum())
    lost = float((sample.rows @ difference.mT).square().sum())
    return lost / kept if kept > 0 and math.isfinite(kept) else 0.0
