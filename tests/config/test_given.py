"""Settings of another type than `BGDConfig`, wherever a caller can give them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import bgd_plugin as bgd
from bgd_plugin import fx
from bgd_plugin.config import given_config
from bgd_plugin.errors import ConfigError
from bgd_plugin.integration import quantize_module

_CALLS: dict[str, Callable[[Any], Any]] = {
    "quantize": lambda config: bgd.quantize(nn.Linear(64, 64), [torch.randn(4, 64)], config, progress=False),
    "quantize_weights": lambda config: bgd.quantize_weights(nn.Linear(64, 64), config, progress=False),
    "quantize_module": lambda config: quantize_module(nn.Linear(64, 64), config),
    "plan": lambda config: bgd.plan(nn.Linear(64, 64), config),
    "pass": lambda config: fx.BGDPass(config, [torch.randn(4, 64)]),
}


@pytest.mark.parametrize("call", _CALLS.values(), ids=_CALLS)
@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"target_ratio": 4}, "config is a dict: give a BGDConfig, such as BGDConfig(); BGDConfig.from_dict reads"),
        ({}, "config is a dict"),
        ([torch.zeros(1)], "config is a list: give a BGDConfig, such as BGDConfig(); None for the defaults"),
        (bgd.LayerConfig(), "config is a LayerConfig: give a BGDConfig"),
    ],
)
def test_other_settings_say_what_to_give(call: Callable[[Any], Any], config: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        call(config)
    assert message in str(caught.value)


def test_none_is_the_defaults() -> None:
    config = bgd.BGDConfig(seed=3)
    assert given_config(None) == bgd.BGDConfig()
    assert given_config(config) is config
