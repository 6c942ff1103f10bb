"""Load the packed tensors of a folder, by a weight conversion as in transformers' own quantizers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers.core_model_loading import ConversionOps, WeightConverter

from bgd_plugin_adapters.transformers.files import unpacked_codes, unpacked_mask

__all__ = ["PackedTensors"]


class _Unpack(ConversionOps):
    """Unpacks a tensor for the quantized layers; tied layers get the same tensor."""

    def __init__(self, places: Mapping[str, tuple[str, ...]]) -> None:
        self.places = {names[0]: names for names in places.values()}

    def __deepcopy__(self, memo: Any) -> _Unpack:
        """Return itself: it is never changed, and transformers copies a conversion for each tensor."""
        return self

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, Any]:
        """The tensor under each of its names."""
        packed: Tensor = next(iter(input_dict.values()))[0]
        first = str(kwargs["full_layer_name"])
        path, _, part = first.rpartition(".")
        layer = kwargs["model"].get_submodule(path)
        if part == "codes":
            packed = unpacked_codes(path, layer, packed)
        elif part == "mask":
            packed = unpacked_mask(layer, packed)
        return dict.fromkeys(self.places[first], packed)


class PackedTensors(WeightConverter):
    """Loads tensors of a folder by a table of their names in the model."""

    __slots__ = ("places",)

    def __init__(self, places: Mapping[str, tuple[str, ...]]) -> None:
        super().__init__("bgd_plugin_packed", "bgd_plugin_unpacked", [_Unpack(places)])
        self.places = places

    def __deepcopy__(self, memo: Any) -> PackedTensors:
        """A new one with the same table, without the tensors collected by this one."""
        return PackedTensors(self.places)

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        """The first name in the model of the folder's tensor `source_key`; unchanged if it is not in the table."""
        names = self.places.get(source_key)
        return (source_key, None) if names is None else (names[0], self.source_patterns[0])
