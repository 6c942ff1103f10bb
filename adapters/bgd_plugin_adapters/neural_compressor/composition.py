"""Sums of configs, ours and other algorithms'.

neural-compressor's `ComposableConfig` ignores every config for the whole network, and reads a dict of several
algorithms as the first of them, repeated. A sum that includes one of our configs is therefore computed here; every
other sum is left to neural-compressor.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from typing import Any

from neural_compressor.common.base_config import ComposableConfig

from bgd_plugin.integration import ConfigError
from bgd_plugin_adapters.neural_compressor.config import ALGORITHM, BGDConfig

__all__ = ["install"]

# Other algorithms read their own fields from every config of a sum, or change the network in untested ways.
PARTNERS = ("rtn",)


def install() -> None:
    """Make `ComposableConfig` use this module for sums that include our configs; a second call changes nothing."""
    if getattr(ComposableConfig.to_config_mapping, "knows_bgd", False):
        return
    original_mapping = ComposableConfig.to_config_mapping
    original_from_dict = ComposableConfig.from_dict.__func__

    @functools.wraps(original_mapping)
    def to_config_mapping(self: Any, config_list: Any = None, model_info: Any = None) -> Any:
        if not any(isinstance(config, BGDConfig) for config in self.config_list):
            return original_mapping(self, config_list, model_info)
        return _mapping(self.config_list, model_info)

    @functools.wraps(original_from_dict)
    def from_dict(cls: Any, config_dict: Any, config_registry: Any) -> Any:
        if ALGORITHM not in config_dict:
            return original_from_dict(cls, config_dict, config_registry)
        configs = [config_registry[name].from_dict(value) for name, value in config_dict.items()]
        return functools.reduce(lambda total, config: total + config, configs)

    to_config_mapping.knows_bgd = True  # type: ignore[attr-defined]
    ComposableConfig.to_config_mapping = to_config_mapping
    ComposableConfig.from_dict = classmethod(from_dict)


def _mapping(configs: list[Any], model_info: dict[str, Any]) -> OrderedDict[Any, Any]:
    """The config of each layer: a later one wins over an earlier one.

    Ours come first in the result, because other algorithms read their own fields from the last one.
    """
    others = [config for config in configs if not isinstance(config, BGDConfig)]
    unknown = sorted({config.name for config in others} - set(PARTNERS))
    if unknown:
        raise ConfigError(
            f"BGDConfig cannot be added to {', '.join(unknown)}, only to "
            f"{' and '.join(PARTNERS)}: quantize in two calls instead"
        )
    ours = functools.reduce(lambda a, b: a + b, [config for config in configs if isinstance(config, BGDConfig)])
    merged: dict[Any, Any] = {}
    is_done = False
    for config in configs:
        if not isinstance(config, BGDConfig):
            merged |= config.to_config_mapping(model_info=model_info[config.name])
        elif not is_done:  # all of ours together
            merged |= ours.to_config_mapping(model_info=model_info[ALGORITHM])
            is_done = True
    for config in configs:
        if not any(part.name == config.name for part in merged.values()):
            raise ConfigError(
                f"no layer is left for the config of {config.name!r}: later ones in the sum take all of its layers; "
                "put it last, or give the others a white_list"
            )
    return OrderedDict(sorted(merged.items(), key=lambda item: not isinstance(item[1], BGDConfig)))
