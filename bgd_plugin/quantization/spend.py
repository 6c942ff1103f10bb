"""Choose sizes in a run: measure the effect of each layer's error on the output, then spend the budget."""

from __future__ import annotations

from collections.abc import Sequence

from bgd_plugin.calibration import Batch
from bgd_plugin.planning.budget import Budget
from bgd_plugin.planning.measure import measured
from bgd_plugin.planning.survey import Survey
from bgd_plugin.support.log import Log

__all__ = ["spent"]


def spent(
    survey: Survey, budget: Budget | None, batches: Sequence[Batch], log: Log, realized: float, *, progress: bool
) -> Survey:
    """The survey with the sizes that the budget chooses from measurements on `batches`; the same without a budget.

    Args:
        survey: the network's layers and the settings.
        budget: None: no budget.
        batches: calibration batches.
        log: takes the seconds spent.
        realized: divergence found in an earlier try, as a factor of the one expected.
        progress: show a progress bar.
    """
    if budget is None:
        return survey
    with log.timed("budget"):
        return budget.spend(measured(budget, batches, progress=progress), realized)
