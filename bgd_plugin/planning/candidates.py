"""Candidate block and codebook sizes of each layer, their bytes and losses, and the choice within a number of bytes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bgd_plugin.encoding.eight_bit import round_to_eight_bits
from bgd_plugin.encoding.stream import is_codable
from bgd_plugin.planning.losses import LEVEL, Sensitivity, beside_codes
from bgd_plugin.planning.types import PlannedLayer
from bgd_plugin.planning.window_error import window_error
from bgd_plugin.pq.blocks import to_blocks
from bgd_plugin.pq.forms import BLOCKS, TRELLIS
from bgd_plugin.pq.rate import (
    EntropyCurve,
    RateCurve,
    entropy_curve,
    largest_codebook,
    rate_curve,
    sampled_positions,
)
from bgd_plugin.pq.windows import LEAST_ROWS, STATES

__all__ = [
    "Option",
    "block_sizes",
    "codebook_sizes",
    "error_of",
    "fitted_sizes",
    "float_options",
    "options_of",
    "rated",
    "weight_sensitivity",
    "worthwhile",
]

_POINTWISE_BLOCKS = (1, 2, 4, 8, 16)
_LARGEST_BLOCK = 64
_CODEBOOKS = tuple(2**bits for bits in range(4, 13))
_MOST_BITS = 8  # for each weight; beyond that, float is no larger
_SAMPLED_BLOCKS = 1 << 14
"""Blocks in a quick fit."""
_MOST_LEVELS = 256
_NARROW_ERROR = 1e-4
"""Relative squared error of normally distributed weights in 8 bits with a scale for each row."""
_WINDOWS_LAW = 0.044
"""Error of trellis codes in the unit of the law for block codes: 0.7 times that of blocks of four at two bits."""
_ENTROPY_BITS = tuple(bits / 16 for bits in (*range(12, 48), *range(48, 97, 4)))
"""Rates to choose from, in bits for each weight."""


@dataclass(frozen=True, kw_only=True)
class Option:
    """One way to store a layer.

    Attributes:
        layer: as it would be quantized; None: float.
        size_bytes: of the layer in the file.
        loss: expected divergence that it adds, in nats.
        is_narrow: float in 8 bits for each weight, with a scale for each row.
    """

    layer: PlannedLayer | None
    size_bytes: int
    loss: float = math.inf
    is_narrow: bool = False


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


def weight_sensitivity(weight: Tensor, generator: torch.Generator, codes: str = BLOCKS) -> Sensitivity:
    """Sensitivity without data: the weight's own relative error, ‖W − Ŵ‖² / ‖W‖²; from the law alone on `meta`.

    Args:
        weight: `[C_out, ...]`.
        generator: for the quick fits.
        codes: as in the settings.
    """
    shape = tuple(weight.shape)
    sizes = [d for d in block_sizes(shape) if codebook_sizes(shape, d)]
    if weight.is_meta:
        laws = tuple(RateCurve(block_size=d, points=((1, 1.0),)) for d in sizes)
        law = EntropyCurve(points=((0.0, 1.0),))
        reason = "by the layer's shape"
        return Sensitivity(
            curves=laws, losses=((1.0, 1.0),), reason=reason, entropy=law, windows=_WINDOWS_LAW, narrow=_NARROW_ERROR
        )
    weight = weight.detach().float()
    power = float(weight.square().mean())
    rounded = round_to_eight_bits(weight.reshape(shape[0], -1)).reshape(shape)
    curves: list[RateCurve] = []
    entropy = None
    for d in sizes:
        sample = _sampled(weight, d, power, generator)
        curves.append(rate_curve(*sample, fitted_sizes(shape, d), generator=generator))
        entropy = entropy_curve(*sample) if d == 1 else entropy
    matrix = weight.reshape(1, shape[0], -1)
    windows = (
        window_error(matrix, torch.full_like(matrix[:, 0], 1 / power if power > 0 else 1.0))
        if codes == TRELLIS
        else None
    )
    return Sensitivity(
        curves=tuple(curves),
        losses=((1.0, 1.0),),
        reason="by the weight's own error",
        entropy=entropy,
        windows=math.inf if windows is None else windows,
        narrow=float((rounded - weight).square().mean()) / power if power > 0 else 0.0,
    )


def _sampled(weight: Tensor, block_size: int, power: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Some of a weight's blocks, and the metric of each in which the whole weight counts 1."""
    blocks = to_blocks(weight.detach().float(), block_size).transpose(0, 1)
    scale = 1 / power if power > 0 else 1.0
    metrics = scale * torch.eye(block_size, dtype=blocks.dtype, device=blocks.device).expand(blocks.shape[0], -1, -1)
    return sampled_positions(blocks, metrics, _SAMPLED_BLOCKS, generator)


