"""Ours beside neural-compressor's RTN: in a sum, in a dict, one after the other, in `autotune`."""

from __future__ import annotations

import copy
from typing import Any

import pytest

pytest.importorskip("neural_compressor.torch.quantization", reason="neural-compressor is not installed")

import torch
from neural_compressor.common.base_config import ComposableConfig
from neural_compressor.torch.quantization import (
    AWQConfig,
    GPTQConfig,
    HQQConfig,
    RTNConfig,
    TuningConfig,
    autotune,
    quantize,
    save,
)
from torch import nn

from bgd_plugin.errors import ConfigError
from bgd_plugin_adapters.neural_compressor import BGDConfig, load, register
from tests.adapters.neural_compressor.networks import IMAGES, conv_net, feed, kinds

RUN = feed(IMAGES)
RTN, PQ = "INCWeightOnlyLinear", ("PQConv2d", "PQLinear")


def _kinds(config: Any, model: Any = None) -> dict[str, str]:
    return kinds(quantize(model or conv_net(), config, run_fn=RUN))


def test_the_later_one_in_a_sum_wins() -> None:
    found = _kinds(BGDConfig(max_divergence=None) + RTNConfig())
    assert found == {"stem": "Conv2d", "conv": PQ[0], "norm": "BatchNorm2d", "fc1": RTN, "fc2": RTN}
    with pytest.raises(ConfigError, match="no layer is left for the config of 'rtn'"):
        _kinds(RTNConfig() + BGDConfig(max_divergence=None))


@pytest.mark.parametrize("ours_first", [True, False])
def test_white_lists(ours_first: bool) -> None:
    ours, theirs = BGDConfig(white_list=["fc1"], max_divergence=None), RTNConfig(white_list=["fc2"])
    found = _kinds(ours + theirs if ours_first else theirs + ours)
    assert (found["conv"], found["fc1"], found["fc2"]) == ("Conv2d", PQ[1], RTN)


@pytest.mark.parametrize("ours_first", [True, False])
def test_a_dict_of_two_algorithms(ours_first: bool) -> None:
    parts: dict[str, Any] = {
        "bgd": {"block_size": 2},
        "rtn": {"global": {"dtype": "fp32"}, "local": {"fc2": {"bits": 4}}},
    }
    config = dict(sorted(parts.items(), reverse=not ours_first))
    if ours_first:
        found = _kinds(config)
        assert (found["conv"], found["fc2"]) == (PQ[0], RTN)
    else:
        with pytest.raises(ConfigError, match="no layer is left"):
            _kinds(config)


def test_three_parts() -> None:
    config = (
        RTNConfig(white_list=["fc2"])
        + BGDConfig(white_list=["fc1"], max_divergence=None)
        + BGDConfig(white_list=["conv"], max_divergence=None)
    )
    found = _kinds(config)
    assert (found["conv"], found["fc1"], found["fc2"]) == (*PQ, RTN)


def test_rtn_keeps_its_own_settings_in_a_sum() -> None:
    result: Any = quantize(
        conv_net(),
        RTNConfig(bits=8, white_list=["fc2"]) + BGDConfig(white_list=["fc1"], max_divergence=None),
        run_fn=RUN,
    )
    assert result.fc2.bits == 8


def test_an_algorithm_that_was_not_tried_is_refused() -> None:
    with pytest.raises(ConfigError, match="cannot be added to awq, only to rtn"):
        _kinds(AWQConfig(white_list=["fc1"]) + BGDConfig(white_list=["fc2"], max_divergence=None))


def test_sums_without_ours_are_left_to_neural_compressor() -> None:
    register()
    mixed = RTNConfig(white_list=["fc1"]) + GPTQConfig(white_list=["fc2"])
    mapping = mixed.to_config_mapping(model_info=mixed.get_model_info(conv_net()))
    assert {name: config.name for (name, _), config in mapping.items()} == {"fc1": "rtn", "fc2": "gptq"}
    single = ComposableConfig.from_dict({"rtn": {"bits": 8}}, {"rtn": RTNConfig})
    assert isinstance(single, RTNConfig) and single.bits == 8


