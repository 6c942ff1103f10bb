"""Before the fit: check that the network computes the same with quantized modules in the place of its layers.

A network's code may look at its layers: at their class, their attributes, or all parameters. That shows when modules of
the kinds that will be put in their places, with the float weights themselves, answer a calibration batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from bgd_plugin.calibration import Batch, Watch, answers_of, first_difference
from bgd_plugin.errors import CalibrationError, ConfigError
from bgd_plugin.files.attributes import dict_entries, note_scratch_, other_tensors
from bgd_plugin.graph import FoundLayer, Replaced, follow_, install_, untouched
from bgd_plugin.nn import PQModule
from bgd_plugin.planning.survey import Survey
from bgd_plugin.support.processes import largest

__all__ = ["rehearsed"]

_ELSEWHERE = "the network's code keeps its weight elsewhere, too, so that a module in its place would not be used"
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
    wanted, reached = _watched(own, survey, batches)
    reason, read = _tried(own, survey.found, first, wanted)
    unread = [] if reason else [layer.name for layer in survey.found if largest(layer.name in reached - read)]
    if unread:
        survey = survey.without(dict.fromkeys(unread, _ELSEWHERE))
        survey.require_some()
        reason, _ = _tried(own, survey.found, first, wanted)
    if not reason:
        return survey
    differences = {layer.name: _tried(own, [layer], first, wanted)[0] for layer in survey.found}
    kept = survey.without({name: _REASON + found for name, found in differences.items() if found})
    kept.require_some()
    reason, _ = _tried(own, kept.found, first, wanted)
    if reason:
        raise ConfigError(
            f"{type(own).__name__} does not compute the same with quantized modules in the place of its layers, even "
            f"with the float weights themselves: {reason}. Its code looks at the classes, the attributes or the "
            "parameters of its layers: exclude them with overrides, or change that code"
        )
    return kept


def _watched(own: nn.Module, survey: Survey, batches: Sequence[Batch]) -> tuple[list[Any], set[str]]:
    """The network's answers to the first batch, and the names of the layers that compute in it.

    Tensors that the run writes beside the network's state are noted where answers do not depend on them.
    """
    reached: set[str] = set()
    weights = {layer.name: layer.weight for layer in survey.found}
    watch = Watch(weights, lambda name, x, geometry: reached.add(name))
    is_graph = isinstance(survey.network, fx.GraphModule)
    with untouched(own) as (network,):
        before = {name: (tensor, tensor._version) for name, tensor in other_tensors(network)[1].items()}
        with contextlib.nullcontext() if is_graph else watch:
            wanted, caches = _answers_without_caches(network, [batches[0]])
        written = [name for name, tensor in other_tensors(network)[1].items() if _is_written(tensor, before.get(name))]
        others = [batches[len(batches) - 1], batches[0]]
        is_scratch = bool(written) and _are_equal(answers_of(network, others)[-1], wanted[0])
    if is_scratch:
        note_scratch_(own, written)
        for name, table, key, _ in dict_entries(own):
            if name in caches:  # made by float weights, from which the compressed network's differ
                table.pop(key, None)
    return wanted, {layer.name for layer in survey.found} if is_graph else reached


def _answers_without_caches(network: nn.Module, first: Sequence[Batch]) -> tuple[list[Any], set[str]]:
    """A network's answers, and the names of the tensors in its dicts that a run makes again as they were."""
    held = dict_entries(network)
    for _, table, key, _ in held:
        table.pop(key, None)  # several modules may hold the same dict
    try:
        answers = answers_of(network, first)
    except Exception:  # whatever the network's code raises without them
        if not held:
            raise
        answers = []
    made = {name for name, table, key, tensor in held if answers and _is_same(table.get(key), tensor)}
    if len(made) == len(held):
        return answers, made
    for name, table, key, tensor in held:
        if name not in made:
            table[key] = tensor
    return answers_of(network, first), made


def _is_same(found: Any, tensor: Tensor) -> bool:
    return isinstance(found, Tensor) and found.device == tensor.device and torch.equal(found, tensor)


def _is_written(tensor: Tensor, before: tuple[Tensor, int] | None) -> bool:
    return before is None or tensor.data_ptr() != before[0].data_ptr() or tensor._version != before[1]


def _are_equal(found: Any, wanted: Any) -> bool:
    pairs = zip(*(filter(torch.is_tensor, pytree.tree_leaves(answer)) for answer in (found, wanted)), strict=True)
    return all(torch.equal(one, other) for one, other in pairs)


def _tried(
    own: nn.Module, found: Sequence[FoundLayer], batches: Sequence[Batch], wanted: list[Any]
) -> tuple[str, set[str]]:
    """What the exchange of some layers changes, as text, the same in all processes, and empty if nothing.

    Also the names of the layers whose modules were read.
    """
    reason = ""
    with untouched(own) as (trial,):
        installed: dict[str, list[PQModule]] = {}
        replaced: Replaced = []
        try:
            for layer in found:
                installed[layer.name] = _install_exactly_(trial, layer, replaced)
            follow_(trial, replaced)
            reason = first_difference(answers_of(trial, batches), wanted, "its answers")
        except CalibrationError as error:
            reason = str(error)
        read = {name for name, modules in installed.items() if any("read" in vars(module) for module in modules)}
    return reason or ("it does so on another process" if largest(bool(reason)) else ""), read


def _install_exactly_(network: nn.Module, layer: FoundLayer, replaced: Replaced) -> list[PQModule]:
    """Put quantized modules in the place of a layer whose decoded weight is the layer's own; see `swap_`."""
    matrix = layer.matrix.detach()
    columns = layer.columns
    codebook = matrix.new_zeros(2, columns)
    codes = torch.zeros(layer.rows, 1, dtype=torch.uint8, device=matrix.device)
    modules = install_(network, layer, codebook, codes, replaced=replaced)
    for module in modules:
        kind = type(module)
        module.__class__ = type(kind.__name__, (kind,), {"matrix": property(_exact), "__module__": kind.__module__})
        vars(module)["exact"] = matrix
        module.mask = codes.new_ones(1, dtype=torch.bool)  # an embedding then decodes its whole weight
    return modules


def _exact(module: PQModule) -> Tensor:
    vars(module)["read"] = True
    weight: Any = vars(module)["exact"]
    return weight  # type: ignore[no-any-return]
