"""Block and codebook sizes that fit a number of bytes: what each layer's candidates lose, and which to take."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor

from bgd_plugin.errors import ConfigError
from bgd_plugin.planning.types import PlannedLayer
from bgd_plugin.pq.blocks import to_blocks
from bgd_plugin.pq.rate import RateCurve, largest_codebook, rate_curve, sampled_positions
from bgd_plugin.support.tables import mib

__all__ = [
    "Choice",
    "Option",
    "Sensitivity",
    "allocate",
    "block_sizes",
    "choose",
    "codebook_sizes",
    "fitted_sizes",
    "options_of",
    "rated",
    "require_reachable",
    "weight_sensitivity",
]

_POINTWISE_BLOCKS = (1, 2, 4, 8, 16)
_LARGEST_BLOCK = 64
_CODEBOOKS = tuple(2**bits for bits in range(4, 13))
_MOST_BITS = 8  # for each weight; beyond that, float is no larger
_SAMPLED_BLOCKS = 1 << 14
"""Blocks in a quick fit."""
_BINS = 1 << 14
"""Steps into which the bytes to be shared out are cut."""
_CORRECTIONS = 8


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """What a layer's blocks and codebooks cost.

    Attributes:
        curves: the layer's error by codebook size, for each block size.
        per_error: loss for each unit of error.
        reason: what was measured, in words.
    """

    curves: tuple[RateCurve, ...]
    per_error: float
    reason: str

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Sensitivity:
        """The inverse of `to_dict`, also of what JSON made of it."""
        curves = tuple(
            RateCurve(block_size=curve["block_size"], points=tuple((k, error) for k, error in curve["points"]))
            for curve in values["curves"]
        )
        return cls(curves=curves, per_error=values["per_error"], reason=values["reason"])

    def loss(self, block_size: int, codebook_size: int) -> float:
        """The loss that a candidate is expected to bring."""
        curve = next(c for c in self.curves if c.block_size == block_size)
        return self.per_error * curve.error(codebook_size)


@dataclass(frozen=True, kw_only=True)
class Option:
    """One way to store a layer: quantized so, or float (`layer` is None); its bytes and the loss it brings."""

    layer: PlannedLayer | None
    size_bytes: int
    loss: float = math.inf


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What `choose` found: an option for each layer, the length of the file, and the sum of the losses."""

    options: tuple[Option, ...]
    file_bytes: int
    loss: float


def block_sizes(weight_shape: Sequence[int]) -> tuple[int, ...]:
    """Block sizes to choose from: 1, 2, 4, 8, 16; for larger kernels parts and multiples of the kernel's area."""
    columns, kernel = math.prod(weight_shape[1:]), tuple(weight_shape[2:])
    area = math.prod(kernel)
    wanted = _POINTWISE_BLOCKS if area == 1 else (1, 2, kernel[-1], area, 2 * area, 4 * area)
    sizes = sorted({d for d in wanted if d <= _LARGEST_BLOCK and columns % d == 0})
    return tuple(sizes if len(sizes) > 1 else (d for d in range(1, _LARGEST_BLOCK + 1) if columns % d == 0))


