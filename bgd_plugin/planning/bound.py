"""Sizes for a bound on the loss: the fewest bytes with an expected loss within it, and the curve over all bounds."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy

from bgd_plugin.planning.candidates import Option
from bgd_plugin.planning.knapsack import allocate
from bgd_plugin.planning.losses import LEVEL

__all__ = ["fewest_bytes", "loss_by_bytes"]

_FINE = 5e-4
"""The search ends when the range of bytes is this fraction of them."""
_PRICES, _TRIALS = (1e-6, 1e18), 40
"""Bytes for each nat of the loss, among which so many are tried."""
_ROUNDING = 1e-9


def fewest_bytes(layers: Sequence[Sequence[Option]], bound: float) -> list[int]:
    """The index of each layer's option for the fewest bytes whose sum of losses is at most `bound`.

    The knapsack gives the least loss for a number of bytes; it falls as the bytes grow, so the bytes are bisected,
    between those that Lagrange multipliers show to be too few and those with which they keep the bound.

    Args:
        layers: each layer's options, bytes ascending, losses falling; the last one (float) loses nothing.
        bound: of the sum of losses, in nats.

    Returns:
        one index for each layer; the largest options if even these lose more than `bound`.
    """
    picks = [0] * len(layers)
    if _loss(layers, picks) <= bound:
        return picks
    low, picks = _by_multipliers(layers, bound)
    high = _bytes(layers, picks)
    while high - low > max(1, _FINE * high):
        middle = round((low * high) ** 0.5) if high > 2 * low > 0 else (low + high) // 2
        middle = min(max(middle, low + 1), high - 1)
        found = allocate(layers, middle)
        if _loss(layers, found) <= bound:
            picks, high = found, min(middle, _bytes(layers, found))
        else:
            low = middle
    return picks


def _by_multipliers(layers: Sequence[Sequence[Option]], bound: float) -> tuple[int, list[int]]:
    """Bytes that are too few for the bound, and options that keep it, or the largest ones.

    For any price λ of the loss, no choice within the bound has fewer bytes than min Σ (bytes + λ loss) − λ · bound,
    where each layer chooses by itself.
    """
    most = max(map(len, layers))
    sizes, losses = numpy.full((len(layers), most), numpy.inf), numpy.zeros((len(layers), most))
    for row, options in enumerate(layers):
        sizes[row, : len(options)] = [option.size_bytes for option in options]
        losses[row, : len(options)] = [option.loss for option in options]
    losses = numpy.where(numpy.isnan(losses), numpy.inf, losses)
    low, picks = int(sizes[:, 0].sum()), [len(options) - 1 for options in layers]
    below, above = math.log(_PRICES[0]), math.log(_PRICES[1])  # of bytes per nat
    for _ in range(_TRIALS):
        price = math.exp((below + above) / 2)
        costs = sizes + price * losses
        found = costs.argmin(1)
        low = max(low, math.ceil((costs.min(1).sum() - price * bound) * (1 - _ROUNDING)) - 1)
        if _loss(layers, found) <= bound:
            above = math.log(price)
            picks = [int(pick) for pick in found]
        else:
            below = math.log(price)
    return low, picks


def loss_by_bytes(
    rated: Callable[[float], Sequence[Sequence[Option]]], loss: Callable[[Sequence[Option]], float], points: int
) -> list[tuple[int, float]]:
    """Pairs of bytes and the least loss for them, bytes ascending by equal factors, losses falling.

    Args:
        rated: the layers' options, as in `fewest_bytes`, with their shares in a loss of so much.
        loss: of options, one for each layer.
        points: maximum number of pairs; equal ones are given once.
    """
    layers = rated(LEVEL)
    low = sum(options[0].size_bytes for options in layers)
    high = sum(options[-1].size_bytes for options in layers)
    curve: dict[int, float] = {}
    found = loss([options[0] for options in layers])
    for point in range(points):
        shared = round(low * (high / max(1, low)) ** (point / max(1, points - 1)))
        layers = rated(found or LEVEL)  # that of a few bytes less
        picked = [options[i] for options, i in zip(layers, allocate(layers, shared), strict=True)]
        found = min(found, loss(picked))
        curve[sum(option.size_bytes for option in picked)] = found
    return sorted(curve.items())


def _loss(layers: Sequence[Sequence[Option]], picks: Sequence[int]) -> float:
    return sum(options[i].loss for options, i in zip(layers, picks, strict=True))


def _bytes(layers: Sequence[Sequence[Option]], picks: Sequence[int]) -> int:
    return sum(options[i].size_bytes for options, i in zip(layers, picks, strict=True))
