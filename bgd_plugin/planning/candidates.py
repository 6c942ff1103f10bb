"""Candidate block and codebook sizes of each layer, their bytes and losses, and the choice within a number of bytes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bgd_plugin.encoding.stream import is_codable, overhead_bytes
from bgd_plugin.planning.types import PlannedLayer
from bgd_plugin.pq.blocks import to_blocks
from bgd_plugin.pq.rate import (
    EntropyCurve,
    RateCurve,
    entropy_curve,
    largest_codebook,
    rate_curve,
    sampled_positions,
)

__all__ = [
    "Option",
    "Sensitivity",
    "block_sizes",
    "codebook_sizes",
    "entropy_bits",
    "fitted_sizes",
    "options_of",
    "rated",
    "weight_sensitivity",
]

_POINTWISE_BLOCKS = (1, 2, 4, 8, 16)
_LARGEST_BLOCK = 64
_CODEBOOKS = tuple(2**bits for bits in range(4, 13))
_MOST_BITS = 8  # for each weight; beyond that, float is no larger
_SAMPLED_BLOCKS = 1 << 14
"""Blocks in a quick fit."""
_MOST_LEVELS = 256
_USUAL_LEVELS = 48
_ENTROPY_BITS = tuple(bits / 16 for bits in (*range(12, 48), *range(48, 97, 4)))
"""Rates to choose from, in bits for each weight."""


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """The expected loss of a layer's candidates.

    Attributes:
        curves: the layer's error by codebook size, for each block size.
        per_error: loss per unit of error.
        reason: what was measured, as text for the report.
        entropy: the layer's error by bits for each weight where codes are entropy coded; None where they may not be.
    """

    curves: tuple[RateCurve, ...]
    per_error: float
    reason: str
    entropy: EntropyCurve | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Sensitivity:
        """The inverse of `to_dict`; `values` may have gone through JSON."""
        curves = tuple(
            RateCurve(block_size=curve["block_size"], points=tuple((k, error) for k, error in curve["points"]))
            for curve in values["curves"]
        )
        points = (values.get("entropy") or {}).get("points")
        entropy = EntropyCurve(points=tuple((bits, error) for bits, error in points)) if points else None
        return cls(curves=curves, per_error=values["per_error"], reason=values["reason"], entropy=entropy)

    def loss(self, block_size: int, codebook_size: int) -> float:
        """The expected divergence, in nats, from quantizing with this block size and codebook size."""
        curve = next(c for c in self.curves if c.block_size == block_size)
        return self.per_error * curve.error(codebook_size)

    def loss_of(self, layer: PlannedLayer) -> float:
        """The expected divergence, in nats, from quantizing a layer as planned."""
        if layer.codes == "entropy" and self.entropy is not None:
            return self.per_error * self.entropy.error(entropy_bits(layer))
        return self.loss(layer.block_size, layer.codebook_size)


@dataclass(frozen=True, kw_only=True)
class Option:
    """One way to store a layer.

    Attributes:
        layer: as it would be quantized; None: float.
        size_bytes: of the layer in the file.
        loss: expected divergence that it adds, in nats.
    """

    layer: PlannedLayer | None
    size_bytes: int
    loss: float = math.inf


def block_sizes(weight_shape: Sequence[int]) -> tuple[int, ...]:
    """Block sizes to choose from: 1, 2, 4, 8, 16; for larger kernels parts and multiples of the kernel's area.

    Args:
        weight_shape: of the matrix or kernel, `(rows, ...)`; only divisors of a row's weights are returned.
    """
    columns, kernel = math.prod(weight_shape[1:]), tuple(weight_shape[2:])
    area = math.prod(kernel)
    wanted = _POINTWISE_BLOCKS if area == 1 else (1, 2, kernel[-1], area, 2 * area, 4 * area)
    sizes = sorted({d for d in wanted if d <= _LARGEST_BLOCK and columns % d == 0})
    return tuple(sizes if len(sizes) > 1 else (d for d in range(1, _LARGEST_BLOCK + 1) if columns % d == 0))


def codebook_sizes(weight_shape: Sequence[int], block_size: int) -> tuple[int, ...]:
    """Codebook sizes to choose from, ascending; for a small layer only the largest allowed.

    Args:
        weight_shape: `(rows, ...)`.
        block_size: a divisor of a row's weights.
    """
    largest = largest_codebook(math.prod(weight_shape) // block_size)
    largest = min(largest, 2 ** (_MOST_BITS * block_size))
    return tuple(k for k in _CODEBOOKS if k <= largest) or ((largest,) if largest >= 2 else ())


def fitted_sizes(weight_shape: Sequence[int], block_size: int) -> tuple[int, ...]:
    """The codebook sizes for which a quick fit is run: 16 and 256, and the largest one of a small layer.

    Args:
        weight_shape, block_size: as in `codebook_sizes`.
    """
    sizes = codebook_sizes(weight_shape, block_size)
    blocks = math.prod(weight_shape) // block_size
    return tuple(k for k in sizes if k in (16, 256) or (k == sizes[-1] and (blocks <= _SAMPLED_BLOCKS or k < 256)))


def weight_sensitivity(weight: Tensor, generator: torch.Generator) -> Sensitivity:
    """Sensitivity without data: the weight's own relative error, ‖W − Ŵ‖² / ‖W‖²; from the law alone on `meta`.

    Args:
        weight: `[C_out, ...]`.
        generator: for the quick fits.
    """
    shape = tuple(weight.shape)
    sizes = [d for d in block_sizes(shape) if codebook_sizes(shape, d)]
    if weight.is_meta:
        laws = tuple(RateCurve(block_size=d, points=((1, 1.0),)) for d in sizes)
        law = EntropyCurve(points=((0.0, 1.0),))
        return Sensitivity(curves=laws, per_error=1.0, reason="by the layer's shape", entropy=law)
    power = float(weight.detach().float().square().mean())
    curves: list[RateCurve] = []
    entropy = None
    for d in sizes:
        sample = _sampled(weight, d, power, generator)
        curves.append(rate_curve(*sample, fitted_sizes(shape, d), generator=generator))
        entropy = entropy_curve(*sample) if d == 1 else entropy
    return Sensitivity(curves=tuple(curves), per_error=1.0, reason="by the weight's own error", entropy=entropy)


def _sampled(weight: Tensor, block_size: int, power: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Some of a weight's blocks, and the metric of each in which the whole weight counts 1."""
    blocks = to_blocks(weight.detach().float(), block_size).transpose(0, 1)
    scale = 1 / power if power > 0 else 1.0
    metrics = scale * torch.eye(block_size, dtype=blocks.dtype, device=blocks.device).expand(blocks.shape[0], -1, -1)
    return sampled_positions(blocks, metrics, _SAMPLED_BLOCKS, generator)