def codebook_sizes(weight_shape: Sequence[int], block_size: int) -> tuple[int, ...]:
    """Codebook sizes to choose from, ascending; of a small layer only the largest that it may have."""
    largest = largest_codebook(math.prod(weight_shape) // block_size)
    largest = min(largest, 2 ** (_MOST_BITS * block_size))
    return tuple(k for k in _CODEBOOKS if k <= largest) or ((largest,) if largest >= 2 else ())


def fitted_sizes(weight_shape: Sequence[int], block_size: int) -> tuple[int, ...]:
    """The codebook sizes at which a quick fit is worth its time: some in the middle, the largest of small layers."""
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
        curves = tuple(RateCurve(block_size=d, points=((1, 1.0),)) for d in sizes)
        return Sensitivity(curves=curves, per_error=1.0, reason="by the layer's shape")
    power = float(weight.detach().float().square().mean())
    curves = tuple(_weight_curve(weight, d, power, generator) for d in sizes)
    return Sensitivity(curves=curves, per_error=1.0, reason="by the weight's own error")


def _weight_curve(weight: Tensor, block_size: int, power: float, generator: torch.Generator) -> RateCurve:
    blocks = to_blocks(weight.detach().float(), block_size).transpose(0, 1)
    scale = 1 / power if power > 0 else 1.0
    metrics = scale * torch.eye(block_size, dtype=blocks.dtype, device=blocks.device).expand(blocks.shape[0], -1, -1)
    sample = sampled_positions(blocks, metrics, _SAMPLED_BLOCKS, generator)
    return rate_curve(*sample, fitted_sizes(tuple(weight.shape), block_size), generator=generator)


def options_of(planned: PlannedLayer, float_bytes: int) -> list[Option]:
    """All ways to store a layer, bytes ascending; their losses are not known yet."""
    shape = planned.weight_shape
    layers = [
        dataclasses.replace(planned, block_size=d, codebook_size=k, note="")
        for d in block_sizes(shape)
        for k in codebook_sizes(shape, d)
    ]
    options = [Option(layer=layer, size_bytes=layer.compressed_bytes) for layer in layers]
    return sorted([*options, Option(layer=None, size_bytes=float_bytes)], key=lambda option: option.size_bytes)


def rated(options: Sequence[Option], sensitivity: Sensitivity) -> list[Option]:
    """The options with their losses, as far as they are worth a thought: each loses less than all smaller ones."""
    kept: list[Option] = []
    losses = [sensitivity.loss(o.layer.block_size, o.layer.codebook_size) if o.layer else 0.0 for o in options]
    for option, loss in sorted(zip(options, losses, strict=True), key=lambda pair: (pair[0].size_bytes, pair[1])):
        if not kept or loss < kept[-1].loss:
            kept.append(dataclasses.replace(option, loss=loss))
    return kept


def require_reachable(
    layers: Sequence[Sequence[Option]], target_bytes: int, file_size: Callable[[Sequence[Option]], int]
) -> None:
    """Refuse a target below the least possible file.

    Raises:
        ConfigError: saying how long that is.
    """
    smallest = [options[0] for options in layers]
    least = file_size(smallest)
    if least > target_bytes:
        raise ConfigError(
            f"a file of {target_bytes:,} bytes cannot be reached: the least possible size is {least:,} bytes "
            f"({mib(least)}), of which {least - _bytes(smallest):,} are not the budget's to choose; "
            "ask for that or more, or let more layers be quantized (first_layer, depthwise_conv, overrides)"
        )


def choose(
    layers: Sequence[Sequence[Option]], target_bytes: int, file_size: Callable[[Sequence[Option]], int]
) -> Choice:
    """The options with the least sum of losses whose file is no longer than the target.

    The knapsack knows the bytes of codes and codebooks; what a file holds beside them follows from measuring whole
    files, and the bytes to be shared out are corrected by the difference.

    Args:
        layers: each one's options, bytes ascending.
        target_bytes: never exceeded.
        file_size: length of the file with these options.

    Raises:
        ConfigError: even the smallest options make a longer file.
    """
    require_reachable(layers, target_bytes, file_size)
    best = [options[0] for options in layers]
    best_size = file_size(best)
    shared = target_bytes - best_size + _bytes(best)
    for _ in range(_CORRECTIONS):
        picked = [options[i] for options, i in zip(layers, allocate(layers, shared), strict=True)]
        size = file_size(picked)
        if size <= target_bytes and _loss(picked) <= _loss(best):
            best, best_size = picked, size
        gap = target_bytes - size
        if 0 <= gap < target_bytes / 2000:
            break
        shared += gap if gap > 0 else gap - 8
    return Choice(options=tuple(best), file_bytes=best_size, loss=_loss(best))


def allocate(layers: Sequence[Sequence[Option]], shared_bytes: int) -> list[int]:
    """A knapsack with one option for each layer: the least sum of losses within a sum of bytes.

    By dynamic programming over the bytes beyond each layer's smallest option, in up to `_BINS` steps, each rounded up:
    the sum of the bytes never exceeds `shared_bytes`, unless the smallest options do.

    Args:
        layers: each one's options, the smallest first.
        shared_bytes: for all of them.

    Returns:
        the index of each layer's option.
    """
    free = max(0, shared_bytes - sum(options[0].size_bytes for options in layers))
    step = max(1, -(-free // _BINS))
    bins = free // step
    losses = numpy.zeros(bins + 1)  # the least loss of the layers so far, by the bins that they may take
    picks = numpy.zeros((len(layers), bins + 1), dtype=numpy.int16)
    for row, options in zip(picks, layers, strict=True):
        before, losses = losses, losses + options[0].loss
        for index, option in enumerate(options[1:], start=1):
            cost = -(-(option.size_bytes - options[0].size_bytes) // step)
            if cost > bins:
                continue
            candidate = before[: bins + 1 - cost] + option.loss
            better = candidate < losses[cost:]
            losses[cost:][better] = candidate[better]
            row[cost:][better] = index
    chosen, place = [], bins
    for row, options in zip(picks[::-1], reversed(layers), strict=True):
        index = int(row[place])
        chosen.append(index)
        place -= -(-(options[index].size_bytes - options[0].size_bytes) // step)
    return chosen[::-1]


def _bytes(options: Sequence[Option]) -> int:
    return sum(option.size_bytes for option in options)


def _loss(options: Sequence[Option]) -> float:
    return sum(option.loss for option in options)
