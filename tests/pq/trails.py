"""The points that a full fit goes through, watched while it runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from torch import Tensor

from bgd_plugin.pq import full_gram

__all__ = ["Trail", "watched_trails"]


class Trail(full_gram._Trail):
    """A trail that is kept; the fit works on the weight and the Gram divided by powers of two."""

    def unit(self, weight: Tensor) -> float:
        """The factor from the fit's weight to the given one."""
        return float(weight.double().abs().max() / self._weight.double().abs().max())

    def objectives(self, weight: Tensor, damped_gram: Tensor) -> list[float]:
        """The objective at each point, in the units of the weight and the damped Gram."""
        level = float(damped_gram.abs().max() / self._gram.abs().max())
        return [level * self.unit(weight) ** 2 * loss for loss in self.history]

    def heldout_objectives(self, weight: Tensor) -> list[float]:
        """The same where a held-out Gram decides, which the fit takes as it is."""
        return [self.unit(weight) ** 2 * loss for loss in self.history]


@contextmanager
def watched_trails() -> Iterator[list[Trail]]:
    """The trails of all fits inside the context."""
    trails: list[Trail] = []

    class Watched(Trail):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            trails.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(full_gram, "_Trail", Watched)
        yield trails
