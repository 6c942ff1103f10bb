"""The float network's answers to a few samples, beside which those with one layer changed are put."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from bgd_plugin.calibration import Batch, Rerun, ThinHead, Walk, answers_at_some_tokens
from bgd_plugin.planning.extrapolate import NUMBERS, loss_and_shifts
from bgd_plugin.planning.outputs import Measure, Scale

__all__ = ["Reference"]


@dataclass(frozen=True, kw_only=True)
class Reference:
    """What the float network answers.

    Attributes:
        outputs: one for each batch.
        scale: of losses.
        head: the layer that is run on some of the tokens, as it was for the outputs; None: everything is run on all.
    """

    outputs: Sequence[Any]
    scale: Scale
    head: ThinHead | None

    @classmethod
    def of(cls, network: nn.Module, batches: Sequence[Batch], measure: Measure | None) -> Reference:
        """That of a network.

        Args:
            network: the float one.
            batches: a few samples.
            measure: of losses, if it is not to be told from the outputs.
        """
        outputs = [batch.call(network) for batch in batches]
        scale = Scale.of(outputs, measure)
        thin = answers_at_some_tokens(network, batches, outputs, NUMBERS) if scale.measure == "KL" else None
        head, outputs = thin or (None, outputs)
        return cls(outputs=outputs, scale=scale, head=head)

    def loss(self, walk: Walk | Rerun) -> tuple[float, str, list[tuple[Tensor, Tensor]]]:
        """The loss of the network as it is now, run from the walk's place to the end.

        Returns:
            the loss, the name of its measure, and for each batch logits and shifts `[samples, classes]`, if there are
            some.
        """
        with nullcontext() if self.head is None else self.head.thinned(walk.student):
            found = (walk.finish(index) for index in range(len(self.outputs)))
            return loss_and_shifts(found, self.outputs, self.scale.measure)
