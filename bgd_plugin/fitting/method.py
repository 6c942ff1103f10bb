"""Interface of a fitting method: its inputs and its result."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bgd_plugin.calibration import InputSample, LayerInputs
from bgd_plugin.config import BGDConfig
from bgd_plugin.fitting.target_residual import Skip
from bgd_plugin.planning.types import PlannedLayer
from bgd_plugin.pq.forms import BLOCKS, FORMS
from bgd_plugin.support.processes import total

__all__ = ["FittedLayer", "LayerContext", "Method", "output_error", "shift_gain", "unused_codewords"]


@dataclass(frozen=True, kw_only=True)
class LayerContext:
    """Everything a method needs to fit one layer.

    Attributes:
        layer: the planned block and codebook size.
        weight: `[C_out, C_in / groups, *kernel]` or `[C_out, C_in]`.
        inputs: the layer's inputs in the student, whose earlier layers are quantized, and in the float network.
        mask: bool of the weight's shape, false where the decoded weight must be zero; None: nowhere.
        has_batchnorm: whether a batch norm is the only reader of the layer's output.
        has_bias: whether the layer has a bias.
        skip: the other side of the residual block that the layer ends, if it has drifted.
        config: the settings of the run.
        scale_bounds: the smallest and largest factor per row that the batch norm can undo, both `[rows]`; None: any.
    """

    layer: PlannedLayer
    weight: Tensor
    inputs: LayerInputs
    mask: Tensor | None = None
    has_batchnorm: bool
    has_bias: bool
    config: BGDConfig
    skip: Skip | None = None
    scale_bounds: tuple[Tensor, Tensor] | None = None

    @property
    def takes_mean(self) -> bool:
        """Whether a bias or a batch norm can make good the mean of the outputs, so that the fit is centred."""
        return self.has_batchnorm or self.has_bias

    @property
    def rows(self) -> Tensor:
        """The weight as float32 `[C_out, columns]`."""
        return self.weight.detach().float().flatten(1)


@dataclass(frozen=True, kw_only=True)
class FittedLayer:
    """The result of a fit.

    Attributes:
        codebook, codes: of the shapes that their form has (`pq.forms`): `[codebook_size, block_size]` and
            `[rows, blocks_per_row]` for blocks.
        row_scale: `[rows]`, the factor on each row of the weight before it was quantized; the batch norm that follows
            undoes it. None: no scaling.
        bias_shift: `[rows]`, to be added to the layer's bias. None: no shift.
        warnings: what the fit found out, such as codewords that are not used.
        form: "blocks" or "trellis".
    """

    codebook: Tensor
    codes: Tensor
    row_scale: Tensor | None = None
    bias_shift: Tensor | None = None
    warnings: tuple[str, ...] = ()
    form: str = BLOCKS

    def decoded(self, shape: Sequence[int]) -> Tensor:
        """The weight that codebook and codes stand for, of a shape `[rows, ...]`; zeros are not yet put in."""
        return FORMS[self.form].decode(self.codebook, self.codes, shape)


@dataclass(frozen=True, kw_only=True)
class Method:
    """A fitting method, in two steps: collect statistics of the inputs, then solve for codebook and codes."""

    collect: Callable[[LayerContext, torch.Generator], Any]
    solve: Callable[[LayerContext, Any, torch.Generator], FittedLayer]


def unused_codewords(codes: Tensor, codebook_size: int) -> tuple[str, ...]:
    """A warning where codewords stand for no block of the layer.

    Args:
        codes: `[rows, blocks_per_row]`.
        codebook_size: number of codewords.
    """
    unused = codebook_size - int(torch.bincount(codes.flatten().long(), minlength=codebook_size).count_nonzero())
    return (f"{unused} of {codebook_size} codewords are not used",) if unused else ()


@torch.no_grad()
def output_error(weight: Tensor, decoded: Tensor, sample: InputSample) -> float:
    """‖X(W − Ŵ)ᵀ‖² / ‖XWᵀ‖² on a sample of the layer's inputs; 0 if the layer's output is all zero.

    Args:
        weight, decoded: W and Ŵ, `[C_out, C_in / groups, *kernel]` or `[C_out, C_in]`.
        sample: rows `[groups, positions, columns]`.
    """
    groups, _, columns = sample.rows.shape
    exact = weight.float().reshape(groups, -1, columns)
    difference = exact - decoded.float().reshape(groups, -1, columns)
    kept, lost = (
        float(torch.linalg.vector_norm(sample.rows @ w.mT, dtype=torch.float64)) ** 2 for w in (exact, difference)
    )
    kept, lost = total(kept), total(lost)
    return lost / kept if kept > 0 and math.isfinite(kept) else 0.0


@torch.no_grad()
def shift_gain(shift: Tensor, decoded: Tensor, sample: InputSample) -> float:
    """The reduction of a layer's squared output error by a bias shift, relative to the outputs' variance.

    Shifting by the mean of an error reduces its mean square by the square of that mean.

    Args:
        shift: `[C_out]`.
        decoded: Ŵ, `[rows, columns]`, as in `output_error`.
        sample: as in `output_error`.
    """
    groups, _, columns = sample.rows.shape
    outputs = sample.rows @ decoded.float().reshape(groups, -1, columns).mT
    square = float(shift.double().square().sum()) * sample.rows.shape[1]
    variance = float((outputs - outputs.mean(1, keepdim=True)).square().sum(dtype=torch.float64))
    square, variance = total(square), total(variance)
    return square / variance if 0 < variance < math.inf else 0.0
