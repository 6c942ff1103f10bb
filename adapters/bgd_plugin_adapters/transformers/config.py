"""The settings as a transformers quantization config, which `config.json` holds for a quantized model."""

from __future__ import annotations

import dataclasses
import glob
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedConfig
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils.quantization_config import QuantizationConfigMixin

from bgd_plugin import BGDConfig, integration
from bgd_plugin.integration import ConfigError

__all__ = ["QUANT_METHOD", "BGDQuantizationConfig", "parts_of"]

QUANT_METHOD = "bgd"
# transformers' folders have no 8-bit numbers with scales: such values would take four bytes each.
_STORAGE = {"codebook_storage": "float16", "weight_storage": "float16"}
_LOAD_WITH = (
    "pip install 'bgd-plugin[transformers]'; then, before from_pretrained: "
    "import bgd_plugin; bgd_plugin.load_adapter('transformers')"
)


class BGDQuantizationConfig(QuantizationConfigMixin):
    """The fields of `BGDConfig` as keywords, and transformers' own `modules_to_not_convert`.

    `codebook_storage` and `weight_storage` are "float16" by default.

    Args:
        modules_to_not_convert: layers that stay float, by name or part of a name, as in transformers' other configs.
            An entry that matches no layer is an error.
        config: existing settings, instead of keywords.
        layers: block and codebook size of each quantized layer; written when a model is quantized.
        shapes: of the weight of each quantized layer; written when a model is saved.
        tied: quantized layers that share the tensors of another one, and that one, whose name the tensors have;
            written when a model is saved.
        checksum: of all codes and codebooks; written when a model is saved.
        original_bytes: of the float model; written when a model is quantized.
        **fields: of `BGDConfig`, also as plain values.
    """

    def __init__(
        self,
        modules_to_not_convert: Sequence[str] | None = None,
        *,
        config: BGDConfig | None = None,
        layers: Mapping[str, Sequence[int]] | None = None,
        shapes: Mapping[str, Sequence[int]] | None = None,
        tied: Mapping[str, str] | None = None,
        checksum: str | None = None,
        original_bytes: int | None = None,
        **fields: Any,
    ) -> None:
        for written in ("quant_method", "load_with"):
            fields.pop(written, None)
        if config is not None and fields:
            raise ConfigError(f"config and {', '.join(sorted(fields))}: give only one of them")
        if isinstance(modules_to_not_convert, str):
            raise ConfigError(f"modules_to_not_convert={modules_to_not_convert!r}: give a list of names")
        self.quant_method = QUANT_METHOD
        self.config = config or BGDConfig.from_dict(_STORAGE | fields)
        self.modules_to_not_convert = list(modules_to_not_convert) if modules_to_not_convert is not None else None
        self.layers: dict[str, Sequence[int]] | None = dict(layers) if layers is not None else None
        self.shapes: dict[str, Sequence[int]] = dict(shapes or {})
        self.tied: dict[str, str] = dict(tied or {})
        self.checksum = checksum
        self.original_bytes = original_bytes

    def to_dict(self) -> dict[str, Any]:
        """The content for `config.json`."""
        written: dict[str, Any] = {
            "quant_method": QUANT_METHOD,
            "load_with": _LOAD_WITH,
            "modules_to_not_convert": self.modules_to_not_convert,
            "layers": {path: list(sizes) for path, sizes in self.layers.items()} if self.layers else None,
            "shapes": {path: list(shape) for path, shape in self.shapes.items()},
            "tied": dict(self.tied),
            "checksum": self.checksum,
            "original_bytes": self.original_bytes,
        }
        settings: dict[str, Any] = _plain(self.config.to_dict())
        return written | settings

    def settings_for(self, model: nn.Module) -> BGDConfig:
        """The core's settings: each layer of `modules_to_not_convert` gets an override that keeps it float.

        Raises:
            ConfigError: an entry that matches no layer.
        """
        if not self.modules_to_not_convert:
            return self.config
        names = [*integration.layers_in(model)[0]]
        for entry in self.modules_to_not_convert:
            if all(should_convert_module(name, [entry]) for name in names):
                raise ConfigError(f"modules_to_not_convert: {entry!r} matches no layer; the model has {_some(names)}")
        kept = [name for name in names if not should_convert_module(name, self.modules_to_not_convert)]
        overrides = tuple((glob.escape(name), None) for name in kept)
        return dataclasses.replace(self.config, overrides=(*overrides, *self.config.overrides))


def parts_of(config: Any) -> Iterator[Any]:
    """The configs inside a model's config, such as those of its encoder and decoder."""
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if isinstance(part, PreTrainedConfig):
            yield part
            yield from parts_of(part)


def _plain(value: Any) -> Any:
    """Tuples as lists, as JSON reads them back."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, (tuple, list)) else value


def _some(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
