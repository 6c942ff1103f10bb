"""The parameters of the config: the fields of the core's `BGDConfig`, and the parameters of a single layer.

A new field of the core becomes a parameter here without a change.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import bgd_plugin as bgd
from bgd_plugin import LayerConfig
from bgd_plugin.integration import ConfigError

__all__ = [
    "LAYER_DEFAULTS",
    "NETWORK_DEFAULTS",
    "SIZES_AND_FORM",
    "checked",
    "core_config",
    "is_choice",
    "layer_setting",
    "plain",
]

DTYPES = ("pq", "fp32")
FORMS = ("blocks", "trellis")
SIZES_AND_FORM = ("block_size", "codebook_size", "form")
LAYER_DEFAULTS: dict[str, Any] = {"dtype": "pq", **dict.fromkeys(SIZES_AND_FORM)}
NETWORK_DEFAULTS: dict[str, Any] = {
    field.name: getattr(bgd.BGDConfig(), field.name) for field in dataclasses.fields(bgd.BGDConfig)
}


def is_choice(name: str, value: Any) -> bool:
    """Whether the value of the parameter called `name` is a list of values for `autotune` to choose from."""
    pairs = name == "overrides" and isinstance(value, list) and all(_is_pair(entry) for entry in value)
    return isinstance(value, list) and not pairs


def _is_pair(entry: Any) -> bool:
    return isinstance(entry, (list, tuple)) and len(entry) == 2 and isinstance(entry[0], str)


def checked(name: str, value: Any) -> Any:
    """The value of the parameter called `name` as the core has it; plain dicts and lists become its settings.

    Raises:
        ConfigError: the core refuses the value.
    """
    if is_choice(name, value):
        if not value:
            raise ConfigError(f"{name}=[]: give at least one value to choose from")
        return [checked(name, option) for option in value]
    if name == "dtype" and value not in DTYPES:
        raise ConfigError(f"dtype={value!r}: give 'pq' to quantize a layer or 'fp32' to keep it float")
    if name == "form" and value not in (None, *FORMS):
        raise ConfigError(f"form={value!r}: give 'blocks' or 'trellis', or None for what the kind of layer has")
    if name == "block_size" and value is not None:
        LayerConfig(block_size=value)
    if name == "codebook_size" and value is not None:
        LayerConfig(block_size=1, codebook_size=value)
    return value if name in LAYER_DEFAULTS else getattr(bgd.BGDConfig.from_dict({name: value}), name)


def plain(name: str, value: Any) -> Any:
    """The value of the parameter called `name` as JSON has it; the inverse of `checked`."""
    if is_choice(name, value):
        return [plain(name, option) for option in value]
    if name in LAYER_DEFAULTS:
        return value
    return _lists(bgd.BGDConfig(**{name: value}).to_dict()[name])


def _lists(value: Any) -> Any:
    """Tuples as lists, as JSON reads them back."""
    if isinstance(value, dict):
        return {key: _lists(entry) for key, entry in value.items()}
    return [_lists(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def core_config(parameters: dict[str, Any]) -> bgd.BGDConfig:
    """The core's settings for the whole network; sizes and form apply to every kind of layer with a setting.

    Raises:
        ConfigError: a parameter is a list of choices, or sizes are given beside trellis codes.
    """
    for name, value in parameters.items():
        if is_choice(name, value):
            raise ConfigError(
                f"{name} is a list of {len(value)} values, which only autotune accepts: give quantize one of them"
            )
    fields = {name: parameters[name] for name in NETWORK_DEFAULTS}
    for name, value in fields.items():
        if isinstance(value, LayerConfig):
            fields[name] = layer_setting(parameters, value)
    return bgd.BGDConfig(**fields)


def layer_setting(parameters: dict[str, Any], kind: LayerConfig) -> LayerConfig:
    """The core's setting of a layer, or of a kind of layer: the parameters of one layer, and for the rest `kind`.

    Raises:
        ConfigError: sizes are given beside trellis codes.
    """
    form = parameters["form"] or kind.codes
    sizes = {name: parameters[name] for name in ("block_size", "codebook_size")}
    if form == kind.codes:
        sizes = {name: value or getattr(kind, name) for name, value in sizes.items()}
    return LayerConfig(codes=form, **sizes)
