"""Settings as a caller gives them to a public function."""

from __future__ import annotations

from typing import Any

from bgd_plugin.config.network import BGDConfig
from bgd_plugin.errors import ConfigError

__all__ = ["given_config"]


def given_config(config: Any) -> BGDConfig:
    """The settings that a caller gave; the defaults where there are none.

    Args:
        config: a `BGDConfig`, or None.

    Raises:
        ConfigError: it is something else, such as a dict.
    """
    if config is None:
        return BGDConfig()
    if isinstance(config, BGDConfig):
        return config
    instead = "BGDConfig.from_dict reads what to_dict wrote" if isinstance(config, dict) else "None for the defaults"
    raise ConfigError(f"config is a {type(config).__name__}: give a BGDConfig, such as BGDConfig(); {instead}")
