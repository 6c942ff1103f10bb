"""torchao: `quantize_(model, BGDWeightOnlyConfig())`, by itself and inside `FqnToConfig`.

torchao passes one module at a time to its handlers, without a name and without data. So torchao's own `quantize_` fits
each weight separately; the `quantize_` of this module takes calibration data, sees the whole network, and rejects names
that match nothing.
"""

from __future__ import annotations

import dataclasses
import glob
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torchao.core.config import ALLOWED_AO_MODULES, AOBaseConfig
from torchao.quantization import FqnToConfig
from torchao.quantization import quantize_ as torchao_quantize_
from torchao.quantization.quant_api import _is_linear
from torchao.quantization.transform_module import register_quantize_module_handler
from torchao.utils import TorchAOBaseTensor

import bgd_plugin as bgd
from bgd_plugin import BGDConfig, LayerConfig, integration
from bgd_plugin.integration import FAMILIES, ConfigError, Report

__all__ = ["BGDWeightOnlyConfig", "make_room_", "quantize_", "register"]

Filter = Callable[[nn.Module, str], bool]

_OF_NETWORKS = ("distillation", "reconstruction", "finetuning", "freeze_norms", "target_bytes", "target_ratio")


@dataclass(frozen=True, kw_only=True)
class BGDWeightOnlyConfig(BGDConfig, AOBaseConfig):
    """The settings of `BGDConfig` as a torchao config; every field means the same.

    `overrides` must be empty: `filter_fn` and `FqnToConfig` select layers and their settings.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.overrides:
            raise ConfigError("overrides: torchao chooses layers by filter_fn, and settings by name with FqnToConfig")
        object.__setattr__(self, "overrides", [])  # lists, here and below: torchao's JSON has no tuples
        if self.finetuning:
            finetuning = dataclasses.replace(self.finetuning)
            for field in dataclasses.fields(finetuning):
                value = getattr(finetuning, field.name)
                if isinstance(value, tuple):
                    object.__setattr__(finetuning, field.name, list(value))
            object.__setattr__(self, "finetuning", finetuning)


def register() -> None:
    """Register the handler, and let torchao read our configs from JSON."""
    register_quantize_module_handler(BGDWeightOnlyConfig)(_handle)
    ALLOWED_AO_MODULES.update((__name__, "bgd_plugin.config"))


def quantize_(
    model: nn.Module,
    config: AOBaseConfig,
    filter_fn: Filter | None = None,
    *,
    calibration: Iterable[Any] | None = None,
    **options: Any,
) -> Report:
    """Quantize in place, as torchao's `quantize_` does, and with calibration data if it is given.

    Args:
        model: changed in place.
        config: a `BGDWeightOnlyConfig`, or a `FqnToConfig` of such configs; it may also have other torchao configs for
            other layers, which torchao applies afterwards.
        filter_fn: selects the modules to quantize; default: linear ones. Not together with `FqnToConfig`.
        calibration: batches, as for `bgd_plugin.quantize`; without it each weight is fitted separately.
        **options: of `bgd_plugin.quantize`: `teacher`, `forward`, `checkpoint`, `progress`.

    Returns:
        the report of `bgd_plugin.quantize`.

    Raises:
        ConfigError: a name or filter that matches nothing, a layer that is already quantized, a config of another kind.
    """
    chosen = _by_name(model, config) if isinstance(config, FqnToConfig) else _by_filter(model, config, filter_fn)
    if isinstance(config, FqnToConfig) and filter_fn is not None:
        raise ConfigError("filter_fn and FqnToConfig: give only one of them")
    ours = {name: c for name, c in chosen.items() if isinstance(c, BGDWeightOnlyConfig)}
    others = OrderedDict((name, c) for name, c in chosen.items() if not isinstance(c, BGDWeightOnlyConfig))
    if not ours:
        raise ConfigError("no layer has a BGDWeightOnlyConfig: use torchao's own quantize_")
    for name in ours:
        _require_float(model.get_submodule(name), f"layer {name!r}")
    settings = _core_config(model, ours)
    if calibration is None:
        result = bgd.quantize_weights(model, settings)
    else:
        result = bgd.quantize(model, calibration, settings, **options)
    integration.transplant_(model, result.model)
    if others:
        torchao_quantize_(model, FqnToConfig(others), filter_fn=None)
    return result.report


def make_room_(model: nn.Module, state_dict: Mapping[str, Any]) -> nn.Module:
    """Insert empty quantized layers where a state dict has some, so that `model.load_state_dict(state_dict)` works.

    Args:
        model: the float network, changed in place.
        state_dict: of the quantized network.

    Returns:
        `model`.

    Raises:
        CheckpointError: the state dict has no quantized layer, or one that does not fit the network.
    """
    placement = integration.placement_in(state_dict)
    if not placement:
        raise integration.CheckpointError("the state dict has no layer with a codebook and codes: load it directly")
    integration.make_room_(model, placement | dict.fromkeys(_frozen_norms(model, state_dict), ()))
    return model


def _frozen_norms(model: nn.Module, state_dict: Mapping[str, Any]) -> list[str]:
    """Batch norms that have a scale and a shift in the state dict, but no statistics."""
    norms = [path for path, norm in model.named_modules() if getattr(norm, "running_mean", None) is not None]
    present = [path for path in norms if {f"{path}.weight", f"{path}.bias"} <= state_dict.keys()]
    return [path for path in present if not {f"{path}.running_mean", f"{path}.running_var"} & state_dict.keys()]


def _handle(module: nn.Module, config: BGDWeightOnlyConfig) -> nn.Module:
    """The handler that torchao calls for each module that its filter or its names select.

    The module itself becomes the quantized one, as with torchao's own configs: a caller may quantize a bare layer, and
    a module with two names is passed only once.
    """
    _require_float(module, f"a {type(module).__name__}")
    wholes = [name for name in _OF_NETWORKS if getattr(config, name)]
    if wholes:
        raise ConfigError(
            f"{', '.join(wholes)}: needs the whole network, but torchao passes one layer at a time: use "
            "bgd_plugin_adapters.torchao.quantize_(model, config, filter_fn, calibration=...)"
        )
    made = integration.quantize_module(module, _plain(config), name=f"a {type(module).__name__}")
    return integration.become_(module, made)


def _require_float(module: nn.Module, where: str) -> None:
    weight = getattr(module, "weight", None)
    if isinstance(weight, TorchAOBaseTensor):
        raise ConfigError(f"{where} is already quantized by torchao ({type(weight).__name__}): exclude it")
    if hasattr(module, "codebook"):
        raise ConfigError(f"{where} is already quantized ({module}): give one config per layer")
    if not isinstance(weight, Tensor):
        raise ConfigError(f"{where} has no weight to quantize: choose convolutions and linear layers")


def _by_filter(model: nn.Module, config: AOBaseConfig, filter_fn: Filter | None) -> dict[str, AOBaseConfig]:
    """The outermost modules that a filter accepts, as in torchao."""
    if not isinstance(config, BGDWeightOnlyConfig):
        raise ConfigError(f"config is a {type(config).__name__}: give a BGDWeightOnlyConfig or a FqnToConfig")
    accepts = filter_fn or _is_linear
    chosen: dict[str, AOBaseConfig] = {}
    for name, module in model.named_modules():
        is_inside = any(name.startswith(f"{outer}.") for outer in chosen)
        if name and not is_inside and accepts(module, name):
            chosen[name] = config
    if not chosen:
        raise ConfigError(
            "filter_fn accepts no module of the network" if filter_fn else "the network has no linear layer"
        )
    return chosen


def _by_name(model: nn.Module, config: FqnToConfig) -> dict[str, AOBaseConfig]:
    """The config of each module; an exact name takes precedence over the first regex that matches."""
    paths = {path: module for path, module in model.named_modules(remove_duplicate=False) if path}
    names = [path for path, module in paths.items() if list(module.parameters(recurse=False))]
    first = {id(module): path for path, module in reversed(paths.items())}  # the first name of a shared module
    rules: Mapping[str, Any] = config.fqn_to_config
    unused = set(rules) - {"_default"}
    chosen: dict[str, AOBaseConfig] = {}
    for name in names:
        keys = [key for key in rules if key in (name, f"{name}.weight")]
        keys += [key for key in rules if key.startswith("re:") and re.fullmatch(key[3:], name)]
        unused -= set(keys)
        if not keys and "_default" in rules and _is_linear(paths[name]):
            keys = ["_default"]
        if keys and rules[keys[0]] is not None:
            chosen.setdefault(first[id(paths[name])], rules[keys[0]])
    if unused:
        raise ConfigError(f"FqnToConfig: {', '.join(sorted(unused))} matches no layer; the network has {_some(names)}")
    return chosen


def _some(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _core_config(model: nn.Module, ours: Mapping[str, AOBaseConfig]) -> BGDConfig:
    """One setting for the network: the first config, overrides for those that differ, and everything else float."""
    plain = {name: _plain(config) for name, config in ours.items()}
    base = next(iter(plain.values()))
    families, reasons = integration.layers_in(model)
    for name in set(ours) - set(families):
        reason = reasons.get(name, f"a {type(model.get_submodule(name)).__name__} has no product-quantized form")
        raise ConfigError(f"layer {name!r} cannot be quantized: {reason}")
    overrides: list[tuple[str, LayerConfig | None]] = []
    for name, family in families.items():
        config = plain.get(name)
        if config is None:
            overrides.append((glob.escape(name), None))
            continue
        if dataclasses.replace(config, **{f: getattr(base, f) for f in FAMILIES}) != base:
            raise ConfigError(f"layer {name!r}: configs of one network may differ in block and codebook sizes only")
        if config != base:
            overrides.append((glob.escape(name), config.setting_for(family)))
    return dataclasses.replace(base, overrides=tuple(overrides))


def _plain(config: AOBaseConfig) -> BGDConfig:
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(BGDConfig)}
    if values["finetuning"]:
        values["finetuning"] = dataclasses.replace(values["finetuning"])  # with a tuple again
    return BGDConfig(**values)