def entropy_bits(layer: PlannedLayer) -> float:
    """The bits for each weight that an entropy-coded layer has for its codes."""
    return max(0.0, 8 * (layer.size_bytes - _beside_codes(layer)) / layer.weights)


def _beside_codes(layer: PlannedLayer) -> int:
    """About the bytes of frequencies, lanes and levels, if there are as many levels as there mostly are."""
    return overhead_bytes(layer.rows, layer.weights // layer.rows, _USUAL_LEVELS) + _USUAL_LEVELS + 4


def _entropy_coded(planned: PlannedLayer) -> list[PlannedLayer]:
    """A layer at several rates."""
    columns = planned.weights // planned.rows
    if not is_codable(_MOST_LEVELS, columns):
        return []
    layer = dataclasses.replace(planned, block_size=1, codebook_size=_MOST_LEVELS, codes="entropy", note="")
    beside = _beside_codes(layer)
    return [
        dataclasses.replace(layer, size_bytes=beside + math.ceil(bits * layer.weights / 8)) for bits in _ENTROPY_BITS
    ]


def options_of(
    planned: PlannedLayer, float_bytes: int, codebook_size: int | None = None, *, codes: str = "blocks"
) -> list[Option]:
    """All ways to store a layer, bytes ascending; their losses are not known yet.

    Args:
        planned: the layer.
        float_bytes: of the layer in float.
        codebook_size: if it is not to be chosen: then the layer is quantized in any case.
        codes: "entropy": entropy-coded codes at several rates are among them.
    """
    shape = planned.weight_shape
    layers = [
        dataclasses.replace(planned, block_size=d, codebook_size=k, note="")
        for d in block_sizes(shape)
        for k in codebook_sizes(shape, d)
    ]
    if codebook_size is not None:
        layers = _fixed(planned, codebook_size)
    elif codes == "entropy":
        layers += _entropy_coded(planned)
    options = [Option(layer=layer, size_bytes=layer.compressed_bytes) for layer in layers]
    options += [] if codebook_size is not None else [Option(layer=None, size_bytes=float_bytes)]
    return sorted(options, key=lambda option: option.size_bytes)


def _fixed(planned: PlannedLayer, codebook_size: int) -> list[PlannedLayer]:
    """The same layer in all blocks, with a codebook size of the user's, as far as the layer may have it."""
    counts = {d: largest_codebook(planned.weights // d) for d in block_sizes(planned.weight_shape)}
    return [
        dataclasses.replace(planned, block_size=d, codebook_size=min(codebook_size, k), note="")
        for d, k in counts.items()
        if k >= 2
    ]


def rated(options: Sequence[Option], sensitivity: Sensitivity) -> list[Option]:
    """The options with their losses, as far as they are worth a thought: each loses less than all smaller ones."""
    kept: list[Option] = []
    losses = [sensitivity.loss_of(o.layer) if o.layer else 0.0 for o in options]
    for option, loss in sorted(zip(options, losses, strict=True), key=lambda pair: (pair[0].size_bytes, pair[1])):
        if not kept or loss < kept[-1].loss:
            kept.append(dataclasses.replace(option, loss=loss))
    return kept
