"""Where the quantized layers of a folder stand in a model, which need not be of the class that was saved.

A folder of ours holds the names of the model that was saved. A model of another class gets the renamings that
transformers applies to a float folder, prefixes of base models included; what is not in the model is left out, and a
layer of another shape stays float, so that transformers treats it as it treats a float folder's.
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
        names: what each packed tensor of the folder is in the model: several names where layers are tied.
    """

    placement: dict[str, Sequence[int]]
    names: dict[str, tuple[str, ...]]


def renamings_for(model: Any) -> list[WeightRenaming]:
    """The renamings of a float folder, where the model is of another class than the one that was saved."""
    if type(model).__name__ in (model.config.architectures or ()):
        return []
    return [entry for entry in get_model_conversion_mapping(model) if isinstance(entry, WeightRenaming)]


def layout_in(model: Any, config: BGDQuantizationConfig, packed_bytes: Mapping[str, int]) -> Layout:
    """Find the layers of a folder in a float model.

    Args:
        model: as it is built, before its layers are replaced.
        config: of the folder; its `layers` are given.
        packed_bytes: length of the packed codes by their name in the folder, as far as it is known.
    """
    paths = _Paths(model)
    places: dict[str, str] = {}
    placement: dict[str, Sequence[int]] = {}
    for path, sizes in (config.layers or {}).items():
        place = paths.find(path)
        if place is not None and _fits(paths, place, path, sizes, config, packed_bytes):
            placement[place] = sizes
            if len(sizes) > 1:  # not a norm, whose tensors are packed in no way
                places[path] = place
    for path in config.tied:
        if path not in (config.layers or {}) and (place := paths.find(path)) is not None:
            places[path] = place
    names: dict[str, tuple[str, ...]] = {}
    for path, targets in _sources(places, config.tied).items():
        for name, part in (("weight", "codes"), ("codes", "codes"), ("mask", "mask"), ("codebook", "codebook")):
            if part != "codebook" or targets != (paths.find(path),):
                renamed = tuple(f"{target}.{part}" for target in targets)
                names |= dict.fromkeys((f"{path}.{name}", paths.renamed(f"{path}.{name}")), renamed)
    return Layout(placement=placement, names=names)


def _sources(places: Mapping[str, str], tied: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """The places in the model, by the path under which a folder stores the layer."""
    sources: dict[str, tuple[str, ...]] = {}
    for path, place in places.items():
        source = tied.get(path, path)
        sources[source] = (*sources.get(source, ()), place)
    return sources


class _Paths:
    """Paths of a folder in a model."""

    def __init__(self, model: Any) -> None:
        self.state: dict[str, Tensor] = model.state_dict() | _parametrized(model)
        self._renamings = renamings_for(model)
        self._prefix = model.base_model_prefix
        self._state: Any = self.state

    def renamed(self, name: str) -> str:
        """A name of the folder as transformers would rename it before it looks for it."""
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

    def shape(self, place: str) -> tuple[int, ...]:
        """Of the weight at a place."""
        value = self.state.get(f"{place}.weight", self.state.get(place))
        return tuple(value.shape) if value is not None else ()


def _parametrized(model: nn.Module) -> dict[str, Tensor]:
    """Weights that a parametrization computes, such as a weight norm; folded before a folder's layers are put in."""
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
    """Whether the layer has its folder's shape; judged by the length of the codes where a folder names no shapes."""
    if len(sizes) < 2:  # a norm
        return True
    shape = paths.shape(place)
    if (saved := config.shapes.get(path)) is not None:
        return tuple(saved) == shape
    source = config.tied.get(path, path)
    found = packed_bytes.get(f"{source}.weight", packed_bytes.get(f"{source}.codes"))
    bits = max(1, math.ceil(math.log2(max(2, sizes[1]))))
    return found is None or found == -(-(math.prod(shape) // max(1, sizes[0])) * bits // 8)
