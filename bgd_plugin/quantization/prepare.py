"""Before the fit: the form in which a network is fitted, its survey, and its budget."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from bgd_plugin.calibration import Batch, checked
from bgd_plugin.config import BGDConfig
from bgd_plugin.graph import Front, front_end, set_modes
from bgd_plugin.planning.budget import Budget
from bgd_plugin.planning.survey import Survey, surveyed
from bgd_plugin.quantization.rehearsal import rehearsed
from bgd_plugin.rotation import Rotated, rotated
from bgd_plugin.support.processes import processes, total

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
    """The same with data: the network is rotated where it can be, and surveyed again if its form is another one.

    Args:
        first: the result of `prepared`.
        model, config: as there.
        original_bytes: as there.
        batches: calibration batches.

    Returns:
        the network in evaluation mode.

    Raises:
        CalibrationError, TraceError: as `checked`.
        ConfigError: settings that need a graph, for a network that is fitted without one; otherwise as `prepared` and
            `rehearsed`.
    """
    turned = _rotated(model, config, batches)
    front = checked(first.front if turned.network is None else front_end(turned.network), batches)
    set_modes(front.network, {"": False})
    ready = first if front is first.front else _prepared(front, model, config, original_bytes)
    survey = rehearsed(front.own, ready.survey, batches)
    if survey is not ready.survey:
        ready = Prepared(front=front, survey=survey, budget=Budget.of(survey))
    return dataclasses.replace(ready, survey=ready.survey.noted(turned.note)) if turned.note else ready


def _rotated(model: nn.Module, config: BGDConfig, batches: Sequence[Batch]) -> Rotated:
    """The network in random bases, if the settings ask for it and every process can rotate it."""
    is_apt = config.method == "full" and not config.preserve_zeros
    if not (config.rotation is True or (config.rotation == "auto" and is_apt)):
        return Rotated(network=None, note="")
    turned = rotated(model, batches, config.seed)
    if total(float(turned.network is not None)) in (0.0, float(processes())):
        return turned
    return Rotated(network=None, note="rotation: none, since the processes do not agree on it")


def _prepared(front: Front, model: nn.Module, config: BGDConfig, original_bytes: int | None) -> Prepared:
    survey = surveyed(front, config, original=model, original_bytes=original_bytes)
    survey.require_some()
    return Prepared(front=front, survey=survey, budget=Budget.of(survey))
