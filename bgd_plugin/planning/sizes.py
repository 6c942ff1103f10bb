"""Sizes before compression: the length of the future file, and the size by the paper's accounting."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from bgd_plugin.encoding.masks import mask_form, pack_mask
from bgd_plugin.encoding.small_integers import fold_to_integers
from bgd_plugin.files.format import State, file_size, stored_state
from bgd_plugin.files.grids import is_on_grid
from bgd_plugin.files.rounding import round_floats_, round_weights_
from bgd_plugin.graph import FoundLayer, float_module, module_at, untouched
from bgd_plugin.nn import PQModule, quantized
from bgd_plugin.planning.lean import WEIGHT_BITS, coarse_weights, freeze_lean_norms_
from bgd_plugin.planning.survey import Chosen, Survey, weight_name
from bgd_plugin.planning.types import PlannedLayer
from bgd_plugin.pq.forms import FORMS

__all__ = ["Sketch", "as_saved_", "paper_bytes", "planned_layer", "planned_paper_bytes", "stream_bytes"]

_ENTROPY_LEVELS = 2  # of the module that stands for an entropy-coded layer
_STREAM_BYTES, _REST_SHARE = 16, 64
_COUNTER_BYTES = 8  # by which a batch norm's count of batches may grow in the file while the network is finetuned


class Sketch:
    """The state of a network as its file will hold it, in which layers can be exchanged for quantized ones.

    Args:
        survey: of the float network, which is left untouched.
    """

    def __init__(self, survey: Survey) -> None:
        self._network = survey.own
        self._config = survey.config
        self._paths = {layer.name: dict(paths) for layer, paths in _weight_paths(survey.own, survey.everywhere)}
        self._storages = survey.storages
        self._names = {weight_name(layer): layer.name for layer in survey.everywhere}
        is_fixed = not survey.config.has_budget
        always_quantized = [f.weight for f, p in survey.chosen if is_fixed or p.name not in survey.free]
        with untouched(survey.own) as (base,):
            _empty_(base, always_quantized)
            as_saved_(base, survey)
            self._state = State.of(base)

    def file_size(self, chosen: Chosen, storages: Mapping[str, str] | None = None) -> int:
        """Length in bytes of the file with the chosen layers quantized and the rest float, rounded as the settings say.

        With a budget it is an upper bound: the fit changes statistics and biases, which then may no longer fit a narrow
        type.

        Args:
            chosen: the layers to be quantized.
            storages: by weight name, the storage types of float weights; those of the survey where they are not given.
        """
        state = self._with(chosen, storages or {})
        content = stored_state(state)
        if not self._config.has_budget:
            return file_size(content)
        whole = state.tensors
        narrows = self._config.float_storage == "float32"  # by its values, which may change
        changing = {name for name, value in whole.items() if _may_change(value) and narrows}
        tensors = {n: whole[n].to("meta") if n in changing else t for n, t in content.tensors.items()}
        counters = sum(not t.is_floating_point() and t.ndim == 0 for t in whole.values())
        reserve = _COUNTER_BYTES * counters if self._config.finetuning else 0
        if content.streams:  # names and numbers in the header, and 8-bit integers that the fit changes
            rest = sum(t.numel() * t.element_size() for n, t in content.tensors.items() if n not in content.streams)
            reserve += _STREAM_BYTES * len(content.streams) + rest // _REST_SHARE
        return file_size(dataclasses.replace(content, tensors=tensors)) + reserve

    def _with(self, chosen: Chosen, storages: Mapping[str, str]) -> State:
        """The state with empty codebooks and codes in the place of weights, and float weights of other types."""
        narrow = {
            path: self._state.tensors[path].to("meta", getattr(torch, storage))
            for name, storage in storages.items()
            if storage != self._storages.get(name)
            for path in self._paths[self._names[name]]
        }
        places = {
            name: (path, module, planned)
            for found, planned in chosen
            for module in [planned_layer(self._network, found, planned)]
            for name, path in self._paths[found.name].items()
        }
        tensors: dict[str, Tensor] = {}
        layers, streams = dict(self._state.layers), dict(self._state.stream_bytes)
        for name, value in self._state.tensors.items():
            if name not in places:
                tensors[name] = narrow.get(name, value)
                continue
            path, module, planned = places[name]
            layers[path] = module
            if planned.codes == "entropy":
                streams[path] = stream_bytes(planned, module)
            parts = {"codebook": module.codebook.detach(), "codes": module.codes, "mask": module.mask}
            tensors |= {f"{path}.{part}": tensor for part, tensor in parts.items() if tensor is not None}
        return dataclasses.replace(self._state, tensors=tensors, layers=layers, stream_bytes=streams)


def _weight_paths(
    network: nn.Module, layers: Sequence[FoundLayer]
) -> Iterator[tuple[FoundLayer, list[tuple[str, str]]]]:
    """For each layer, the names of its weight in a state dict, and the path at which a module will hold it."""
    paths: dict[int, list[str]] = {}
    for path, module in network.named_modules(remove_duplicate=False):
        paths.setdefault(id(module), []).append(path)
    same: dict[int, list[str]] = {}
    for name, parameter in network.named_parameters(remove_duplicate=False):
        same.setdefault(id(parameter), []).append(name)
    for layer in layers:
        names = []
        for target in (layer.target, *layer.tied):
            owner_path, _, attribute = target.rpartition(".")
            owner = module_at(network, owner_path)
            if attribute in owner._parameters:
                held = [f"{path}.{attribute}".lstrip(".") for path in paths[id(owner)]]
                held = list(dict.fromkeys((*held, *same[id(owner._parameters[attribute])])))
                names += list(zip(held, held, strict=True))
            else:
                names += [(f"{path}.weight".lstrip("."), path) for path in paths[id(module_at(network, target))]]
        yield layer, names


def stream_bytes(planned: PlannedLayer, module: PQModule) -> int:
    """What an entropy-coded layer has for its stream, and for its levels beyond those of its `planned_layer`."""
    return planned.size_bytes - _ENTROPY_LEVELS * module.codebook.element_size()


def planned_layer(network: nn.Module, found: FoundLayer, planned: PlannedLayer) -> PQModule:
    """The module that will stand for a layer, with shapes and types alone.

    Args:
        network: in which the layer was found.
        found: the layer.
        planned: what it will be.
    """
    dtype = torch.int8 if planned.codebook_storage == "int8" else found.weight.dtype
    size = _ENTROPY_LEVELS if planned.codes == "entropy" else planned.codebook_size  # the levels count as stream
    codebook, codes = FORMS[planned.form].empty(planned.sizes(size), dtype=dtype, device="meta")
    module = float_module(network, found.target, found.layout)
    return quantized(module, codebook, codes, planned.kept(found.matrix), planned.form)


def _empty_(network: nn.Module, weights: list[nn.Parameter]) -> None:
    """Take the values from weights that a file never holds in float: they need not be rounded."""
    empty = {id(weight): nn.Parameter(weight.detach().to("meta"), requires_grad=False) for weight in weights}
    for module in network.modules():
        for name, parameter in module._parameters.items():
            if id(parameter) in empty:
                module._parameters[name] = empty[id(parameter)]


def as_saved_(network: nn.Module, survey: Survey) -> None:
    """Round what stays float to the values that the file of a finished network would have, in place.

    Args:
        network: of the survey, or the same with some layers quantized.
        survey: with the settings.
    """
    config, coarse = survey.config, coarse_weights(survey)
    for name in coarse:
        owner, _, attribute = name.rpartition(".")
        parameters = module_at(network, owner)._parameters
        weight = parameters[attribute]
        if weight is not None and not weight.is_meta and not is_on_grid(weight.detach().half()):
            parameters[attribute] = nn.Parameter(fold_to_integers(weight.detach(), WEIGHT_BITS)[0], requires_grad=False)
    freeze_lean_norms_(network, config)
    round_weights_(network, {name: to for name, to in survey.storages.items() if name not in coarse})
    if config.float_storage == "float16":
        round_floats_(network, survey.tables)


def paper_bytes(model: nn.Module) -> int:
    """Size by the paper's accounting (arXiv 1907.05686, section 4.1), in bytes.

    `log2(k) / d` bits for each quantized weight, codebooks in half precision, every other parameter in single
    precision; masks, which the paper has none of, in the bits that they take.
    """
    return -(-_paper_bits(model) // 8)


def planned_paper_bytes(survey: Survey) -> int:
    """The same of the network that the survey's layers will make."""
    bits = _paper_bits(survey.own) - sum(32 * found.weight.numel() for found in survey.found)
    for planned in survey.layers:
        bits += planned.paper_bits
    return -(-bits // 8)


def _paper_bits(model: nn.Module) -> int:
    layers = list({id(m.codebook): m for m in model.modules() if isinstance(m, PQModule)}.values())  # tied ones once
    codebooks = {id(layer.codebook) for layer in layers}
    bits = sum(layer.codes.numel() * layer.code_bits + 16 * layer.codebook.numel() for layer in layers)
    bits += sum(8 * pack_mask(m.mask, mask_form(m.mask)).numel() for m in layers if m.mask is not None)
    return bits + sum(32 * p.numel() for p in model.parameters() if id(p) not in codebooks)


def _may_change(value: Tensor) -> bool:
    return value.is_floating_point() and value.ndim == 1
