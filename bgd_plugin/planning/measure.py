"""Measure the effect of each layer's error on the output, for choosing sizes."""

from __future__ import annotations

import json
from collections.abc import Sequence

from torch import Tensor
from tqdm import tqdm

from bgd_plugin.calibration import Batch
from bgd_plugin.graph import isolate_weights_, release_
from bgd_plugin.planning.budget import Budget
from bgd_plugin.planning.candidates import Sensitivity
from bgd_plugin.planning.sensitivity import measure_sensitivities
from bgd_plugin.support.processes import from_first, is_first

__all__ = ["measured"]


def measured(budget: Budget, batches: Sequence[Batch], *, progress: bool) -> dict[str, Sensitivity]:
    """The sensitivity of each layer whose size is to be chosen, by name; a layer that no input reaches has none.

    The first process measures it, on its own data.

    Args:
        budget: holds the survey, and the layers whose size is to be chosen.
        batches: calibration batches.
        progress: show a progress bar.
    """
    network = budget.survey.network

    def work() -> tuple[dict[str, Tensor], str]:
        shown = progress and is_first()
        with tqdm(total=len(budget.free), disable=not shown, desc="measure", unit="layer", dynamic_ncols=True) as bar:
            found = measure_sensitivities(network, batches, budget.free, budget.survey.config, bar.update)
        return {}, json.dumps({name: one.to_dict() for name, one in found.items()})

    isolate_weights_(network, budget.free)
    text = from_first(work)[1]
    for layer in budget.free:
        release_(network, layer)
    return {name: Sensitivity.from_dict(values) for name, values in json.loads(text).items()}
