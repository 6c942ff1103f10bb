"""The config class that neural-compressor knows as "bgd"."""

from __future__ import annotations

import copy
import inspect
import itertools
import json
from collections import OrderedDict
from typing import Any, ClassVar

from neural_compressor.common.base_config import BaseConfig, register_config
from neural_compressor.common.utils import DEFAULT_WHITE_LIST
from neural_compressor.torch.quantization.config import FRAMEWORK_NAME, OperatorConfig, TorchBaseConfig
from neural_compressor.torch.utils.utility import WHITE_MODULE_LIST, get_model_info
from torch import nn

import bgd_plugin as bgd
from bgd_plugin.integration import ConfigError
from bgd_plugin_adapters.neural_compressor.matching import matches
from bgd_plugin_adapters.neural_compressor.settings import (
    LAYER_DEFAULTS,
    NETWORK_DEFAULTS,
    checked,
    core_config,
    is_choice,
    plain,
)

__all__ = ["ALGORITHM", "LOADED_BY", "BGDConfig", "get_default_bgd_config"]

ALGORITHM = "bgd"
PRIORITY = 65  # among the weight-only algorithms, whose priorities are 50 to 90
LOADED_BY = "bgd_plugin_adapters.neural_compressor.load"
_TYPE = "type:"
_DEFAULTS = LAYER_DEFAULTS | NETWORK_DEFAULTS


class _Parameters(dict[str, Any]):
    """Plain parameters, with a value for the two keys that other algorithms' statistics read from any config."""

    def __missing__(self, key: str) -> str:
        if key in ("bits", "group_size"):
            return "pq"
        raise KeyError(key)


