"""Through every framework the codes and the accuracy are those of the core, on trained networks."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import bgd_plugin as bgd
from bgd_plugin import BGDConfig, FinetuningConfig
from bgd_plugin.errors import ConfigError
from tests.adapters.digits import DigitsResNet, accuracy, digits, trained_on_digits
from tests.adapters.entrances import ENTRANCES, same_state

SETTINGS = {
    "default": BGDConfig(max_divergence=None),
    "em": BGDConfig.paper(
        "small", batchnorm="matched", distillation=None, finetuning=FinetuningConfig(steps=10, learning_rate=0.001)
    ),
    "budget": BGDConfig(target_ratio=5.5, method="em", freeze_norms=True, codebook_storage="float16"),
}


def _their_resnet() -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16, 32, 64], depths=[2, 2, 2, 2], layer_type="basic", num_labels=10
    )
    return ResNetForImageClassification(config)


def _their_vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=8,
        patch_size=2,
        num_labels=10,
    )
    return ViTForImageClassification(config)


CASES: list[tuple[str, Callable[[], nn.Module]]] = [
    ("neural_compressor", DigitsResNet),
    ("modelopt", DigitsResNet),
    ("torchao", DigitsResNet),
    ("transformers", _their_resnet),
    ("transformers", _their_vit),
]


def _batches(make: Callable[[], nn.Module]) -> list[Any]:
    images = digits()[0][:300].split(100)
    return list(images) if make is DigitsResNet else [{"pixel_values": batch} for batch in images]


@functools.cache
def _by_the_core(make: Callable[[], nn.Module], settings: str) -> bgd.results.Quantized:
    return bgd.quantize(trained_on_digits(make), _batches(make), SETTINGS[settings], progress=False)


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize(("name", "make"), CASES, ids=[f"{name}-{make.__name__.strip('_')}" for name, make in CASES])
def test_same_codes_and_accuracy_as_the_core(name: str, make: Callable[[], nn.Module], settings: str) -> None:
    entrance = ENTRANCES[name]
    if entrance.missing:
        pytest.skip(entrance.missing)
    expected = _by_the_core(make, settings)
    result = entrance.quantize(trained_on_digits(make), _batches(make), SETTINGS[settings])
    assert sum(key.endswith(".codes") for key in result.state_dict()) == len(expected.report.layers) > 3
    assert same_state(result, expected.model)
    assert accuracy(result) == accuracy(expected.model) > 0.5


def _pruned(*, permanent: bool) -> nn.Module:
    model = trained_on_digits(DigitsResNet)
    for path in ("layer3.0.conv2", "layer4.0.conv1"):
        layer = model.get_submodule(path)
        prune.l1_unstructured(layer, "weight", 0.5)
        if permanent:
            prune.remove(layer, "weight")
    return model


@pytest.mark.parametrize("name", ["neural_compressor", "modelopt", "torchao"])
def test_zeros_of_a_pruned_network_are_preserved_as_by_the_core(name: str) -> None:
    entrance = ENTRANCES[name]
    if entrance.missing:
        pytest.skip(entrance.missing)
    config, data = BGDConfig(method="em", preserve_zeros=True, max_divergence=None), _batches(DigitsResNet)
    expected = bgd.quantize(_pruned(permanent=True), data, config, progress=False)
    result = entrance.quantize(_pruned(permanent=True), data, config)
    assert same_state(result, expected.model)
    kept: Any = result.get_submodule("layer4.0.conv1").weight
    assert torch.equal(kept == 0, _pruned(permanent=True).get_submodule("layer4.0.conv1").weight == 0)
    if name == "neural_compressor":  # which gives a new network; the others would have to change the one under masks
        assert same_state(entrance.quantize(_pruned(permanent=False), data, config), expected.model)
    else:
        with pytest.raises(ConfigError, match=r"has pruning masks: make them permanent first .*prune\.remove"):
            entrance.quantize(_pruned(permanent=False), data, config)
