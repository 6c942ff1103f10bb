"""Spend a file's budget to the end: the last layer whose codes are entropy coded gets the bytes that all others left.

A plan reserves bytes before there are codes, and streams come out a little shorter. So before the last of these layers
is fitted the length of the file is measured, with everything that is finished as it will be saved. Should the finished
file be too long all the same, codes are fitted once more, to fewer bytes.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from bgd_plugin.encoding.stream import coded_bytes
from bgd_plugin.files.content import measured_size
from bgd_plugin.files.format import State, file_size, stored_state
from bgd_plugin.fitting import FittedLayer, fit_weight
from bgd_plugin.graph import copy_module, install_, module_or_none
from bgd_plugin.nn import PQModule
from bgd_plugin.planning.sizes import as_saved_, planned_layer, stream_bytes
from bgd_plugin.planning.survey import Survey
from bgd_plugin.planning.types import PlannedLayer

__all__ = ["shorten_", "with_the_rest"]

_RESERVE_BYTES = 48
"""Of the header: numbers that are known at the end."""
_LEAST_SHARE = 0.5
_TRIALS = 4


def with_the_rest(survey: Survey, student: nn.Module, index: int) -> PlannedLayer:
    """A layer as planned; the last one whose codes are entropy coded, with all bytes of the budget that are left.

    Args:
        survey: the layers, and how each is quantized.
        student: the network whose layers before this one are finished.
        index: of the layer among those to be quantized.
    """
    planned = survey.layers[index]
    target = survey.config.budget_bytes(survey.original_bytes)
    coded = [place for place, layer in enumerate(survey.layers) if layer.codes == "entropy"]
    if target is None or not coded or index != coded[-1]:
        return planned
    left = target - _length(survey, student) - _RESERVE_BYTES
    least = int(_LEAST_SHARE * planned.size_bytes)
    return dataclasses.replace(planned, size_bytes=max(least, planned.size_bytes + left))


def _length(survey: Survey, student: nn.Module) -> int:
    """Of the file, if what is not fitted yet comes out as planned."""
    network = copy_module(student, share_tensors=True)
    as_saved_(network, survey)
    streams: dict[int, int] = {}
    for found, planned in survey.chosen:
        if isinstance(module_or_none(network, planned.target), PQModule):
            continue
        shape = planned_layer(network, found, planned)
        codebook, mask = shape.codebook.detach(), planned.kept(found.matrix)
        modules = install_(network, found, codebook, shape.codes, mask, planned.form)
        if planned.codes == "entropy":
            streams |= dict.fromkeys(map(id, modules), stream_bytes(planned, shape))
    state = State.of(network)
    lengths = {path: streams[id(layer)] for path, layer in state.layers.items() if id(layer) in streams}
    return file_size(stored_state(dataclasses.replace(state, stream_bytes=lengths)))


def shorten_(survey: Survey, network: nn.Module, target_bytes: int) -> list[str]:
    """Fit entropy-coded layers again, to fewer bytes, until the file is no longer than `target_bytes`.

    Args:
        survey: the layers, and how each is quantized.
        network: the compressed one; its largest streams are changed in place.
        target_bytes: of the file.

    Returns:
        the names of the layers.
    """
    layers = [p for p in survey.layers if p.codes == "entropy"]
    found = [(p, m) for p in layers if isinstance(m := module_or_none(network, p.target), PQModule)]
    found.sort(key=lambda pair: -pair[0].size_bytes)
    names: list[str] = []
    for planned, layer in found[:_TRIALS]:
        excess = measured_size(network) - target_bytes
        if excess <= 0:
            break
        size = coded_bytes(layer.codes, layer.codebook_size) + layer.codebook_size
        least = dataclasses.replace(planned, size_bytes=max(int(_LEAST_SHARE * size), size - excess - _RESERVE_BYTES))
        _put_(network, layer, _coarser(layer, least))
        names.append(planned.name)
    return names


def _coarser(layer: PQModule, planned: PlannedLayer) -> FittedLayer:
    """The decoded weight, fitted to fewer bytes. Between its levels it is made even, or few lengths could be had."""
    weight: Tensor = layer.matrix.detach()
    levels = layer.codebook.detach().flatten().sort().values
    step = float((levels[-1] - levels[0]) / max(1, len(levels) - 1))
    noise = torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) - 0.5
    return fit_weight(weight + step * noise.to(weight), torch.eye(1), planned, None, 0, torch.Generator())


def _put_(network: nn.Module, layer: PQModule, fit: FittedLayer) -> None:
    """Give a layer, and those that share its codebook, other codes."""
    old = layer.codebook
    codebook = nn.Parameter(fit.codebook.to(old), requires_grad=old.requires_grad)
    codes = fit.codes.to(layer.codes)
    for module in network.modules():
        if isinstance(module, PQModule) and module.codebook is old:
            module.codebook, module.codes = codebook, codes