def _entropy_coded(planned: PlannedLayer) -> list[PlannedLayer]:
    """A layer at several rates."""
    columns = planned.weights // planned.rows
    if not is_codable(_MOST_LEVELS, columns):
        return []
    layer = dataclasses.replace(planned, block_size=1, codebook_size=_MOST_LEVELS, codes="entropy", note="")
    beside = beside_codes(layer)
    return [
        dataclasses.replace(layer, size_bytes=beside + math.ceil(bits * layer.weights / 8)) for bits in _ENTROPY_BITS
    ]


def _windows(planned: PlannedLayer) -> list[PlannedLayer]:
    """A layer with trellis codes, if it has rows enough."""
    if planned.rows < LEAST_ROWS:
        return []
    layer = dataclasses.replace(planned, block_size=1, codebook_size=STATES, codebook_storage="float16", note="")
    return [dataclasses.replace(layer, codes=TRELLIS)]


def options_of(
    planned: PlannedLayer,
    float_bytes: int,
    codebook_size: int | None = None,
    *,
    codes: str = "blocks",
    narrow_bytes: int | None = None,
) -> list[Option]:
    """All ways to store a layer, bytes ascending; their losses are not known yet.

    Args:
        planned: the layer.
        float_bytes: of the layer in float.
        codebook_size: if it is not to be chosen: then the layer is quantized in any case.
        codes: "entropy": entropy-coded codes at several rates are among them; "trellis": trellis codes are.
        narrow_bytes: of the layer in 8 bits for each weight; None if the settings do not allow it.
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
    elif codes == TRELLIS:
        layers += _windows(planned)
    options = [Option(layer=layer, size_bytes=layer.compressed_bytes) for layer in layers]
    options += [] if codebook_size is not None else float_options(float_bytes, narrow_bytes)
    return sorted(options, key=lambda option: option.size_bytes)


def float_options(float_bytes: int, narrow_bytes: int | None) -> list[Option]:
    """The ways to store a layer that is not quantized.

    Args:
        float_bytes: of the layer in float.
        narrow_bytes: of the layer in 8 bits for each weight; None if the settings do not allow it.
    """
    narrow = [] if narrow_bytes is None else [Option(layer=None, size_bytes=narrow_bytes, is_narrow=True)]
    return [*narrow, Option(layer=None, size_bytes=float_bytes)]


def _fixed(planned: PlannedLayer, codebook_size: int) -> list[PlannedLayer]:
    """The same layer in all blocks, with a codebook size of the user's, as far as the layer may have it."""
    counts = {d: largest_codebook(planned.weights // d) for d in block_sizes(planned.weight_shape)}
    return [
        dataclasses.replace(planned, block_size=d, codebook_size=min(codebook_size, k), note="")
        for d, k in counts.items()
        if k >= 2
    ]


def error_of(option: Option, sensitivity: Sensitivity) -> float:
    """The expected error of an option, mean square per weight.

    Args:
        option: of a layer.
        sensitivity: of the same one.
    """
    if option.layer is not None:
        return sensitivity.error_of(option.layer)
    return sensitivity.narrow if option.is_narrow else 0.0


def worthwhile(options: Sequence[Option], sensitivity: Sensitivity) -> list[tuple[Option, float]]:
    """The options that are worth a thought, bytes ascending, each with its error: less than those of all smaller ones.

    Args:
        options: of a layer.
        sensitivity: of the layer.
    """
    pairs = [(option, error_of(option, sensitivity)) for option in options]
    kept: list[tuple[Option, float]] = []
    for option, error in sorted(pairs, key=lambda pair: (pair[0].size_bytes, pair[1])):
        if math.isfinite(error) and (not kept or error < kept[-1][1]):
            kept.append((option, error))
    return kept


def rated(options: Sequence[tuple[Option, float]], sensitivity: Sensitivity, level: float = LEVEL) -> list[Option]:
    """Options with their losses.

    Args:
        options: as of `worthwhile`.
        sensitivity: of the layer.
        level: the loss of all layers together at which each one's share is told.
    """
    per_error = sensitivity.per_error(level)
    return [dataclasses.replace(option, loss=per_error * error) for option, error in options]
