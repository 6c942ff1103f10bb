"""neural-compressor's own tests that apply to any algorithm's config, with ours in the place of theirs.

Written after `test/3x/torch/test_config.py` (dict and class configs, white lists, to and from dicts, sums, mapping,
expansion), `test/3x/common/test_common.py` (registry, mixed algorithms, local configs, config sets, loader) and
`test/3x/torch/quantization/weight_only/test_mixed_algos.py`. Where theirs name a layer that the network does not have,
which ours refuses, the name is put right.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

pytest.importorskip("neural_compressor.torch.quantization", reason="neural-compressor is not installed")

from neural_compressor.common.base_config import (
    ComposableConfig,
    config_registry,
    get_all_config_set_from_config_registry,
)
from neural_compressor.common.base_tuning import ConfigLoader, ConfigSet, SequentialSampler
from neural_compressor.torch.quantization import GPTQConfig, RTNConfig, get_all_config_set, quantize
from neural_compressor.torch.utils import get_model_info, logger
from torch import nn

from bgd_plugin import LayerConfig
from bgd_plugin_adapters.neural_compressor import BGDConfig, get_default_bgd_config
from tests.adapters.neural_compressor.networks import VECTORS, feed, linears

GLOBAL_AND_LOCAL = {
    "bgd": {"global": {"method": "em", "block_size": 10}, "local": {"fc1": {"block_size": 5, "codebook_size": 16}}}
}
LINEAR = "Linear"


def _quantized(config: Any) -> nn.Module:
    result: nn.Module = quantize(linears(), config, run_fn=feed(VECTORS))
    assert [type(m).__name__ for m in result.children()][1:] == ["PQLinear", "PQLinear"]
    return result


def test_quantize_default() -> None:
    config = get_default_bgd_config().set_local("fc1", BGDConfig(block_size=2))
    result = quantize(linears(), config, run_fn=feed(VECTORS))
    kinds = [type(m).__name__ for m in result.children()]
    assert kinds[:2] == ["PQLinear", "PQLinear"]
    assert kinds[2] in ("PQLinear", "Linear")  # five outputs: a bound may have no use for codes there


def test_quantize_from_dict_beginner() -> None:
    _quantized({"bgd": {"method": "em", "block_size": 5, "codebook_size": 16}})


def test_quantize_from_class_beginner() -> None:
    _quantized(BGDConfig(method="em", block_size=5, codebook_size=16, max_divergence=None))


def test_quantize_from_dict_advance() -> None:
    result: Any = _quantized(GLOBAL_AND_LOCAL)
    assert [layer.block_size for layer in result.children()] == [5, 10, 10]


def test_quantize_from_class_advance() -> None:
    config = BGDConfig(block_size=10, max_divergence=None).set_local("fc1", BGDConfig(block_size=5))
    result: Any = _quantized(config)
    assert [layer.block_size for layer in result.children()] == [5, 10, 10]


def test_config_white_list() -> None:
    result: Any = _quantized(
        BGDConfig(block_size=10, max_divergence=None) + BGDConfig(block_size=5, white_list=["fc1"], max_divergence=None)
    )
    assert [layer.block_size for layer in result.children()] == [5, 10, 10]


def test_config_white_list_mapping() -> None:
    config = BGDConfig(block_size=10, max_divergence=None) + BGDConfig(
        block_size=5, white_list=["fc1"], max_divergence=None
    )
    mapping = config.to_config_mapping(model_info=get_model_info(linears(), [nn.Linear]))
    assert mapping["fc1", LINEAR].block_size == 5
    assert mapping["fc2", LINEAR].block_size == 10


def test_config_from_dict() -> None:
    assert BGDConfig.from_dict(GLOBAL_AND_LOCAL["bgd"]).local_config["fc1"].codebook_size == 16


def test_config_to_dict() -> None:
    values = BGDConfig(block_size=4, max_divergence=None).set_local("fc1", BGDConfig(block_size=5)).to_dict()
    assert {"global", "local"} <= set(values)
    assert values["local"]["fc1"]["block_size"] == 5


def test_same_type_configs_addition() -> None:
    one = BGDConfig.from_dict({"block_size": 10})
    two = BGDConfig.from_dict({"global": {"block_size": 3}, "local": {"fc1": {"block_size": 5, "method": "em"}}})
    total = (one + two).to_dict()
    assert total["local"]["fc1"]["block_size"] == 5
    assert total["local"]["fc1"]["method"] == "em"
    assert total["global"]["block_size"] == 10


@pytest.mark.parametrize("ours_first", [True, False])
def test_different_types_configs_addition(ours_first: bool) -> None:
    total = (
        BGDConfig(block_size=4, max_divergence=None) + RTNConfig()
        if ours_first
        else RTNConfig() + BGDConfig(block_size=4, max_divergence=None)
    )
    assert isinstance(total, ComposableConfig)
    assert set(total.to_dict()) == {"bgd", "rtn"}
    assert total.to_json_string()


def test_composable_config_addition() -> None:
    total = BGDConfig(block_size=4, max_divergence=None) + GPTQConfig(double_quant_bits=4)
    more = total + BGDConfig(block_size=4, max_divergence=None)
    assert set((total + more).to_dict()) == {"bgd", "gptq"}


def test_config_mapping() -> None:
    info = get_model_info(linears(), [nn.Linear])
    config = BGDConfig(block_size=10, max_divergence=None).set_local("fc1", BGDConfig(block_size=5))
    mapping = config.to_config_mapping(model_info=info)
    assert [mapping[name, LINEAR].block_size for name in ("fc1", "fc2")] == [5, 10]
    config.set_local("fc", BGDConfig(block_size=2))  # the beginning of three names
    mapping = config.to_config_mapping(model_info=info)
    assert [mapping[name, LINEAR].block_size for name in ("fc1", "fc2", "fc3")] == [2, 2, 2]


def test_dict_and_class_are_equal() -> None:
    values = {"method": "em", "linear": {"block_size": 8, "codebook_size": 16}}
    config = BGDConfig(method="em", linear=LayerConfig(block_size=8, codebook_size=16))
    assert BGDConfig.from_dict(values).to_dict() == config.to_dict()
    assert BGDConfig.from_dict(values) == config


def test_expand_config() -> None:
    first, second = BGDConfig.expand(BGDConfig(block_size=[4, 6], max_divergence=None))
    assert (first.block_size, second.block_size) == (4, 6)


def test_expand_complex_values() -> None:
    options = [LayerConfig(block_size=4), LayerConfig(block_size=8), None]
    assert [config.linear for config in BGDConfig(linear=options, max_divergence=None).expand()] == options


def test_registry() -> None:
    assert config_registry.get_cls_configs()["torch"]["bgd"] is BGDConfig
    assert "bgd" in config_registry.get_sorted_configs()["torch"]
    config_set = get_all_config_set()
    assert len(config_set) == len(config_registry.get_all_config_cls_by_fwk_name("torch"))
    ours = next(config for config in config_set if isinstance(config, BGDConfig))
    assert len(ours.expand()) == 4
    assert ours in get_all_config_set_from_config_registry("torch")
    assert BGDConfig.supported_configs[0].operators


def test_mixed_two_algorithms() -> None:
    model = linears()
    mixed = RTNConfig(white_list=["fc1"]) + BGDConfig(white_list=["fc2"], max_divergence=None)
    mapping = mixed.to_config_mapping(model_info=mixed.get_model_info(model))
    assert {name: config.name for (name, _), config in mapping.items()} == {"fc1": "rtn", "fc2": "bgd"}


def test_both_algorithms_are_applied() -> None:
    with patch.object(logger, "info") as info:
        quantize(
            linears(),
            RTNConfig(white_list=["fc1"]) + BGDConfig(white_list=["fc2"], max_divergence=None),
            run_fn=feed(VECTORS),
        )
    said = [call[0][0] for call in info.call_args_list]
    assert "Start to apply rtn on the model." in said
    assert "Start to apply bgd on the model." in said


def test_set_local_by_type() -> None:
    info = [("a", "Conv2d"), ("b", "Conv2d"), ("c", "Linear")]
    config = (
        BGDConfig(block_size=4, max_divergence=None)
        .set_local(nn.Conv2d, BGDConfig(block_size=6))
        .set_local("b", BGDConfig(block_size=9))
    )
    assert [c.block_size for c in config.to_config_mapping(model_info=info).values()] == [6, 9, 4]


def test_config_set_sampler_and_loader() -> None:
    configs = [BGDConfig(block_size=4, max_divergence=None), BGDConfig(block_size=8, max_divergence=None)]
    assert len(ConfigSet.from_fwk_configs(configs)) == 2
    assert list(SequentialSampler(configs)) == [0, 1]
    assert list(ConfigLoader(configs)) == configs


def test_loader_skips_a_config_that_was_tried() -> None:
    assert (
        len(
            list(
                ConfigLoader(
                    [BGDConfig(block_size=4, max_divergence=None), BGDConfig(block_size=[4, 8], max_divergence=None)]
                )
            )
        )
        == 2
    )


def test_json_files(tmp_path: Path) -> None:
    config = BGDConfig(linear=LayerConfig(block_size=8), overrides=(("head*", None),), seed=3, max_divergence=None)
    config.set_local("fc1", BGDConfig(dtype="fp32")).set_local(nn.Conv2d, BGDConfig(block_size=9))
    config.to_json_file(str(tmp_path / "config.json"))
    again = BGDConfig.from_json_file(str(tmp_path / "config.json"))
    assert again.to_dict() == config.to_dict()
    info = [("conv", "Conv2d"), ("fc1", "Linear"), ("fc2", "Linear")]
    assert again.to_config_mapping(model_info=info) == config.to_config_mapping(model_info=info)
    assert (
        BGDConfig.from_dict(BGDConfig(white_list=["fc1"], method="em", max_divergence=None).to_dict()).global_config
        is None
    )
