"""Settings from plain mappings, as JSON and frameworks give them; what is left out takes its default."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from bgd_plugin.config.checks import check
from bgd_plugin.config.layer import BLOCK_SIZES, CODEBOOK_SIZE, LayerConfig

__all__ = ["Override", "checked_overrides", "nested", "nested_overrides", "upgraded"]

Override = tuple[str, "LayerConfig | None"]


def nested(kind: type[Any], values: Any, where: str) -> Any:
    """An instance of `kind` from a mapping of values; None and instances are returned unchanged.

    Args:
        where: names the setting in messages.

    Raises:
        ConfigError: not a mapping, or an unknown field.
    """
    if values is None or isinstance(values, kind):
        return values
    check(isinstance(values, Mapping), f"{where}: found {values!r}, give the fields of {kind.__name__}")
    known = {f.name for f in dataclasses.fields(kind)}
    unknown = sorted(set(values) - known)
    check(not unknown, f"{where}: unknown {', '.join(unknown)}; {kind.__name__} has {', '.join(sorted(known))}")
    return kind(**values)


def upgraded(fields: Mapping[str, Any], version: int) -> dict[str, Any]:
    """Settings of an older version as this one has them.

    In version 1 sizes were fixed unless a budget or a bound was given, and a budget chose for the kinds of layer whose
    sizes were the default ones.

    Args:
        fields: as `BGDConfig.from_dict` gets them.
        version: number of their layout, from 1.
    """
    if version != 1:
        return dict(fields)
    result = {"max_divergence": None, **fields}
    for kind in ("conv", "pointwise_conv", "linear"):
        if result.get(kind) == {"block_size": BLOCK_SIZES[kind], "codebook_size": CODEBOOK_SIZE}:
            result[kind] = {}
    return result


def nested_overrides(overrides: Any) -> Any:
    """Overrides whose settings may be mappings: pairs, or a mapping by glob. Other errors are found later."""
    if not isinstance(overrides, (Mapping, list, tuple)):
        return overrides
    pairs = overrides.items() if isinstance(overrides, Mapping) else overrides
    return tuple(_nested_override(entry) for entry in pairs)


def _nested_override(entry: Any) -> Any:
    if isinstance(entry, (tuple, list)) and len(entry) == 2 and isinstance(entry[1], Mapping):
        return entry[0], nested(LayerConfig, entry[1], f"override {entry[0]!r}")
    return entry


def checked_overrides(overrides: Any) -> tuple[Override, ...]:
    """Overrides as pairs.

    Raises:
        ConfigError: an entry is not a pair of a glob and a setting.
    """
    is_sequence = isinstance(overrides, (tuple, list))
    check(is_sequence, f"overrides: found {overrides!r}, give pairs of a glob and a LayerConfig or None")
    checked = []
    for entry in overrides:
        check(
            isinstance(entry, (tuple, list)) and len(entry) == 2 and isinstance(entry[0], str),
            f"overrides: found {entry!r}, give pairs of a glob and a LayerConfig or None",
        )
        pattern, layer = entry
        check(
            layer is None or isinstance(layer, LayerConfig),
            f"override {pattern!r}: found {layer!r}, give a LayerConfig, or None to keep the layers float",
        )
        checked.append((pattern, layer))
    return tuple(checked)
