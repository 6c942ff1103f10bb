"""What a layer's inputs say of it before it is quantized: what an error in it counts, and a rough quantization."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from bgd_plugin.calibration import LayerInputs, sampled_inputs
from bgd_plugin.config import BGDConfig
from bgd_plugin.encoding.eight_bit import LEVELS
from bgd_plugin.files.rounding import as_stored
from bgd_plugin.graph import FoundLayer
from bgd_plugin.pq.feedback import cholesky, damped, diagonal_blocks, encode_with_feedback, nearest
from bgd_plugin.pq.positions import positions_as_groups

__all__ = ["LayerFacts", "layer_facts", "narrow_error", "roughly_quantized", "rounding_error", "spread_ratio"]

_ROWS = 4096  # of a layer's inputs
_DAMPING = 0.2
_MAX_COLUMNS = 8192
_TINY = 1e-12


@dataclass(kw_only=True)
class LayerFacts:
    """What is known of a layer from its inputs.

    Attributes:
        layer: the layer.
        weight: `[groups, rows_per_group, columns]`.
        mean: of the inputs `[groups, columns]`.
        gram: damped second moments around the mean, or around zero if nothing takes a mean out, `[groups, columns,
            columns]`, float64.
        covariance, damping: the same without damping, float32; and what was added, in units of the mean diagonal.
        root: V, upper triangular, gram = V Vᵀ; None where blocks are measured by the gram alone.
        scale: `[groups, rows_per_group]`, what a row's error is multiplied with.
        norm: path of the batch norm that follows.
        takes_mean: whether a bias or a batch norm takes out the mean of the layer's error.
    """

    layer: FoundLayer
    weight: Tensor
    mean: Tensor
    gram: Tensor
    covariance: Tensor
    damping: float
    root: Tensor | None
    scale: Tensor
    norm: str | None
    takes_mean: bool

    def metrics(self, block_size: int) -> Tensor:
        """The metric of an error at each block position, `[groups, blocks_per_row, d, d]`, for a block size d.

        With error feedback the later blocks compensate for part of an error, and the rest is measured by (H⁻¹_II)⁻¹,
        where H⁻¹ is that of the columns from block I on: V_II V_IIᵀ.
        """
        if self.root is None:
            metrics = diagonal_blocks(self.gram, block_size)
            return metrics.mean((0, 1)).expand_as(metrics)
        blocks = diagonal_blocks(self.root, block_size)
        return blocks @ blocks.mT


def layer_facts(
    inputs: LayerInputs,
    layer: FoundLayer,
    config: BGDConfig,
    generator: torch.Generator,
    *,
    norm: str | None,
    has_bias: bool,
) -> LayerFacts:
    """The facts of a layer.

    Args:
        inputs: its inputs in the float network.
        layer: the layer.
        config: the settings.
        generator: for the rows that are looked at.
        norm: path of the batch norm that follows.
        has_bias: whether the layer adds a bias that can take a mean out.
    """
    rows = sampled_inputs(inputs, _ROWS, generator).rows
    groups, count, columns = rows.shape
    weight = layer.matrix.detach().float().reshape(groups, -1, columns)
    full = config.method == "full"
    takes_mean = norm is not None or (full and has_bias)
    mean = rows.mean(1)
    centred = rows - mean[:, None] if takes_mean else rows
    second = (centred.mT @ centred) / count
    damping = min(1.0, _DAMPING * (1 + columns / count))
    gram = damped(second, damping)
    # With few rows feedback would hide the error on just the samples that show its cost.
    has_root = full and columns <= _MAX_COLUMNS and count >= 2 * columns
    root = cholesky(gram.flip((1, 2))).flip((1, 2)) if has_root else None
    scale = torch.ones_like(weight[..., 0])
    power = ((weight @ second) * weight).sum(2).clamp(min=0)
    if full and norm is not None:
        alive = power > 1e-6 * power.mean()
        scale = torch.where(alive, power, power.mean().clamp(min=_TINY)).rsqrt()
    elif float(power.sum()) > 0:
        scale = scale * float(power.mean()) ** -0.5
    return LayerFacts(
        layer=layer,
        weight=weight,
        mean=mean,
        gram=gram,
        covariance=second,
        damping=damping,
        root=root,
        scale=scale,
        norm=norm,
        takes_mean=takes_mean,
    )


def roughly_quantized(scaled: Tensor, facts: LayerFacts, codebook: Tensor) -> Tensor:
    """The scaled weight, encoded with the codebook of a quick fit and decoded again.

    Args:
        scaled: `[groups, rows_per_group, columns]`.
        facts: of the layer.
        codebook: `[codebook_size, block_size]`.

    Returns:
        the shape of `scaled`.
    """
    groups, rows, columns = scaled.shape
    if facts.root is not None:
        codes = encode_with_feedback(scaled.flatten(0, 1), codebook, facts.covariance, damping=facts.damping)
        return functional.embedding(codes, codebook).reshape(groups, rows, columns)
    blocks, metrics = positions_as_groups(scaled, facts.metrics(codebook.shape[1]))
    codes = nearest(blocks, torch.linalg.cholesky(metrics.double()).to(blocks), codebook)
    decoded = functional.embedding(codes, codebook)  # [groups · blocks_per_row, rows_per_group, d]
    return decoded.reshape(groups, -1, rows, codebook.shape[1]).transpose(1, 2).reshape(groups, rows, columns)


def rounding_error(scaled: Tensor, facts: LayerFacts) -> float:
    """The expected error, mean square per weight, that rounding a codebook to 8 bits adds: that of one step.

    Args:
        scaled: `[groups, rows_per_group, columns]`; the largest weight is about the largest value of a codebook.
        facts: of the layer.
    """
    step = float(scaled.abs().max()) / LEVELS
    return step**2 / 12 * float(facts.covariance.diagonal(dim1=1, dim2=2).mean())


@torch.no_grad()
def narrow_error(facts: LayerFacts) -> float:
    """The error, mean square per weight, of the float layer with 8 bits for each weight and a scale for each row.

    Args:
        facts: of the layer.
    """
    layer = facts.layer
    rounded = nn.Parameter(as_stored(layer.weight.detach(), "int8"), requires_grad=False)
    matrix = dataclasses.replace(layer, weight=rounded).matrix.float().reshape(facts.weight.shape)
    error = (matrix - facts.weight) * facts.scale[..., None]
    return float(((error @ facts.covariance) * error).sum(2).mean()) / error.shape[2]


def spread_ratio(facts: LayerFacts, rough: Tensor) -> Tensor:
    """For each row, the output's standard deviation with the exact weight over that with the rough one.

    Args:
        facts: of the layer.
        rough: an approximate weight, `[groups, rows_per_group, columns]`.

    Returns:
        `[groups, rows_per_group]`, limited to 0.05…20.
    """
    gram = facts.covariance
    exact = ((facts.weight @ gram) * facts.weight).sum(2).clamp(min=0)
    found = ((rough @ gram) * rough).sum(2).clamp(min=0)
    ratio = ((exact + _TINY) / (found + _TINY)).sqrt()
    return ratio.clamp(0.05, 20.0)
