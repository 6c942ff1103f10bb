"""What the settings say to one layer, where they leave something out."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

import bgd_plugin as bgd
from bgd_plugin import BGDConfig, LayerConfig
from bgd_plugin.errors import ConfigError


class _Kinds(nn.Sequential):
    """A layer of each kind; rows of the depthwise convolution do not divide into blocks of 9, nor those of the next."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(8, 64, 3)
        self.odd = nn.Conv2d(64, 64, 5, groups=64)
        self.wide = nn.Conv2d(64, 32, 5)
        self.point = nn.Conv2d(32, 64, 1)
        self.flat = nn.Flatten()
        self.head = nn.Linear(64, 64)


def _blocks(config: BGDConfig) -> dict[str, int]:
    return {layer.name: layer.block_size for layer in bgd.plan(_Kinds(), config).layers}


SIZES = {"codebook_size": 16}


def test_an_override_that_names_a_codebook_takes_the_blocks_of_the_layers_kind() -> None:
    config = BGDConfig.from_dict({"overrides": {"*": SIZES}})
    assert _blocks(config) == {"stem": 9, "odd": 5, "wide": 8, "point": 4, "head": 4}
    assert {layer.codebook_size for layer in bgd.plan(_Kinds(), config).layers} == {16}


def test_the_kinds_own_setting_goes_before_its_default() -> None:
    config = BGDConfig.from_dict({"overrides": {"head": SIZES}, "linear": {"block_size": 8}})
    assert _blocks(config)["head"] == 8


@pytest.mark.parametrize(
    ("kind", "layer", "blocks"), [("depthwise_conv", "odd", 5), ("first_layer", "stem", 9), ("linear", "head", 4)]
)
def test_kinds_that_are_float_by_default_have_blocks_too(kind: str, layer: str, blocks: int) -> None:
    assert _blocks(BGDConfig.from_dict({kind: SIZES}))[layer] == blocks


def test_a_block_size_that_is_given_is_never_adjusted() -> None:
    settings: list[Any] = [{"overrides": {"odd": {"block_size": 9}}}, {"depthwise_conv": {"block_size": 9}}]
    for setting in settings:
        with pytest.raises(ConfigError, match="layer 'odd': 25 weights per row do not divide into blocks of 9"):
            bgd.plan(_Kinds(), BGDConfig.from_dict(setting))


def test_nothing_given_is_the_default() -> None:
    assert BGDConfig(linear=LayerConfig()) == BGDConfig()
