"""What a network's outputs are: logits that tell samples apart, or values that are compared as they are.

A tensor `[samples, values]` may be logits, probabilities, an embedding or a regression; nothing but its values tells.
Softmax of an embedding, or of scores between 0 and 1, is next to the same for all samples: its divergence stays small
whatever becomes of the output, so that a bound on it would bound nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from bgd_plugin.calibration import logits_of

__all__ = ["LOGITS", "Information", "Measure", "Scale", "has_logits", "logit_pair"]

Measure = Literal["KL", "squared difference"]

_INFORMED = 0.05
"""Nats that logits tell of a sample at the least: far less than any useful classifier, far more than an embedding."""
_OF_VARIANCE = 0.1
_FEW = 8
_ROUNDING = 1e-3
_LEAST_PROBABILITY = 1e-12
_PIECE = 1 << 18
"""Logits looked at at once, in a cache."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How losses are measured, and which loss a bound on the divergence stands for.

    Attributes:
        measure: KL, or the squared relative error of all outputs.
        tolerance: the loss that a divergence of 1 stands for. A relative error counts from 0, most outputs vary around
            something else: a tenth of the share that their variance has in their squares.
    """

    measure: Measure
    tolerance: float = 1.0

    @classmethod
    def of(cls, outputs: Sequence[Any], measure: Measure | None = None) -> Scale:
        """That of a float network.

        Args:
            outputs: one for each batch.
            measure: if it is not to be told from the outputs.
        """
        measure = measure or _measure_of(outputs)
        if measure == "KL":
            return cls(measure=measure)
        return cls(measure=measure, tolerance=_OF_VARIANCE * _varying_share(outputs))


LOGITS = Scale(measure="KL")
"""That of logits."""


def has_logits(output: Any) -> bool:
    """Whether an output is, or has a field of, the form of logits.

    Args:
        output: of a network for one batch.
    """
    if isinstance(output, Tensor):
        return output.ndim == 2 and output.shape[1] > 1
    named = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    return isinstance(named, Tensor) and named.ndim > 1


def logit_pair(found: Any, exact: Any) -> tuple[Tensor, Tensor]:
    """The logits of two outputs; where those of `exact` are probabilities, the logarithms of both.

    Args:
        found: of the compressed network.
        exact: of the float network.

    Returns:
        both `[batch, classes]`, `[batch, tokens, classes]` or `[batch, classes, height, width]`.
    """
    mine, theirs = logits_of(found), logits_of(exact)
    if not _are_probabilities(theirs):
        return mine, theirs
    return mine.clamp(min=_LEAST_PROBABILITY).log(), theirs.clamp(min=_LEAST_PROBABILITY).log()


def _measure_of(outputs: Sequence[Any]) -> Measure:
    if not outputs or not all(map(has_logits, outputs)):
        return "squared difference"
    information = Information()
    for output in outputs:
        information.add(logit_pair(output, output)[1])
    return "KL" if information.is_enough else "squared difference"


class Information:
    """What logits tell of a sample: the entropy of the mean answer less the mean entropy of an answer, in nats."""

    def __init__(self) -> None:
        self.answers = 0
        self._entropies = 0.0
        self._chances: Tensor | None = None

    def add(self, logits: Tensor, tokens: Tensor | None = None) -> None:
        """Count the answers of a batch.

        Args:
            logits: `[batch, classes]`, `[batch, tokens, classes]` or `[batch, classes, height, width]`.
            tokens: `[batch, tokens]`, true where a token counts; None: all count.
        """
        dim = 1 if logits.ndim in (2, 4) else -1
        rows = logits.movedim(dim, -1).reshape(-1, logits.shape[dim])
        rows = rows if tokens is None else rows[tokens.reshape(-1)]
        self.answers += len(rows)
        for piece in torch.split(rows, max(1, _PIECE // max(1, rows.shape[1]))):
            scores = piece.float().log_softmax(1)
            chances = scores.exp()
            self._entropies -= float((chances * scores).nan_to_num().sum())
            sums = chances.sum(0).double()
            self._chances = sums if self._chances is None else self._chances + sums

    @property
    def nats(self) -> float:
        """So far."""
        if self._chances is None or not self.answers:
            return 0.0
        mean = self._chances / self.answers
        return float(-(mean * mean.clamp(min=1e-300).log()).sum()) - self._entropies / self.answers

    @property
    def is_enough(self) -> bool:
        """Whether their divergence means something; a single answer is taken to be one that does."""
        return self.answers < 2 or not self.nats < _INFORMED


def _are_probabilities(values: Tensor) -> bool:
    """Whether values are the chances of classes: none below 0, and all of a sample 1 together."""
    dim = 1 if values.ndim in (2, 4) else -1
    with torch.no_grad():
        if not values.is_floating_point() or not values.numel() or float(values.min()) < 0:
            return False
        return bool(((values.float().sum(dim) - 1).abs() < _ROUNDING).all())


def _varying_share(outputs: Sequence[Any]) -> float:
    """The variance of each channel of each output over samples and positions, as a share of the mean square of all."""
    moments: dict[tuple[int, int], Tensor] = {}
    for output in outputs:
        floats = [t for t in pytree.tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point() and t.ndim]
        for index, value in enumerate(floats):
            dim = 1 if value.ndim in (2, 4) else -1
            rows = value.movedim(dim, -1).reshape(-1, value.shape[dim]).double()
            found = torch.stack([torch.full_like(rows[0], len(rows)), rows.sum(0), rows.square().sum(0)])
            place = index, value.shape[dim]
            moments[place] = moments[place] + found if place in moments else found
    within = total = 0.0
    for count, sums, squares in moments.values():
        if float(count[0]) < _FEW:  # their mean is theirs
            return 1.0
        within += float((squares - sums.square() / count).clamp(min=0).sum())
        total += float(squares.sum())
    share = within / total if total > 0 else 1.0
    return share if 0 < share < 1 else 1.0
