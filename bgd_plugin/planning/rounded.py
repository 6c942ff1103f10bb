"""Float weights in 8 bits: what their rounding does to the output, so that those it costs too much keep half precision.

First layers, depthwise convolutions and embeddings without a setting take 8 bits for each weight. In a large network
this costs nothing that could be measured; in a narrow one it can cost more than a bound allows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch import fx, nn

from bgd_plugin.calibration import Batch, Walk
from bgd_plugin.config import BGDConfig
from bgd_plugin.files.rounding import as_stored
from bgd_plugin.graph import FoundLayer
from bgd_plugin.planning.extrapolate import loss_and_shifts, losses_by_error
from bgd_plugin.planning.lean import coarse_weights
from bgd_plugin.planning.losses import Sensitivity
from bgd_plugin.planning.outputs import Scale
from bgd_plugin.planning.perturbation import Change, changed, holders
from bgd_plugin.planning.sensitivity import first_node
from bgd_plugin.planning.survey import Survey, weight_name

__all__ = ["can_be_narrow", "measure_rounding", "narrow_bytes", "roundings"]

_SCALE_BYTES = 4
_MINOR = 0.02
"""Share of the expected loss up to which the rounding of these weights is not looked at layer by layer."""


def can_be_narrow(layer: FoundLayer, config: BGDConfig) -> bool:
    """Whether the settings, and the weight's dtype, let a layer that stays float take 8 bits for each weight."""
    return config.weight_storage in ("int8", "int5") and layer.weight.dtype == torch.float32 and layer.weight.ndim > 1


def narrow_bytes(layer: FoundLayer) -> int:
    """Bytes of a layer's weight in 8 bits, with a scale for each row."""
    return layer.weight.numel() + _SCALE_BYTES * layer.weight.shape[0]


def roundings(network: nn.Module, survey: Survey, layers: Sequence[FoundLayer]) -> dict[str, list[Change]]:
    """The changes that round those weights which stay float and take 8 bits, by the layer's name.

    Weights in five bits, whose scales go into the norm behind them, are left out.

    Args:
        network: the float one.
        survey: says which.
        layers: those of the network, whether quantized or not.
    """
    storages: Mapping[str, str] = survey.storages
    coarse = coarse_weights(survey)
    names = {layer.name: weight_name(layer) for layer in layers}
    return {
        layer.name: _rounding(network, layer)
        for layer in layers
        if storages.get(names[layer.name]) in ("int8", "int5") and names[layer.name] not in coarse
    }


@torch.no_grad()
def measure_rounding(
    network: nn.Module, batches: Sequence[Batch], survey: Survey, scale: Scale, level: float
) -> dict[str, Sensitivity]:
    """What the rounding of each layer without a setting costs, by the layer's name; nothing where all of it is minor.

    Args:
        network: the float one, whose weights can be exchanged.
        batches: a few samples.
        survey: of its layers.
        scale: of losses.
        level: the loss of all layers together that is to be expected.
    """
    layers = roundings(network, survey, survey.beside)
    exact = [batch.call(network) for batch in batches] if layers else []

    if not layers:
        return {}
    with changed([change for changes in layers.values() for change in changes]):
        loss, _, _ = loss_and_shifts((batch.call(network) for batch in batches), exact, scale.measure)
    if loss <= _MINOR * level:
        return {}
    found = {}
    few = list(islice(batches, -(-len(batches) // 2)))  # half of them tell which layers matter
    for name, answers in _rounded_alone(network, few, survey.beside, layers):
        loss, measure, shifts = loss_and_shifts(answers, exact[: len(few)], scale.measure)
        reason = f"{measure} {loss:.2g} if only this layer is rounded to 8 bits"
        found[name] = Sensitivity(curves=(), losses=losses_by_error(shifts, 1.0, loss), reason=reason, narrow=1.0)
    return found


def _rounded_alone(
    network: nn.Module,
    batches: Sequence[Batch],
    layers: Sequence[FoundLayer],
    roundings: Mapping[str, Sequence[Change]],
) -> Iterator[tuple[str, Iterator[Any]]]:
    """The network's answers with one layer rounded, for each of these layers, by its name; a graph runs from there."""
    waiting = dict(roundings)
    if isinstance(network, fx.GraphModule):
        walk = Walk(network, batches)
        first = {first_node(walk, layer): layer.name for layer in layers if layer.name in waiting and layer.calls}
        for node in islice(walk.nodes(first), len(first)):  # what comes after the last need not run
            name = first[node.name]
            with changed(waiting.pop(name)):
                yield name, (walk.finish(index) for index in range(walk.batch_count))
    for name, changes in waiting.items():
        with changed(changes):
            yield name, (batch.call(network) for batch in batches)


def _rounding(network: nn.Module, layer: FoundLayer) -> list[Change]:
    rounded = nn.Parameter(as_stored(layer.weight.detach(), "int8"), requires_grad=False)
    return [(holder, name, rounded) for holder, name in holders(network, layer)]
