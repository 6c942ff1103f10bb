"""Choose one candidate per layer: the least sum of losses for a file no longer than a target."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy

from bgd_plugin.errors import ConfigError
from bgd_plugin.planning.candidates import Option
from bgd_plugin.support.tables import mib

__all__ = ["Choice", "allocate", "choose", "require_reachable"]

_BINS = 1 << 14
"""Number of steps into which the available bytes are divided."""
_CORRECTIONS = 8


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The result of `choose`.

    Attributes:
        options: one for each layer.
        file_bytes: length of the file.
        loss: sum of the options' losses.
    """

    options: tuple[Option, ...]
    file_bytes: int
    loss: float


def require_reachable(
    layers: Sequence[Sequence[Option]],
    target_bytes: int,
    file_size: Callable[[Sequence[Option]], int],
    note: str = "",
) -> None:
    """Refuse a target below the smallest possible file.

    Args:
        layers: each layer's options, bytes ascending.
        target_bytes: maximum length of the file.
        file_size: the length of the file, in bytes, with one option chosen per layer.
        note: what else there is to say of the network.

    Raises:
        ConfigError: saying how long that is.
    """
    smallest = [options[0] for options in layers]
    least = file_size(smallest)
    if least > target_bytes:
        raise ConfigError(
            f"a file of {target_bytes:,} bytes cannot be reached: the least possible size is {least:,} bytes "
            f"({mib(least)}), of which {least - _bytes(smallest):,} are fixed; "
            "give at least that, or quantize more layers (first_layer, depthwise_conv, overrides)"
            + (f". {note}" if note else "")
        )


def choose(
    layers: Sequence[Sequence[Option]], target_bytes: int, file_size: Callable[[Sequence[Option]], int]
) -> Choice:
    """The options with the least sum of losses for a file no longer than the target.

    The knapsack counts the bytes of codes and codebooks. The rest of a file is measured: the length of the whole file
    is computed, and the available bytes are corrected by the difference.

    Args:
        layers: each layer's options, bytes ascending.
        target_bytes: maximum length of the file.
        file_size: the length of the file, in bytes, with these options.

    Raises:
        ConfigError: even the smallest options make a longer file.
    """
    require_reachable(layers, target_bytes, file_size)
    best = [options[0] for options in layers]
    best_size = file_size(best)
    shared, before = target_bytes - best_size + _bytes(best), 0
    for _ in range(_CORRECTIONS):
        picked = [options[i] for options, i in zip(layers, allocate(layers, shared), strict=True)]
        size = file_size(picked)
        if size <= target_bytes and _loss(picked) <= _loss(best):
            best, best_size = picked, size
        gap = target_bytes - size
        if 0 <= gap < target_bytes / 2000:
            break
        if gap < 0 and size == before:  # since bytes are counted in steps; with fewer than it has it is no choice
            shared = _bytes(picked)
        before = size
        shared += gap if gap > 0 else gap - 8
    return Choice(options=tuple(best), file_bytes=best_size, loss=_loss(best))


def allocate(layers: Sequence[Sequence[Option]], shared_bytes: int) -> list[int]:
    """A knapsack with one option per layer: the least sum of losses within a sum of bytes.

    Dynamic programming over the bytes beyond each layer's smallest option, in up to `_BINS` steps. Costs are rounded
    up, so the sum of the bytes exceeds `shared_bytes` only if the smallest options do.

    Args:
        layers: each layer's options, the smallest first.
        shared_bytes: for all layers together.

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
