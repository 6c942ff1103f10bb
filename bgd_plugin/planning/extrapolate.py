"""What an error in one layer costs when it is larger or smaller than the one that was measured.

The logits' shift that a small error brings is proportional to the error. Its Kullback-Leibler divergence is not: of a
network that is sure of its answers, small shifts change next to nothing, and larger ones much. So the shift is scaled,
and the divergence computed again, without running the network.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from bgd_plugin.planning.answers import output_loss
from bgd_plugin.planning.outputs import Measure, logit_pair

__all__ = ["NUMBERS", "loss_and_shifts", "losses_by_error", "shifted_logits"]

_ENERGIES = tuple(4.0**step for step in range(-3, 15))
"""Factors on the energy of the shift."""
_LEAST, _MOST = 1e-6, 1.0
"""Divergences in nats: what rounding leaves, and what no bound asks for."""
_NOTHING = 1e-30
NUMBERS = 2_000_000
"""Logits, at most, whose shifts are looked at."""
_PIECE = 1 << 17
"""Logits looked at at once, in a cache."""


def loss_and_shifts(
    outputs: Iterable[Any], exact: Sequence[Any], measure: Measure
) -> tuple[float, str, list[tuple[Tensor, Tensor]]]:
    """The loss of a changed network's outputs, by which measure, and the shifts of its logits if it has some.

    Args:
        outputs: of the changed network, one for each batch.
        exact: of the float network, for the same batches.
        measure: of the losses.

    Returns:
        the loss, the name of its measure, and for each batch logits and shifts `[samples, classes]`, if there are some.
    """
    total, samples, measured = 0.0, 0, ""
    shifts = []
    for found, wanted in zip(outputs, exact, strict=True):
        loss, measured = output_loss(found, wanted, measure)
        size = _samples_in(wanted)
        total, samples = total + size * loss, samples + size
        if measured == "KL":
            shifts.append(shifted_logits(found, wanted, NUMBERS // len(exact)))
    return total / max(1, samples), measured, shifts


def _samples_in(output: Any) -> int:
    return next((t.shape[0] for t in pytree.tree_leaves(output) if isinstance(t, Tensor) and t.ndim), 1)


def shifted_logits(found: Any, exact: Any, most: int) -> tuple[Tensor, Tensor]:
    """Logits of one output, and their shift in another one, in double precision.

    Args:
        found: output with an error.
        exact: the same without it.
        most: logits, beyond which only some of the samples are taken.

    Returns:
        logits and shifts, both `[samples, classes]`.
    """
    moved, true = logit_pair(found, exact)
    dim = 1 if true.ndim in (2, 4) else -1
    true, moved = (t.movedim(dim, -1).reshape(-1, t.shape[dim]) for t in (true, moved))
    every = max(1, true.numel() // most)
    logits = true[::every].double()
    return logits, moved[::every].double() - logits


def losses_by_error(
    shifts: Sequence[tuple[Tensor, Tensor]], size: float, loss: float
) -> tuple[tuple[float, float], ...]:
    """Pairs (error, loss), both ascending.

    Args:
        shifts: logits and their shifts, both `[samples, classes]`; none of an output without logits.
        size: of the error that brought them, mean square per weight.
        loss: of that error, in nats.

    Returns:
        at least one pair. Without logits just the one measured: its loss is proportional to its error.
    """
    if not shifts:
        return ((size, max(loss, _NOTHING * size)),)
    parts = [_Part.of(logits, shift) for logits, shift in shifts]
    pairs: list[tuple[float, float]] = []
    for energy in _ENERGIES:
        cost = _divergence(parts, math.sqrt(energy))
        if not math.isfinite(cost):
            break
        if cost > max(_LEAST, pairs[-1][1] if pairs else 0.0):
            pairs.append((energy * size, cost))
        if cost > _MOST:
            break
    return tuple(pairs) or ((1.0, _NOTHING),)


@dataclass(frozen=True, kw_only=True)
class _Part:
    """Logits and their shifts.

    Attributes:
        scores: log p, `[samples, classes]`.
        shift: of the same shape.
        mean: Σ p shift, of each sample.
    """

    scores: Tensor
    shift: Tensor
    mean: Tensor

    @classmethod
    def of(cls, logits: Tensor, shift: Tensor) -> _Part:
        """Those of logits and shifts, both `[samples, classes]`."""
        scores = logits.log_softmax(1)
        pieces = zip(_pieces(scores), _pieces(shift), strict=True)
        return cls(scores=scores, shift=shift, mean=torch.cat([(p.exp() * moved).sum(1) for p, moved in pieces]))


def _pieces(rows: Tensor) -> tuple[Tensor, ...]:
    """Rows `[samples, classes]`, a few at once."""
    return torch.split(rows, max(1, _PIECE // rows.shape[1]))


def _divergence(parts: Sequence[_Part], factor: float) -> float:
    """KL(p ‖ q), averaged over samples, where q ∝ p exp(s), s = factor · shift: log Σ p exp(s) − Σ p s.

    Args:
        parts: of all samples.
        factor: on the shifts.
    """
    total = 0.0
    for part in parts:
        pieces = zip(_pieces(part.scores), _pieces(part.shift), strict=True)
        total += sum(float(torch.logsumexp(torch.add(p, moved, alpha=factor), 1).sum()) for p, moved in pieces)
        total -= factor * float(part.mean.sum())
    return total / sum(len(part.scores) for part in parts)
