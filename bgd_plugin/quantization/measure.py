"""Spend a budget in a run: measure the effect of each layer's error on the output, then choose the sizes."""

from __future__ import annotations

import json
from collections.abc import Sequence

from torch import Tensor, fx
from tqdm import tqdm

from bgd_plugin.calibration import Batch
from bgd_plugin.graph import isolate_weights_, release_
from bgd_plugin.planning.budget import Budget
from bgd_plugin.planning.candidates import Sensitivity
from bgd_plugin.planning.sensitivity import measure_sensitivities
from bgd_plugin.planning.survey import Survey
from bgd_plugin.support.log import Log
from bgd_plugin.support.processes import from_first

__all__ = ["spent"]


def spent(budget: Budget, batches: Sequence[Batch], log: Log, *, progress: bool) -> Survey:
    """The survey with the sizes that the budget chooses from measurements on `batches`."""
    with log.timed("budget"):
        survey = budget.spend(_sensitivities(budget, batches, progress))
    log.note(*survey.notes)
    return survey


def _sensitivities(budget: Budget, batches: Sequence[Batch], progress: bool) -> dict[str, Sensitivity] | None:
    """The sensitivity of each layer whose size the budget chooses, measured by the first process on its data.

    None if it cannot be measured.
    """
    network = budget.survey.network
    if not isinstance(network, fx.GraphModule):
        return None

    def measured() -> tuple[dict[str, Tensor], str]:
        count = len(budget.free)
        with tqdm(total=count, disable=not progress, desc="measure", unit="layer", dynamic_ncols=True) as bar:
            found = measure_sensitivities(network, batches, budget.free, budget.survey.config, bar.update)
        return {}, json.dumps({name: one.to_dict() for name, one in found.items()})

    isolate_weights_(network, budget.free)
    text = from_first(measured)[1]
    for layer in budget.free:
        release_(network, layer)
    return {name: Sensitivity.from_dict(values) for name, values in json.loads(text).items()}
