"""The paths of a folder's quantized layers in a model, which may be of another class than the saved one.

A folder holds the names of the saved model. For a model of another class, the renamings that transformers applies to a
float folder are applied, prefixes of base models included. Layers that are not in the model are left out. A layer of
another shape stays float, so that transformers treats it as in a float folder.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

from bgd_plugin_adapters.transformers.config import BGDQuantizationConfig

__all__ = ["Layout", "layout_in", "renamings_for"]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The quantized layers of a folder in one model.

    Attributes:
        placement: sizes of each quantized layer, by its path in the model.
        names: the names in the model of each packed tensor of the folder; several if layers are tied.
        shared: tied layers by their path in the model, and the path of the layer whose tensors they share.
    """

    placement: dict[str, Sequence[int]]
    names: dict[str, tuple[str, ...]]
    shared: dict[str, str]


def renamings_for(model: Any) -> list[WeightRenaming]:
    """The renamings of a float folder, if the model is of another class than the saved one; otherwise none."""
    if type(model).__name__ in (model.config.architectures or ()):
        return []
    return [entry for entry in get_model_conversion_mapping(model) if isinstance(entry, WeightRenaming)]


def layout_in(model: Any, config: BGDQuantizationConfig, packed_bytes: Mapping[str, int]) -> Layout:
    """Find the layers of a folder in a float model.

    Args:
        model: before its layers are replaced.
        config: of the folder, with its `layers`.
        packed_bytes: length of the packed codes, by name in the folder, as far as known.
    """
    paths = _Paths(model)
    places: dict[str, str] = {}
    placement: dict[str, Sequence[int]] = {}
    for path, sizes in (config.layers or {}).items():
        place = paths.find(path)
        if place is not None and _fits(paths, place, path, sizes, config, packed_bytes):
            placement[place] = sizes
            if len(sizes) > 1:  # not a norm, whose tensors are not packed
                places[path] = place
    shared: dict[str, str] = {}
    for path, source in config.tied.items():
        place, first = paths.find(path), places.get(source)
        if place is not None and path not in (config.layers or {}):
            places[path] = place
            if first is not None and not paths.is_one(place, first):  # one module when it was saved, two here
                placement[place] = placement[first]
        if first is not None and path in places:
            shared[places[path]] = first
    return Layout(placement=placement, names=_names(paths, _sources(places, config.tied)), shared=shared)


def _names(paths: _Paths, sources: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """What each packed tensor of the folder is in the model, by the paths that share what stands at each source."""
    names: dict[str, tuple[str, ...]] = {}
    for path, targets in sources.items():
        for name, part in (("weight", "codes"), ("codes", "codes"), ("mask", "mask"), ("codebook", "codebook")):
            if part != "codebook" or targets != (paths.find(path),):
                renamed = tuple(f"{target}.{part}" for target in targets)
                names |= dict.fromkeys((f"{path}.{name}", paths.renamed(f"{path}.{name}")), renamed)
    return names


def _sources(places: Mapping[str, str], tied: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """The paths in the model, by the path under which the folder stores the layer."""
    sources: dict[str, tuple[str, ...]] = {}
    for path, place in places.items():
        source = tied.get(path, path)
        sources[source] = (*sources.get(source, ()), place)
    return sources


class _Paths:
    """Finds paths of a folder in a model."""

    def __init__(self, model: Any) -> None:
        self.state: dict[str, Tensor] = model.state_dict() | _parametrized(model)
        self._modules = dict(model.named_modules(remove_duplicate=False))
        self._renamings = renamings_for(model)
        self._prefix = model.base_model_prefix
        self._state: Any = self.state

    def renamed(self, name: str) -> str:
        """A name of the folder after transformers' renamings."""
        return rename_source_key(name, self._renamings, [])[0] if self._renamings else name

    def find(self, path: str) -> str | None:
        """The path in the model of a layer or norm of the folder; None if the model has none."""
        for suffix in (".weight", "", ".running_mean"):
            for renamings in (self._renamings, []):
                name: str = rename_source_key(
                    path + suffix, renamings, [], base_model_prefix=self._prefix, meta_state_dict=self._state
                )[0]
                if name in self.state and name.endswith(suffix):
                    return name.removesuffix(suffix)
        return None

    def is_one(self, place: str, other: str) -> bool:
        """Whether one module hangs at both places."""
        return self._modules.get(place) is self._modules.get(other)

    def shape(self, place: str) -> tuple[int, ...]:
        """The shape of the weight at a path."""
        value = self.state.get(f"{place}.weight", self.state.get(place))
        return tuple(value.shape) if value is not None else ()


def _parametrized(model: nn.Module) -> dict[str, Tensor]:
    """Weights computed by a parametrization, such as a weight norm; they are folded before layers are inserted."""
    modules = dict(model.named_modules())
    return {f"{p}.weight": m.weight for p, m in modules.items() if parametrize.is_parametrized(m, "weight")}


def _fits(
    paths: _Paths,
    place: str,
    path: str,
    sizes: Sequence[int],
    config: BGDQuantizationConfig,
    packed_bytes: Mapping[str, int],
) -> bool:
    """Whether the layer has the folder's shape; if the folder has no shapes, by the length of the codes."""
    if len(sizes) < 2:  # a norm
        return True
    shape = paths.shape(place)
    if (saved := config.shapes.get(path)) is not None:
        return tuple(saved) == shape
    source = config.tied.get(path, path)
    found = packed_bytes.get(f"{source}.weight", packed_bytes.get(f"{source}.codes"))
    bits = max(1, math.ceil(math.log2(max(2, sizes[1]))))
    return found is None or found == -(-(math.prod(shape) // max(1, sizes[0])) * bits // 8)
