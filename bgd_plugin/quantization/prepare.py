"""Before the fit: the form in which a network is fitted, its survey, and its budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from bgd_plugin.calibration import Batch, checked
from bgd_plugin.config import BGDConfig
from bgd_plugin.graph import Front, front_end, set_modes
from bgd_plugin.planning.budget import Budget
from bgd_plugin.planning.survey import Survey, surveyed

__all__ = ["Prepared", "prepared", "prepared_for"]


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A network before any work is done.

    Attributes:
        front: the forms in which the library works on it.
        survey: its layers, and what becomes of each.
        budget: for their sizes; None without one.
    """

    front: Front
    survey: Survey
    budget: Budget | None


def prepared(model: nn.Module, config: BGDConfig, original_bytes: int | None) -> Prepared:
    """Survey a network without data.

    Args:
        model: the caller's network.
        config: the settings.
        original_bytes: size of the float network; None: count its parameters and buffers.

    Raises:
        ConfigError: no layer to quantize, or a budget below the smallest file.
    """
    return _prepared(front_end(model), model, config, original_bytes)


def prepared_for(
    first: Prepared, model: nn.Module, config: BGDConfig, original_bytes: int | None, batches: Sequence[Batch]
) -> Prepared:
    """The same with data: the network is surveyed again only if it is fitted in another form than without data.

    Args:
        first: the result of `prepared`.
        model, config: as there.
        original_bytes: as there.
        batches: calibration batches.

    Returns:
        the network in evaluation mode.

    Raises:
        CalibrationError, TraceError: as `checked`.
        ConfigError: settings that need a graph, for a network that is fitted without one; otherwise as `prepared`.
    """
    front = checked(first.front, batches)
    set_modes(front.network, {"": False})
    return first if front is first.front else _prepared(front, model, config, original_bytes)


def _prepared(front: Front, model: nn.Module, config: BGDConfig, original_bytes: int | None) -> Prepared:
    survey = surveyed(front, config, original=model, original_bytes=original_bytes)
    survey.require_some()
    return Prepared(front=front, survey=survey, budget=Budget.of(survey))
