"""Before the fit: check that the network computes the same with quantized modules in the place of its layers.

A network's code may look at its layers: at their class, their attributes, or all parameters. That shows when modules of
the kinds that will be put in their places, with the float weights themselves, answer a calibration batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from bgd_plugin.calibration import Batch, answers_of, first_difference
from bgd_plugin.errors import CalibrationError, ConfigError
from bgd_plugin.graph import FoundLayer, install_, untouched
from bgd_plugin.nn import PQModule
from bgd_plugin.planning.survey import Survey
from bgd_plugin.support.processes import largest

__all__ = ["rehearsed"]

_REASON = "the network's code looks at its class, attributes or parameters; with a quantized module in its place "


@torch.no_grad()
def rehearsed(own: nn.Module, survey: Survey, batches: Sequence[Batch]) -> Survey:
    """The survey without the layers whose exchange changes what the network computes; they stay float.

    Args:
        own: the network, of its own class; it is left as it is. A graph does not look at its layers.
        survey: its layers.
        batches: the calibration data; the first batch is answered.

    Raises:
        CalibrationError: the network fails on the batch.
        ConfigError: nothing is left to quantize, or only the exchange of several layers shows.
    """
    if isinstance(own, fx.GraphModule):
        return survey
    first = [batches[0]]
    with untouched(own) as (network,):
        wanted = answers_of(network, first)
    reason = _difference(own, survey.found, first, wanted)
    if not reason:
        return survey
    differences = {layer.name: _difference(own, [layer], first, wanted) for layer in survey.found}
    kept = survey.without({name: _REASON + found for name, found in differences.items() if found})
    kept.require_some()
    reason = _difference(own, kept.found, first, wanted)
    if reason:
        raise ConfigError(
            f"{type(own).__name__} does not compute the same with quantized modules in the place of its layers, even "
            f"with the float weights themselves: {reason}. Its code looks at the classes, the attributes or the "
            "parameters of its layers: exclude them with overrides, or change that code"
        )
    return kept


def _difference(own: nn.Module, found: Sequence[FoundLayer], batches: Sequence[Batch], wanted: list[Any]) -> str:
    """What the exchange of some layers changes, as text, the same in all processes; empty if nothing."""
    reason = ""
    with untouched(own) as (trial,):
        try:
            for layer in found:
                _install_exactly_(trial, layer)
            reason = first_difference(answers_of(trial, batches), wanted, "its answers")
        except CalibrationError as error:
            reason = str(error)
    return reason or ("it does so on another process" if largest(bool(reason)) else "")


def _install_exactly_(network: nn.Module, layer: FoundLayer) -> None:
    """Put quantized modules in the place of a layer whose decoded weight is the layer's own."""
    matrix = layer.matrix.detach()
    columns = layer.columns
    codebook = matrix.new_zeros(2, columns)
    codes = torch.zeros(layer.rows, 1, dtype=torch.uint8, device=matrix.device)
    for module in install_(network, layer, codebook, codes):
        kind = type(module)
        module.__class__ = type(kind.__name__, (kind,), {"matrix": property(_exact), "__module__": kind.__module__})
        vars(module)["exact"] = matrix
        module.mask = codes.new_ones(1, dtype=torch.bool)  # an embedding then decodes its whole weight


def _exact(module: PQModule) -> Tensor:
    weight: Any = vars(module)["exact"]
    return weight  # type: ignore[no-any-return]
