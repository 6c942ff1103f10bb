"""Turn a config for each layer into the core's settings: one for the network, and overrides for layers that differ."""

from __future__ import annotations

import glob
from dataclasses import replace
from typing import Any

from torch import fx, nn

import bgd_plugin as bgd
from bgd_plugin import LayerConfig, integration
from bgd_plugin.integration import FAMILIES, ConfigError, PlannedLayer
from bgd_plugin_adapters.neural_compressor.config import BGDConfig
from bgd_plugin_adapters.neural_compressor.foreign import foreign_layers
from bgd_plugin_adapters.neural_compressor.settings import SIZES_AND_FORM, layer_setting

__all__ = ["Mapping", "core_settings"]

Mapping = dict[tuple[str, Any], Any]


def core_settings(model: nn.Module, mapping: Mapping, original_bytes: int | None = None) -> bgd.BGDConfig:
    """The core's settings for the configs of all layers, ours and other algorithms'.

    Args:
        model: the float network.
        mapping: the config of each layer.
        original_bytes: size of the float network, for ratios; None: count its parameters and buffers.

    Raises:
        ConfigError: a layer named in a config, by name or type, cannot be quantized; or every config says "fp32".
    """
    parent: BGDConfig = next(config for config in mapping.values() if isinstance(config, BGDConfig)).parent
    base = parent.core_config()
    wanted = {name: c for (name, _), c in mapping.items() if isinstance(c, BGDConfig) and c.dtype != "fp32"}
    if not wanted:
        raise ConfigError("every BGDConfig here has dtype='fp32': nothing would be quantized")
    is_whole = parent.global_config is not None and parent.dtype != "fp32"
    known = _quantizable(model, base, all_families=True)
    named = {name for name, _ in mapping}
    others: dict[str, LayerConfig | None] = dict.fromkeys(
        n for n in known if n not in wanted and (n in named or not is_whole)
    )
    default = _quantizable(model, base, all_families=False)
    own: dict[str, LayerConfig | None] = {}
    for name, config in wanted.items():
        differs = any(getattr(config, name) != getattr(parent, name) for name in SIZES_AND_FORM)
        kept_float = name not in default and (config.asked == name or _follows_foreign(model, known.get(name)))
        if name in known and (kept_float or (differs and name in default)):
            own[name] = _layer(known[name], config, base)
    result = replace(base, overrides=_overrides(others) + _overrides(own) + base.overrides)
    _check_asked(bgd.plan(model, result, original_bytes=original_bytes), wanted)
    return result


def _quantizable(model: nn.Module, base: bgd.BGDConfig, *, all_families: bool) -> dict[str, PlannedLayer]:
    """The layers that can be quantized, of all kinds or only of those with a setting; in blocks of one weight."""
    one = LayerConfig(block_size=1)
    families: dict[str, Any] = {name: one for name in FAMILIES if all_families or base.setting_for(name)}
    nothing: dict[str, Any] = dict.fromkeys(FAMILIES)
    try:
        found = bgd.plan(model, bgd.BGDConfig(**(nothing | families)))
    except ConfigError:  # no such layer
        return {}
    return {layer.name: layer for layer in found.layers}


def _follows_foreign(model: nn.Module, layer: PlannedLayer | None) -> bool:
    """Whether a layer comes first only because another algorithm has quantized those before it."""
    if layer is None or not isinstance(model, fx.GraphModule):
        return False
    foreign = foreign_layers(model)
    for node in model.graph.nodes:
        if node.name in layer.calls:
            return False
        if node.op == "call_module" and str(node.target) in foreign:
            return True
    return False


def _layer(layer: PlannedLayer, config: BGDConfig, base: bgd.BGDConfig) -> LayerConfig:
    """The setting of one layer: its config, and for the rest that of its kind, with blocks that divide its rows.

    Sizes that the kind leaves open stay so.

    Raises:
        ConfigError: its kind has no setting.
    """
    kind = base.setting_for(layer.family)
    if kind is None and config.block_size is None and config.form is None:
        raise ConfigError(
            f"layer {layer.name!r}: {layer.family} has no setting: give its config a block_size or a form"
        )
    setting = layer_setting(config.get_params_dict(), kind or LayerConfig())
    if setting.block_size and not config.block_size:
        columns = layer.weights // layer.rows
        fitting = max(d for d in range(1, columns + 1) if columns % d == 0 and d <= setting.block_size)
        setting = replace(setting, block_size=fitting)
    return setting


def _overrides(layers: dict[str, LayerConfig | None]) -> tuple[tuple[str, LayerConfig | None], ...]:
    """Settings of single layers, as overrides; names are escaped, because overrides are globs."""
    return tuple((glob.escape(name), layer) for name, layer in layers.items())


def _check_asked(plan: integration.Plan, wanted: dict[str, BGDConfig]) -> None:
    """Check that each local config applies to a planned layer."""
    planned = {layer.name for layer in plan.layers}
    reasons = {layer.name: layer.reason for layer in plan.skipped}
    asked: dict[str, list[str]] = {}
    for name, config in wanted.items():
        if config.asked is not None:
            asked.setdefault(config.asked, []).append(name)
    for key, names in asked.items():
        if not planned & set(names):
            why = "; ".join(f"{n}: {reasons.get(n, 'not called by itself in the network')}" for n in names[:5])
            raise ConfigError(
                f"BGDConfig for {key!r} would quantize nothing ({why}): give the first layer or a depthwise "
                "convolution a block_size of its own, by its name; leave out what cannot be quantized"
            )
