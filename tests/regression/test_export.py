"""Exported programs go in, and what comes out can be exported again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision import models

import bgd_plugin as bgd
from tests.networks import SmallResNet, em, randomized


def _round_trip(model: nn.Module, x: Tensor, path: Path, config: bgd.BGDConfig) -> bgd.results.Quantized:
    program = torch.export.export(model, (x,))
    plan = bgd.plan(program, config)
    assert {layer.name for layer in plan.layers} == {layer.name for layer in bgd.plan(model, config).layers}
    result = bgd.quantize(program, [x], config, progress=False)
    assert result.report.compressed_bytes == plan.compressed_bytes == bgd.save(result.model, path)
    again = torch.export.export(result.model, (x,)).module()
    loaded = bgd.load(path, like=program)
    with torch.no_grad():
        answer = result.model(x)
        assert torch.equal(answer, loaded(x))
        assert torch.equal(answer, again(x))
        assert torch.equal(answer, bgd.materialize(result.model)(x))
        assert not torch.equal(answer, model(x))
    return result


@pytest.mark.parametrize("method", ["em", "full"])
def test_a_round_trip(method: Any, tmp_path: Path) -> None:
    result = _round_trip(randomized(SmallResNet()), torch.randn(4, 3, 8, 8), tmp_path / "net", em(method=method))
    assert [layer.name for layer in result.report.layers] == ["conv1", "conv2", "down", "fc"]


def test_the_program_stays_as_it_was() -> None:
    x = torch.randn(4, 3, 8, 8)
    program = torch.export.export(randomized(SmallResNet()), (x,))
    with torch.no_grad():
        before = program.module()(x)
        bgd.quantize(program, [x], em(), progress=False)
        assert torch.equal(program.module()(x), before)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "vit_b_16"])
def test_round_trips_of_torchvision_models(name: str, tmp_path: Path) -> None:
    size = {"image_size": 32} if name == "vit_b_16" else {}
    model = models.get_model(name, weights=None, **size).eval()
    if name == "vit_b_16":
        nn.init.normal_(model.heads.head.weight)  # zeros at first
    _round_trip(model, torch.randn(2, 3, 32, 32), tmp_path / "net", em(em_iterations=1))
