"""The plan of a run: with a budget, what each layer's error does to the output is measured first."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from torch import Tensor, fx, nn
from tqdm import tqdm

from bgd_plugin.calibration import Batch
from bgd_plugin.config import BGDConfig
from bgd_plugin.graph import FoundLayer
from bgd_plugin.planning.candidates import Sensitivity
from bgd_plugin.planning.make import free_layers, make_plan
from bgd_plugin.planning.sensitivity import measure_sensitivities
from bgd_plugin.planning.types import Plan
from bgd_plugin.support.log import Log
from bgd_plugin.support.processes import from_first

__all__ = ["measured_plan"]


def measured_plan(
    student: nn.Module,
    batches: Sequence[Batch],
    config: BGDConfig,
    log: Log,
    original: nn.Module,
    original_bytes: int | None,
    folded: Mapping[str, str],
    *,
    progress: bool,
) -> tuple[Plan, list[FoundLayer]]:
    """The plan and its layers, as `make_plan` gives them; a budget is spent by what was measured on `batches`."""

    def made(sensitivities: dict[str, Sensitivity] | None) -> tuple[Plan, list[FoundLayer]]:
        return make_plan(
            student,
            config,
            original=original,
            original_bytes=original_bytes,
            sensitivities=sensitivities,
            folded=folded,
        )

    if not config.has_budget:
        return made(None)
    with log.timed("budget"):
        plan, found = made(_sensitivities(student, batches, config, progress))
    log.note(*plan.notes)
    return plan, found


def _sensitivities(
    student: nn.Module, batches: Sequence[Batch], config: BGDConfig, progress: bool
) -> dict[str, Sensitivity] | None:
    """What each layer whose size the budget chooses does to the output: the first process measures it, on its data.

    None where that cannot be measured.
    """
    if not isinstance(student, fx.GraphModule):
        return None
    names = [planned.name for _, planned in free_layers(student, config)]

    def measured() -> tuple[dict[str, Tensor], str]:
        with tqdm(total=len(names), disable=not progress, desc="measure", unit="layer", dynamic_ncols=True) as bar:
            found = measure_sensitivities(student, batches, names, config, bar.update)
        return {}, json.dumps({name: one.to_dict() for name, one in found.items()})

    text = from_first(measured)[1]
    return {name: Sensitivity.from_dict(values) for name, values in json.loads(text).items()}
