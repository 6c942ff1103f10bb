"""Settings: checked where they are made, and the same again after JSON."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bgd_plugin import BGDConfig, BGDError, DistillationConfig, FinetuningConfig, LayerConfig, ReconstructionConfig
from bgd_plugin.config import DEFAULT_DIVERGENCE
from bgd_plugin.errors import ConfigError

LAYERS = st.builds(
    LayerConfig, block_size=st.integers(1, 64), codebook_size=st.integers(1, 16).map(lambda bits: 2**bits)
)
CONFIGS = st.builds(
    BGDConfig,
    conv=st.none() | LAYERS,
    depthwise_conv=st.none() | LAYERS,
    first_layer=st.none() | LAYERS,
    overrides=st.lists(st.tuples(st.text(max_size=6), st.none() | LAYERS), max_size=3).map(tuple),
    em_iterations=st.integers(1, 200),
    batchnorm=st.sampled_from(["matched", "reestimate", "keep"]),
    distillation=st.none() | st.builds(DistillationConfig, steps=st.integers(1, 9), batch_size=st.integers(1, 9)),
    finetuning=st.none() | st.builds(FinetuningConfig, epochs=st.integers(1, 9)),
    seed=st.integers(0, 2**31 - 1),
)


@given(CONFIGS)
def test_it_is_the_same_after_a_dict(config: BGDConfig) -> None:
    assert BGDConfig.from_dict(config.to_dict()) == config


@given(CONFIGS)
def test_it_is_the_same_after_json(config: BGDConfig) -> None:
    assert BGDConfig.from_json(config.to_json()) == config
    sizes = {"conv": 9, "pointwise_conv": 4, "linear": 4}
    in_part = BGDConfig.from_dict({kind: {"codebook_size": 16} for kind in sizes})
    assert {kind: getattr(in_part, kind).block_size for kind in sizes} == sizes
    alone = BGDConfig(first_layer=LayerConfig(codebook_size=16), overrides=(("fc", LayerConfig(codebook_size=16)),))
    assert alone.first_layer == alone.overrides[0][1] == LayerConfig(codebook_size=16)


def test_the_dict_has_a_version_and_nothing_that_json_lacks() -> None:
    values = BGDConfig.paper("small", overrides=(("fc", None),)).to_dict()
    assert values["version"] == 2
    assert isinstance(json.dumps(values), str)


def test_settings_can_not_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        BGDConfig().seed = 1  # type: ignore[misc]


def test_an_unknown_field_is_named_with_the_known_ones() -> None:
    with pytest.raises(
        ConfigError, match=r"BGDConfig: unknown blocks; BGDConfig has .*batchnorm, codebook_storage, codes, conv, "
    ):
        BGDConfig.from_dict({"blocks": 9})


def test_an_unknown_field_of_a_layer_is_named_with_its_place() -> None:
    with pytest.raises(ConfigError, match="conv: unknown size; LayerConfig has block_size, codebook_size"):
        BGDConfig.from_dict({"conv": {"size": 9}})


def test_an_unknown_field_of_an_override_is_named_with_its_glob() -> None:
    with pytest.raises(ConfigError, match=r"override 'layer4\.\*': unknown size"):
        BGDConfig.from_dict({"overrides": [["layer4.*", {"size": 9}]]})


def test_a_newer_version_asks_for_an_upgrade() -> None:
    with pytest.raises(ConfigError, match="version 999, this library reads up to 2: upgrade bgd-plugin"):
        BGDConfig.from_dict({"version": 999})


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (LayerConfig, {"block_size": 0}, "block_size=0: give an integer of at least 1"),
        (LayerConfig, {"block_size": 4.5}, "block_size=4.5: give an integer"),
        (
            LayerConfig,
            {"block_size": 4, "codebook_size": 100},
            "codebook_size=100: give a power of two from 2 to 65536",
        ),
        (LayerConfig, {"block_size": 4, "codebook_size": 1}, "codebook_size=1: give a power of two"),
        (LayerConfig, {"block_size": 4, "codebook_size": 131072}, "codebook_size=131072: give a power of two"),
        (DistillationConfig, {"steps": 0}, "distillation: steps=0: give at least 1, or distillation=None for none"),
        (DistillationConfig, {"batch_size": 0}, "distillation: batch_size=0"),
        (DistillationConfig, {"learning_rate": 0.0}, "distillation: learning_rate=0.0: give a positive number"),
        (FinetuningConfig, {"epochs": 0}, "finetuning: epochs=0: give at least 1, or finetuning=None for none"),
        (FinetuningConfig, {"epochs": 1, "steps": 1}, "finetuning: epochs=1 and steps=1: give one of the two"),
        (FinetuningConfig, {"learning_rate": -1.0}, "finetuning: learning_rate=-1.0: give a positive number"),
        (BGDConfig, {"method": "magic"}, "method='magic': give "),
        (BGDConfig, {"batchnorm": "none"}, "batchnorm='none': give 'matched', 'reestimate' or 'keep'"),
        (BGDConfig, {"em_iterations": 0}, "em_iterations=0: give at least 1"),
        (BGDConfig, {"seed": "a"}, "seed='a': give an integer"),
        (BGDConfig, {"conv": 9}, "conv=9: give a LayerConfig, or None to keep these layers float"),
        (BGDConfig, {"overrides": ("fc",)}, "overrides: found 'fc', give pairs of a glob and a LayerConfig or None"),
        (BGDConfig, {"overrides": (("fc", 4),)}, "override 'fc': found 4, give a LayerConfig, or None"),
    ],
)
def test_a_wrong_value_says_what_to_give(kind: type[Any], values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        kind(**values)


def test_a_wrong_setting_is_a_value_error_and_one_of_ours() -> None:
    assert issubclass(ConfigError, ValueError)
    assert issubclass(ConfigError, BGDError)


@pytest.mark.parametrize(("regime", "conv", "pointwise"), [("small", 9, 4), ("large", 18, 8)])
def test_the_papers_regimes(regime: Any, conv: int, pointwise: int) -> None:
    config = BGDConfig.paper(regime)
    assert config.conv == LayerConfig(block_size=conv, codebook_size=256)
    assert config.pointwise_conv == LayerConfig(block_size=pointwise, codebook_size=256)
    assert config.linear == LayerConfig(block_size=4, codebook_size=2048)
    assert (config.method, config.batchnorm) == ("em", "keep")
    assert config.distillation == DistillationConfig(
        steps=2500, batch_size=128, learning_rate=0.05, momentum=0.9, weight_decay=1e-4
    )
    assert config.finetuning == FinetuningConfig(epochs=9, trained="codebooks", momentum=0.9, weight_decay=1e-4)
    assert config.finetuning.rate == 0.01
    assert (config.depthwise_conv, config.first_layer) == (None, None)


def test_the_papers_keywords() -> None:
    config = BGDConfig.paper(
        "large", codebook_size=512, fc_codebook_size=1024, pointwise_block_size=4, distillation=None, seed=3
    )
    assert config.conv == LayerConfig(block_size=18, codebook_size=512)
    assert config.pointwise_conv == LayerConfig(block_size=4, codebook_size=512)
    assert config.linear == LayerConfig(block_size=4, codebook_size=1024)
    assert (config.distillation, config.seed) == (None, 3)


def test_another_regime_is_an_error() -> None:
    with pytest.raises(ConfigError, match="regime='tiny': give 'small', 'large' or 'mask_rcnn'"):
        BGDConfig.paper("tiny")  # type: ignore[arg-type]


def test_a_setting_in_part_takes_the_rest_of_its_kind() -> None:
    config = BGDConfig.from_dict({"linear": {"codebook_size": 16}, "conv": {"block_size": 3}, "pointwise_conv": {}})
    assert config.linear == LayerConfig(block_size=4, codebook_size=16)
    assert config.conv == LayerConfig(block_size=3, codebook_size=256)
    assert config.pointwise_conv == BGDConfig().pointwise_conv
    assert BGDConfig(linear=LayerConfig(codebook_size=16)).linear == config.linear
    assert BGDConfig.from_json(config.to_json()) == config


def test_the_default_is_a_bound_on_the_divergence_with_all_sizes_open() -> None:
    config = BGDConfig()
    assert config.bound == DEFAULT_DIVERGENCE
    assert (config.conv, config.pointwise_conv, config.linear) == (LayerConfig(),) * 3
    assert [config.sizes(LayerConfig(), kind) for kind in ("conv", "pointwise_conv", "linear")] == [
        (9, 256),
        (4, 256),
        (4, 256),
    ]


@pytest.mark.parametrize("target", [{"target_bytes": 1000}, {"target_ratio": 5.0}])
def test_the_default_bound_gives_way_to_a_budget_and_another_one_does_not(target: dict[str, Any]) -> None:
    config = BGDConfig(**target)
    assert (config.bound, config.has_budget) == (None, True)
    assert BGDConfig.from_json(config.to_json()) == config
    with pytest.raises(ConfigError, match="give only one of them"):
        BGDConfig(max_divergence=0.5, **target)


def test_sizes_are_fixed_without_a_bound_and_a_budget() -> None:
    config = BGDConfig(max_divergence=None)
    assert (config.bound, config.has_budget) == (None, False)
    assert not BGDConfig.paper().has_budget


def test_a_budget_beside_the_papers_method_chooses_the_sizes_that_are_those_of_the_default() -> None:
    config = BGDConfig.paper("small", target_bytes=1000)
    assert (config.conv, config.pointwise_conv) == (LayerConfig(), LayerConfig())
    assert config.linear == LayerConfig(block_size=4, codebook_size=2048)


def test_settings_of_the_first_version_mean_what_they_meant() -> None:
    """Written before a bound was the default: sizes are fixed, and a budget chooses where they are the default ones."""
    sizes = {"conv": {"block_size": 9, "codebook_size": 256}, "linear": {"block_size": 4, "codebook_size": 16}}
    fixed = BGDConfig.from_dict({"version": 1, **sizes})
    assert not fixed.has_budget
    assert fixed.sizes(fixed.conv or LayerConfig(), "conv") == (9, 256)
    assert fixed.linear == LayerConfig(block_size=4, codebook_size=16)
    budget = BGDConfig.from_dict({"version": 1, **sizes, "target_bytes": 1000})
    assert budget.conv == LayerConfig()
    assert budget.linear == LayerConfig(block_size=4, codebook_size=16)
    assert BGDConfig.from_dict({"version": 1, "max_divergence": 0.1}).bound == 0.1


def test_overrides_in_part_as_pairs_and_by_glob() -> None:
    pairs = BGDConfig.from_dict({"overrides": [["fc", {"codebook_size": 16}], ["stem", None]]})
    assert pairs.overrides == (("fc", LayerConfig(codebook_size=16)), ("stem", None))
    assert BGDConfig.from_dict({"overrides": {"fc": {"codebook_size": 16}, "stem": None}}) == pairs
    assert BGDConfig.from_json(pairs.to_json()) == pairs


def test_training_in_part() -> None:
    config = BGDConfig.from_dict({"finetuning": {"steps": 3}, "distillation": {"steps": 2}, "reconstruction": {}})
    assert (config.finetuning, config.distillation) == (FinetuningConfig(steps=3), DistillationConfig(steps=2))
    assert config.reconstruction == ReconstructionConfig()


def test_mappings_stand_for_settings_in_python_too() -> None:
    fields: dict[str, Any] = {
        "linear": {"codebook_size": 16},
        "overrides": {"fc": {"block_size": 8}},
        "finetuning": {"steps": 3},
    }
    assert BGDConfig(**fields) == BGDConfig.from_dict(fields)
    with pytest.raises(ConfigError, match="finetuning: found 3, give the fields of FinetuningConfig"):
        BGDConfig(finetuning=3)
    with pytest.raises(ConfigError, match="linear: unknown size"):
        BGDConfig(linear={"size": 3})
