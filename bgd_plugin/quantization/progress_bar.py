"""The progress bar of a run."""

from __future__ import annotations

from typing import Any

from torch import fx
from tqdm import tqdm

from bgd_plugin.planning.survey import Survey
from bgd_plugin.support.processes import is_first
from bgd_plugin.training import reconstruction_steps
from bgd_plugin.training.finetuning import total_steps

__all__ = ["progress_bar"]


def progress_bar(survey: Survey, batches: int, *, shown: bool) -> Any:
    """A progress bar with one step per layer and one per gradient step.

    Args:
        batches: number of batches in one pass over the calibration data.
        shown: whether the bar is drawn; only the first process draws it.
    """
    student, config = survey.network, survey.config
    steps = len(survey.layers) * (1 + (config.distillation.steps if config.distillation else 0))
    if config.reconstruction and isinstance(student, fx.GraphModule):
        steps += reconstruction_steps(student, [layer.target for layer in survey.layers], config.reconstruction)
    steps += total_steps(config.finetuning, batches) if config.finetuning else 0
    return tqdm(total=steps, disable=not (shown and is_first()), desc="quantize", unit="step", dynamic_ncols=True)