@register_config(framework_name=FRAMEWORK_NAME, algo_name=ALGORITHM, priority=PRIORITY)
class BGDConfig(TorchBaseConfig):
    """Product quantization of weights, as settings of neural-compressor.

    Args:
        dtype: "pq", or "fp32" to keep a layer float.
        block_size, codebook_size: of every layer, or of the layers of a local config; None: as set for each kind of
            layer.
        form: of the codes of every layer, or of the layers of a local config, "blocks" or "trellis"; None: as set for
            each kind of layer.
        white_list: names and types of the layers to quantize; all by default.
        **settings: any field of `bgd_plugin.BGDConfig`, or its JSON form. A list holds the choices of `autotune`.

    Raises:
        ConfigError: an unknown parameter, or a value that the core refuses.
    """

    name = ALGORITHM
    supported_configs: ClassVar[list[Any]] = []

    def __init__(self, white_list: Any = DEFAULT_WHITE_LIST, **kwargs: Any) -> None:
        if LOADED_BY in kwargs.values():
            raise ConfigError(f"a folder that was saved with {ALGORITHM!r} in it is read by {LOADED_BY}")
        unknown = sorted(set(kwargs) - set(_DEFAULTS))
        if unknown:
            raise ConfigError(f"BGDConfig: unknown {', '.join(unknown)}; it has {', '.join(_DEFAULTS)}, white_list")
        super().__init__(white_list=white_list)
        self.parent: BGDConfig = self
        self.asked: Any = None
        self.refused: str | None = None
        for name, default in _DEFAULTS.items():
            setattr(self, name, kwargs.get(name, default))
        self._post_init()

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, checked(name, value) if name in _DEFAULTS else value)

    # what neural-compressor reads and writes

    def get_params_dict(self) -> dict[str, Any]:
        """The parameters and their values, except the white list."""
        return {name: getattr(self, name) for name in _DEFAULTS}

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; a config with local ones has the keys "global" and "local"."""
        own = _Parameters({name: plain(name, value) for name, value in self.get_params_dict().items()})
        if not self.local_config:
            return own
        local = {self._key(name): config.to_dict() for name, config in self.local_config.items()}
        return {"local": local} | ({"global": own} if self.global_config else {"white_list": [*local]})

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any]) -> BGDConfig:
        """The inverse of `to_dict`; parameters missing in `config_dict` get their defaults."""
        if not {"global", "local"} & set(config_dict):
            return cls(**config_dict)
        has_global = "global" in config_dict or "white_list" not in config_dict
        config = cls(**config_dict.get("global", {}), white_list=DEFAULT_WHITE_LIST if has_global else None)
        for name, local in config_dict.get("local", {}).items():
            config.set_local(name, cls(**local))
        if not has_global and config.local_config:  # what belongs to the whole network stands in every layer's config
            first = next(iter(config.local_config.values()))
            for name in NETWORK_DEFAULTS:
                setattr(config, name, getattr(first, name))
        return config

    @classmethod
    def from_json_file(cls, filename: str) -> BGDConfig:
        """Read the file at `filename`, written by `to_json_file`."""
        with open(filename, encoding="utf-8") as file:
            return cls.from_dict(json.load(file))

    @classmethod
    def to_diff_dict(cls, instance: BGDConfig) -> dict[str, Any]:
        """The parameters that differ from their defaults."""
        return {name: plain(name, v) for name, v in instance.get_params_dict().items() if v != _DEFAULTS[name]}

    @staticmethod
    def _key(name: Any) -> str:
        return name if isinstance(name, str) else f"{_TYPE}{name.__name__}"

    @staticmethod
    def get_model_info(model: nn.Module) -> list[tuple[str, str]]:
        """Name and type of every convolution and linear layer."""
        return list(get_model_info(model, WHITE_MODULE_LIST))

    @classmethod
    def register_supported_configs(cls) -> None:
        """Register the types of layers that the algorithm supports."""
        cls.supported_configs = [OperatorConfig(config=cls(), operators=list(WHITE_MODULE_LIST))]

    @classmethod
    def get_config_set_for_tuning(cls) -> BGDConfig:
        """Four bounds on the divergence, from the smallest network to the largest."""
        return cls(max_divergence=[0.1, 0.05, 0.02, 0.005])

    # autotune

    def expand(self) -> list[BGDConfig]:
        """Every combination of the values in lists, also in local configs; the last parameter varies fastest."""
        places = [(None, name) for name, value in self.get_params_dict().items() if is_choice(name, value)]
        local = {} if isinstance(self.white_list, list) else self.local_config
        places += [(key, n) for key, c in local.items() for n, v in c.get_params_dict().items() if is_choice(n, v)]
        options = [getattr(self if key is None else local[key], name) for key, name in places]
        result = []
        for values in itertools.product(*options):
            chosen = dict(zip(places, values, strict=True))
            own = {name: value for (key, name), value in chosen.items() if key is None}
            config = type(self)(**(self.get_params_dict() | own), white_list=self.white_list)
            for key, one in local.items():
                changed = copy.deepcopy(one)
                for (where, name), value in chosen.items():
                    if where == key:
                        setattr(changed, name, value)
                config.local_config[key] = changed
            result.append(config)
        return result

    # which layer gets what

    def __add__(self, other: BaseConfig) -> BaseConfig:
        """This config with the local ones of `other`, as neural-compressor adds two of one kind; neither is changed.

        An ambiguous sum raises when it is used.
        """
        if not isinstance(other, BGDConfig):
            return super().__add__(other)
        total = copy.deepcopy(self)
        total.refused = self.refused or other.refused or self._clash(other)
        total.local_config |= copy.deepcopy(other.local_config)
        return total

    def _clash(self, other: BGDConfig) -> str | None:
        """Why two configs have no sum, or None."""
        both = [
            key
            for key in self.local_config
            if self.local_config[key] != other.local_config.get(key, self.local_config[key])
        ]
        if both:
            return f"two BGDConfigs for {', '.join(map(self._key, both))}: give one"
        different = [n for n, v in self.get_params_dict().items() if v != getattr(other, n)]
        if self.global_config and other.global_config and different:
            return (
                f"two BGDConfigs for the whole network, with different {', '.join(different)}: "
                "give one of them a white_list, or use set_local"
            )
        return None

    def to_config_mapping(self, config_list: Any = None, model_info: Any = None) -> OrderedDict[Any, Any]:
        """The config of each layer.

        Local configs apply by type or by name of a layer. Names take precedence over types, and later configs over
        earlier ones. A name is a layer's whole name, the name of a module that contains layers, or a regular expression
        for the beginning of names.

        Args:
            config_list: the configs; None: this one.
            model_info: name and type of each layer.

        Raises:
            ConfigError: a name or type that no layer has, two configs that contradict each other, or a local config
                with a setting for the whole network.
        """
        mapping: OrderedDict[Any, Any] = OrderedDict()
        for config in config_list or [self]:
            mapping.update(config._layers(list(model_info)))
        return mapping

    def _layers(self, model_info: list[tuple[str, Any]]) -> dict[tuple[str, Any], BGDConfig]:
        if self.refused:
            raise ConfigError(self.refused)
        names = [name for name, _ in model_info]
        found: dict[tuple[str, Any], BGDConfig] = {}
        if self.global_config is not None:
            found = {pair: self._for_layer(self, None) for pair in model_info}
        by_type = [key for key in self.local_config if self._type_name(key)]
        for key in by_type + [key for key in self.local_config if key not in by_type]:
            kind = self._type_name(key)
            hit = {n for n, t in model_info if getattr(t, "__name__", t) == kind} if kind else matches(str(key), names)
            if not hit:
                raise ConfigError(
                    f"BGDConfig for {self._key(key)!r}: no layer has that {'type' if kind else 'name'}; "
                    f"the network has {', '.join(names[:8]) or 'no convolution and no linear layer'}"
                    + (f" and {len(names) - 8} more" if len(names) > 8 else "")
                )
            config = self._for_layer(self.local_config[key], key)
            found |= {pair: config for pair in model_info if pair[0] in hit}
        if not found:
            raise ConfigError(
                "BGDConfig finds no layer to quantize: "
                + (
                    "its white_list names none"
                    if names
                    else "the network has no convolution and no linear layer that is not quantized already"
                )
            )
        return found

    @staticmethod
    def _type_name(key: Any) -> str | None:
        if isinstance(key, str):
            return key.removeprefix(_TYPE) if key.startswith(_TYPE) else None
        return str(key.__name__)

    def _for_layer(self, local: BGDConfig, asked: Any) -> BGDConfig:
        """The config of one layer: the parameters of the local config, and this one's for the rest."""
        for name, default in NETWORK_DEFAULTS.items():
            value = getattr(local, name)
            if value not in (default, getattr(self, name)):
                raise ConfigError(
                    f"BGDConfig for {self._key(asked)!r} sets {name}, which applies to the whole network: set it in "
                    f"the global config; a local one may set {', '.join(LAYER_DEFAULTS)}"
                )
        own = {
            name: getattr(local, name) if getattr(local, name) is not None else getattr(self, name)
            for name in LAYER_DEFAULTS
        }
        if local.form is not None and local.form != self.form:  # sizes of the other form do not suit it
            own |= {"block_size": local.block_size, "codebook_size": local.codebook_size}
        config = type(self)(**(self.get_params_dict() | own), white_list=None)
        config.parent, config.asked = self, None if asked is None else self._key(asked)
        return config

    def core_config(self) -> bgd.BGDConfig:
        """The core's settings for the whole network."""
        return core_config(self.get_params_dict())


def _signature() -> inspect.Signature:
    """The signature of `BGDConfig.__init__`, from which neural-compressor learns what can be tuned."""
    kind = inspect.Parameter.KEYWORD_ONLY
    parameters = [inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)]
    parameters += [inspect.Parameter(n, kind, default=v, annotation=Any) for n, v in _DEFAULTS.items()]
    parameters += [inspect.Parameter("white_list", kind, default=DEFAULT_WHITE_LIST, annotation=Any)]
    return inspect.Signature(parameters)


BGDConfig.__init__.__signature__ = _signature()  # type: ignore[attr-defined]
BGDConfig.register_supported_configs()


def get_default_bgd_config() -> BGDConfig:
    """The library's default settings."""
    return BGDConfig()