@pytest.mark.parametrize("ours_first", [True, False])
def test_one_after_the_other(ours_first: bool, tmp_path: Any) -> None:
    ours, theirs = BGDConfig(white_list=["conv"], max_divergence=None), RTNConfig()
    model: Any = conv_net()
    for config in (ours, theirs) if ours_first else (theirs, ours):
        model = quantize(model, config, run_fn=RUN)
    found = kinds(model)
    assert (found["conv"], found["fc1"], found["fc2"]) == (PQ[0], RTN, RTN)
    assert {config.name for config in model.qconfig.values()} == {"bgd", "rtn"}
    save(model, str(tmp_path))
    assert torch.equal(load(str(tmp_path), conv_net())(IMAGES[0]), model(IMAGES[0]))


def _agreement(model: nn.Module) -> float:
    """How often a network answers as the float one does; a metric as a user would have it."""
    target = conv_net()
    with torch.no_grad():
        same = [(model(x).argmax(1) == target(x).argmax(1)).float().mean() for x in IMAGES]
    return float(torch.stack(same).mean())


def test_autotune_takes_the_first_that_is_good_enough(tmp_path: Any) -> None:
    tried: list[float] = []

    def eval_fn(model: nn.Module) -> float:
        tried.append(_agreement(model))
        return tried[-1]

    ours = BGDConfig(
        method="em", batchnorm="keep", conv=None, codebook_size=[2, 4], block_size=[32, 16], max_divergence=None
    )
    tuning = TuningConfig(config_set=[ours, RTNConfig(bits=2)], tolerable_loss=-1.0)  # never good enough: all are tried
    best: Any = autotune(conv_net(), tuning, eval_fn, run_fn=RUN)
    assert len(tried) == 6
    assert _agreement(best) == max(tried[1:])
    best.save(str(tmp_path))
    assert torch.equal(load(str(tmp_path), conv_net())(IMAGES[0]), best(IMAGES[0]))


def test_autotune_stops_where_the_loss_is_tolerable() -> None:
    tuning = TuningConfig(
        config_set=[BGDConfig(conv=None, block_size=[32, 1], max_divergence=None), RTNConfig(bits=8)],
        tolerable_loss=0.2,
    )
    trials: list[nn.Module] = []
    best: Any = autotune(conv_net(), tuning, lambda m: trials.append(m) or _agreement(m), run_fn=RUN)
    assert trials[-1] is best
    assert _agreement(best) >= 0.8


def _accounted(model: Any, report: Any) -> set[str]:
    """Layers that are product-quantized, quantized by others, or named in the report as float; each must be one."""
    found = kinds(model)
    ours = {name for name, kind in found.items() if kind.startswith("PQ")}
    theirs = {name for name, m in model.named_modules() if type(m).__module__.startswith("neural_compressor")}
    return ours | theirs | {skipped.name for skipped in report.skipped}


@pytest.mark.parametrize(
    ("theirs", "ours_first"),
    [
        (RTNConfig(), True),
        (RTNConfig(), False),
        (RTNConfig(dtype="nf4"), True),
        (RTNConfig(dtype="nf4"), False),
        (HQQConfig(), True),  # what it leaves runs in half precision alone, so that it cannot come before calibration
    ],
)
def test_every_float_layer_is_accounted_for_beside_their_algorithms(theirs: Any, ours_first: bool) -> None:
    ours = BGDConfig(white_list=["conv"], max_divergence=None)
    model: Any = conv_net()
    for config in (ours, theirs) if ours_first else (theirs, ours):
        model = quantize(model, config, run_fn=RUN)
    layers = {name for name, m in conv_net().named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    assert layers <= _accounted(model, model.report)
    assert kinds(model)["conv"] == PQ[0]
    assert isinstance(theirs, HQQConfig) or bool(model(IMAGES[0]).isfinite().all())


def test_lora_is_merged_before_or_quantized_along() -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    settings = peft.LoraConfig(r=4, target_modules=["fc1", "fc2"], init_lora_weights=False)
    with_lora = peft.get_peft_model(conv_net(), settings).eval()
    merged = quantize(copy.deepcopy(with_lora).merge_and_unload(), BGDConfig(max_divergence=None), run_fn=RUN)
    assert kinds(merged)["fc1"] == "PQLinear"
    along = quantize(
        with_lora, BGDConfig(white_list=["base_model.model.fc1.base_layer"], max_divergence=None), run_fn=RUN
    )
    assert kinds(along)["base_model.model.fc1.base_layer"] == "PQLinear"
    assert kinds(along)["base_model.model.fc1.lora_A.default"] == "Linear"
    assert torch.allclose(along(IMAGES[0]), with_lora(IMAGES[0]), atol=0.5)
