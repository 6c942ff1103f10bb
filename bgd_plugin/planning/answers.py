"""Quality of a compressed network's outputs: divergence from the float network, and agreement with it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from bgd_plugin.calibration import Batch
from bgd_plugin.planning.outputs import Information, Measure, has_logits, logit_pair
from bgd_plugin.support.processes import total
from bgd_plugin.training import kl_to_teacher

__all__ = ["Answers", "compare_answers", "output_loss"]

_CALLED: dict[Measure, str] = {"KL": "KL divergence", "squared difference": "relative squared error"}


@dataclass(frozen=True, kw_only=True)
class Answers:
    """How a compressed network's answers compare with the float network's.

    Attributes:
        samples: number of samples on which they were compared.
        measure: "KL divergence" of the logits (or probabilities) in nats, averaged over samples (and tokens or pixels);
            for an output without logits, or whose logits do not tell samples apart, "relative squared error",
            ‖y − ŷ‖² / ‖y‖² over all floating point outputs.
        divergence: in that measure; 0 means the same outputs.
        agreement: share of samples (tokens, pixels) with the same most likely class; None without logits.
        kept_aside: whether these samples were used neither by the fit nor by training.
    """

    samples: int
    measure: str
    divergence: float
    agreement: float | None
    kept_aside: bool

    def __str__(self) -> str:
        seen = "kept aside" if self.kept_aside else "that the fit has seen"
        agreement = "" if self.agreement is None else f", same class for {self.agreement:.1%}"
        samples = f"{self.samples} sample{'' if self.samples == 1 else 's'} {seen}"
        return f"answers: {self.measure} {self.divergence:.3g} from the float network{agreement} ({samples})"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return dataclasses.asdict(self)


_PIECE = 1 << 18
"""Numbers whose squares are summed at once, in a cache: the logits of a language model are hundreds of megabytes."""


_TEXTS = 4
"""Texts that are compared at the least."""


@dataclass
class _Sums:
    """Sums over batches."""

    samples: float = 0.0
    divergence: float = 0.0
    lost: float = 0.0
    kept: float = 0.0
    agreeing: float = 0.0
    answers: float = 0.0
    informed: float = 0.0

    def shared(self) -> _Sums:
        """The sums of all processes."""
        return _Sums(**{f.name: total(getattr(self, f.name)) for f in dataclasses.fields(self)})


@torch.no_grad()
def compare_answers(
    compressed: Callable[[Batch], Any],
    reference: Callable[[Batch], Any],
    batches: Sequence[Batch],
    *,
    kept_aside: bool,
    measure: Measure | None = None,
    enough_tokens: float = math.inf,
) -> Answers:
    """Compare two networks' outputs batch by batch, with the outputs of one batch in memory.

    Args:
        compressed, reference: from a batch to each network's output, in evaluation mode.
        batches: at least one.
        kept_aside: whether the fit has not used these samples.
        measure: by which they are compared; None: as the reference's outputs are (`planning.outputs`).
        enough_tokens: number of tokens with logits of their own that are enough; texts that follow are not looked at.
    """
    sums, information = _Sums(), Information()
    is_logits = measure != "squared difference"
    for batch in batches:
        exact, found = reference(batch), compressed(batch)
        is_logits = is_logits and has_logits(exact)
        sums.samples += batch.size
        if measure != "KL" or not is_logits:
            lost, kept = _squares(found, exact)
            sums.lost += lost
            sums.kept += kept
        if is_logits:
            pair = logit_pair(found, exact)
            _add_logits(sums, batch, *pair)
            if measure is None:
                information.add(pair[1], batch.tokens(pair[1]))
            if pair[1].ndim == 3 and sums.samples >= _TEXTS and sums.answers >= enough_tokens:
                break
    sums.informed = sums.samples if measure == "KL" or information.is_enough else 0.0
    sums = sums.shared()
    is_kl = is_logits and sums.informed > sums.samples / 2
    divergence = sums.divergence / max(1, sums.samples) if is_kl else _relative(sums.lost, sums.kept)
    return Answers(
        samples=round(sums.samples),
        measure=_CALLED["KL" if is_kl else "squared difference"],
        divergence=max(0.0, divergence) if math.isfinite(divergence) else math.inf,
        agreement=sums.agreeing / max(1.0, sums.answers) if is_logits else None,
        kept_aside=kept_aside,
    )


def output_loss(output: Any, exact: Any, measure: Measure = "KL") -> tuple[float, str]:
    """The loss of an output against the float network's, and the name of its measure.

    Args:
        output: of the compressed network.
        exact: of the float network.
        measure: "KL": for logits (`[samples, classes]`, or a field of that name) their KL divergence in nats. For other
            outputs, and with "squared difference", ‖output − exact‖² / ‖exact‖².
    """
    if measure == "KL" and has_logits(exact):
        loss = float(kl_to_teacher(*logit_pair(output, exact)))
        return (max(0.0, loss) if math.isfinite(loss) else math.inf), "KL"
    return _relative(*_squares(output, exact)), "relative squared difference of outputs"


def _add_logits(sums: _Sums, batch: Batch, found: Tensor, exact: Tensor) -> None:
    tokens = batch.tokens(exact)
    sums.divergence += batch.size * float(kl_to_teacher(found, exact, tokens))
    dim = 1 if exact.ndim in (2, 4) else -1
    same = (found.argmax(dim) == exact.argmax(dim)).float()
    same = same if tokens is None else same[tokens]
    sums.agreeing += float(same.sum())
    sums.answers += same.numel()


def _squares(output: Any, exact: Any) -> tuple[float, float]:
    """‖y − ŷ‖² and ‖y‖² over all floating point tensors of two outputs."""
    pairs = zip(pytree.tree_leaves(output), pytree.tree_leaves(exact), strict=True)
    lost = kept = 0.0
    for a, b in pairs:
        if isinstance(b, Tensor) and b.is_floating_point():
            for x, y in zip(torch.split(a.reshape(-1), _PIECE), torch.split(b.reshape(-1), _PIECE), strict=True):
                exact = y.double()
                lost += float((x.double() - exact).square().sum())
                kept += float(exact.square().sum())
    return lost, kept


def _relative(lost: float, kept: float) -> float:
    loss = lost / kept if kept > 0 else 0.0
    return loss if math.isfinite(loss) and math.isfinite(lost) else math.inf
