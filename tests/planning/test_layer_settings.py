"""What the settings say to one layer, where they leave something out."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

import bgd_plugin as bgd
from bgd_plugin import BGDConfig, LayerConfig
from bgd_plugin.errors import ConfigError
from bgd_plugin.graph import find_layers, front_end
from bgd_plugin.nn import quantized
from bgd_plugin.planning.layer_settings import first_layer, setting_of


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


def test_a_row_shorter_than_a_block_is_one_block() -> None:
    (layer,) = bgd.plan(nn.Sequential(nn.Linear(3, 64)), BGDConfig(first_layer=LayerConfig(codebook_size=8))).layers
    assert layer.block_size == 3 and layer.note == "block 4 → 3: 3 weights per row"


def test_what_was_folded_into_a_weight_and_what_shares_it_is_said() -> None:
    model = _Kinds()
    nn.utils.parametrizations.weight_norm(model.point)
    model.head.weight = nn.Parameter(torch.randn(64, 64))
    model.tail = nn.Linear(64, 64)
    model.tail.weight = model.head.weight
    notes = {
        layer.name: layer.note for layer in bgd.plan(model, BGDConfig(linear=LayerConfig(codebook_size=64))).layers
    }
    assert "WeightNorm folded into the weight" in notes["point"]
    assert notes["head"] == "tied to tail"
    assert notes["wide"] == "block 9 → 8: 1600 weights per row"


@pytest.mark.parametrize(
    ("dtype", "zeros", "expected"),
    [
        (torch.float32, False, "int8"),
        (torch.float32, True, "float16"),
        (torch.float64, False, "float16"),
        (torch.bfloat16, False, "float16"),
    ],
)
def test_eight_bits_are_for_single_precision_without_zeros(dtype: torch.dtype, zeros: bool, expected: str) -> None:
    model = nn.Sequential(nn.Linear(16, 64), nn.Linear(64, 64)).to(dtype)
    if zeros:
        model[1].weight.data[:, ::2] = 0
    (layer,) = bgd.plan(model, BGDConfig(preserve_zeros=zeros, codebook_storage="int8")).layers
    assert layer.codebook_storage == expected
    (layer,) = bgd.plan(model, BGDConfig(preserve_zeros=zeros, codebook_storage="float16")).layers
    assert layer.codebook_storage == "float16"


def test_only_an_embedding_that_stays_float_names_the_layers_tied_to_it() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(64, 64), nn.Linear(64, 64))
    model[2].weight = model[1].weight
    (layer, *_) = [found for found in find_layers(front_end(model).network)[0] if found.tied]
    setting, reason, _ = setting_of(layer, BGDConfig(linear=None), is_first=False)
    assert (setting, reason) == (None, "linear=None")
    table = dataclasses.replace(layer, family="embedding")
    assert setting_of(table, BGDConfig(), is_first=False)[1] == f"embedding=None (tied to {layer.tied[0]})"
    alone = dataclasses.replace(table, tied=())
    assert setting_of(alone, BGDConfig(), is_first=False)[1] == "embedding=None"


def test_a_setting_in_part_may_be_adjusted_only_where_its_block_size_is_the_defaults() -> None:
    (layer, *_) = find_layers(front_end(nn.Sequential(nn.Linear(8, 8))).network)[0]
    size = LayerConfig(block_size=4, codebook_size=16)
    for config, adapts in (
        (BGDConfig(), True),
        (BGDConfig(linear=LayerConfig(block_size=2)), False),
        (BGDConfig(overrides=(("*", size),)), False),
    ):
        assert setting_of(layer, config, is_first=False)[2] is adapts
    assert setting_of(layer, BGDConfig(first_layer=size), is_first=True)[0] == size


@pytest.mark.parametrize("has_graph", [True, False])
def test_the_first_layer_is_the_first_that_reads_the_input_however_often_it_runs(has_graph: bool) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.a(torch.relu(self.b(self.a(x))))
            return x if has_graph or float(x.detach().sum()) < 1e9 else -x

    network = front_end(Twice().eval()).network
    found = find_layers(network)[0]
    first = first_layer(network, found)
    assert first is not None and first.name == "a"
    assert first_layer(network, []) is None


@pytest.mark.parametrize("layers", [(nn.Embedding(8, 16), nn.Linear(16, 16)), (None, nn.Linear(16, 16))])
def test_behind_a_table_or_a_quantized_layer_no_layer_is_the_first(layers: Any) -> None:
    table, last = layers
    quantized_one = quantized(nn.Linear(16, 16), torch.randn(4, 4), torch.randint(0, 4, (16, 4)))
    network = front_end(nn.Sequential(quantized_one if table is None else table, last).eval()).network
    found = [layer for layer in find_layers(network)[0] if layer.kind == "linear"]
    assert [layer.name for layer in found] == ["1"] and first_layer(network, found) is None
